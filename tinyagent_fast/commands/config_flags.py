"""Preset, config file and flags to one resolved config, shared by the commands that need one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tinyagent_fast.config import Config, check_config
from tinyagent_fast.config_file import read_config
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.presets import PRESETS, preset_config


def resolve_config(
    command: str, arguments: Sequence[str], default_preset: str, start: Config | None = None
) -> Config:
    """Resolve a config: defaults < preset < `--config` file < flags.

    Args:
        command: Name of the command, for its help.
        arguments: The command's flags.
        default_preset: The preset when none is named.
        start: Takes the preset's place, for a run that is resumed.

    Returns:
        The checked config.

    Raises:
        ConfigError: A preset, key or value is wrong.
        SystemExit: A flag is wrong (2) or help was asked for (0).
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(list(arguments))
    if start is not None and (known.preset or known.config):
        raise ConfigError(
            "--resume together with --preset or --config",
            "a resumed run has its config already",
            "leave them out",
        )
    config = start or preset_config(known.preset or default_preset)
    if known.config is not None:
        config = read_config(_read(known.config), config, str(known.config))
    names = ", ".join(f"{name} ({_first_line(name)})" for name in PRESETS)
    config = tyro.cli(
        Config,
        default=config,
        args=rest,
        prog=f"tinyagent-fast {command}",
        description="Flags override --config FILE, which overrides --preset NAME. "
        f"Presets: {names}.",
    )
    check_config(config)
    return config


def _first_line(preset: str) -> str:
    return (PRESETS[preset].__doc__ or "").splitlines()[0].rstrip(".")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}", f"it cannot be read: {error}", "check it") from error
