"""Configs as strict YAML: every unknown key is an error with the nearest known name.

The resolved config is written into the run's folder, and `read_config(text_of(config)) == config`.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.config import Config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.strict_yaml import load_yaml

_LINE_MARKS = re.compile("[\x85\u2028\u2029]")


def to_mapping(config: Any) -> dict[str, Any]:
    """Turn a config into plain values for YAML.

    Args:
        config: A config dataclass.

    Returns:
        Nested dicts of strings, numbers, booleans and None.
    """
    plain: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            plain[item.name] = to_mapping(value)
        else:
            plain[item.name] = str(value) if isinstance(value, Path) else value
    return plain


def text_of(config: Config) -> str:
    """Write a config as YAML.

    Args:
        config: The config.

    Returns:
        YAML that `read_config` turns back into an equal config.
    """
    import yaml

    plain = to_mapping(config)
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if _LINE_MARKS.search(text):
        # PyYAML writes these as they are, and reads them as line breaks.
        text = yaml.safe_dump(plain, sort_keys=False)
    return text


def read_config(text: str, base: Config | None = None, source: str = "config") -> Config:
    """Read YAML over a base config; every unknown key and wrong type is an error.

    Args:
        text: YAML, a mapping of the sections of `Config`; sections and keys may be left out.
        base: What holds for the keys left out.
        source: Named in messages.

    Returns:
        The new config.

    Raises:
        ConfigError: Lists all problems, with the nearest known name for each unknown key.
    """
    try:
        raw = load_yaml(text)
    except ValueError as error:
        raise ConfigError(source, f"it is no valid YAML: {error}", "correct the file") from error
    problems: list[str] = []
    config: Config = _merge(base or Config(), {} if raw is None else raw, "", problems)
    if problems:
        raise ConfigError(
            f"{source} has {len(problems)} problem(s)",
            "\n       ".join(problems),
            "`tinyagent-fast train --help` lists every setting",
        )
    return config


def _merge(base: Any, raw: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        problems.append(f"{path.rstrip('.') or 'the top level'}: must be a mapping, got {raw!r}")
        return base
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    seen: set[str] = set()
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(hints)}"
            problems.append(f"{path}{key}: unknown setting{hint}")
        elif name in seen:
            problems.append(f"{path}{key}: given twice, with - and with _")
        elif is_dataclass(hints[name]):
            changes[name] = _merge(getattr(base, name), value, f"{path}{name}.", problems)
        else:
            try:
                changes[name] = _convert(value, hints[name])
            except (TypeError, ValueError):
                problems.append(f"{path}{key}: {value!r} is not {_described(hints[name])}")
        seen.add(name)
    return replace(base, **changes)


def _described(hint: Any) -> str:
    """Name a field's type as someone who writes YAML knows it."""
    if typing.get_origin(hint) is Literal:
        names = typing.get_args(hint)
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = typing.get_args(hint)
        return " or ".join("null" if a is type(None) else _described(a) for a in kinds)
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text (put it in quotes)",
        Path: "a path",
    }[hint]


def _convert(value: Any, hint: Any) -> Any:
    """Convert a YAML value to a field's type; `2e-4` is a string to YAML 1.1."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        # YAML 1.1 reads a bare true as a boolean, which here is one of the choices' names.
        text = str(value).lower() if isinstance(value, bool) else value
        if text not in typing.get_args(hint):
            raise ValueError("none of the choices")
        return text
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(hint):
            return None
        return _convert_to_any(value, [a for a in typing.get_args(hint) if a is not type(None)])
    if isinstance(value, bool) and hint is not bool:
        raise TypeError("a truth value is no number")
    if hint is float and isinstance(value, int | float | str):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError("no limit holds for it")
        return number
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, int, str) and isinstance(value, hint):
        return value
    raise TypeError("another type")


def _convert_to_any(value: Any, kinds: list[Any]) -> Any:
    """Convert to the first of several types that takes the value."""
    for kind in kinds[:-1]:
        try:
            return _convert(value, kind)
        except (TypeError, ValueError):
            continue
    return _convert(value, kinds[-1])
