"""Tool catalogues: a YAML file that says which tools exist and how people ask for them.

A catalogue is checked whole when it is loaded, so that generation cannot fail half-way or write a
plan that says something wrong. Our own checks and not a validation library, which gives no object
when a key is wrong: all problems, those between tools too, are told at once.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from tinyagent_fast.config import typed
from tinyagent_fast.data.generation import phrases
from tinyagent_fast.data.generation.phrases import MOST_CHARACTERS, parse_phrase
from tinyagent_fast.data.generation.values import BUILT_IN_VALUES, INTEGER_KINDS
from tinyagent_fast.errors import DataError, did_you_mean, plainly, shown
from tinyagent_fast.plans.grammar import (
    END_OF_PLAN,
    END_OF_RESPONSE,
    references,
    render_call,
)
from tinyagent_fast.plans.tools import JOIN, PARAMETER_TYPES, Parameter, Tool, accepts
from tinyagent_fast.strict_yaml import load_yaml, read_yaml_text

BUILT_IN_CATALOGUE = Path(__file__).with_name("tinyagent.yaml")
REQUIRED = object()
"""Marks a parameter without a default."""

_NAME = re.compile(r"[^\W\d]\w*")
DERIVED_KINDS = {"end": ("start", "str"), "all_day": ("due", "bool")}
"""Kinds that follow from another parameter: its kind of value, and the type of what follows."""


@dataclass(frozen=True, kw_only=True)
class SlotParameter(Parameter):
    """One parameter of a tool and where its values come from."""

    follows: str | None = None
    embed: tuple[str, ...] = ("{}",)
    unsaid: tuple[str, ...] | None = None
    several: float | None = None
    """Share of lists that name more than one; None leaves it to the mix."""
    default: object = field(default=REQUIRED, hash=False)  # maybe a list

    @property
    def may_be_left_out(self) -> bool:
        """Whether a phrase need not name it: it has a default, or follows from something."""
        derived = self.value in DERIVED_KINDS or self.unsaid is not None
        return self.default is not REQUIRED or derived


@dataclass(frozen=True, kw_only=True)
class CatalogueTool(Tool):
    """One tool, and the wordings that ask for it."""

    parameters: tuple[SlotParameter, ...]
    phrases: tuple[str, ...]
    mention: str | None = None
    again: tuple[str, ...] = ()
    """How a sentence speaks of its result once more."""
    weight: float = 1.0
    lookup: bool = False
    """Nobody wants its result for itself: among several calls, another one uses it."""

    def parameter(self, name: str) -> SlotParameter:
        """Find a parameter by name; phrases were checked, so it exists."""
        return next(p for p in self.parameters if p.name == name)

    @property
    def counted(self) -> bool:
        """Whether a list may name several of its results: they are told apart by what is said."""
        return self.mention is not None and "{" in self.mention


@dataclass(frozen=True)
class Catalogue:
    """All tools of a dataset, in the order in which prompts list them."""

    name: str
    tools: tuple[CatalogueTool, ...]
    words: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, CatalogueTool]:
        """Give the tools by their names."""
        return {tool.name: tool for tool in self.tools}

    @property
    def passed_kinds(self) -> set[str]:
        """Name the kinds whose words a plan can pass; words of others are only said."""
        kinds = {p.value for tool in self.tools for p in tool.parameters if p.value is not None}
        for text in (t for tool in self.tools for t in (*tool.phrases, tool.mention or "")):
            blanks = phrases.blanks(parse_phrase(text))
            kinds |= {blank.manner for blank in blanks if isinstance(blank, phrases.Slot)}
        return kinds

    def providers(self, kind: str) -> list[CatalogueTool]:
        """List the tools whose result is of a kind and that can be mentioned in a phrase."""
        return [tool for tool in self.tools if tool.mention is not None and tool.returns == kind]

    @cached_property
    def chain_lengths(self) -> Mapping[str, float]:
        """Calls that a tool's mention needs at least before it, by the tool's name.

        Infinite where every chain of providers comes back to the tool itself.
        """
        lengths: dict[str, float] = {t.name: math.inf for t in self.tools if t.mention is not None}
        before: dict[str, float] = {}
        while before != lengths:
            before = dict(lengths)
            for tool in self.tools:
                if tool.mention is not None:
                    named = _slots_of(tool.mention)
                    slots = [p for p in tool.parameters if p.name in named]
                    needed = [self.calls_before(slot, lengths) for slot in slots]
                    lengths[tool.name] = max(needed, default=0)
        return lengths

    def calls_before(self, parameter: SlotParameter, lengths: Mapping[str, float]) -> float:
        """Count the calls that a slot needs at least; 0 if it has literal values."""
        if parameter.value is not None:
            return 0
        providers = [tool for kind in parameter.sources for tool in self.providers(kind)]
        # Without any provider the checks report the slot, and it is no part of a circle.
        return min((1 + lengths[tool.name] for tool in providers), default=0)


def _slots_of(mention: str) -> set[str]:
    try:
        blanks = phrases.blanks(parse_phrase(mention))
        return {blank.name for blank in blanks if isinstance(blank, phrases.Slot)}
    except ValueError:
        return set()  # which the checks report


@typed
def load_catalogue(path: str | Path | None = None) -> Catalogue:
    """Read a catalogue as described in data/README.md, or TinyAgent's own, and check it whole.

    Its `by_name` are the tools as plans know them, for scoring and drawing.

    Raises:
        DataError: The file is missing, no YAML, or breaks a rule; all problems are listed.
    """
    path = BUILT_IN_CATALOGUE if path is None else Path(path)
    if path.suffix == ".py":
        raise DataError(
            f"tool catalogue {path}",
            "it is a Python file: a catalogue (YAML) is wanted here, and not functions",
            f"make one of its functions with `tinyagent-fast tools check {path} --draft "
            f"{path.with_suffix('.yaml')}` and edit its phrases and words (docs/own_tools.md)",
        )
    try:
        document = load_yaml(read_yaml_text(path))
    except OSError as error:
        raise DataError(
            f"tool catalogue {path}", f"it cannot be read: {plainly(error)}", "check the path"
        ) from error
    except ValueError as error:
        raise DataError(
            f"tool catalogue {path}", f"it is no valid YAML: {error}", "correct the YAML"
        ) from error
    problems = list(_half_characters(document, ""))
    catalogue = _read_document(document, path, problems)
    if problems or catalogue is None:
        raise DataError(
            f"tool catalogue {path} has {len(problems)} problem(s)",
            "\n       ".join(problems),
            "see data/README.md for the format; the built-in tinyagent.yaml is an example",
        )
    return catalogue


def plan_tools(path: Path | None) -> Mapping[str, Tool] | None:
    """Give a catalogue's tools by name; None, which stands for TinyAgent's own tools, stays None.

    Raises:
        DataError: The catalogue cannot be used.
    """
    if path is None:
        return None
    return load_catalogue(path).by_name


# --- from YAML to the dataclasses: every key has a right type


class _Mapping:
    """One mapping of the file; what is wrong with a key becomes a problem with its place."""

    def __init__(
        self, raw: Mapping[str, Any], where: str, known: Sequence[str], problems: list[str]
    ) -> None:
        self.raw, self.where, self.problems = raw, where, problems
        for key in raw:
            if key not in known:
                hint = did_you_mean(key, known) or f"; known: {', '.join(known)}"
                problems.append(f"{where}: unknown key `{key}`{hint}")

    def name(self) -> str:
        """Return the name, or a stand-in for one that neither prompt nor plan could use."""
        name: str = self.raw["name"]
        if _NAME.fullmatch(name) and name != JOIN:
            return name
        self.problems.append(
            f"{self.where}: a name is a word of letters, digits and _, and not `{JOIN}`"
        )
        return "unnamed"

    def take(self, key: str, wanted: str, fits: Callable[[Any], bool], default: Any) -> Any:
        """Return a value that fits, else the default; without a default, it must be there."""
        value = self.raw.get(key)
        if fits(value):
            return value
        if key not in self.raw and default is not None:
            return default
        self.problems.append(f"{self.where}.{key}: must be {wanted}, got {shown(value)}")
        return default


def _is_line(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value.strip()) and "\n" not in value)


def _are_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else ()
    return bool(texts) and all(isinstance(text, str) and text.strip() for text in texts)


def _is_share(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_text_or_texts(value: Any) -> bool:
    return _are_texts([value]) or _are_texts(value)


def _tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _named(raw: Any) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("name"), str)


def _read_document(document: Any, path: Path, problems: list[str]) -> Catalogue | None:
    tools = document.get("tools") if isinstance(document, dict) else None
    if not isinstance(tools, list) or not tools:
        problems.append("the top level must be a mapping with a list `tools` that is not empty")
        return None
    _Mapping(document, "the top level", ("name", "tools", "values"), problems)
    read = []
    for index, raw in enumerate(tools):
        if _named(raw):
            read.append(_read_tool(raw, problems))
        else:
            problems.append(f"tools[{index}]: must be a mapping with a `name`")
    words = _read_words(document.get("values"), problems)
    catalogue = Catalogue(str(document.get("name", path.stem)), tuple(read), words)
    problems += _catalogue_problems(catalogue)
    return catalogue


def _read_words(raw: Any, problems: list[str]) -> dict[str, tuple[str | int, ...]]:
    """Read the word lists; YAML turns a bare `yes`, `1.5` or date into something else."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        problems.append("values: must be a mapping of a kind to a list of words")
        return {}
    words: dict[str, tuple[str | int, ...]] = {}
    for kind, entries in raw.items():
        where = f"values.{kind}"
        words[str(kind)] = ()
        if not isinstance(entries, list) or not entries:
            problems.append(f"{where}: must be a list of words that is not empty")
            continue
        odd = [entry for entry in entries if type(entry) not in (str, int)]
        problems += [f"{where}: {shown(o)} is no text; put it in quotes" for o in odd]
        if not odd and len({type(entry) for entry in entries}) > 1:
            problems.append(f"{where}: holds texts and numbers; put the numbers in quotes")
        words[str(kind)] = tuple(entries)
    return words


