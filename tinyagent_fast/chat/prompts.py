"""Which system text a request is planned with: a file, or texts of the run's own test queries.

Published data carries tools and examples in its system texts, so a planner is only tried fairly
with one of those.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.errors import ConfigError
from tinyagent_fast.plans.tools import TINYAGENT, Tool
from tinyagent_fast.runs import Run

if TYPE_CHECKING:
    from tinyagent_fast.data.schema import Example

_WORD = re.compile(r"\w+")
_LISTED_TOOLS = 6
_DEFAULT_QUESTION = ("Question: ", "")


@dataclass(frozen=True, kw_only=True)
class ChosenPrompt:
    """The two texts that a planner gets, and where the system text comes from."""

    system: str | None
    user: str
    source: str


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Makes the texts for a request."""

    system: str | None
    source: str
    """Where `system` comes from, as the header says it."""
    question: tuple[str, str] = _DEFAULT_QUESTION
    """What stands before and after a request in the user text, as in the run's data."""
    nearest: NearestQuery | None = None
    """If given, it chooses the system text by the request, and `system` is not used."""

    def choose(self, request: str, system: str | None = None) -> ChosenPrompt:
        """Choose the texts for a request.

        Args:
            request: What the user typed.
            system: A system text for this request alone; none leaves the choice to the source.

        Returns:
            The texts.
        """
        before, after = self.question
        source, text = self.source, self.system
        if system is not None:
            source, text = "a text given with the request", system
        elif self.nearest is not None:
            example = self.nearest.find(request)
            source, text = f"that of the test query {example.query!r}", example.system
        return ChosenPrompt(system=text, user=f"{before}{request}{after}", source=source)


class NearestQuery:
    """Finds the test query most like a request: words in common, rare ones counting more."""

    def __init__(self, examples: Sequence[Example]) -> None:
        """Index queries.

        Args:
            examples: At least one.
        """
        self.examples = examples
        self._words = [_words(example.query) for example in examples]
        counts: dict[str, int] = {}
        for words in self._words:
            for word in words:
                counts[word] = counts.get(word, 0) + 1
        self._weights = {
            word: math.log(1 + len(examples) / count) ** 2 for word, count in counts.items()
        }

    def find(self, request: str) -> Example:
        """Find the nearest example.

        Args:
            request: Any text.

        Returns:
            Its example; the first of several that are equally near.
        """
        words = _words(request)
        scores = [self._likeness(words, other) for other in self._words]
        return self.examples[scores.index(max(scores))]

    def _likeness(self, words: set[str], other: set[str]) -> float:
        """Compare two sets of words by the cosine of their weights."""
        sizes = self._weight(words) * self._weight(other)
        return self._weight(words & other) / math.sqrt(sizes) if sizes else 0.0

    def _weight(self, words: set[str]) -> float:
        return sum(self._weights.get(word, 0.0) for word in words)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))


def load_prompts(system: str, run: Run | None) -> PromptSource:
    """Make the source of system texts that a user asked for.

    Args:
        system: `nearest`, `first`, a text file, or `auto`: nearest where there is a test file.
        run: The run whose test file has the texts; none if the model lies in no run.

    Returns:
        The source.

    Raises:
        ConfigError: The file cannot be read, or `nearest` has no test file to search.
    """
    file, examples = (None, ()) if run is None else _test_examples(run)
    question = _question(examples[0]) if examples else _DEFAULT_QUESTION
    if system not in ("auto", "first", "nearest"):
        return PromptSource(system=_read(Path(system)), source=f"file {system}", question=question)
    if examples and system != "first":
        source = f"that of the most similar test query of {file}, for each request"
        return PromptSource(
            system=None, source=source, question=question, nearest=NearestQuery(examples)
        )
    if examples:
        source = f"that of the first test query of {file}"
        return PromptSource(system=examples[0].system, source=source, question=question)
    missing = f"the run's test file {file} is not here" if file else "no run's test file is known"
    if system == "nearest":
        raise ConfigError("--system nearest", missing, "name a run with --run, or a --system FILE")
    return PromptSource(
        system=None,
        source=f"none: {missing}; name a --system FILE for a planner that was trained with one",
    )


def describe_tools(system: str | None, tools: Mapping[str, Tool] | None) -> str:
    """Say which tools a system text names, since a planner is meant to call no others.

    Args:
        system: The text.
        tools: All tools by name; none stands for TinyAgent's own.

    Returns:
        For example `3 tools (get_phone_number, reply_to_email, create_note)`.
    """
    named = set(_WORD.findall(system or ""))
    found = [name for name in (TINYAGENT if tools is None else tools) if name in named]
    if not found:
        return "no tool of the catalogue"
    shown = ", ".join(found[:_LISTED_TOOLS]) + ", ..." * (len(found) > _LISTED_TOOLS)
    return f"{len(found)} tool{'s' * (len(found) != 1)} ({shown})"


def _test_examples(run: Run) -> tuple[Path | None, Sequence[Example]]:
    """Read the plans of a run's test file, if it is there; none is generated for this."""
    from tinyagent_fast.data.cache import cache_folder, load_examples

    config = run.config()
    named = None if config.data.test is None else str(config.data.test)
    record = run.path / "data.json"
    if record.exists():
        test_file = json.loads(record.read_text(encoding="utf-8")).get("test_file")
        named = test_file["path"] if test_file else named
    if named is None:
        return None, ()
    path = find_beside(named, run)
    if not path.exists():
        return Path(named), ()
    table = load_examples(
        path, on_bad_entry=config.data.on_bad_entry, cache_dir=cache_folder(), points="plan"
    )
    return Path(named), table


def find_beside(name: str, run: Run) -> Path:
    """Find a path that a run recorded, also when the program runs in another folder now.

    Args:
        name: The path, relative to the folder that holds `runs/`.
        run: The run.

    Returns:
        The path as it is, or seen from beside the folder of all runs if it is only there.
    """
    there = run.path.resolve().parents[1] / name
    return there if there.exists() and not Path(name).exists() else Path(name)


def _question(example: Example) -> tuple[str, str]:
    before, found, after = example.user.partition(example.query)
    return (before, after) if found else _DEFAULT_QUESTION


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--system {path}",
            f"it cannot be read as text: {error}",
            "name a UTF-8 text file, or `auto`, `nearest` or `first`",
        ) from error
