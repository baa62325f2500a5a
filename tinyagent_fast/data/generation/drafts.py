"""A first catalogue for tools that are there as functions: complete, and meant to be edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from tinyagent_fast.agent.tools import RunnableTool
from tinyagent_fast.data.generation.catalogue import DERIVED_KINDS
from tinyagent_fast.data.generation.values import BUILT_IN_VALUES, INTEGER_KINDS
from tinyagent_fast.plans.tools import Parameter

_HEAD = """\
# A first catalogue, made from functions. Edit it until people would talk so: phrases, words in
# `values`, and `from` where a parameter takes what another tool gives (data/README.md).
"""


def draft_catalogue(name: str, tools: Mapping[str, RunnableTool]) -> str:
    """Write a catalogue as YAML, with a phrase for each tool and a word list for each text.

    Tools that only look something up can be mentioned in other requests.
    """
    values: dict[str, list[str]] = {}
    made = [_tool(tool, values) for tool in tools.values()]
    document = {"name": name, "values": values, "tools": made}
    if not values:
        del document["values"]
    return _HEAD + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)


def _tool(tool: RunnableTool, values: dict[str, list[str]]) -> dict[str, Any]:
    defaults = dict(tool.defaults)
    parameters, slots, always = [], [], []
    for parameter in tool.tool.parameters:
        entry: dict[str, Any] = {"name": parameter.name, "type": parameter.type}
        if parameter.nullable:
            entry["nullable"] = True
        kind = _kind(parameter, tool.name, values)
        if kind is not None:
            entry["value"] = kind
            slots.append(parameter.name)
            if kind not in BUILT_IN_VALUES and kind not in values:
                values[kind] = list(parameter.choices) or [f"some {kind}", f"other {kind}"]
        if parameter.name in defaults or kind is None:
            entry["default"] = defaults.get(parameter.name, False)
        else:
            always.append(parameter.name)
        parameters.append(entry)
    words = tool.name.replace("_", " ")
    wanted = "".join(f" {{{name}}}" for name in slots if name in always)
    optional = "".join(f"[ with {name} {{{name}}}]" for name in slots if name not in always)
    made: dict[str, Any] = {
        "name": tool.name,
        "description": list(tool.tool.description) or [words],
        "parameters": parameters,
        "returns": f"{words} result",
        "phrases": [f"{words}{wanted}{optional}"],
    }
    if not tool.changes:
        made["mention"] = f"the result of {words}{wanted}"
    return made


def _kind(parameter: Parameter, tool: str, values: Mapping[str, list[str]]) -> str | None:
    """Choose where a parameter's values come from; None for truth values, which have a default."""
    name, choices = parameter.name, list(parameter.choices)
    if choices:  # of a kind that gives just these
        free = name not in BUILT_IN_VALUES | DERIVED_KINDS.keys()
        return name if free and values.get(name, choices) == choices else f"{tool}_{name}"
    if parameter.type == "bool":
        return None
    if parameter.type == "int":
        return name if name in INTEGER_KINDS else "number"
    return "text" if name in INTEGER_KINDS | DERIVED_KINDS.keys() else name
