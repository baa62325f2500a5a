"""Seeded requests with the plan that answers them, put together from a tool catalogue.

A request is one to four clauses. A clause is a tool's phrase; a slot of it is filled with a
literal value or with the result of another tool, which the plan then calls first.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tinyagent_fast.data.generation.catalogue import (
    REQUIRED,
    Catalogue,
    CatalogueTool,
    SlotParameter,
)
from tinyagent_fast.data.generation.phrases import Either, Kind, Maybe, Phrase, Slot, parse_phrase
from tinyagent_fast.data.generation.values import (
    REUSABLE_KINDS,
    Value,
    Values,
    is_whole_day,
    one_hour_after,
)
from tinyagent_fast.errors import DataError
from tinyagent_fast.plans.doubts import takes
from tinyagent_fast.plans.grammar import reference_uses

_OPENERS = [
    *("Please ", "Please ", "Can you ", "Could you ", "Could you please ", "I need you to "),
    *("I want to ", "Hey, ", "Hi, please ", "I'd like you to ", "pls ", "First, "),
]
_NEXT_CLAUSE = (", ", ", ", ", ", ", ", ", then ", ", and ", " and ", " and then ", ", and then ")
_LAST_CLAUSE = [
    *(" and ", " and ", ", and ", ", and ", ", and ", ", then ", ", and then ", " and then "),
    *(", and finally ", ", and finally, ", " and also ", ", and also "),
]
_NEXT_SENTENCE = [
    *("Then, ", "Then ", "Additionally, ", "Additionally, ", "After that, ", "Also, ", "Also "),
    *("Afterwards, ", "Next, ", "", "And ", "Then please "),
]
_LAST_SENTENCE = [*_NEXT_SENTENCE, "Finally, ", "Finally, ", "Lastly, "]
_SENTENCE_SHARE = 0.35
_ASKS = ("what ", "what's ", "how ", "where ", "which ", "who ")
_MAX_DEPTH = 3
_MAX_ATTEMPTS = 200
_TYPED_WORDS = re.compile(
    r"\b(create|send|reminder|message|email|directions|attach|attached|forward|reply|append|event"
    r"|summarize|calendar|tomorrow|please|subject|number|address|folder|called|titled)\b"
)
"""Words that a typing error may hit: none of them is ever a name."""


@dataclass(frozen=True)
class Mix:
    """How requests are composed; the defaults follow the published data's statistics.

    Source: statistics of 1,512 published in-context examples and of the dataset itself (one tool
    in 18 % of queries, about three calls and join per plan).
    """

    single_share: float = 0.18
    clause_weights: tuple[float, ...] = (0.27, 0.33, 0.25, 0.15)
    dependency_share: float = 0.75
    optional_share: float = 0.3
    list_weights: tuple[float, ...] = (0.4, 0.4, 0.2)
    reuse_share: float = 0.2
    again_share: float = 0.6
    max_calls: int = 8


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
    now: datetime
    """When it is said."""


class _NotNow(Exception):
    """A phrase speaks of something that was not mentioned."""


@dataclass
class _Draft:
    catalogue: Catalogue
    mix: Mix
    rng: random.Random
    values: Values
    calls: list[Call] = field(default_factory=list)
    mentioned: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    together: dict[str, list[Value]] = field(default_factory=dict)
    """Values by kind that the last list named."""

    def reference(self, call: Call) -> str:
        """Return `$n` of the call, made now unless the plan has it already."""
        if call not in self.calls:
            self.calls.append(call)
        return f"${self.calls.index(call) + 1}"

    def made(self, tool: str) -> list[str]:
        """List references to the calls of a tool."""
        return [f"${n}" for n, call in enumerate(self.calls, start=1) if call.tool == tool]


def _draft(catalogue: Catalogue, mix: Mix, rng: random.Random) -> _Draft:
    moment = datetime(2023, 1, 1) + timedelta(minutes=rng.randrange(5 * 365 * 24 * 60))
    return _Draft(catalogue, mix, rng, Values(rng, catalogue.words, moment))


def write_request(catalogue: Catalogue, mix: Mix, rng: random.Random) -> Request:
    """Write one request and its calls, in an order in which references point back only.

    Raises:
        DataError: The catalogue cannot give a request within `mix.max_calls` calls.
    """
    tools = [tool for tool in catalogue.tools if tool.weight > 0]
    weights = [tool.weight for tool in tools]
    single = rng.random() < mix.single_share
    for attempt in range(_MAX_ATTEMPTS):
        draft = _draft(catalogue, mix, rng)
        count = rng.choices(range(1, len(mix.clause_weights) + 1), mix.clause_weights)[0]
        clauses: list[str] = []
        for tool in rng.choices(tools, weights, k=1 if single else count):
            try:
                text, call = _expand(draft, tool, rng.choice(tool.phrases), 0, {})
            except _NotNow:
                clauses = []
                break
            if call not in draft.calls:
                draft.calls.append(call)
            clauses.append(text)
        # Some catalogues have no single calls, or nothing else: then any number will do.
        wanted = (len(draft.calls) == 1) == single or attempt > _MAX_ATTEMPTS // 2
        fits = 0 < len(draft.calls) <= mix.max_calls and not _has_idle_lookup(draft)
        if clauses and wanted and fits and len(set(clauses)) == len(clauses):
            query = _sentence(clauses, rng)
            return Request(query, tuple(draft.calls), draft.values.now)
    raise DataError(
        f"tool catalogue {catalogue.name!r}",
        f"no request with at most {mix.max_calls} call(s) came out of {_MAX_ATTEMPTS} attempts, "
        "as its tools need results of too many others, or look up (`lookup`) what none can use",
        "give parameters that have `from` a `value` too, so that a literal can end the chain",
    )


def _has_idle_lookup(draft: _Draft) -> bool:
    """Say whether one of several calls looks up what no other uses: no published plan does."""
    used = {number for call in draft.calls for number, _ in reference_uses(call.arguments)}
    return len(draft.calls) > 1 and any(
        draft.catalogue.by_name[call.tool].lookup and number not in used
        for number, call in enumerate(draft.calls, start=1)
    )


def write_parts(catalogue: Catalogue, rng: random.Random) -> tuple[str, list[str]]:
    """Write a request and, in order, the parts it is made of: clauses, or names in a list."""
    count = rng.choice((1, 2, 2, 3, 3, 4))
    draft = _draft(catalogue, SINGLE_CALLS, rng)
    if rng.random() < 0.4:
        names = [f'"{draft.values.draw("person").argument}"' for _ in range(count)]
        return _enumerate(names, rng), names
    tools = [tool for tool in catalogue.tools if tool.weight > 0]
    parts: list[str] = []
    while not parts:
        chosen = rng.choices(tools, k=min(count, 3))
        try:
            parts = [_expand(draft, t, rng.choice(t.phrases), 0, {})[0] for t in chosen]
        except _NotNow:
            continue
    return _sentence(parts, rng), parts


def _expand(
    draft: _Draft, tool: CatalogueTool, phrase: str, depth: int, asking: Mapping[str, object]
) -> tuple[str, Call]:
    """Fill the slots of a tool's phrase or mention; what they depend on is called on the way.

    `depth` calls need this one's result; `asking` has the arguments so far of the first of them.
    """
    arguments: dict[str, object] = {}
    untils: dict[str, object] = {}
    again: set[str] = set()

    def fill(parts: Phrase) -> str:
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
            elif isinstance(part, Kind):
                text += (
                    _pronoun(draft) if part.name == "them" else draft.values.draw(part.name).text
                )
            elif isinstance(part, Either):
                text += fill(draft.rng.choice(part.wordings))
            elif isinstance(part, Maybe):
                if draft.rng.random() < draft.mix.optional_share:
                    text += fill(part.part)
            else:
                parameter = tool.parameter(part.name)
                said, argument, until = _fill_slot(draft, parameter, part, depth, arguments)
                arguments[part.name], untils[part.name] = argument, until
                again.update([part.name] if part.manner == "said" else [])
                text += "" if part.silent else said
        return text

    text = fill(parse_phrase(phrase))
    for parameter in tool.parameters:
        if parameter.name not in arguments:
            asked = {name: arguments[name] for name in again}
            before = _same_thing(draft, asked) if asked else {}
            arguments[parameter.name] = before.get(
                parameter.name, _left_out(draft, parameter, arguments, untils, asking)
            )
    return text, Call(tool.name, tuple(arguments[p.name] for p in tool.parameters))


def _same_thing(draft: _Draft, asked: Mapping[str, object]) -> Mapping[str, object]:
    """Find the arguments of the last call that was about the same, such as a note's folder."""
    for call in reversed(draft.calls):
        names = [parameter.name for parameter in draft.catalogue.by_name[call.tool].parameters]
        given = dict(zip(names, call.arguments, strict=True))
        if all(given.get(name) == value for name, value in asked.items()):
            return given
    return {}


