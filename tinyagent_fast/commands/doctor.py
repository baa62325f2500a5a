"""`doctor`: what this machine has and lacks for a config, with the command that repairs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING

from tinyagent_fast.commands.config_flags import parser_of, resolve_config
from tinyagent_fast.presets import preset_of_card

if TYPE_CHECKING:
    from tinyagent_fast.config import Config
    from tinyagent_fast.doctor import Finding, Machine

_FLAGS_HELP = "--online also asks the hub, --json prints JSON."
_STYLES = {"ok": "green", "warning": "yellow", "failure": "bold red"}


def run(arguments: Sequence[str]) -> int:
    """Check this machine; exit code 1 for a failure, which would stop training or break it."""
    parser = parser_of("doctor")
    parser.add_argument("--online", action="store_true")
    parser.add_argument("--json", action="store_true")
    flags, rest = parser.parse_known_args(list(arguments))
    from rich.console import Console

    from tinyagent_fast.display import Display

    @cache  # once, and not for the help
    def machine() -> Machine:
        from tinyagent_fast.doctor import read_machine

        with Display(Console(stderr=True)).working("looking at this machine"):
            return read_machine()

    automatic = False

    def preset_of_this_machine() -> str:
        nonlocal automatic
        automatic = True
        return _preset(machine())

    config = resolve_config("doctor", rest, preset_of_this_machine, more_flags=_FLAGS_HELP)
    from tinyagent_fast.doctor import find_out

    found = find_out(config, machine(), automatic=automatic, quick=False, online=flags.online)
    if flags.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        _show(found, config, online=flags.online)
    return 1 if any(finding.status == "failure" for finding in found) else 0


def _preset(machine: Machine) -> str:
    """Choose the preset that training would choose."""
    gpu = machine.gpu
    return "cpu" if gpu is None else preset_of_card(gpu.total_gib, gpu.capability[0])


def _show(found: Sequence[Finding], config: Config, *, online: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    title = f"preset {config.preset}: {config.model.base} in {config.model.weights}"
    console.print(title, markup=False, soft_wrap=True)
    for finding in found:
        line = Text(f"{finding.status:<7} {finding.name:<10} {finding.text}")
        line.stylize(_STYLES[finding.status], end=len(finding.status))
        console.print(line, soft_wrap=True)
        if finding.fix:
            # One unbroken line, so that a command can be copied.
            console.print(f"{'':19} fix: {finding.fix}", markup=False, soft_wrap=True)
    counts = {status: sum(f.status == status for f in found) for status in _STYLES}
    summary = f"{counts['ok']} ok, {counts['warning']} warning(s), {counts['failure']} failure(s)"
    console.print(summary + ("" if online else "; the hub was not asked (--online asks it)"))
