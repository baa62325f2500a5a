"""Seeded requests with the plan that answers them, put together from a tool catalogue.

A request is one to three clauses. A clause is a tool's phrase; a slot of it is filled with a
literal value or with the result of another tool, which the plan then calls first.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass, field

from tinyagent_fast.data.generation.catalogue import (
    REQUIRED,
    Catalogue,
    CatalogueTool,
    SlotParameter,
)
from tinyagent_fast.data.generation.values import REUSABLE_KINDS, Value, draw, one_hour_after
from tinyagent_fast.errors import DataError

_PART = re.compile(r"\[[^\]]*\]|\{\w+(?::literal)?\}")
_OPENERS = ("", "", "", "Please ", "Can you ", "I need you to ")
_CONNECTORS = (" and ", ", then ", ". Then ", ". Also ", ", and after that ")
_MAX_DEPTH = 3
_MAX_ATTEMPTS = 200


@dataclass(frozen=True)
class Mix:
    """How requests are composed; the defaults follow the published data's statistics.

    Source: statistics of 1,512 published in-context examples and of the dataset itself (one tool
    in 18 % of queries, about three calls and join per plan).
    """

    single_share: float = 0.18
    clause_weights: tuple[float, ...] = (0.5, 0.4, 0.1)
    dependency_share: float = 0.85
    optional_share: float = 0.3
    list_weights: tuple[float, ...] = (0.55, 0.3, 0.15)
    reuse_share: float = 0.25
    max_calls: int = 7


SINGLE_CALLS = Mix(single_share=1.0, clause_weights=(1.0,), dependency_share=0.0, max_calls=1)
"""Requests that one call with literal arguments answers: what the nano base model is taught."""


@dataclass(frozen=True)
class Call:
    """One call of a plan; the n-th call's result is `$n`."""

    tool: str
    arguments: tuple[object, ...]


@dataclass(frozen=True)
class Request:
    """What the user says and the calls that answer it, without the final join."""

    query: str
    calls: tuple[Call, ...]


@dataclass
class _Draft:
    catalogue: Catalogue
    mix: Mix
    rng: random.Random
    calls: list[Call] = field(default_factory=list)
    mentioned: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))

    def reference(self, call: Call) -> str:
        """Return `$n` of the call, made now unless the plan has it already."""
        if call not in self.calls:
            self.calls.append(call)
        return f"${self.calls.index(call) + 1}"


def write_request(catalogue: Catalogue, mix: Mix, rng: random.Random) -> Request:
    """Write one request and its calls, in an order in which references point back only.

    Raises:
        DataError: The catalogue cannot give a request within `mix.max_calls` calls.
    """
    tools = [tool for tool in catalogue.tools if tool.weight > 0]
    weights = [tool.weight for tool in tools]
    single = rng.random() < mix.single_share
    for attempt in range(_MAX_ATTEMPTS):
        draft = _Draft(catalogue, mix, rng)
        count = rng.choices(range(1, len(mix.clause_weights) + 1), mix.clause_weights)[0]
        clauses = []
        for tool in rng.choices(tools, weights, k=count):
            text, call = _expand(draft, tool, rng.choice(tool.phrases), depth=0)
            if call not in draft.calls:
                draft.calls.append(call)
            clauses.append(text)
        # Some catalogues have no single calls, or nothing else: then any number will do.
        wanted = (len(draft.calls) == 1) == single or attempt > _MAX_ATTEMPTS // 2
        if wanted and len(draft.calls) <= mix.max_calls and len(set(clauses)) == len(clauses):
            return Request(_sentence(clauses, rng), tuple(draft.calls))
    raise DataError(
        f"tool catalogue {catalogue.name!r}",
        f"no request with at most {mix.max_calls} call(s) came out of {_MAX_ATTEMPTS} attempts, "
        "as its tools need results of too many others",
        "give parameters that have `from` a `value` too, so that a literal can end the chain",
    )