def _left_out(
    draft: _Draft,
    parameter: SlotParameter,
    arguments: Mapping[str, object],
    untils: Mapping[str, object],
    asking: Mapping[str, object],
) -> object:
    """Find the argument of a parameter that the sentence does not name."""
    if parameter.value == "end" and parameter.follows is not None:
        start = arguments.get(parameter.follows)
        if start is None:
            start = draft.values.unsaid("start")
        return untils.get(parameter.follows) or one_hour_after(start)
    if parameter.value == "all_day" and parameter.follows is not None:
        return is_whole_day(arguments[parameter.follows])
    known = draft.catalogue.by_name
    kinds = {n: known[call.tool].returns for n, call in enumerate(draft.calls, start=1)}
    for name in parameter.unsaid or ():
        if asking.get(name) and takes(parameter, asking[name], kinds):
            return asking[name]
    if parameter.default is not REQUIRED:
        return parameter.default
    assert parameter.value is not None, "catalogues are checked when loaded"
    return draft.values.unsaid(parameter.value)


def _fill_slot(
    draft: _Draft, parameter: SlotParameter, slot: Slot, depth: int, arguments: Mapping[str, object]
) -> tuple[str, object, object]:
    """Give what is said, the argument, and when what starts then ends."""
    rng = draft.rng
    if slot.manner == "said":
        known = draft.mentioned[parameter.value or ""]
        if not known:
            raise _NotNow
        return known[-1].text, known[-1].argument, None
    is_list = parameter.type == "list[str]"
    count = 1
    if is_list:
        share = parameter.several
        weights = draft.mix.list_weights if share is None else (1 - share, share)
        count = rng.choices(range(1, len(weights) + 1), weights)[0]
    source = slot.manner if slot.manner in parameter.sources else None
    literal = bool(slot.manner) and source is None
    may_depend = bool(parameter.sources) and not literal and depth < _MAX_DEPTH
    share = 1.0 if source else draft.mix.dependency_share
    if parameter.value is None or (may_depend and rng.random() < share):
        texts, references = _provide(draft, parameter, source, count, depth, arguments)
        if is_list:
            return _enumerate(texts, rng), references, None
        return texts[0], rng.choice(parameter.embed).replace("{}", references[0]), None
    kind = slot.manner if literal and slot.manner != "literal" else parameter.value
    values = _draw_distinct(draft, kind, count)
    if is_list:
        return _enumerate([v.text for v in values], rng), [v.argument for v in values], None
    return values[0].text, values[0].argument, values[0].until


