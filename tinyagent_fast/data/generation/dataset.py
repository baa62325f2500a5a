"""Write a generated dataset in the published files' own schema."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterator, Set
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE, Catalogue, load_catalogue
from tinyagent_fast.data.generation.outcomes import Outcomes
from tinyagent_fast.data.generation.prompts import (
    PromptStyle,
    full_planner_prompt,
    short_planner_prompt,
)
from tinyagent_fast.data.generation.queries import SINGLE_CALLS, Mix, Request, write_request
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.errors import DataError, plainly
from tinyagent_fast.plans.grammar import MAX_PLAN_CHARS, parse_plan, render_call
from tinyagent_fast.plans.tools import JOIN
from tinyagent_fast.runs import unfinished_folder

_MAX_REPEATS = 2000
_EXAMPLES_PER_PROMPT = 5
_OTHERS = (0, 1, 1, 2, 2, 3, 4, 6, 9, 15)
"""How many tools a prompt may name beside the needed ones; a retriever finds few or many."""


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """What to generate; equal specs give equal files, byte for byte."""

    train_entries: int = 8000
    """Entries of training_data.json."""
    test_entries: int = 200
    """Entries of testing_data.json; none of their queries occurs in the training file."""
    seed: int = 0
    """Seed of everything that is drawn."""
    prompt_style: PromptStyle = "short"
    """`short` names the retrieved tools; `full` has the published prompts' build and length."""
    max_calls: int = 8
    """Most calls of a plan, join not counted."""
    single_calls: bool = False
    """Only requests that one call with literal arguments answers."""
    failure_share: float = 0.15
    """Share of plans that meet a failure when they are run: most call for a replan."""
    catalogue: Path = BUILT_IN_CATALOGUE
    """YAML file with the tools."""

    def __post_init__(self) -> None:
        """Refuse counts and shares that make no dataset."""
        if self.train_entries < 1 or self.test_entries < 0:
            raise ValueError("train_entries must be 1 or more and test_entries 0 or more")
        if self.max_calls < 1:
            raise ValueError(f"max_calls must be 1 or more, got {self.max_calls}")
        if not 0 <= self.failure_share <= 1:
            raise ValueError(f"failure_share must be in 0..1, got {self.failure_share}")


@dataclass(frozen=True)
class GeneratedFiles:
    """Where a generated dataset lies."""

    train: Path
    test: Path


