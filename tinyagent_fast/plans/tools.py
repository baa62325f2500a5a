"""The tools a plan may call: names, parameters and descriptions.

First stage of the flow: prompts print these tools, the grammar knows nothing about them, and
scoring checks the calls of a plan against them. A dataset may bring tools of its own; the 16
tools of TinyAgent are the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tinyagent_fast.errors import DataError

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
    meaning: str = ""
    nullable: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a name or type that no prompt and no plan could use.

        Raises:
            DataError: If the name is no identifier or the type is not in `PARAMETER_TYPES`.
        """
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


@dataclass(frozen=True)
class Tool:
    """One tool: what a planner is told about it.

    `returns` is the type printed after the arrow; what the value means belongs into
    `description`, one entry per bullet line.
    """

    name: str
    parameters: tuple[Parameter, ...]
    returns: str = field(default="str", kw_only=True)
    description: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a tool that could not be called in a plan.

        Raises:
            DataError: If the name is no identifier or is `join`, or a parameter name repeats.
        """
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
    """Print a tool's signature as a prompt shows it.

    Args:
        tool: The tool.

    Returns:
        For example `get_email_address(name: str) -> str`.

    Source:
        SqueezeAILab/TinyAgent, src/tiny_agent/tiny_agent_tools.py (form of the descriptions).
    """
    parameters = ", ".join(f"{one.name}: {one.type}" for one in tool.parameters)
    return f"{tool.name}({parameters}) -> {tool.returns}"


def tools_by_name(tools: Iterable[Tool]) -> dict[str, Tool]:
    """Index tools by name, in the order given.

    Args:
        tools: The tools of a dataset or prompt.

    Returns:
        Name to tool.

    Raises:
        DataError: If two tools share a name.
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
    """Say whether an argument has the type its parameter asks for.

    A string that is a reference and nothing else ("$2", "${2}") is right for every type: its
    value is known only when the plan runs. None is right where the parameter is nullable. A bool
    is no int, an int is no bool, and only a list of strings is a list[str]: a tuple is not, and
    neither is a bare string, although TinyAgent's executor wraps one in a list. That repair
    happens in the app; a report on what the planner learned must still show the slip.

    Args:
        parameter: The parameter the argument is given for.
        value: The argument as read from the plan.

    Returns:
        True if the types agree.
    """
    if isinstance(value, str):
        return parameter.type == "str" or _WHOLE_REFERENCE.fullmatch(value) is not None
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


def _text(name: str, meaning: str, *, nullable: bool = False) -> Parameter:
    return Parameter(name, "str", meaning, nullable=nullable)


def _texts(name: str, meaning: str) -> Parameter:
    return Parameter(name, "list[str]", meaning)


_CURRENT_MAIL = "Works on the email that is selected in the mail app."
_CONTEXT = _text("context", "what the text must contain, if the query says so")
_FOLDER = _text("folder", 'folder of the note, or ""')
_ATTACHMENTS = _texts("attachments", "paths of the files to attach, or []")
_CC = _texts("cc", "email addresses to copy in, or []")

