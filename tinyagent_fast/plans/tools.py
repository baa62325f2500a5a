"""The tools a plan may call: names and parameters.

The grammar of plans knows nothing about tools; scoring checks the calls of a plan against them. A
dataset may bring tools of its own; the 16 tools of TinyAgent are the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from tinyagent_fast.errors import DataError, count_of

JOIN = "join"
"""Name of the call that ends every plan; it is part of the grammar, not a tool."""

PARAMETER_TYPES = ("str", "int", "bool", "list[str]")
"""The types a parameter may have, spelled as they are printed in a prompt."""

_WHOLE_REFERENCE = re.compile(r"\$(?:[0-9]+|\{[0-9]+\})")
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Parameter:
    """One positional parameter of a tool."""

    name: str
    type: str
    nullable: bool = field(default=False, kw_only=True)
    value: str | None = field(default=None, kw_only=True)
    """The kind of its literal values, such as `email`; None if that is not known."""
    sources: tuple[str, ...] = field(default=(), kw_only=True)
    """Kinds of results that it takes, as `Tool.returns` names them; none if they are not known."""
    choices: tuple[str, ...] = field(default=(), kw_only=True)
    """The texts that it may be; none if any will do."""

    @property
    def wanted(self) -> str:
        """Say what it must be, for one who has to correct a call: `int` or `one of day, night`."""
        kind = f"one of {', '.join(self.choices)}" if self.choices else self.type
        return f"{kind} or None" if self.nullable else kind

    def __post_init__(self) -> None:
        """Refuse a name or type that no prompt and no plan could use."""
        if not _NAME.fullmatch(self.name):
            raise DataError(
                f"parameter name {self.name!r}",
                "a parameter is printed in the tool's signature and must be an identifier",
                "use letters, digits and underscores only",
            )
        if self.type not in PARAMETER_TYPES:
            raise DataError(
                f"parameter {self.name!r} has type {self.type!r}",
                f"argument checks know only {', '.join(PARAMETER_TYPES)}",
                "use the nearest of these types",
            )
        if odd := [one for one in self.choices if _WHOLE_REFERENCE.fullmatch(one)]:
            raise DataError(
                f"parameter {self.name!r} may be {', '.join(map(repr, odd))}",
                "in a plan that is the result of an earlier call",
                "give another text, such as one with a word before the number",
            )


@dataclass(frozen=True)
class Tool:
    """One tool; every one gives a text back."""

    name: str
    parameters: tuple[Parameter, ...]
    description: tuple[str, ...] = field(default=(), kw_only=True)
    """What a prompt says of it, one entry per line."""
    returns: str = field(default="", kw_only=True)
    """The kind of its result, such as `email address`."""

    def __post_init__(self) -> None:
        """Refuse a tool that could not be called in a plan."""
        if not _NAME.fullmatch(self.name) or self.name == JOIN:
            raise DataError(
                f"tool name {self.name!r}",
                f"a tool is called by name in a plan, and {JOIN!r} is the call that ends it",
                "use letters, digits and underscores only, and another name than join",
            )
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) != len(names):
            raise DataError(
                f"tool {self.name!r} with parameters {', '.join(names)}",
                "a parameter name occurs twice",
                "give every parameter of a tool a name of its own",
            )


def signature(tool: Tool) -> str:
    """Print a tool's signature as a prompt shows it: `get_email_address(name: str) -> str`."""
    parameters = ", ".join(f"{one.name}: {one.type}" for one in tool.parameters)
    return f"{tool.name}({parameters}) -> str"


def signature_differences(tools: Mapping[str, Tool], known: Mapping[str, Tool]) -> list[str]:
    """Say which tools of the same name take other parameters than those that a model knows.

    Parameters are held against each other by name, type and place, as plans pass them by place.
    """

    def places(tool: Tool) -> list[tuple[str, str]]:
        return [(one.name, one.type) for one in tool.parameters]

    return [
        f"{signature(tool)}, but the model knows {signature(known[name])}"
        for name, tool in tools.items()
        if name in known and places(tool) != places(known[name])
    ]


def with_choices(known: Mapping[str, Tool], tools: Mapping[str, Tool]) -> dict[str, Tool]:
    """Give the tools that a model knows, held to what those of the same name take.

    These may have fewer texts, and no None. `signature_differences` finds none between them.
    """

    def limited(tool: Tool) -> Tool:
        pairs = zip(tool.parameters, tools[tool.name].parameters, strict=True)
        return replace(
            tool,
            parameters=tuple(
                replace(p, choices=o.choices, nullable=p.nullable and o.nullable) for p, o in pairs
            ),
        )

    return {name: limited(tool) if name in tools else tool for name, tool in known.items()}