def _read_tool(raw: dict[str, Any], problems: list[str]) -> CatalogueTool:
    tool = _Mapping(raw, raw["name"], [f.name for f in fields(CatalogueTool)], problems)
    parameters = tool.take("parameters", "a list", lambda v: isinstance(v, list | None), ()) or ()
    if not all(map(_named, parameters)):
        problems.append(f"{tool.where}.parameters: each must be a mapping with a `name`")
    sentences = tool.take("phrases", "a list of sentences that is not empty", _are_texts, None)
    lines = tool.take("description", "a text or a list of texts", _is_text_or_texts, ())
    weight = tool.take(
        "weight",
        "a number of 0 or more",
        lambda value: type(value) in (int, float) and 0 <= value <= sys.float_info.max,
        1,
    )
    read = [_read_parameter(p, tool.where, problems) for p in parameters if _named(p)]
    twice = _repeated(p.name for p in read)
    problems += [f"{tool.where}.{name}: defined twice" for name in twice]
    return CatalogueTool(
        name=tool.name(),
        phrases=tuple(sentences or ()),
        description=_tuple(lines),
        mention=tool.take("mention", "one line of text", _is_line, None),
        again=_tuple(tool.take("again", "a text or a list of texts", _is_text_or_texts, ())),
        returns=tool.take("returns", "one line of text", _is_line, None) or "",
        parameters=tuple({p.name: p for p in read}.values()),
        weight=float(weight),
        lookup=tool.take("lookup", "true or false", lambda v: type(v) is bool, False),
    )


