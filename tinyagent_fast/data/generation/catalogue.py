"""Tool catalogues: a YAML file that says which tools exist and how people ask for them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyagent_fast.data.generation.values import BUILT_IN_VALUES
from tinyagent_fast.errors import DataError
from tinyagent_fast.plans.tools import Parameter, Tool

BUILT_IN_CATALOGUE = Path(__file__).with_name("tinyagent.yaml")
PARAMETER_TYPES = ("str", "int", "bool", "list[str]")
REQUIRED = object()
"""Marks a parameter without a default."""

_SLOT = re.compile(r"\{(\w+)(:literal)?\}")


@dataclass(frozen=True, kw_only=True)
class SlotParameter:
    """One parameter of a tool and where its values come from."""

    name: str
    type: str
    value: str | None = None
    follows: str | None = None
    sources: tuple[str, ...] = ()
    embed: tuple[str, ...] = ("{}",)
    default: object = REQUIRED
    nullable: bool = False


@dataclass(frozen=True, kw_only=True)
class CatalogueTool:
    """One tool: its signature, its description and the wordings that ask for it."""

    name: str
    parameters: tuple[SlotParameter, ...]
    returns: str
    phrases: tuple[str, ...]
    mention: str | None = None
    description: tuple[str, ...] = ()
    weight: float = 1.0

    def parameter(self, name: str) -> SlotParameter:
        """Find a parameter by name; phrases were checked, so it exists."""
        return next(p for p in self.parameters if p.name == name)

    @property
    def signature(self) -> str:
        """The tool as a prompt shows it."""
        arguments = ", ".join(f"{p.name}: {p.type}" for p in self.parameters)
        return f"{self.name}({arguments}) -> str"

    def plan_tool(self) -> Tool:
        """Give the tool as the scorer knows it: name, parameters and their types.

        Returns:
            The tool without phrases.
        """
        parameters = tuple(Parameter(p.name, p.type, nullable=p.nullable) for p in self.parameters)
        return Tool(self.name, parameters, description=self.description)


@dataclass(frozen=True)
class Catalogue:
    """All tools of a dataset, in the order in which prompts list them."""

    name: str
    tools: tuple[CatalogueTool, ...]
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def providers(self, kind: str) -> list[CatalogueTool]:
        """List the tools whose result is of a kind and that can be mentioned in a phrase."""
        return [t for t in self.tools if t.returns == kind and t.mention is not None]


def load_catalogue(path: Path = BUILT_IN_CATALOGUE) -> Catalogue:
    """Read a catalogue and check it whole, so that generation cannot fail half-way.

    Args:
        path: A YAML file as described in data/README.md.

    Returns:
        The checked catalogue.

    Raises:
        DataError: The file is missing, no YAML, or breaks a rule; all problems are listed.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"tool catalogue {path}", f"it cannot be read: {error.strerror}", "check the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(
            f"tool catalogue {path}", f"it is no valid YAML: {error}", "correct the YAML"
        ) from error
    problems: list[str] = []
    catalogue = _read_document(document, path, problems)
    if not problems:
        problems += _check_links(catalogue)
    if problems:
        raise DataError(
            f"tool catalogue {path} has {len(problems)} problem(s)",
            "\n       ".join(problems),
            "see data/README.md for the format; the built-in tinyagent.yaml is an example",
        )
    return catalogue


def _read_document(document: Any, path: Path, problems: list[str]) -> Catalogue:
    if not isinstance(document, dict) or not isinstance(document.get("tools"), list):
        problems.append("the top level must be a mapping with a list `tools`")
        return Catalogue(path.stem, ())
    _unknown_keys(document, ("name", "tools", "values"), "the top level", problems)
    words = {}
    for kind, entries in (document.get("values") or {}).items():
        if not isinstance(entries, list) or not entries:
            problems.append(f"values.{kind}: must be a list of words that is not empty")
            continue
        words[str(kind)] = tuple(str(entry) for entry in entries)
    tools = tuple(
        tool
        for index, raw in enumerate(document["tools"])
        if (tool := _read_tool(raw, index, problems)) is not None
    )
    return Catalogue(str(document.get("name", path.stem)), tools, words)