def tools_by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Index tools by name, in the order given.

    Raises:
        DataError: Two tools share a name.
    """
    indexed: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in indexed:
            raise DataError(
                f"tool {tool.name!r} is given twice",
                "a plan names the tool only, so the two could not be told apart",
                "rename or remove one of them",
            )
        indexed[tool.name] = tool
    return indexed


def accepts(parameter: Parameter, value: object) -> bool:
    """Say whether an argument has the type its parameter asks for, and is one of its choices.

    A string that is a reference and nothing else ("$2", "${2}") is right for every type: its
    value is known only when the plan runs. None is right where the parameter is nullable. A bool
    is no int, an int is no bool, and only a list of strings is a list[str]: a tuple is not, and
    neither is a bare string, although TinyAgent's executor wraps one in a list. That repair
    happens in the app; a report on what the planner learned must still show the slip.
    """
    if isinstance(value, str):
        fits = parameter.type == "str" and (not parameter.choices or value in parameter.choices)
        return fits or _WHOLE_REFERENCE.fullmatch(value) is not None
    if value is None:
        return parameter.nullable
    if isinstance(value, bool):
        return parameter.type == "bool"
    if isinstance(value, int):
        return parameter.type == "int"
    return (
        parameter.type == "list[str]"
        and isinstance(value, list)
        and all(isinstance(item, str) for item in value)
    )


def call_problems(
    name: str, arguments: Sequence[object], tools: Mapping[str, Tool]
) -> Iterator[tuple[str, str]]:
    """Hold a call against the signature of its tool.

    Yields:
        For each problem its kind, `unknown_tool`, `wrong_arity` or `wrong_argument_type`, and
        what is wrong.
    """
    tool = tools.get(name)
    if tool is None:
        yield "unknown_tool", f"there is no tool {name}"
        return
    wanted, given = len(tool.parameters), len(arguments)
    if wanted != given:
        told = f"{name} takes {count_of(wanted, 'argument')}, this call has {given}"
        yield "wrong_arity", told
    for parameter, value in zip(tool.parameters, arguments):  # noqa: B905 - see wrong_arity
        if not accepts(parameter, value):
            yield "wrong_argument_type", f"{parameter.name} must be {parameter.wanted}"


_SIGNATURES = """\
create_calendar_event(title: str, start_date: str, end_date: str, location: str or None, \
invitees: list[str], notes: str or None, calendar: str or None)
get_phone_number(name: str)
get_email_address(name: str)
open_and_get_file_path(file_name: str)
summarize_pdf(pdf_path: str)
compose_new_email(recipients: list[str], cc: list[str], subject: str, context: str, \
attachments: list[str])
reply_to_email(cc: list[str], context: str, attachments: list[str])
forward_email(recipients: list[str], cc: list[str], context: str, attachments: list[str])
maps_open_location(location: str)
maps_show_directions(start_location: str, end_location: str, transport: str)
create_note(name: str, content: str, folder: str)
open_note(name: str, folder: str)
append_note_content(name: str, content: str, folder: str)
create_reminder(name: str, due_date: str, notes: str, list_name: str, priority: int, all_day: bool)
send_sms(recipients: list[str], message: str)
get_zoom_meeting_link(topic: str, start_time: str, duration: int, meeting_invitees: list[str])
"""


def _tool(line: str) -> Tool:
    name, _, inside = line.removesuffix(")").partition("(")
    parameters = []
    for part in inside.split(", "):
        parameter, _, kind = part.partition(": ")
        nullable = kind.endswith(" or None")
        parameters.append(Parameter(parameter, kind.removesuffix(" or None"), nullable=nullable))
    return Tool(name, tuple(parameters))


TINYAGENT_TOOLS: tuple[Tool, ...] = tuple(map(_tool, _SIGNATURES.splitlines()))
"""The 16 tools in TinyAgent's fixed order, which is also the label order of its tool retriever.

Source: SqueezeAILab/TinyAgent, src/tiny_agent/tiny_agent_tools.py. How a prompt may describe them
is in data/generation/tinyagent.yaml.
"""

TINYAGENT: Mapping[str, Tool] = MappingProxyType(tools_by_name(TINYAGENT_TOOLS))
"""`TINYAGENT_TOOLS` by name."""