def _read_parameter(raw: dict[str, Any], tool: str, problems: list[str]) -> SlotParameter:
    known = ["name", "type", "value", "follows", "from", "as", "unsaid", "several"]
    known += ["default", "nullable"]
    parameter = _Mapping(raw, f"{tool}.{raw['name']}", known, problems)
    type_name = raw.get("type")
    if type_name not in PARAMETER_TYPES:
        problems.append(f"{parameter.where}.type: must be one of {', '.join(PARAMETER_TYPES)}")
    unsaid = parameter.take("unsaid", "a list of names", _are_names, None)
    sources = parameter.take("from", "a kind of result, or a list of them", _is_text_or_texts, ())
    embed = parameter.take(
        "as",
        "a list of texts that contain {}",
        lambda texts: _are_texts(texts) and all("{}" in text for text in texts),
        ("{}",),
    )
    return SlotParameter(
        parameter.name(),
        type_name if type_name in PARAMETER_TYPES else "str",
        nullable=parameter.take("nullable", "true or false", lambda v: type(v) is bool, False),
        value=parameter.take("value", "one line of text", _is_line, None),
        follows=parameter.take("follows", "one line of text", _is_line, None),
        sources=_tuple(sources),
        embed=tuple(embed),
        several=parameter.take("several", "a share from 0 to 1", _is_share, None),
        unsaid=None if unsaid is None else tuple(unsaid),
        default=raw.get("default", REQUIRED),
    )


