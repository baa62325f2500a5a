"""The rules of a tool catalogue: what would make generation fail, or a plan say something wrong.

`catalogue.load_catalogue` reads the YAML and asks here for everything that holds between tools,
parameters, phrases and values.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tinyagent_fast.data.generation.values import BUILT_IN_VALUES, INTEGER_KINDS
from tinyagent_fast.plans.grammar import references
from tinyagent_fast.plans.tools import JOIN, Parameter, accepts

if TYPE_CHECKING:
    from tinyagent_fast.data.generation.catalogue import Catalogue, CatalogueTool, SlotParameter

SLOT = re.compile(r"\{(\w+)(:literal)?\}")
"""A slot of a phrase, and whether it takes literal values only."""

_NAME = re.compile(r"[^\W\d]\w*")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")


def catalogue_problems(catalogue: Catalogue) -> list[str]:
    """Check all that holds between the parts of a catalogue.

    Args:
        catalogue: As read; parts that could not be read are left out of it.

    Returns:
        Every problem as one line that begins with the place; none for a good catalogue.
    """
    problems = []
    if catalogue.tools and not any(tool.weight > 0 for tool in catalogue.tools):
        problems.append("every tool has weight 0, so none would ever be asked for")
    names = [tool.name for tool in catalogue.tools]
    problems += [f"{name}: defined twice" for name in _repeated(names)]
    problems += _word_problems(catalogue)
    for tool in catalogue.tools:
        if not _NAME.fullmatch(tool.name) or tool.name == JOIN:
            problems.append(
                f"{tool.name}: a name is a word of letters, digits and _, and not `{JOIN}`"
            )
        problems += [
            f"{tool.name}.{name}: defined twice"
            for name in _repeated([p.name for p in tool.parameters])
        ]
        for parameter in tool.parameters:
            problems += _parameter_problems(catalogue, tool, parameter)
        problems += _phrase_problems(tool)
    return problems


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _word_problems(catalogue: Catalogue) -> list[str]:
    problems = []
    if "end" in catalogue.words:
        problems.append("values.end: the name stands for the end of an event; take another one")
    for kind, words in catalogue.words.items():
        problems += [
            f"values.{kind}: {word!r} would be read as the result of a call; write no $ and digits"
            for word in words
            if references([word])
        ]
    return problems


def _parameter_problems(
    catalogue: Catalogue, tool: CatalogueTool, parameter: SlotParameter
) -> list[str]:
    where = f"{tool.name}.{parameter.name}"
    problems = []
    if not _NAME.fullmatch(parameter.name):
        problems.append(f"{where}: a name is a word of letters, digits and _")
    problems += _value_problems(catalogue, tool, parameter, where)
    for kind in parameter.sources:
        if not catalogue.providers(kind):
            kinds = {t.returns for t in catalogue.tools if t.mention is not None}
            problems.append(
                f"{where}.from: no tool with a `mention` returns {kind!r}{_hint(kind, kinds)}"
            )
    if parameter.sources and catalogue.calls_before(parameter) == math.inf:
        problems.append(
            f"{where}.from: its providers need one another in a circle, so no plan can begin; "
            "give a parameter of the circle a `value`"
        )
    if parameter.embed != ("{}",) and (parameter.type != "str" or not parameter.sources):
        problems.append(f"{where}.as: only for parameters of type str that have `from`")
    if references(text.replace("{}", "") for text in parameter.embed):
        problems.append(f"{where}.as: has a $ and digits, which name the result of a call")
    if parameter.may_be_left_out and parameter.value != "end":
        known = Parameter("p", parameter.type, nullable=parameter.nullable)
        if not accepts(known, parameter.default) or references([parameter.default]):
            wanted = f"of type {parameter.type}" + ("" if parameter.nullable else " and not null")
            problems.append(f"{where}.default: must be {wanted}, got {parameter.default!r}")
    return problems


def _value_problems(
    catalogue: Catalogue, tool: CatalogueTool, parameter: SlotParameter, where: str
) -> list[str]:
    value, known = parameter.value, {*catalogue.words, *BUILT_IN_VALUES, "end"}
    if value == "end":
        start = next((p for p in tool.parameters if p.name == parameter.follows), None)
        if start is None:
            return [f"{where}.follows: must name the parameter that holds the start"]
        if (start.value, start.type, start.sources) != ("start", "str", ()) or (
            start.may_be_left_out or "start" in catalogue.words or parameter.type != "str"
        ):
            return [
                f"{where}.follows: both must be of type str, and {start.name!r} must have the "
                "built-in value `start`, no `from` and no default"
            ]
        return []
    if parameter.follows is not None:
        return [f"{where}.follows: only goes with `value: end`"]
    if value is None:
        return []
    if value not in known:
        return [
            f"{where}.value: unknown kind {value!r}{_hint(value, known)}; "
            f"known: {', '.join(sorted(known))}"
        ]
    words = catalogue.words.get(value)
    is_number = isinstance(words[0], int) if words else value in INTEGER_KINDS
    if is_number != (parameter.type == "int") or parameter.type == "bool":
        made = "numbers" if is_number else "texts"
        return [f"{where}.value: {value!r} gives {made}, which are no {parameter.type}"]
    return []


def _phrase_problems(tool: CatalogueTool) -> list[str]:
    problems = []
    names = [p.name for p in tool.parameters]
    for phrase in (*tool.phrases, *([tool.mention] if tool.mention else [])):
        where = f"{tool.name}: phrase {phrase!r}"
        always_text = _OPTIONAL.sub("", phrase)
        if re.search(r"[\[\]]", always_text):
            problems.append(f"{where} has unbalanced or nested brackets")
        if re.search(r"[{}]", SLOT.sub("", phrase)):
            problems.append(f"{where} has a brace that is no {{slot}} and no {{slot:literal}}")
        if not always_text.strip():
            problems.append(f"{where} has nothing outside its optional parts")
        slots = [match[1] for match in SLOT.finditer(phrase)]
        always = [match[1] for match in SLOT.finditer(always_text)]
        problems += [f"{where} names {{{slot}}} twice" for slot in _repeated(slots)]
        problems += [
            f"{where} names no parameter {slot!r}{_hint(slot, names)}"
            for slot in sorted(set(slots) - set(names))
        ]
        literal = [match[1] for match in SLOT.finditer(phrase) if match[2]]
        for parameter in tool.parameters:
            slot = f"{{{parameter.name}}}"
            if not parameter.may_be_left_out and parameter.name not in always:
                problems.append(f"{where} leaves out {slot}, which has no default")
            if parameter.name not in slots:
                continue
            if parameter.value == "end":
                problems.append(f"{where} names {slot}, which follows from another parameter")
            elif parameter.value is None and not parameter.sources:
                problems.append(f"{where} names {slot}, which has neither `value` nor `from`")
            elif parameter.value is None and parameter.name in literal:
                problems.append(f"{where} wants a literal {slot}, which has no `value`")
    return problems


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