def write_parts(catalogue: Catalogue, rng: random.Random) -> tuple[str, list[str]]:
    """Write a request and, in order, the parts it is made of: clauses, or names in a list."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    if rng.random() < 0.4:
        names = [f'"{draw("person", {}, rng).text}"' for _ in range(count)]
        return _enumerate(names), names
    draft = _Draft(catalogue, SINGLE_CALLS, rng)
    tools = [tool for tool in catalogue.tools if tool.weight > 0]
    chosen = rng.choices(tools, k=min(count, 3))
    parts = [_expand(draft, tool, rng.choice(tool.phrases), depth=0)[0] for tool in chosen]
    return _sentence(parts, rng), parts


def _expand(draft: _Draft, tool: CatalogueTool, phrase: str, depth: int) -> tuple[str, Call]:
    """Fill a phrase's slots from left to right; what they depend on is called on the way."""
    arguments: dict[str, object] = {}

    def fill(match: re.Match[str]) -> str:
        part = match[0]
        if part.startswith("["):
            if draft.rng.random() >= draft.mix.optional_share:
                return ""
            return _PART.sub(fill, part[1:-1])
        name, _, literal = part[1:-1].partition(":")
        text, arguments[name] = _fill_slot(draft, tool.parameter(name), bool(literal), depth)
        return text

    text = _PART.sub(fill, phrase)
    for parameter in tool.parameters:
        if parameter.name in arguments:
            continue
        if parameter.value == "end" and parameter.follows is not None:
            arguments[parameter.name] = one_hour_after(arguments[parameter.follows])
        else:
            assert parameter.default is not REQUIRED, "catalogues are checked when loaded"
            arguments[parameter.name] = parameter.default
    return text, Call(tool.name, tuple(arguments[p.name] for p in tool.parameters))


def _fill_slot(
    draft: _Draft, parameter: SlotParameter, literal: bool, depth: int
) -> tuple[str, object]:
    rng = draft.rng
    is_list = parameter.type == "list[str]"
    count = 1
    if is_list:
        weights = draft.mix.list_weights
        count = rng.choices(range(1, len(weights) + 1), weights)[0]
    may_depend = bool(parameter.sources) and not literal and depth < _MAX_DEPTH
    if parameter.value is None or (may_depend and rng.random() < draft.mix.dependency_share):
        texts, references = _provide(draft, parameter, count, depth)
        if is_list:
            return _enumerate(texts), references
        return texts[0], rng.choice(parameter.embed).replace("{}", references[0])
    values = _draw_distinct(draft, parameter.value, count)
    if is_list:
        return _enumerate([v.text for v in values]), [v.argument for v in values]
    return values[0].text, values[0].argument


def _provide(
    draft: _Draft, parameter: SlotParameter, count: int, depth: int
) -> tuple[list[str], list[str]]:
    """Call providers of one kind; a list never names the same result twice."""
    catalogue = draft.catalogue
    kind = draft.rng.choice(parameter.sources)
    texts: list[str] = []
    references: list[str] = []
    for _ in range(count):
        if depth < _MAX_DEPTH:
            provider = draft.rng.choice(catalogue.providers(kind))
        else:
            # Without a literal value the chain must go on, now by the shortest way.
            lengths, sources = catalogue.chain_lengths, parameter.sources
            providers = [tool for kind in sources for tool in catalogue.providers(kind)]
            provider = min(providers, key=lambda tool: lengths[tool.name])
        assert provider.mention is not None, "providers() lists only tools with a mention"
        text, call = _expand(draft, provider, provider.mention, depth + 1)
        reference = draft.reference(call)
        if reference not in references:
            texts.append(text)
            references.append(reference)
    return texts, references


def _draw_distinct(draft: _Draft, kind: str, count: int) -> list[Value]:
    values: list[Value] = []
    for _ in range(count):
        known = draft.mentioned[kind]
        reuse = kind in REUSABLE_KINDS and known and draft.rng.random() < draft.mix.reuse_share
        value = draft.rng.choice(known) if reuse else draw(kind, draft.catalogue.words, draft.rng)
        if value not in values:
            values.append(value)
            known.append(value)
    return values


def _enumerate(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def _sentence(clauses: list[str], rng: random.Random) -> str:
    opener = rng.choice(_OPENERS)
    if clauses[0].startswith(("what ", "how ")):
        opener = ""
    text = opener + clauses[0]
    for clause in clauses[1:]:
        text += rng.choice(_CONNECTORS) + clause
    ending = "?" if opener.startswith("Can") or clauses[0].startswith(("what ", "how ")) else "."
    return text[0].upper() + text[1:] + ending