# --- what holds between tools, parameters, phrases and values


def _catalogue_problems(catalogue: Catalogue) -> list[str]:
    problems = []
    weight = sum(tool.weight for tool in catalogue.tools)
    if weight == 0:
        problems.append("every tool has weight 0, so none would ever be asked for")
    if weight == math.inf:
        problems.append("the weights of all tools add up to no number; make them smaller")
    problems += [f"{name}: defined twice" for name in _repeated(t.name for t in catalogue.tools)]
    problems += [
        f"values.{kind}: the name stands for what follows from the {begins}; take another one"
        for kind, (begins, _) in DERIVED_KINDS.items()
        if kind in catalogue.words
    ]
    problems += [
        f"values.{kind}: {shown(word)} {problem}"
        for kind, words in catalogue.words.items()
        for word in words
        if isinstance(word, str | int) and (problem := _word_problem(word))
    ]
    taken = {kind for t in catalogue.tools for p in t.parameters for kind in p.sources}
    problems += [
        f"{tool.name}.lookup: no parameter takes its result by `from`, or it has no `mention`"
        for tool in catalogue.tools
        if tool.lookup and (tool.mention is None or tool.returns not in taken)
    ]
    for tool in catalogue.tools:
        for parameter in tool.parameters:
            where = f"{tool.name}.{parameter.name}"
            found = _parameter_problems(catalogue, tool, parameter)
            problems += [f"{where}{problem}" for problem in found]
        for phrase in (*tool.phrases, *([tool.mention] if tool.mention else [])):
            problems += [
                f"{tool.name}: phrase {phrase!r} {problem}"
                for problem in _phrase_problems(catalogue, tool, phrase)
            ]
    return problems


def _parameter_problems(
    catalogue: Catalogue, tool: CatalogueTool, parameter: SlotParameter
) -> list[str]:
    problem = _value_problem(catalogue, tool, parameter)
    problems = [problem] if problem else []
    for kind in parameter.sources:
        if not catalogue.providers(kind):
            kinds = {t.returns for t in catalogue.tools if t.mention is not None}
            problems.append(
                f".from: no tool with a `mention` returns {kind!r}{did_you_mean(kind, kinds)}"
            )
    if catalogue.calls_before(parameter, catalogue.chain_lengths) == math.inf:
        problems.append(
            ".from: its providers need one another in a circle, so no plan can begin; "
            "give a parameter of the circle a `value`"
        )
    if parameter.embed != ("{}",) and (parameter.type != "str" or not parameter.sources):
        problems.append(".as: only for parameters of type str that have `from`")
    problems += [
        f".as: {shown(text)} {problem}"
        for text in parameter.embed
        if (problem := _argument_problem(text.replace("{}", "")))
    ]
    default = parameter.default
    if default is REQUIRED or parameter.value in DERIVED_KINDS:
        return problems
    if not accepts(parameter, default):
        wanted = f"of type {parameter.type}" + ("" if parameter.nullable else " and not null")
        problems.append(f".default: must be {wanted}, got {shown(default)}")
    elif problem := _argument_problem(default):
        problems.append(f".default: {shown(default)} {problem}")
    return problems


def _word_problem(word: str | int) -> str | None:
    if isinstance(word, str) and not word.strip():
        return "is blank, so a request would say nothing where the plan passes it"
    return _argument_problem(word)


def _argument_problem(value: object) -> str | None:
    """Say why a value of a right type cannot be an argument of a plan that is trained on."""
    if references([value]):
        return "would be read as the result of a call; write no $ and digits"
    try:
        written = render_call("", [value])
    except ValueError:
        return f"is no number that a plan can have: they lie within {2**63 - 1} of 0"
    if stop := next((s for s in (END_OF_PLAN, END_OF_RESPONSE) if s in written), None):
        return f"has {stop} in it, where a model stops writing"
    if len(written) - len("()") > MOST_CHARACTERS:
        return f"takes more than {MOST_CHARACTERS:,} characters in a plan"
    return None


