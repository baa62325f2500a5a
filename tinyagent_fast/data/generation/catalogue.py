"""Tool catalogues: a YAML file that says which tools exist and how people ask for them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tinyagent_fast.data.generation.rules import SLOT, catalogue_problems
from tinyagent_fast.errors import DataError
from tinyagent_fast.plans.tools import PARAMETER_TYPES, Parameter, Tool, signature
from tinyagent_fast.strict_yaml import load_yaml

BUILT_IN_CATALOGUE = Path(__file__).with_name("tinyagent.yaml")
REQUIRED = object()
"""Marks a parameter without a default."""

_DOCUMENT_KEYS = ("name", "tools", "values")
_TOOL_KEYS = ("name", "parameters", "returns", "mention", "phrases", "description", "weight")
_PARAMETER_KEYS = ("name", "type", "value", "follows", "from", "as", "default", "nullable")


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

    @property
    def may_be_left_out(self) -> bool:
        """Whether a phrase need not name it: it has a default, or follows another parameter."""
        return self.default is not REQUIRED or self.value == "end"


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
        return signature(self.plan_tool())

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
    words: Mapping[str, tuple[str | int, ...]] = field(default_factory=dict)

    def providers(self, kind: str) -> list[CatalogueTool]:
        """List the tools whose result is of a kind and that can be mentioned in a phrase."""
        return [t for t in self.tools if t.returns == kind and t.mention is not None]

    @cached_property
    def chain_lengths(self) -> Mapping[str, float]:
        """Calls that a tool's mention needs at least before it, by the tool's name.

        Infinite where every chain of providers comes back to the tool itself.
        """
        lengths: dict[str, float] = {t.name: math.inf for t in self.tools if t.mention is not None}
        for _ in lengths:
            for tool in self.tools:
                if tool.mention is not None:
                    named = {match[1] for match in SLOT.finditer(tool.mention)}
                    slots = [p for p in tool.parameters if p.name in named]
                    lengths[tool.name] = max((self._calls(p, lengths) for p in slots), default=0)
        return lengths

    def calls_before(self, parameter: SlotParameter) -> float:
        """Count the calls that a slot needs at least; 0 if it has literal values."""
        return self._calls(parameter, self.chain_lengths)

    def _calls(self, parameter: SlotParameter, lengths: Mapping[str, float]) -> float:
        if parameter.value is not None:
            return 0
        providers = [tool for kind in parameter.sources for tool in self.providers(kind)]
        # Without any provider the rules report the slot, and it is no part of a circle.
        return min((1 + lengths[tool.name] for tool in providers), default=0)


def load_catalogue(path: Path = BUILT_IN_CATALOGUE) -> Catalogue:
    """Read a catalogue and check it whole, so that generation cannot fail half-way.

    Args:
        path: A YAML file as described in data/README.md.

    Returns:
        The checked catalogue.

    Raises:
        DataError: The file is missing, no YAML, or breaks a rule; all problems are listed.
    """
    try:
        document = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"tool catalogue {path}", f"it cannot be read: {error.strerror}", "check the path"
        ) from error
    except ValueError as error:
        raise DataError(
            f"tool catalogue {path}", f"it is no valid YAML: {error}", "correct the YAML"
        ) from error
    problems: list[str] = []
    catalogue = _read_document(document, path, problems)
    problems += catalogue_problems(catalogue)
    if problems:
        raise DataError(
            f"tool catalogue {path} has {len(problems)} problem(s)",
            "\n       ".join(problems),
            "see data/README.md for the format; the built-in tinyagent.yaml is an example",
        )
    return catalogue


def plan_tools(path: Path | None) -> Mapping[str, Tool] | None:
    """Give the tools that plans may call.

    Args:
        path: A catalogue, or None.

    Returns:
        The catalogue's tools by name; None stands for TinyAgent's own.

    Raises:
        DataError: The catalogue cannot be used.
    """
    if path is None:
        return None
    return {tool.name: tool.plan_tool() for tool in load_catalogue(path).tools}


def _read_document(document: Any, path: Path, problems: list[str]) -> Catalogue:
    tools = document.get("tools") if isinstance(document, dict) else None
    if not isinstance(tools, list) or not tools:
        problems.append("the top level must be a mapping with a list `tools` that is not empty")
        return Catalogue(path.stem, ())
    _unknown_keys(document, _DOCUMENT_KEYS, "the top level", problems)
    read = [_read_tool(raw, index, problems) for index, raw in enumerate(tools)]
    return Catalogue(
        str(document.get("name", path.stem)),
        tuple(tool for tool in read if tool is not None),
        _read_words(document.get("values"), problems),
    )


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
        problems += [f"{where}: {o!r} is no text; put it in quotes" for o in odd]
        if not odd and len({type(entry) for entry in entries}) > 1:
            problems.append(f"{where}: holds texts and numbers; put the numbers in quotes")
        words[str(kind)] = tuple(entries)
    return words


def _read_tool(raw: Any, index: int, problems: list[str]) -> CatalogueTool | None:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        problems.append(f"tools[{index}]: must be a mapping with a `name`")
        return None
    where = raw["name"]
    _unknown_keys(raw, _TOOL_KEYS, where, problems)
    if not _is_list_of_texts(raw.get("phrases")):
        problems.append(f"{where}.phrases: must be a list of sentences that is not empty")
    parameters = [] if raw.get("parameters") is None else raw["parameters"]
    if not isinstance(parameters, list):
        problems.append(f"{where}.parameters: must be a list")
        parameters = []
    description = raw.get("description", [])
    description = [description] if isinstance(description, str) else description
    if description and not _is_list_of_texts(description):
        problems.append(f"{where}.description: must be a text or a list of texts")
    weight = raw.get("weight", 1)
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        problems.append(f"{where}.weight: must be a number of 0 or more, got {weight!r}")
        weight = 1
    mention = _text(raw, "mention", where, problems)
    read = [_read_parameter(p, where, problems) for p in parameters]
    return CatalogueTool(
        name=where,
        parameters=tuple(p for p in read if p is not None),
        returns=_text(raw, "returns", where, problems) or "",
        mention=mention,
        phrases=tuple(raw["phrases"]) if _is_list_of_texts(raw.get("phrases")) else (),
        description=tuple(description) if _is_list_of_texts(description) else (),
        weight=float(weight),
    )


def _read_parameter(raw: Any, tool: str, problems: list[str]) -> SlotParameter | None:
    if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
        problems.append(f"{tool}.parameters: each must be a mapping with a `name`")
        return None
    where = f"{tool}.{raw['name']}"
    _unknown_keys(raw, _PARAMETER_KEYS, where, problems)
    type_name = raw.get("type")
    if type_name not in PARAMETER_TYPES:
        problems.append(f"{where}.type: must be one of {', '.join(PARAMETER_TYPES)}")
        type_name = "str"
    sources = raw.get("from", [])
    sources = [sources] if isinstance(sources, str) else sources
    if "from" in raw and not _is_list_of_texts(sources):
        problems.append(f"{where}.from: must be a kind of result, or a list of them")
        sources = []
    embed = raw.get("as", ["{}"])
    if not _is_list_of_texts(embed) or any("{}" not in text for text in embed):
        problems.append(f"{where}.as: must be a list of texts that contain {{}}")
        embed = ["{}"]
    if not isinstance(raw.get("nullable", False), bool):
        problems.append(f"{where}.nullable: must be true or false")
    return SlotParameter(
        name=raw["name"],
        type=type_name,
        value=_text(raw, "value", where, problems),
        follows=_text(raw, "follows", where, problems),
        sources=tuple(sources),
        embed=tuple(embed),
        default=raw.get("default", REQUIRED),
        nullable=raw.get("nullable") is True,
    )


def _is_list_of_texts(raw: Any) -> bool:
    return (
        isinstance(raw, list) and bool(raw) and all(isinstance(t, str) and t.strip() for t in raw)
    )


def _text(raw: Mapping[str, Any], key: str, where: str, problems: list[str]) -> str | None:
    value = raw.get(key)
    if value is None or (isinstance(value, str) and value.strip() and "\n" not in value):
        return value
    problems.append(f"{where}.{key}: must be one line of text, got {value!r}")
    return None


def _unknown_keys(
    raw: Mapping[str, Any], known: tuple[str, ...], where: str, problems: list[str]
) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
            problems.append(f"{where}: unknown key `{key}`{hint}")