def generate_dataset(
    spec: GenerationSpec,
    out_dir: Path,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> GeneratedFiles:
    """Write training_data.json and testing_data.json into a folder, atomically.

    `on_progress` is called with the entries of both files that are written, and all of them.

    Raises:
        DataError: The catalogue is faulty or too small for that many different queries, or the
            folder cannot be written.
    """
    catalogue = load_catalogue(spec.catalogue)
    files = GeneratedFiles(out_dir / "training_data.json", out_dir / "testing_data.json")
    taken: set[str] = set()
    done, total = count(1), spec.test_entries + spec.train_entries
    parts = ((files.test, spec.test_entries, "test"), (files.train, spec.train_entries, "train"))
    try:
        with unfinished_folder(out_dir, "part") as unfinished:
            for path, wanted, part in parts:
                rng = random.Random(f"{spec.seed}/{part}")
                entries = generate_entries(catalogue, spec, wanted, rng, taken)
                _write_object(
                    unfinished / path.name, entries, lambda: on_progress(next(done), total)
                )
            # Only now, as each file's queries were chosen for the other's.
            for path, _, _ in parts:
                (unfinished / path.name).replace(path)
    except OSError as error:
        raise DataError(
            f"generated files in {out_dir}",
            f"they cannot be written: {plainly(error)}",
            "name another folder",
        ) from error
    return files


def generate_entries(
    catalogue: Catalogue, spec: GenerationSpec, count: int, rng: random.Random, taken: set[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Generate entries whose queries are all new.

    Args:
        catalogue: The tools.
        spec: Prompt style, mix and failures; its counts and seed are not looked at.
        count: How many entries.
        rng: Where all choices come from.
        taken: Normalised queries that may not come again, nor as an example in a full prompt; the
            new ones are added to it.

    Yields:
        Key and entry, in the published schema.

    Raises:
        DataError: No new query came out of many attempts.
    """
    mix = SINGLE_CALLS if spec.single_calls else Mix(max_calls=spec.max_calls)
    with closing(Outcomes(catalogue)) as outcomes:
        writer = _EntryWriter(catalogue, spec, rng, frozenset(taken), outcomes)
        for done in range(count):
            asked = f"{count} queries asked for, {done} different ones found"
            request = writer.new_request(mix, taken, asked)
            taken.add(normalise_query(request.query))
            yield writer.uuid().hex, writer.entry(request)


def _write_object(
    path: Path, entries: Iterator[tuple[str, dict[str, Any]]], on_entry: Callable[[], None]
) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write("{")
        separator = "\n"
        for key, entry in entries:
            text = json.dumps(entry, indent=4, ensure_ascii=False).replace("\n", "\n    ")
            stream.write(f"{separator}    {json.dumps(key)}: {text}")
            separator = ",\n"
            on_entry()
        stream.write("\n}\n")


@dataclass(frozen=True)
class _EntryWriter:
    """Writes entries; the order in which it draws from `rng` is part of what a seed stands for."""

    catalogue: Catalogue
    spec: GenerationSpec
    rng: random.Random
    held_out: frozenset[str]
    outcomes: Outcomes

    def uuid(self) -> uuid.UUID:
        """Draw an id of the seed."""
        return uuid.UUID(int=self.rng.getrandbits(128), version=4)

    def new_request(self, mix: Mix, taken: Set[str], asked: str) -> Request:
        """Write a request whose query is new by the measure of splits and leak reports."""
        for _ in range(_MAX_REPEATS):
            request = write_request(self.catalogue, mix, self.rng)
            if normalise_query(request.query) not in taken:
                return request
        raise DataError(
            asked,
            f"catalogue {self.catalogue.name!r} has too few phrases and values for more",
            "ask for fewer entries, or add phrases and values to the catalogue",
        )

    def entry(self, request: Request) -> dict[str, Any]:
        """Write the entry of a request, with all its points."""
        tool_names = self.retrieved_tools(request)  # drawn in any style
        if self.spec.prompt_style == "short":
            system = short_planner_prompt(tool_names, request.now)
        else:
            examples = [self.example(request) for _ in range(_EXAMPLES_PER_PROMPT)]
            system = full_planner_prompt(self.catalogue, examples, request.now)
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Question: {request.query}"},
        ]
        steps = [{"tool_name": c.tool, "tool_args": list(c.arguments)} for c in request.calls]
        steps.append({"tool_name": JOIN, "tool_args": []})
        plan = self.point("plan", messages, _render(request), steps, 0)
        return {
            "input": request.query,
            "output": [plan, *self.later_points(request, messages)],
            "closest_5_queries": [],
        }

    def retrieved_tools(self, request: Request) -> list[str]:
        """Name the needed tools and some that are not, as a retriever would."""
        needed = {call.tool for call in request.calls}
        names = [tool.name for tool in self.catalogue.tools]
        others = [name for name in names if name not in needed]
        needed |= set(self.rng.sample(others, k=min(len(others), self.rng.choice(_OTHERS))))
        return [name for name in names if name in needed]

    def example(self, asked_for: Request) -> str:
        """Make an example for a prompt: neither the query itself nor a query of the test file."""
        forbidden = self.held_out | {normalise_query(asked_for.query)}
        asked = f"{_EXAMPLES_PER_PROMPT} examples asked for in each full prompt"
        request = self.new_request(Mix(), forbidden, asked)
        return f"Question: {request.query}\n{_render(request)}"

    def later_points(
        self, request: Request, messages: list[dict[str, str]]
    ) -> Iterator[dict[str, Any]]:
        """Play the plan through, and write what a joiner and a planner should say then."""
        text = _render(request)
        if len(text) > MAX_PLAN_CHARS:
            raise DataError(
                f"catalogue {self.catalogue.name!r}",
                f"a plan made from it has {len(text):,} characters, and none of more than "
                f"{MAX_PLAN_CHARS:,} is ever read",
                "shorten its longest words and defaults, or ask for plans with fewer calls",
            )
        plan = parse_plan(text)
        share, user = self.spec.failure_share, messages[-1]["content"]
        played = self.outcomes.points(request.query, user, plan, share, self.rng)
        for index, point in enumerate(played, start=1):
            asked = [*messages[:-1], {"role": "user", "content": point.user}]
            if point.kind == "join":
                asked = asked[-1:]
            yield self.point(point.kind, asked, point.output, point.parsed, index)

    def point(
        self, kind: str, messages: list[dict[str, str]], output: str, parsed: object, index: int
    ) -> dict[str, Any]:
        """Write one point in the published form."""
        return {
            "type": kind,
            "raw_input": repr(messages),
            "raw_output": output,
            "parsed_output": parsed,
            "id": str(self.uuid()),
            "index": index,
        }


def _render(request: Request) -> str:
    """Render a request's plan as the published data does, without `<END_OF_PLAN>`."""
    calls = [render_call(call.tool, call.arguments) for call in request.calls]
    return "\n".join(f"{n}. {call}" for n, call in enumerate([*calls, f"{JOIN}()"], start=1))
