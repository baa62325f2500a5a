"""Flags that `chat`, `serve` and `agent` share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.agent.session import AgentSpec
from tinyagent_fast.config import GrammarUse
from tinyagent_fast.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tinyagent_fast.agent.session import OpenAgent
    from tinyagent_fast.agent.tools import RunnableTool
    from tinyagent_fast.inference.planner import Planner


def refuse_loose_words(words: Sequence[str], most: int, command: str) -> None:
    """Refuse a request that a shell has taken apart, since it was not in quotes.

    Args:
        words: What is typed behind `command`.
        most: Words without a flag that may stand there.
        command: The beginning of the command, as far as the request.

    Raises:
        ConfigError: There are more words than that.
    """
    loose = list(takewhile(lambda word: not word.startswith("-"), words))
    if len(loose) > most:
        request = " ".join(loose)
        raise ConfigError(
            f"the words {request}",
            "they stand without a flag, or a request is not in quotes",
            f"for a request: tinyagent-fast {command} {shlex.quote(request)}; "
            "a run or model is named by --run or --model",
        )


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

    def load(self, batch: int = 1) -> Planner:
        """Open the planner that is meant; `batch` requests can be answered together."""
        from rich.console import Console

        from tinyagent_fast.display import Display
        from tinyagent_fast.interrupts import raise_swallowed_interrupt

        with Display(Console(stderr=True)).working("loading the planner"):
            from tinyagent_fast.inference import planner

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


@dataclass(frozen=True, kw_only=True)
class AgentFlags(PlannerFlags, AgentSpec):
    """Flags that also say which tools plans are carried out with."""

    yes: bool = False
    """Do what changes something without asking; a sandbox never asks."""

    def load_tools(self) -> Mapping[str, RunnableTool] | None:
        """Load the Python file with tools, if one is named, before the model, which takes long.

        Raises:
            ConfigError: The model plans with none of them.
            DataError: The file gives no tools.
        """
        if self.tools is None:
            return None
        from tinyagent_fast.agent.session import refuse_unplanned
        from tinyagent_fast.agent.tools import tools_of_module
        from tinyagent_fast.inference.planner import find_source

        tools = tools_of_module(self.tools)
        if self.grammar == "on":
            source = find_source(self.model, run=self.run, runs=self.runs)
            refuse_unplanned(source.tools(), tools)
        return tools

    def open_agent(
        self, planner: Planner, tools: Mapping[str, RunnableTool] | None
    ) -> AbstractAsyncContextManager[OpenAgent]:
        """Give the agent that is meant, to be opened in the loop that it will run in."""
        from tinyagent_fast.agent.session import open_agent

        return open_agent(planner, self, tools)