def _provide(
    draft: _Draft,
    parameter: SlotParameter,
    source: str | None,
    count: int,
    depth: int,
    arguments: Mapping[str, object],
) -> tuple[list[str], list[str]]:
    """Call providers of one kind; a list never names the same result twice."""
    catalogue, rng = draft.catalogue, draft.rng
    kind = source or rng.choice(parameter.sources)
    if depth < _MAX_DEPTH:
        provider = rng.choice(catalogue.providers(kind))
    else:
        # Without a literal value the chain must go on, now by the shortest way.
        lengths, sources = catalogue.chain_lengths, parameter.sources
        providers = [tool for kind in sources for tool in catalogue.providers(kind)]
        provider = min(providers, key=lambda tool: lengths[tool.name])
    assert provider.mention is not None, "providers() lists only tools with a mention"
    made = draft.made(provider.name)
    if provider.again and len(made) == 1 and rng.random() < draft.mix.again_share:
        return [rng.choice(provider.again)], made
    again = _said_again(draft, provider, math.inf if parameter.type == "list[str]" else 1)
    if again is not None:
        return again
    texts: list[str] = []
    references: list[str] = []
    before = {kind: len(values) for kind, values in draft.mentioned.items()}
    for _ in range(count if provider.counted else 1):
        text, call = _expand(draft, provider, provider.mention, depth + 1, arguments)
        reference = draft.reference(call)
        if reference not in references:
            texts.append(text)
            references.append(reference)
    for kind, values in draft.mentioned.items():
        if new := values[before.get(kind, 0) :]:
            draft.together[kind] = list(dict.fromkeys(new))
    return texts, references