TINYAGENT_TOOLS: tuple[Tool, ...] = (
    Tool(
        name="create_calendar_event",
        parameters=(
            _text("title", "title of the event"),
            _text("start_date", "start as YYYY-MM-DD HH:MM:SS"),
            _text("end_date", "end as YYYY-MM-DD HH:MM:SS"),
            _text("location", 'place, or ""', nullable=True),
            _texts("invitees", "email addresses of the invited people, or []"),
            _text("notes", 'notes, or ""', nullable=True),
            _text("calendar", "calendar to use, or None for the default one", nullable=True),
        ),
        description=(
            "Puts an event into the calendar and reports whether that worked.",
            "Dates are written as YYYY-MM-DD HH:MM:SS.",
            "Invitees are email addresses; use [] if nobody is invited.",
            'Location and notes may be "" and calendar may be None.',
        ),
    ),
    Tool(
        name="get_phone_number",
        parameters=(_text("name", "name of the person"),),
        description=("Looks a person up in the contacts and returns the phone number.",),
    ),
    Tool(
        name="get_email_address",
        parameters=(_text("name", "name of the person"),),
        description=("Looks a person up in the contacts and returns the email address.",),
    ),
    Tool(
        name="open_and_get_file_path",
        parameters=(_text("file_name", "name of the file"),),
        description=("Finds a file, opens it and returns its path.",),
    ),
    Tool(
        name="summarize_pdf",
        parameters=(_text("pdf_path", "path of the PDF file"),),
        description=(
            "Returns a summary of a PDF file.",
            "The path must come from an earlier open_and_get_file_path call.",
        ),
    ),
    Tool(
        name="compose_new_email",
        parameters=(
            _texts("recipients", "email addresses of the recipients"),
            _CC,
            _text("subject", "subject line"),
            _CONTEXT,
            _ATTACHMENTS,
        ),
        description=(
            "Drafts a new email and reports whether that worked.",
            'Context hands results of earlier calls to the text; otherwise it may be "".',
            "A map link or a meeting link goes into context, never into attachments.",
        ),
    ),
    Tool(
        name="reply_to_email",
        parameters=(_CC, _CONTEXT, _ATTACHMENTS),
        description=(
            "Drafts a reply and reports whether that worked.",
            _CURRENT_MAIL,
            'Context hands results of earlier calls to the text; otherwise it may be "".',
        ),
    ),
    Tool(
        name="forward_email",
        parameters=(
            _texts("recipients", "email addresses of the recipients"),
            _CC,
            _CONTEXT,
            _ATTACHMENTS,
        ),
        description=("Forwards an email and reports whether that worked.", _CURRENT_MAIL),
    ),
    Tool(
        name="maps_open_location",
        parameters=(_text("location", "place or address"),),
        description=("Shows a place in the maps app and returns a link to it.",),
    ),
    Tool(
        name="maps_show_directions",
        parameters=(
            _text("start_location", 'start, or "" for the current place'),
            _text("end_location", "destination"),
            _text("transport", "d, w or r"),
        ),
        description=(
            "Shows the way between two places in the maps app and returns a link to it.",
            'Transport is "d" for driving, "w" for walking or "r" for public transport.',
            'An empty start "" means the current place.',
        ),
    ),
    Tool(
        name="create_note",
        parameters=(_text("name", "title of the note"), _text("content", "its text"), _FOLDER),
        description=("Writes a new note and reports whether that worked.", 'Folder may be "".'),
    ),
    Tool(
        name="open_note",
        parameters=(_text("name", "title of the note"), _FOLDER),
        description=("Opens a note and returns its text.", 'Folder may be "".'),
    ),
    Tool(
        name="append_note_content",
        parameters=(_text("name", "title of the note"), _text("content", "text to add"), _FOLDER),
        description=(
            "Adds text at the end of a note and reports whether that worked.",
            "The note need not be opened before.",
        ),
    ),
    Tool(
        name="create_reminder",
        parameters=(
            _text("name", "what to be reminded of"),
            _text("due_date", "YYYY-MM-DD HH:MM:SS, or YYYY-MM-DD for a whole day"),
            _text("notes", 'notes, or ""'),
            _text("list_name", 'list to put it on, or ""'),
            Parameter("priority", "int", "0 if the query names none"),
            Parameter("all_day", "bool", "True for a whole day"),
        ),
        description=(
            "Sets a reminder and reports whether that worked.",
            "The due date is written as YYYY-MM-DD HH:MM:SS, or as YYYY-MM-DD if all_day is True.",
            "Priority is 0 unless the query asks for another one.",
        ),
    ),
    Tool(
        name="send_sms",
        parameters=(
            _texts("recipients", "phone numbers of the recipients"),
            _text("message", "the message"),
        ),
        description=(
            "Sends a text message and reports whether that worked.",
            "One call can reach several phone numbers.",
        ),
    ),
    Tool(
        name="get_zoom_meeting_link",
        parameters=(
            _text("topic", "topic of the meeting"),
            _text("start_time", "start as YYYY-MM-DD HH:MM:SS"),
            Parameter("duration", "int", "length in minutes"),
            _texts("meeting_invitees", "email addresses of the invited people, or []"),
        ),
        description=(
            "Sets up a Zoom meeting and returns the link to join it.",
            "Duration is in minutes.",
            "Pass the link on in the notes of a calendar event or in the context of an email.",
        ),
    ),
)
"""The 16 tools in TinyAgent's fixed order, which is also the label order of its tool retriever.

Names, parameters and constraints: SqueezeAILab/TinyAgent, src/tiny_agent/tiny_agent_tools.py. The
descriptions are this project's own words.
"""

TINYAGENT: Mapping[str, Tool] = MappingProxyType(tools_by_name(TINYAGENT_TOOLS))
"""`TINYAGENT_TOOLS` by name."""