def _read_tool(raw: Any, index: int, problems: list[str]) -> CatalogueTool | None:
    where = f"tools[{index}]"
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        problems.append(f"{where}: must be a mapping with a `name`")
        return None
    where = raw["name"]
    keys = ("name", "parameters", "returns", "mention", "phrases", "description", "weight")
    _unknown_keys(raw, keys, where, problems)
    if not re.fullmatch(r"[A-Za-z_]\w*", where) or where == "join":
        problems.append(f"{where}: a name is a word of letters, digits and _, and not `join`")
    phrases = raw.get("phrases")
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases) or not phrases:
        problems.append(f"{where}.phrases: must be a list of sentences that is not empty")
        phrases = []
    if not isinstance(raw.get("returns", ""), str):
        problems.append(f"{where}.returns: must be a word or two for the kind of result")
    weight = raw.get("weight", 1)
    if not isinstance(weight, int | float) or weight < 0:
        problems.append(f"{where}.weight: must be a number of 0 or more, got {weight!r}")
        weight = 1
    parameters = tuple(_read_parameter(p, where, problems) for p in raw.get("parameters") or [])
    return CatalogueTool(
        name=where,
        parameters=tuple(p for p in parameters if p is not None),
        returns=str(raw.get("returns", "")),
        mention=raw.get("mention"),
        phrases=tuple(phrases),
        description=tuple(str(line) for line in raw.get("description") or ()),
        weight=float(weight),
    )


def _read_parameter(raw: Any, tool: str, problems: list[str]) -> SlotParameter | None:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        problems.append(f"{tool}.parameters: each must be a mapping with a `name`")
        return None
    where = f"{tool}.{raw['name']}"
    keys = ("name", "type", "value", "follows", "from", "as", "default", "nullable")
    _unknown_keys(raw, keys, where, problems)
    if raw.get("type") not in PARAMETER_TYPES:
        problems.append(f"{where}.type: must be one of {', '.join(PARAMETER_TYPES)}")
    sources = raw.get("from", ())
    embed = raw.get("as", ["{}"])
    if not isinstance(embed, list) or any("{}" not in str(text) for text in embed):
        problems.append(f"{where}.as: must be a list of texts that contain {{}}")
    return SlotParameter(
        name=raw["name"],
        type=str(raw.get("type")),
        value=raw.get("value"),
        follows=raw.get("follows"),
        sources=(sources,) if isinstance(sources, str) else tuple(sources),
        embed=tuple(str(text) for text in embed),
        default=raw.get("default", REQUIRED),
        nullable=bool(raw.get("nullable", False)),
    )


def _unknown_keys(
    raw: Mapping[str, Any], known: tuple[str, ...], where: str, problems: list[str]
) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
            problems.append(f"{where}: unknown key `{key}`{hint}")


def _check_links(catalogue: Catalogue) -> list[str]:
    problems = []
    names = [tool.name for tool in catalogue.tools]
    problems += [
        f"{name}: defined twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    for tool in catalogue.tools:
        for parameter in tool.parameters:
            problems += _check_parameter(catalogue, tool, parameter)
        problems += _check_phrases(tool)
    return problems


def _check_parameter(
    catalogue: Catalogue, tool: CatalogueTool, parameter: SlotParameter
) -> list[str]:
    where = f"{tool.name}.{parameter.name}"
    problems = []
    known = sorted({*catalogue.words, *BUILT_IN_VALUES, "end"})
    if parameter.value is not None and parameter.value not in known:
        problems.append(
            f"{where}.value: unknown kind {parameter.value!r}; known: {', '.join(known)}"
        )
    if parameter.value == "end" and parameter.follows not in [p.name for p in tool.parameters]:
        problems.append(f"{where}.follows: must name the parameter that holds the start")
    for kind in parameter.sources:
        if not catalogue.providers(kind):
            problems.append(f"{where}.from: no tool with a `mention` returns {kind!r}")
    return problems


def _check_phrases(tool: CatalogueTool) -> list[str]:
    problems = []
    names = {p.name for p in tool.parameters}
    for phrase in (*tool.phrases, *([tool.mention] if tool.mention else [])):
        slots = {match[1] for match in _SLOT.finditer(phrase)}
        always = {m[1] for m in _SLOT.finditer(re.sub(r"\[[^\]]*\]", "", phrase))}
        problems += [
            f"{tool.name}: phrase {phrase!r} names no parameter {s!r}" for s in slots - names
        ]
        for parameter in tool.parameters:
            fillable = parameter.default is not REQUIRED or parameter.value == "end"
            if not fillable and parameter.name not in always:
                problems.append(
                    f"{tool.name}: phrase {phrase!r} leaves out {{{parameter.name}}}, "
                    "which has no default"
                )
        if phrase.count("[") != phrase.count("]"):
            problems.append(f"{tool.name}: phrase {phrase!r} has unbalanced brackets")
    return problems
