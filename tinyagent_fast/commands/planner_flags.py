"""Flags that `chat`, `serve` and `agent` share: which model plans."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tinyagent_fast.commands.config_flags import parse_flags
from tinyagent_fast.config import GrammarUse
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.inference import planner

Flags = TypeVar("Flags", bound="PlannerFlags")


def read_flags(kind: type[Flags], command: str, arguments: Sequence[str], asks: str) -> Flags:
    """Read the flags of a command, and refuse a request that a shell has taken apart.

    Args:
        kind: The flags; a field `request` or `once` has the request's first word.
        command: The command's name.
        arguments: What is typed behind it.
        asks: The beginning of a command that answers one request, as far as the request.

    Raises:
        ConfigError: Words stand without a flag, as those of a request that is not in quotes do.
        SystemExit: A flag is wrong (2) or help was asked for (0).
    """
    flags, rest = parse_flags(kind, command, arguments)
    if rest:
        first = getattr(flags, "request", getattr(flags, "once", None))
        words = " ".join(rest if first is None else [first, *rest])
        raise ConfigError(
            f"the words {words}",
            "they stand without a flag, or a request is not in quotes",
            f"for a request: tinyagent-fast {asks} {shlex.quote(words)}; "
            "a run or model is named by --run or --model",
        )
    return flags


@dataclass(frozen=True, kw_only=True)
class PlannerFlags:
    """Flags that say which model plans, and with which system text."""

    run: str | None = None
    """Run to try: its name, its folder, or `latest`, which is meant where neither this nor
    `--model` is given. For a `--model` outside any run it gives system text and tools."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    model: Path | None = None
    """A .gguf file, a merged folder or an adapter instead of the run's own adapter."""
    system: str = "auto"
    """`nearest` takes for each request the system text of the run's most similar test query,
    `first` that of the first one for all requests; `auto` lets the tool retriever of the run or
    model write it, takes the nearest where there is none and the test file is there, and none
    elsewhere; anything else is a text file."""
    max_new_tokens: int | None = None
    """Tokens after which a plan is broken off; None takes the run's, or 300."""
    threads: int | None = None
    """CPU threads; None leaves it to torch or llama.cpp."""
    grammar: GrammarUse = "on"
    """`on` lets the model write nothing but plans of the tools that its prompt lists; `off` lets
    it write freely."""

    def load(self, batch: int = 1) -> planner.Planner:
        """Open the planner that is meant; `batch` requests can be answered together."""
        from rich.console import Console

        from tinyagent_fast.display import Display
        from tinyagent_fast.interrupts import raise_swallowed_interrupt

        with Display(Console(stderr=True)).working("loading the planner"):
            opened = planner.load(
                self.model,
                run=self.run,
                runs=self.runs,
                system=self.system,
                max_new_tokens=self.max_new_tokens,
                threads=self.threads,
                batch=batch,
                grammar=self.grammar,
            )
        raise_swallowed_interrupt()
        return opened
