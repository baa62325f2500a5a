"""Write a generated dataset in the published files' own schema."""

from __future__ import annotations

import json
import os
import random
import uuid
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE, Catalogue, load_catalogue
from tinyagent_fast.data.generation.prompts import (
    PromptStyle,
    full_planner_prompt,
    joiner_prompt,
    short_planner_prompt,
)
from tinyagent_fast.data.generation.queries import SINGLE_CALLS, Call, Mix, Request, write_request
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.errors import DataError
from tinyagent_fast.plans.grammar import render_call
from tinyagent_fast.plans.tools import JOIN

_MAX_REPEATS = 2000
_EXAMPLES_PER_PROMPT = 5


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
    max_calls: int = 7
    """Most calls of a plan, join not counted."""
    single_calls: bool = False
    """Only requests that one call with literal arguments answers."""
    failure_share: float = 0.15
    """Share of join points whose observations hold a failure and call for a replan."""
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


def generate_dataset(spec: GenerationSpec, out_dir: Path) -> GeneratedFiles:
    """Write training_data.json and testing_data.json, atomically.

    Args:
        spec: What to generate.
        out_dir: Folder for the two files; made if absent.

    Returns:
        The two paths.

    Raises:
        DataError: The catalogue is faulty or too small for that many different queries, or the
            folder cannot be written.
    """
    catalogue = load_catalogue(spec.catalogue)
    files = GeneratedFiles(out_dir / "training_data.json", out_dir / "testing_data.json")
    taken: set[str] = set()
    parts = ((files.test, spec.test_entries, "test"), (files.train, spec.train_entries, "train"))
    temporaries = {path: path.with_name(f"{path.name}.{os.getpid()}.part") for path, _, _ in parts}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for path, count, part in parts:
            rng = random.Random(f"{spec.seed}/{part}")
            with temporaries[path].open("w", encoding="utf-8", newline="\n") as stream:
                _write_object(stream.write, generate_entries(catalogue, spec, count, rng, taken))
        # Only now, as each file's queries were chosen for the other's.
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"generated files in {out_dir}",
            f"they cannot be written: {error}",
            "name another folder",
        ) from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink()
    return files


