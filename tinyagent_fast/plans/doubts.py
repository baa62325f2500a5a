"""Calls whose arguments are of another kind than their parameters take, by a catalogue's kinds.

Such a call is no error of form: `send_sms(["$1"], ...)` where `$1` is a file. A planner that writes
it has left a look-up out, or has miscounted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tinyagent_fast.plans.grammar import (
    Plan,
    Step,
    reference_uses,
    references,
    render_call,
    render_plan,
    substitute,
)
from tinyagent_fast.plans.tools import Parameter, Tool

_FORMS = {
    "email": re.compile(r"[^\s@]+@[^\s@]+"),
    "phone": re.compile(r"(?<![\w.@])[+(]?\d[\d ().-]{2,}(?![\w@])"),
}
"""Kinds of values that are told from all others by their form."""
_WORD = re.compile(r"\w+")
_BEFORE_A_DIGIT = re.compile(r"\$\{\d+\}\d")
"""A reference that another number cannot be written for as `$n`."""


@dataclass(frozen=True)
class Doubt:
    """A call that may be wrong."""

    number: int
    before: tuple[Step, ...]
    """The calls before it."""
    instead: tuple[str, ...]
    """Tools that may be called in its place, with other arguments if its own is among them; those
    that the plan calls later where there are such, since they come too late then."""
    why: str
    """What speaks against it, such as `recipients takes phone number, and $1 is note text`."""
    needless: bool = False
    """It looks up what it was given, so a plan without it may be right."""


def doubts(plan: Plan, tools: Mapping[str, Tool]) -> list[Doubt]:
    """Find the calls with an argument that their parameter does not take.

    That is a reference to a result of another kind, a literal such as a name where addresses are
    wanted, or the wanted thing itself where a tool would look it up. Nothing is said where kinds
    are not known, or where no tool of the prompt, given by name, could be called instead.
    """
    found = []
    kinds: dict[int, str] = {}
    for at, step in enumerate(plan.steps):
        tool = tools.get(step.tool)
        if tool is None:
            continue
        for parameter, value in zip(tool.parameters, step.arguments, strict=False):
            if instead := _instead(tool, parameter, value, kinds, tools):
                later = {other.tool for other in plan.steps[at + 1 :]}
                meant = tuple(name for name in instead if name in later)
                wrong = _not_taken(parameter, value, kinds)
                why = f"{tool.name} is given what it looks up"
                if wrong:
                    taken = " or ".join(parameter.sources)
                    why = f"{parameter.name} takes {taken}, and {' and '.join(wrong)}"
                found.append(
                    Doubt(step.number, plan.steps[:at], meant or instead, why, needless=not wrong)
                )
                break
        if tool.returns:
            kinds[step.number] = tool.returns
    return found


def not_asked_for(plan: Plan, tools: Mapping[str, Tool], request: str) -> dict[int, str]:
    """Find names that are looked up and do not stand in the request, such as another person's.

    A small model copies wrongly what it has seldom seen. Looked at are tools that take one text and
    give what another tool takes; of 1,627 such calls in published plans 37 look up a paraphrase.

    Returns:
        What to tell of a call, by its number.
    """
    wanted = {kind for tool in tools.values() for one in tool.parameters for kind in one.sources}
    said, words = request.casefold(), _words(request)
    found = {}
    for step in plan.steps:
        tool = tools.get(step.tool)
        if tool is None or tool.returns not in wanted or len(tool.parameters) != 1:
            continue
        texts = (text for value in step.arguments for text in _literals(value))
        if new := [t for t in texts if not (_words(t) <= words or t.casefold() in said)]:
            is_or_are = "is" if len(new) == 1 else "are"
            told = " and ".join(map(repr, new))
            found[step.number] = f"{told} {is_or_are} not in the request"
    return found


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


def without_repeats(plan: Plan, tools: Mapping[str, Tool]) -> Plan:
    """Leave out calls that look up again what an earlier one found, and use what that found.

    Those are calls with the same tool and arguments, of a tool whose result another one takes, if
    no call between them changes something that has one of these arguments, such as a note's name.
    No published plan has such a pair. References of the plan point to earlier calls.
    """
    if _BEFORE_A_DIGIT.search(render_plan(plan)):
        return plan
    wanted = {kind for tool in tools.values() for one in tool.parameters for kind in one.sources}
    first: dict[str, Step] = {}
    numbers: dict[int, object] = {}
    kept: list[Step] = []
    for step in plan.steps:
        arguments = tuple(_once_each(substitute(a, numbers)) for a in step.arguments)
        now = replace(step, number=len(kept) + 1, arguments=arguments)
        call = render_call(step.tool, arguments)
        if step.tool not in tools or tools[step.tool].returns not in wanted:
            named = {text for value in arguments for text in _literals(value)}
            first = {
                known: other
                for known, other in first.items()
                if not named.intersection(t for v in other.arguments for t in _literals(v))
            }
        elif call in first:
            numbers[step.number] = f"${first[call].number}"
            continue
        else:
            first[call] = now
        numbers[step.number] = f"${now.number}"
        kept.append(now)
    return replace(plan, steps=tuple(kept))


def _once_each(value: object) -> object:
    """Leave out what a list says again by the same reference."""
    if not isinstance(value, list):
        return value
    return [
        item for at, item in enumerate(value) if item not in value[:at] or not references([item])
    ]


def takes(parameter: Parameter, value: object, kinds: Mapping[int, str]) -> bool:
    """Say whether a value is of a kind that a parameter takes, as far as kinds are known.

    A literal may hold more than the wanted thing, such as a name beside an address. `kinds` are
    those of earlier results, by number.
    """
    return not _not_taken(parameter, value, kinds)


def _not_taken(parameter: Parameter, value: object, kinds: Mapping[int, str]) -> list[str]:
    """Say of each part of a value that a parameter does not take what it is."""
    form, wanted = _FORMS.get(parameter.value or ""), parameter.sources
    named = {n: kinds[n] for n, _ in reference_uses([value]) if wanted and n in kinds}
    wrong = [f"${number} is {kind}" for number, kind in named.items() if kind not in wanted]
    odd = [text for text in _literals(value) if form and not form.search(text)]
    return [*wrong, *(f"{text!r} is none" for text in odd)]


def _literals(value: object) -> list[str]:
    """List the texts of an argument that refer to nothing."""
    texts = value if isinstance(value, list) else [value]
    return [t for t in texts if isinstance(t, str) and t and not reference_uses([t])]


def _instead(
    tool: Tool,
    parameter: Parameter,
    value: object,
    kinds: Mapping[int, str],
    tools: Mapping[str, Tool],
) -> tuple[str, ...]:
    """Name the tools to call instead of passing a value; none if nothing speaks against it."""
    if not takes(parameter, value, kinds):
        there = set(kinds.values()) & set(parameter.sources)
        if there and reference_uses([value]):
            return (tool.name,)
        return tuple(name for name, one in tools.items() if one.returns in parameter.sources)
    wanted = [
        form
        for one in tools.values()
        for other in one.parameters
        if tool.returns in other.sources and (form := _FORMS.get(other.value or ""))
    ]
    if parameter.value not in _FORMS and any(
        form.fullmatch(text) for form in wanted for text in _literals(value)
    ):
        return tuple(name for name in tools if name != tool.name)
    return ()
