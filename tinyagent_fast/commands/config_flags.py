"""Preset, config file and flags to one resolved config, shared by the commands that need one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tinyagent_fast.config import Config, check_config
from tinyagent_fast.config_file import read_config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.presets import PRESETS, preset_config
from tinyagent_fast.strict_yaml import load_yaml


def resolve_config(
    command: str,
    arguments: Sequence[str],
    default_preset: Callable[[], str],
    *,
    start: Config | None = None,
    more_flags: str = "",
) -> Config:
    """Resolve a config: defaults < preset < `--config` file < flags.

    Args:
        command: Name of the command, for its help.
        arguments: The command's flags.
        default_preset: Chooses the preset when neither a flag nor the file names one.
        start: Takes the preset's place, for a run that is resumed.
        more_flags: Flags that the command itself has taken out of `arguments`, for its help.

    Returns:
        The checked config.

    Raises:
        ConfigError: A preset, key or value is wrong.
        SystemExit: A flag is wrong (2) or help was asked for (0).
    """
    import tyro

    first = argparse.ArgumentParser(
        prog=f"tinyagent-fast {command}", add_help=False, allow_abbrev=False
    )
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
    help_asked = "-h" in rest or "--help" in rest
    text = None if known.config is None else _read(known.config)
    if start is None:
        named = named or _preset_in(text)
        start = preset_config(named or ("cpu" if help_asked else default_preset()))
    config = start
    if text is not None:
        # A file that was written for another preset must not rename the one that is taken.
        config = replace(read_config(text, start, str(known.config)), preset=start.preset)
    config = tyro.cli(
        Config,
        default=config,
        args=rest,
        prog=f"tinyagent-fast {command}",
        description=_description(more_flags),
    )
    check_config(config)
    return config


def _description(more_flags: str) -> str:
    presets = ", ".join(f"{name} ({_first_line(name)})" for name in PRESETS)
    return (
        "Flags override --config FILE, which overrides --preset NAME. "
        f"Presets: {presets}.{more_flags and ' '}{more_flags}"
    )


def _preset_in(text: str | None) -> str | None:
    """Find the preset that a config file is written for; other mistakes in it are found later."""
    if text is None:
        return None
    try:
        raw = load_yaml(text)
    except ValueError:
        return None
    preset = raw.get("preset") if isinstance(raw, dict) else None
    return preset if isinstance(preset, str) else None


def _first_line(preset: str) -> str:
    return (PRESETS[preset].__doc__ or "").splitlines()[0].rstrip(".")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}", f"it cannot be read: {error}", "check it") from error
