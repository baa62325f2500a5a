"""Preset, config file and flags to one resolved config, shared by the commands that need one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tinyagent_fast.config import Config, check_config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.presets import PRESETS, load_config, preset_config

Flags = TypeVar("Flags")


def parser_of(command: str) -> argparse.ArgumentParser:
    """Make a parser of flags that are taken out before the config's are read."""
    name = f"tinyagent-fast {command}"
    return argparse.ArgumentParser(prog=name, add_help=False, allow_abbrev=False)


def parse_flags(
    kind: type[Flags], command: str, arguments: Sequence[str], **how: Any
) -> tuple[Flags, list[str]]:
    """Parse flags, and give the words that stand without one too; `how` is for tyro.

    Raises:
        SystemExit: A flag is wrong (2) or help was asked for (0).
    """
    import tyro

    def parse(**more: Any) -> Any:
        name = f"tinyagent-fast {command}"
        return tyro.cli(kind, args=list(arguments), prog=name, **how, **more)

    flags, words = parse(return_unknown_args=True)
    if any(word.startswith("-") for word in words):
        parse()  # says which flags are meant, and ends
    return flags, words


def resolve_config(
    command: str,
    arguments: Sequence[str],
    default_preset: Callable[[], str],
    *,
    start: Config | None = None,
    more_flags: str = "",
) -> Config:
    """Resolve a config: defaults < preset < `--config` file < flags.

    `default_preset` is asked where neither a flag nor the file names one; `start` takes the
    preset's place, for a run that is resumed; `more_flags` tells in the help of flags that the
    command has taken out of `arguments`.

    Raises:
        ConfigError: A preset, key or value is wrong.
        SystemExit: A flag is wrong (2) or help was asked for (0).
    """
    import tyro

    first = parser_of(command)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(list(arguments))
    named = None if known.preset == "auto" else known.preset
    if start is not None and (named or known.config):
        raise ConfigError(
            "--resume together with --preset or --config",
            "a resumed run has its config already",
            "leave them out",
        )
    # Help comes at once, without a look at the machine.
    asks_help = "-h" in rest or "--help" in rest
    default: Callable[[], str] = (lambda: "cpu") if asks_help else default_preset
    if not asks_help:  # before the look at the machine too
        _, words = parse_flags(Config, command, rest, default=preset_config(named or "cpu"))
        if words:
            raise _is_no_flag(command, words[0])
    if known.config is not None:
        start = load_config(known.config, preset=named, default=default)
    elif start is None:
        start = preset_config(named or default())
    config = tyro.cli(
        Config,
        default=start,
        args=rest,
        prog=f"tinyagent-fast {command}",
        description=_description(more_flags),
    )
    check_config(config)
    return config


def _is_no_flag(command: str, word: str) -> ConfigError:
    """Say which flag a word was meant for."""
    if word in PRESETS:
        fix = f"a preset is named by --preset: tinyagent-fast {command} --preset {word}"
    elif Path(word).suffix in (".yaml", ".yml"):
        fix = f"a config is named by --config: tinyagent-fast {command} --config {word}"
    else:
        fix = f"name what it is: tinyagent-fast {command} --help lists the flags"
    return ConfigError(f"tinyagent-fast {command} {word}", "that word stands without a flag", fix)


def _description(more_flags: str) -> str:
    first_lines = {name: (make.__doc__ or "").splitlines()[0] for name, make in PRESETS.items()}
    presets = ", ".join(f"{name} ({line.rstrip('.')})" for name, line in first_lines.items())
    return (
        "Flags override --config FILE, which overrides --preset NAME. "
        f"Presets: {presets}.{more_flags and ' '}{more_flags}"
    )