def _half_characters(value: object, where: str) -> Iterator[str]:
    """Find texts that no file can hold, with half of an emoji, say, as JSON escapes it."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        place = where or "the top level"
        yield f"{place}: {shown(value)} has half a character; write the whole one"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _half_characters(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _half_characters(key, where)
            yield from _half_characters(item, f"{where}.{key}" if where else str(key))


def _value_problem(
    catalogue: Catalogue, tool: CatalogueTool, parameter: SlotParameter
) -> str | None:
    value, known = parameter.value, {*catalogue.words, *BUILT_IN_VALUES, *DERIVED_KINDS}
    if value in DERIVED_KINDS:
        kind, type_name = DERIVED_KINDS[value]
        begins = next((p for p in tool.parameters if p.name == parameter.follows), None)
        if begins is None:
            return f".follows: must name the parameter that holds the {kind}"
        never_left_out = begins.default is REQUIRED and (kind == "start" or begins.unsaid is None)
        if (
            (begins.value, begins.type, begins.sources) != (kind, "str", ())
            or parameter.type != type_name
            or not never_left_out
            or kind in catalogue.words
        ):
            return (
                f".follows: {begins.name!r} must be of type str, have the built-in value `{kind}`, "
                f"no `from` and no default, and what follows must be of type {type_name}"
            )
        return None
    if parameter.follows is not None:
        return f".follows: only goes with `value: {'` or `'.join(DERIVED_KINDS)}`"
    if value is None:
        return None
    if value not in known:
        near = did_you_mean(value, known)
        return f".value: unknown kind {value!r}{near}; known: {', '.join(sorted(known))}"
    if _gives_numbers(catalogue, value) != (parameter.type == "int") or parameter.type == "bool":
        made = "numbers" if _gives_numbers(catalogue, value) else "texts"
        return f".value: {value!r} gives {made}, which are no {parameter.type}"
    return None


def _gives_numbers(catalogue: Catalogue, kind: str) -> bool:
    words = catalogue.words.get(kind)
    return isinstance(words[0], int) if words else kind in INTEGER_KINDS


def _phrase_problems(catalogue: Catalogue, tool: CatalogueTool, text: str) -> list[str]:
    try:
        phrase = parse_phrase(text)
    except ValueError as error:
        return [str(error)]
    problems = []
    if phrases.says_nothing(phrase):
        problems.append("has nothing outside its optional parts")
    kinds = {*catalogue.words, *BUILT_IN_VALUES}
    blanks = list(phrases.blanks(phrase))
    problems += [
        f"says <{kind}>, which is no kind of value{did_you_mean(kind, kinds)}"
        for kind in sorted({b.name for b in blanks if isinstance(b, phrases.Kind)} - kinds)
    ]
    names = [p.name for p in tool.parameters]
    slots = [blank for blank in blanks if isinstance(blank, phrases.Slot)]
    said, always = {slot.name for slot in slots}, phrases.always(phrase)
    twice = sorted(name for name, count in phrases.most(phrase).items() if count > 1)
    problems += [f"names {{{name}}} twice" for name in twice]
    problems += [
        f"names no parameter {name!r}{did_you_mean(name, names)}"
        for name in sorted(said - set(names))
    ]
    for parameter in tool.parameters:
        slot = f"{{{parameter.name}}}"
        if not parameter.may_be_left_out and parameter.name not in always:
            problems.append(f"leaves out {slot}, which has no default")
        if parameter.name not in said:
            continue
        manners = {s.manner for s in slots if s.name == parameter.name} - {""}
        if parameter.value in DERIVED_KINDS:
            problems.append(f"names {slot}, which follows from another parameter")
        elif parameter.value is None and not parameter.sources:
            problems.append(f"names {slot}, which has neither `value` nor `from`")
        else:
            problems += [
                problem
                for manner in sorted(manners)
                if (problem := _manner_problem(catalogue, parameter, manner))
            ]
    return problems


def _manner_problem(catalogue: Catalogue, parameter: SlotParameter, manner: str) -> str | None:
    slot = f"{{{parameter.name}}}"
    if manner in ("literal", "said"):
        return None if parameter.value else f"wants a {manner} {slot}, which has no `value`"
    if manner in parameter.sources:
        return None
    kinds = {*catalogue.words, *BUILT_IN_VALUES}
    if manner not in kinds:
        near = did_you_mean(manner, {"literal", "said", *kinds, *parameter.sources})
        return f"wants {slot} as {manner!r}, which is no kind{near}"
    if _gives_numbers(catalogue, manner) != (parameter.type == "int") or parameter.type == "bool":
        return f"wants {slot} as {manner!r}, which gives no {parameter.type}"
    return None


def _repeated(names: Iterable[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)
