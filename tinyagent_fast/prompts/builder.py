"""A request becomes the prompt that a planner is asked, and a prompt is read back into its parts.

Published data carries tools and examples in its system texts, so a planner is only tried fairly
with such a text: one that the run's tool retriever writes for the request, one of the run's test
queries, or a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.config import typed
from tinyagent_fast.errors import ConfigError, count_of, plainly
from tinyagent_fast.inference.engine import Prompt
from tinyagent_fast.plans.gbnf import plan_grammar
from tinyagent_fast.plans.tools import TINYAGENT, Tool, tools_by_name
from tinyagent_fast.prompts.system_text import parse, render
from tinyagent_fast.prompts.templates import render_prompt
from tinyagent_fast.runs import Run, read_text

if TYPE_CHECKING:
    from tinyagent_fast.data.schema import Example
    from tinyagent_fast.prompts.retrieval import ToolRetriever
    from tinyagent_fast.prompts.tokens import PromptTokenizer

_WORD = re.compile(r"\w+")
_LISTED_TOOLS = 6
_DEFAULT_QUESTION = ("Question: ", "")


@dataclass(frozen=True)
class ChosenText:
    """A system text, or None for prompts without one, and where it comes from in words."""

    text: str | None
    source: str


Retriever = Callable[[str], ChosenText]
"""Chooses the system text, and with it the tools that it names, by the request."""


@dataclass(frozen=True)
class BuiltPrompt:
    """A prompt, and where its system text comes from."""

    prompt: Prompt
    source: str


@dataclass(frozen=True, kw_only=True)
class PromptParts:
    """What a prompt says."""

    system: str | None
    request: str
    """The user text without what stands around every request of the run's data."""
    tools: tuple[str, ...]
    """Names of the tools that the system text has, in the order of the catalogue."""


@dataclass(frozen=True, kw_only=True)
class PromptBuilder:
    """Makes prompts of requests, and reads them."""

    system: ChosenText
    """For every request; with `retrieve` only its source counts, which says how that chooses."""
    retrieve: Retriever | None = None
    """Chooses the system text by the request."""
    question: tuple[str, str] = _DEFAULT_QUESTION
    """What stands before and after a request in the user text, as in the run's data."""
    tools: Mapping[str, Tool] | None = None
    """All tools by name; None stands for TinyAgent's own."""
    grammar: bool = False
    """Whether plans can only be plans of the tools that their prompt lists."""

    @typed
    def build(self, request: str, system: str | None = None) -> BuiltPrompt:
        """Make the prompt of a request.

        Args:
            request: What the user typed.
            system: A system text for this request alone; None leaves the choice to the builder.

        Raises:
            ConfigError: One of them is no text that a model can read, or there should be a grammar
                and the system text lists unknown tools.
        """
        check_text("request", request)
        if system is not None:
            check_text("system text", system)
        before, after = self.question
        if system is not None:
            chosen = ChosenText(system, "a text given with the request")
        else:
            chosen = self.system if self.retrieve is None else self.retrieve(request)
        prompt = Prompt(system=chosen.text, user=f"{before}{request}{after}")
        if self.grammar:
            prompt = held_to_tools(prompt, self.tools)
        return BuiltPrompt(prompt, chosen.source)

    def read(self, prompt: Prompt) -> PromptParts:
        """Take a prompt apart: one that was built here, or that of an example of the run's data.

        A user text of another form is the request as it is.
        """
        before, after = self.question
        request = prompt.user
        if request.startswith(before) and request.endswith(after):
            request = request.removeprefix(before).removesuffix(after)
        return PromptParts(
            system=prompt.system, request=request, tools=_tools_named(prompt.system, self.tools)
        )

    def describe_tools(self) -> str | None:
        """Say which tools the system text of every request names, as plans should call no others.

        Returns:
            For example `3 tools (get_phone_number, reply_to_email, create_note)`; None if the text
            differs from request to request, or there is none.
        """
        if self.system.text is None:
            return None
        found = _tools_named(self.system.text, self.tools)
        if not found:
            return "no tool of the catalogue"
        shown = ", ".join(found[:_LISTED_TOOLS]) + ", ..." * (len(found) > _LISTED_TOOLS)
        return f"{count_of(len(found), 'tool')} ({shown})"


def held_to_tools(prompt: Prompt, tools: Mapping[str, Tool] | None = None) -> Prompt:
    """Add the grammar of all plans of the tools that a prompt lists, as `listed_tools` finds them.

    Raises:
        ConfigError: It lists a tool that is not known.
    """
    return replace(prompt, grammar=_grammar(tuple(listed_tools(prompt, tools).values())))


def listed_tools(prompt: Prompt, tools: Mapping[str, Tool] | None = None) -> dict[str, Tool]:
    """Find the tools that a plan may call.

    Args:
        prompt: One whose system text has a tool list, or at least names some tools; where it names
            none all tools may be called.
        tools: All tools by name; None stands for TinyAgent's own.

    Raises:
        ConfigError: It lists a tool that is not known.
    """
    known = TINYAGENT if tools is None else tools
    listed = parse(prompt.system or "", known).tools
    if unknown := [name for name in listed if name not in known]:
        raise ConfigError(
            f"a grammar of plans that call {', '.join(unknown)}",
            "the system text lists them, but what arguments they take is not known",
            "name the run whose catalogue has them with --run, or switch the grammar off "
            "(--grammar off)",
        )
    names = listed or _tools_named(prompt.system, tools) or tuple(known)
    return {name: known[name] for name in names}


