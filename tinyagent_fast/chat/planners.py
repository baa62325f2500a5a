"""Open a planner by the name of a run, a folder or a GGUF file, and ask it for plans.

The terminal (`terminal`, command `chat`) and the page (`web`, command `serve`) are built on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.chat.prompts import (
    ChosenPrompt,
    PromptSource,
    describe_tools,
    load_prompts,
)
from tinyagent_fast.chat.sources import (
    LoadingPlan,
    PlannerChoice,
    PlannerSource,
    find_source,
    loading_plan,
)
from tinyagent_fast.chat.writers import (
    LlamaCppWriter,
    Pieces,
    TransformersWriter,
    Writer,
    WrittenReason,
)
from tinyagent_fast.config import Config
from tinyagent_fast.plans.drawing import PlanDrawing, draw_plan
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.templates import STOP_STRINGS

if TYPE_CHECKING:
    from tinyagent_fast.models.loading import LoadedModel

_CONTEXT_TOKENS = 8192
_MAX_NEW_TOKENS = 300


@dataclass(frozen=True, kw_only=True)
class PlanEnding:
    """How a plan ended."""

    stop_reason: WrittenReason
    new_tokens: int
    prompt_tokens: int
    kept_tokens: int
    """Tokens of the prompt that were computed for an earlier request."""
    seconds: float

    def sentence(self) -> str:
        """Say it in one line.

        Returns:
            For example `44 tokens in 0.9 s, prompt of 61 tokens (52 kept)`.
        """
        cut = "; broken off by the limit, see --max-new-tokens"
        return (
            f"{self.new_tokens} tokens in {self.seconds:.1f} s, prompt of {self.prompt_tokens} "
            f"tokens ({self.kept_tokens} kept){cut if self.stop_reason == 'length' else ''}"
        )


class PlanStream:
    """One plan being written: iterate over its pieces once, then ask for the rest."""

    def __init__(self, planner: Planner, prompt: ChosenPrompt) -> None:
        """Prepare; the model starts with the first piece.

        Args:
            planner: Writes it.
            prompt: What it is asked.
        """
        self.prompt = prompt
        self.text = ""
        """What has been written so far."""
        self.ending: PlanEnding | None = None
        """None until the last piece has been taken."""
        self._planner = planner

    def __iter__(self) -> Generator[str, None, None]:
        """Write: pieces of text in order, and empty ones while the prompt is being read.

        Close the generator when stopping early: other plans wait for that.
        """
        # Two plans at once would share one cache.
        with self._planner.turn:
            started = time.perf_counter()
            pieces = self._planner.writer.write(self.prompt.system, self.prompt.user)
            try:
                yield from self._take(pieces, started)
            finally:
                pieces.close()

    def _take(self, pieces: Pieces, started: float) -> Generator[str, None, None]:
        while not self._planner.closed:
            try:
                piece = next(pieces)
            except StopIteration as end:
                written = end.value
                self.ending = PlanEnding(
                    stop_reason=written.stop_reason,
                    new_tokens=written.new_tokens,
                    prompt_tokens=written.prompt_tokens,
                    kept_tokens=written.kept_tokens,
                    seconds=round(time.perf_counter() - started, 3),
                )
                return
            self.text += piece
            yield piece

    def view(self) -> PlanDrawing:
        """Read what has been written so far.

        Returns:
            The plan ready to be drawn.
        """
        return draw_plan(self.text, self._planner.tools, finished=self.ending is not None)


class Planner:
    """A model with all it needs to answer requests with plans, one at a time."""

    def __init__(
        self,
        writer: Writer,
        prompts: PromptSource,
        *,
        facts: Mapping[str, str],
        tools: Mapping[str, Tool] | None = None,
    ) -> None:
        """Put it together; `open_planner` does this.

        Args:
            writer: Writes answers.
            prompts: Chooses system texts.
            facts: What a user should know, by short names.
            tools: Tools that plans may call; none stands for TinyAgent's own.
        """
        self.writer = writer
        self.prompts = prompts
        self.facts = facts
        self.tools = tools
        self.turn = threading.Lock()
        """Held while a plan is being written."""
        self.closed = False

    def stream(self, request: str, system: str | None = None) -> PlanStream:
        """Start a plan.

        Args:
            request: What the user typed.
            system: A system text for this request alone.

        Returns:
            The plan; nothing is computed before it is iterated over.
        """
        return PlanStream(self, self.prompts.choose(request, system))

    def close(self) -> None:
        """Let a plan under way, perhaps in another thread, end with its next piece."""
        self.closed = True
        if self.turn.acquire(timeout=5):
            self.turn.release()


@contextmanager
def open_planner(choice: PlannerChoice) -> Iterator[Planner]:
    """Load a model and keep it for as long as the block runs.

    Args:
        choice: Which model, and with which system text.

    Yields:
        The planner.

    Raises:
        ConfigError: There is no such run, model or system text.
        ModelError: The model cannot be loaded.
    """
    source = find_source(choice)
    prompts = load_prompts(choice.system, source.run)
    config = source.run.config() if source.run else Config()
    tools = _tools(config)
    new_tokens = choice.max_new_tokens or (
        config.eval.max_new_tokens if source.run else _MAX_NEW_TOKENS
    )
    facts = {"model": _shown(source.path), **_prompt_facts(prompts, tools)}
    with _writer(source, config, choice, new_tokens) as (writer, engine):
        facts["engine"] = engine
        planner = Planner(writer, prompts, facts=facts, tools=tools)
        try:
            yield planner
        finally:
            planner.close()


def _shown(path: Path) -> str:
    """Name a path from here where it lies here."""
    here = Path.cwd()
    whole = path.resolve()
    return str(whole.relative_to(here) if whole.is_relative_to(here) else path)


def _prompt_facts(prompts: PromptSource, tools: Mapping[str, Tool] | None) -> dict[str, str]:
    facts = {"system text": prompts.source}
    if prompts.system is not None:
        facts["it names"] = (
            f"{describe_tools(prompts.system, tools)}; for others: --system nearest or FILE"
        )
    return facts


def _tools(config: Config) -> Mapping[str, Tool] | None:
    if config.data.catalogue is None:
        return None
    from tinyagent_fast.data.generation.catalogue import load_catalogue

    return {tool.name: tool.plan_tool() for tool in load_catalogue(config.data.catalogue).tools}


@contextmanager
def _writer(
    source: PlannerSource, config: Config, choice: PlannerChoice, new_tokens: int
) -> Iterator[tuple[Writer, str]]:
    stop = STOP_STRINGS["plan"]
    if source.kind == "gguf":
        from tinyagent_fast.inference.llama_cpp import LlamaCppSettings, llama_server

        settings = LlamaCppSettings(
            model=source.path,
            slots=1,
            context_tokens_per_slot=_CONTEXT_TOKENS,
            threads=choice.threads,
        )
        with llama_server(settings) as server:
            engine = f"llama.cpp, context of {server.context_tokens} tokens"
            yield LlamaCppWriter(server, stop=stop, max_new_tokens=new_tokens), engine
        return
    loaded = _load(loading_plan(source, config), choice.threads)
    notes = "".join(f"; {note}" for note in loaded.notes)
    engine = f"transformers on {loaded.device}, {loaded.compute_dtype}{notes}"
    yield TransformersWriter(loaded, stop=stop, max_new_tokens=new_tokens), engine


def _load(plan: LoadingPlan, threads: int | None) -> LoadedModel:
    from tinyagent_fast.models.libraries import prepare_libraries

    prepare_libraries(plan.config.model)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tinyagent_fast.models.loading import load_for_generation

    disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    return load_for_generation(plan.config, plan.base, plan.adapter)