def _pronoun(draft: _Draft) -> str:
    """Speak of the people who were named last."""
    named = draft.together.get("person") or draft.mentioned["person"][-1:]
    if not named:
        raise _NotNow
    return draft.rng.choice(REUSABLE_KINDS["person"][min(len(named), 3) - 1])


def _said_again(
    draft: _Draft, provider: CatalogueTool, most: float
) -> tuple[list[str], list[str]] | None:
    """Speak with one word of those who were named last, at times, if they are not too many."""
    parameter = provider.parameters[0] if len(provider.parameters) == 1 else None
    kind = (parameter.value or "") if parameter is not None and not parameter.sources else ""
    values = draft.together.get(kind)
    if kind not in REUSABLE_KINDS or not values or draft.rng.random() >= draft.mix.reuse_share:
        return None
    words = REUSABLE_KINDS[kind][min(len(values), 3) - 1]
    if not words or len(values) > most:
        return None
    calls = [Call(provider.name, (value.argument,)) for value in values]
    return [draft.rng.choice(words)], [draft.reference(call) for call in calls]


def _draw_distinct(draft: _Draft, kind: str, count: int) -> list[Value]:
    values: list[Value] = []
    for _ in range(count):
        known = draft.mentioned[kind]
        reuse = kind in REUSABLE_KINDS and known and draft.rng.random() < draft.mix.reuse_share
        value = draft.rng.choice(known) if reuse else draft.values.draw(kind)
        if value not in values:
            values.append(value)
            known.append(value)
    return values


def _enumerate(texts: Sequence[str], rng: random.Random) -> str:
    if len(texts) < 2:
        return texts[0]
    comma = "," if len(texts) > 2 and rng.random() < 0.6 else ""
    return f"{', '.join(texts[:-1])}{comma} and {texts[-1]}"


def _sentence(clauses: Sequence[str], rng: random.Random) -> str:
    """Join clauses to one or several sentences, as people type them."""
    opener = rng.choice(_OPENERS) if rng.random() < 0.15 else ""
    if clauses[0].startswith(_ASKS):
        opener = ""
    text, ending = "", "."
    for at, clause in enumerate(clauses):
        last, asks = at == len(clauses) - 1, clause.startswith(_ASKS)
        if at == 0:
            text = _capital(opener + clause)
        elif asks or ending == "?" or rng.random() < _SENTENCE_SHARE:
            word = "" if asks else rng.choice(_LAST_SENTENCE if last else _NEXT_SENTENCE)
            text = f"{text.removesuffix(',')}{ending} {_capital(word + clause)}"
        else:
            between = rng.choice(_LAST_CLAUSE if last else _NEXT_CLAUSE)
            # A clause may end with a comma of its own, such as that behind "lasting 1 hour,".
            text = text.removesuffix(",") if between.startswith(",") else text
            text += between + clause
            continue
        ending = "?" if asks or (at == 0 and opener.startswith(("Can", "Could"))) else "."
    text = _typed(re.sub(r"\b([Aa]) (?=[aeio](?!ne\b))", r"\1n ", _possessive(text)), rng)
    text = text.removesuffix(",")
    return text if rng.random() < 0.08 else text + ending


def _possessive(text: str) -> str:
    """Mend what comes out where a name was left for a word that stands for it."""
    text = re.sub(r"\bhim's\b", "his", text)
    text = re.sub(r"\bher's\b", "her", text)
    text = re.sub(r"\b(them|both of them)'s\b", "their", text)
    return re.sub(r" +", " ", text).replace(" ,", ",").replace(" :", ":").strip()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _typed(text: str, rng: random.Random) -> str:
    """Let the text look typed at times: a small beginning, a slip of the fingers."""
    if rng.random() < 0.06:
        text = text[0].lower() + text[1:]
    if rng.random() >= 0.04:
        return text
    words = list(_TYPED_WORDS.finditer(text))
    if not words:
        return text
    word = rng.choice(words)
    at = word.start() + rng.randrange(1, len(word[0]) - 2)
    left, one, two, right = text[:at], text[at], text[at + 1], text[at + 2 :]
    return left + rng.choice((two + one, one, one + two + two)) + right