@lru_cache(maxsize=256)
def _grammar(tools: tuple[Tool, ...]) -> str:
    return plan_grammar(tools_by_name(tools))


def _tools_named(system: str | None, tools: Mapping[str, Tool] | None) -> tuple[str, ...]:
    named = set(_WORD.findall(system or ""))
    return tuple(name for name in (TINYAGENT if tools is None else tools) if name in named)


def check_text(name: str, text: str) -> None:
    """Refuse a text that no model can read.

    Raises:
        ConfigError: It is no valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} {text!r}",
            f"it is no valid Unicode: half a character stands at {error.start}",
            "send it as UTF-8",
        ) from error


class NearestQuery:
    """Retrieves the system text of the test query most like a request.

    Alike are queries with words in common, rare ones counting more.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        """Index the queries of at least one example."""
        self.examples = examples
        self._words = [_words(example.query) for example in examples]
        counts: dict[str, int] = {}
        for words in self._words:
            for word in words:
                counts[word] = counts.get(word, 0) + 1
        self._weights = {
            word: math.log(1 + len(examples) / count) ** 2 for word, count in counts.items()
        }

    def __call__(self, request: str) -> ChosenText:
        """Give the text of the nearest query, the first of several that are equally near."""
        words = _words(request)
        scores = [self._likeness(words, other) for other in self._words]
        example = self.examples[scores.index(max(scores))]
        return ChosenText(example.system, f"that of the test query {example.query!r}")

    def _likeness(self, words: set[str], other: set[str]) -> float:
        """Compare two sets of words by the cosine of their weights."""
        sizes = self._weight(words) * self._weight(other)
        return self._weight(words & other) / math.sqrt(sizes) if sizes else 0.0

    def _weight(self, words: set[str]) -> float:
        return sum(self._weights.get(word, 0.0) for word in words)


def _with_retrieved_tools(retriever: ToolRetriever, request: str) -> ChosenText:
    """Write a system text with the tools that a retriever finds for a request, dated now."""
    tools = retriever.retrieve(request)
    text = retriever.system_text(request, tools).dated(f"{datetime.now():%A %Y-%m-%d %H:%M}")
    source = f"{count_of(len(tools), 'tool')} retrieved for it: {', '.join(tools)}"
    return ChosenText(render(text), source)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def prompt_builder(
    system: str = "auto",
    run: Run | None = None,
    tools: Mapping[str, Tool] | None = None,
    retriever: ToolRetriever | None = None,
    *,
    grammar: bool = False,
) -> PromptBuilder:
    """Make the builder that a user asked for.

    Args:
        system: `nearest`, `first`, a text file, or `auto`: written by the retriever if there is one
            with a system text, else nearest where there is a test file.
        run: The run whose test file has the texts; None if the model lies in no run.
        tools: All tools by name; None stands for TinyAgent's own.
        retriever: That of the run or model.
        grammar: Whether prompts hold plans to the tools that they list.

    Raises:
        ConfigError: The file cannot be read, or `nearest` has no test file to search.
    """
    file, examples = (None, ()) if run is None else _test_examples(run)
    question = _question(examples[0]) if examples else _DEFAULT_QUESTION
    retrieve: Retriever | None = None
    if system not in ("auto", "first", "nearest"):
        text = ChosenText(_read(Path(system)), f"file {system}")
    elif system == "auto" and retriever is not None and retriever.system is not None:
        text = ChosenText(None, "written for each request, with the tools retrieved for it")
        retrieve = partial(_with_retrieved_tools, retriever)
    elif examples and system == "first":
        text = ChosenText(examples[0].system, f"that of the first test query of {file}")
    elif examples:
        source = f"that of the most similar test query of {file}, for each request"
        text, retrieve = ChosenText(None, source), NearestQuery(examples)
    else:
        missing = f"the run's test file {file} is not here" if file else "no test file is known"
        if system == "nearest":
            fix = "name a run with --run, or a --system FILE"
            raise ConfigError("--system nearest", missing, fix)
        advice = "name a --system FILE for a planner that was trained with one"
        text = ChosenText(None, f"none: {missing}; {advice}")
    return PromptBuilder(
        system=text, retrieve=retrieve, question=question, tools=tools, grammar=grammar
    )


def encode_prompts(
    tokenizer: PromptTokenizer, prompts: Iterable[Prompt | Example]
) -> list[list[int]]:
    """Encode prompts, exactly as training rows begin; the tokenizer holds their format."""
    return tokenizer.encode_prompts(
        [render_prompt(p.system, p.user, tokenizer.prompt_format, tokenizer.chat) for p in prompts]
    )


def _test_examples(run: Run) -> tuple[Path | None, Sequence[Example]]:
    """Read the plans of a run's test file, if it is there; no file is generated for this."""
    from tinyagent_fast.data.cache import load_examples

    config = run.config()
    path = run.test_file()
    if path is None or not path.exists():
        return path, ()
    table = load_examples(path, on_bad_entry=config.data.on_bad_entry, points="plan")
    return path, table


def _question(example: Example) -> tuple[str, str]:
    before, found, after = example.user.partition(example.query)
    return (before, after) if found else _DEFAULT_QUESTION


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--system {path}",
            f"it cannot be read as text: {plainly(error)}",
            "name a UTF-8 text file, or `auto`, `nearest` or `first`",
        ) from error