def generate_entries(
    catalogue: Catalogue,
    spec: GenerationSpec,
    count: int,
    rng: random.Random,
    taken: set[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Generate entries whose queries are all new.

    Args:
        catalogue: The tools.
        spec: Prompt style, mix and failures.
        count: How many entries.
        rng: Source of randomness.
        taken: Normalised queries that may not come again, nor as an example in a full prompt; the
            new ones are added to it.

    Yields:
        Key and entry, in the published schema.

    Raises:
        DataError: No new query came out of many attempts.
    """
    mix = SINGLE_CALLS if spec.single_calls else Mix(max_calls=spec.max_calls)
    held_out = frozenset(taken)
    for done in range(count):
        asked = f"{count} queries asked for, {done} different ones found"
        request = _new_request(catalogue, mix, rng, taken.__contains__, asked)
        query = normalise_query(request.query)
        taken.add(query)
        yield _key(rng), _entry(catalogue, spec, request, held_out, rng)


def _new_request(
    catalogue: Catalogue, mix: Mix, rng: random.Random, is_taken: Callable[[str], bool], asked: str
) -> Request:
    """Write a request whose query is new by the measure of splits and leak reports."""
    for _ in range(_MAX_REPEATS):
        request = write_request(catalogue, mix, rng)
        if not is_taken(normalise_query(request.query)):
            return request
    raise DataError(
        asked,
        f"catalogue {catalogue.name!r} has too few phrases and values for more",
        "ask for fewer entries, or add phrases and values to the catalogue",
    )


def _write_object(
    write: Callable[[str], object], entries: Iterator[tuple[str, dict[str, Any]]]
) -> None:
    write("{")
    separator = "\n"
    for key, entry in entries:
        text = json.dumps(entry, indent=4, ensure_ascii=False).replace("\n", "\n    ")
        write(f"{separator}    {json.dumps(key)}: {text}")
        separator = ",\n"
    write("\n}\n")


def _key(rng: random.Random) -> str:
    return uuid.UUID(int=rng.getrandbits(128), version=4).hex


def _entry(
    catalogue: Catalogue,
    spec: GenerationSpec,
    request: Request,
    held_out: Set[str],
    rng: random.Random,
) -> dict[str, Any]:
    tool_names = _retrieved_tools(catalogue, request, rng)
    if spec.prompt_style == "short":
        system = short_planner_prompt(tool_names)
    else:
        examples = [
            _example(catalogue, request, held_out, rng) for _ in range(_EXAMPLES_PER_PROMPT)
        ]
        all_names = [tool.name for tool in catalogue.tools]
        system = full_planner_prompt(catalogue, all_names, examples, rng)
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question: {request.query}"},
    ]
    steps = [*_parsed_steps(request), {"tool_name": JOIN, "tool_args": []}]
    plan = _point("plan", repr(messages), render_request(request), steps, 0, rng)
    return {
        "input": request.query,
        "output": [plan, _join_point(catalogue, spec, request, rng)],
        "closest_5_queries": [],
    }


def _retrieved_tools(catalogue: Catalogue, request: Request, rng: random.Random) -> list[str]:
    """Name the needed tools and up to two that are not, as a retriever would."""
    needed = {call.tool for call in request.calls}
    others = [tool.name for tool in catalogue.tools if tool.name not in needed]
    needed |= set(rng.sample(others, k=min(len(others), rng.choice((0, 1, 1, 2)))))
    return [tool.name for tool in catalogue.tools if tool.name in needed]


def _example(
    catalogue: Catalogue, asked_for: Request, held_out: Set[str], rng: random.Random
) -> str:
    """Solve another request than the one that is asked for, and none of the test file's."""
    own = normalise_query(asked_for.query)
    asked = f"{_EXAMPLES_PER_PROMPT} examples asked for in each full prompt"
    request = _new_request(
        catalogue, Mix(), rng, lambda query: query == own or query in held_out, asked
    )
    return f"Question: {request.query}\n{render_request(request)}"


def render_request(request: Request) -> str:
    """Render a request's plan as the published data does: from `1. ` to `N. join()`.

    Args:
        request: A request and its calls.

    Returns:
        The plan's text, without `<END_OF_PLAN>`.
    """
    lines = [f"{n}. {_render(call)}" for n, call in enumerate(request.calls, start=1)]
    return "\n".join([*lines, f"{len(lines) + 1}. {JOIN}()"])


def _render(call: Call) -> str:
    return render_call(call.tool, tuple(_thaw(a) for a in call.arguments))


def _thaw(argument: object) -> object:
    return list(argument) if isinstance(argument, tuple) else argument


def _parsed_steps(request: Request) -> list[dict[str, Any]]:
    return [
        {"tool_name": call.tool, "tool_args": [_thaw(a) for a in call.arguments]}
        for call in request.calls
    ]


def _point(
    kind: str, raw_input: str, raw_output: str, parsed: object, index: int, rng: random.Random
) -> dict[str, Any]:
    return {
        "type": kind,
        "raw_input": raw_input,
        "raw_output": raw_output,
        "parsed_output": parsed,
        "id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "index": index,
    }


def _join_point(
    catalogue: Catalogue, spec: GenerationSpec, request: Request, rng: random.Random
) -> dict[str, Any]:
    fails = rng.random() < spec.failure_share
    failing = rng.randrange(len(request.calls)) if fails else -1
    returns = {tool.name: tool.returns for tool in catalogue.tools}
    observations = [
        f"Error: {call.tool} found nothing that fits."
        if number == failing
        else f"<{returns[call.tool] or 'done'} {rng.randrange(1000):03d}>"
        for number, call in enumerate(request.calls)
    ]
    if fails:
        thought, action, message = "One call failed, so the plan must change.", "Replan", ""
    elif request.query.endswith("?") and not request.query.startswith("Can you"):
        thought, action = "The user asked a question that the last result answers.", "Finish"
        message = observations[-1]
    else:
        thought, action, message = "All calls succeeded.", "Finish", "Task completed!"
    answer = action if fails else f"{action}({message})"
    prompt = joiner_prompt(request.query, [_render(c) for c in request.calls], observations)
    messages = [{"role": "user", "content": prompt}]
    parsed = {"thought": thought, "action": action, "message": message}
    output = f"Thought: {thought}\nAction: {answer}"
    return _point("join", repr(messages), output, parsed, 1, rng)
