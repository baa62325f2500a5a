"""The text form of a plan: reading it and writing it.

    plan    := (thought? step)* thought? join
    thought := "Thought: " text line-break
    step    := N ". " tool "(" python-literals ")" line-break
    join    := N ". join()"

A string argument refers to the result of step N with "$N" (or "${N}"). Used wherever a plan is a
text: data checks, prompts, the generated dataset and scoring. Whether tools and references exist
is not a matter of the grammar: see `tools` and `graph`.
"""

from __future__ import annotations

import ast
import math
import re
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tinyagent_fast.plans.tools import JOIN

END_OF_PLAN = "<END_OF_PLAN>"  # stop string of the planner: plain text, no special token
END_OF_RESPONSE = "<END_OF_RESPONSE>"  # stop string of the joiner
MAX_PLAN_CHARS = 100_000  # longer texts are refused unread; real plans stay below 2,000

PLAN_ERRORS: dict[str, str] = {  # every code of `PlanError`, with its meaning
    "too_long": f"the text has more than {MAX_PLAN_CHARS:,} characters and was not read",
    "empty": "there is no step in the text",
    "bad_syntax": "a line before join is no step of the form 1. tool(arguments)",
    "bad_arguments": "the arguments of a step are not Python literals",
    "join_arguments": "join has arguments",
    "bad_number": "a step number is 0 or has more than 9 digits",
    "duplicate_number": "two steps have the same number",
    "no_join": "the plan does not end with join()",
}

_NOT_LITERAL = (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError)
_PARSING = threading.RLock()  # Python 3.11 counts the depth of all threads' parsing together
_THOUGHT = "Thought:"
_HEADER = re.compile(r"([0-9]+)\. (\w+)\(")
_CLOSED = re.compile(r"\)\s*(?:#.*)?\Z", re.DOTALL)
_CUT = re.compile(r"[0-9]+(?:\.(?: (?:\w+(?:\(.*)?)?)?)?", re.DOTALL)
_REFERENCE = re.compile(r"\$(?:([0-9]+)|\{([0-9]+)\})")
# The look-behind keeps the search linear in long runs of digits and changes no match.
_LOOSE_STEP = re.compile(r"(?<!\d)(\d+)\. (\w+)\(")
_UNPRINTABLE = re.compile('[\\\\"\x00-\x1f\x7f\ud800-\udfff]')
_SHORT_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class PlanError(Exception):
    """A text is no plan; `code` is one of `PLAN_ERRORS`, `message` says what is wrong where."""

    def __init__(self, code: str, message: str) -> None:
        """Keep the stable code apart from the message."""
        self.code = code
        self.message = message
        super().__init__(f"{code}: {message}")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of a plan; `raw_arguments`, the text it was read from, does not count in `==`."""

    number: int
    tool: str
    arguments: tuple[object, ...]
    raw_arguments: str = field(default="", compare=False)
    thought: str | None = None


@dataclass(frozen=True)
class Plan:
    """A whole plan: its steps in the order of the text, join being the last one."""

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class PlanReading:
    """What can be read of a text: its good steps and every problem."""

    steps: tuple[Step, ...]
    problems: tuple[PlanError, ...]


@dataclass(frozen=True)
class JoinerAnswer:
    """A joiner's answer; `action` is "Finish", "Replan" or, if the answer has none, None."""

    thought: str
    action: str | None
    message: str


def parse_plan(text: str) -> Plan:
    """Read a plan, or say what is wrong with the text.

    Blank lines, white space round a line, `Thought:` lines, comments after a step and anything
    after `join()` are allowed. Nothing else is repaired.

    Several thoughts before one step are joined with a space.

    Raises:
        PlanError: With the first problem in the order of the text; no text raises anything else.
    """
    reading = read_plan(text)
    if reading.problems:
        raise reading.problems[0]
    return Plan(reading.steps)


def read_plan(text: str) -> PlanReading:
    """Read as much of a plan as there is, and list every problem instead of stopping at one.

    A last line that begins like a step and has no end is not a problem of its own when join is
    missing: the text was cut.
    """
    if len(text) > MAX_PLAN_CHARS:
        return PlanReading((), (PlanError("too_long", f"{len(text):,} characters"),))
    steps: list[Step] = []
    problems: list[PlanError] = []
    thoughts: list[str] = []
    numbers: set[int] = set()
    lines = text.split("\n")
    for index, line in enumerate(map(str.strip, lines)):
        if line.startswith(_THOUGHT):
            thoughts.append(line[len(_THOUGHT) :].strip())
        elif line.startswith(END_OF_PLAN):
            break
        elif line:
            try:
                step = _read_step(line, thoughts)
            except PlanError as error:
                if index == len(lines) - 1 and error.code == "bad_syntax" and _CUT.fullmatch(line):
                    break
                problems.append(PlanError(error.code, f"line {index + 1}: {error.message}"))
                if error.code == "join_arguments":
                    return PlanReading(tuple(steps), tuple(problems))
                continue
            thoughts = []
            if step.number in numbers:
                message = f"line {index + 1}: step {step.number} occurs twice"
                problems.append(PlanError("duplicate_number", message))
            numbers.add(step.number)
            steps.append(step)
            if step.tool == JOIN:
                return PlanReading(tuple(steps), tuple(problems))
            if line.endswith(END_OF_PLAN):
                break
    nothing = not text.replace(END_OF_PLAN, "").strip()
    code, message = ("empty", "no text") if nothing else ("no_join", "the text ends without join()")
    return PlanReading(tuple(steps), (*problems, PlanError(code, message)))


def _read_step(line: str, thoughts: list[str]) -> Step:
    header = _HEADER.match(line)
    if header is None:
        raise PlanError("bad_syntax", f"{_shown(line)} is no step")
    digits, tool = header.groups()
    if len(digits) > 9 or int(digits) == 0:
        raise PlanError("bad_number", f"{_shown(digits)} is no step number")
    rest = line[header.end() :]
    if tool == JOIN:
        raw, closed, _ = rest.partition(")")
        if not closed:
            raise PlanError("bad_syntax", f"{_shown(line)} has no closing parenthesis")
        if raw.strip():
            raise PlanError("join_arguments", f"join takes no arguments: {_shown(line)}")
        arguments: tuple[object, ...] = ()
    else:
        rest = rest.removesuffix(END_OF_PLAN)
        if _CLOSED.search(rest) is None:
            raise PlanError("bad_syntax", f"{_shown(line)} does not end with a parenthesis")
        arguments, raw = _read_arguments(rest)
    said = " ".join(filter(None, thoughts)) or None
    return Step(number=int(digits), tool=tool, arguments=arguments, raw_arguments=raw, thought=said)


def _read_arguments(rest: str) -> tuple[tuple[object, ...], str]:
    """Read `arguments)  # comment` with Python's own parser; nothing is evaluated."""
    source = f"_({rest}"
    try:
        call = parse_expression(source)
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise PlanError("bad_arguments", f"{_shown(rest)} is not one list of arguments")
        if call.keywords:
            raise PlanError("bad_arguments", f"named arguments in {_shown(rest)}")
        arguments = tuple(
            node.value if isinstance(node, ast.Constant) else ast.literal_eval(node)
            for node in call.args
        )
        plain = all(map(_is_plain, arguments))
    except _NOT_LITERAL as error:
        raise PlanError("bad_arguments", f"{_shown(rest)} are no Python literals") from error
    if not plain or call.end_lineno != 1 or call.end_col_offset is None:
        raise PlanError("bad_arguments", f"{_shown(rest)} holds a value no tool can take")
    return arguments, source.encode()[2 : call.end_col_offset - 1].decode()


def parse_expression(source: str) -> ast.expr:
    """Parse one Python expression, in any number of threads, without evaluating it.

    Raises:
        SyntaxError, ValueError, MemoryError, RecursionError: As `ast.parse` does.

    Source: https://github.com/python/cpython/issues/106905 (why threads must wait for each other)
    """
    with _PARSING, warnings.catch_warnings():
        # An odd escape warns, and under an "error" filter would not parse.
        warnings.simplefilter("ignore")
        return ast.parse(source, mode="eval").body


def _is_plain(value: object) -> bool:
    """Allow what a tool could take and what can be written back: no bytes, sets or infinities."""
    if value is None or isinstance(value, (str, bool)):
        return True
    if isinstance(value, int):
        return abs(value) < 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return isinstance(value, (list, tuple)) and all(map(_is_plain, value))


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def render_plan(plan: Plan) -> str:
    """Write a plan as text, without `END_OF_PLAN`, so that `parse_plan` reads the same plan.

    Arguments are strings, numbers, bools, None, lists, tuples and dicts. There is one line per
    step and per thought, and no line break at the end.

    Raises:
        ValueError: If an argument has no literal form or a thought is not one trimmed line.
    """
    lines: list[str] = []
    for step in plan.steps:
        if step.thought is not None:
            if "\n" in step.thought or step.thought.strip() != step.thought or not step.thought:
                raise ValueError(f"a thought must be one trimmed line: {_shown(step.thought)}")
            lines.append(f"{_THOUGHT} {step.thought}")
        lines.append(f"{step.number}. {render_call(step.tool, step.arguments)}")
    return "\n".join(lines)


def render_call(tool: str, arguments: Iterable[object]) -> str:
    """Write one call, such as `send_sms(["$1"], "On my way")`, with line breaks escaped.

    Raises:
        ValueError: If an argument has no literal form.
    """
    return f"{tool}({', '.join(map(_render, arguments))})"


def _render(value: object) -> str:
    if not _is_plain(value):
        raise ValueError(f"{_shown(repr(value))} cannot be an argument of a plan")
    if isinstance(value, str):
        return '"' + _UNPRINTABLE.sub(_escaped, value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_render, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_render, value)) + (",)" if len(value) == 1 else ")")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_render(k)}: {_render(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match.group())
    return _SHORT_ESCAPES.get(match.group()) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    )


def references(arguments: Iterable[object]) -> frozenset[int]:
    """Find the steps that arguments refer to: every `$N` and `${N}` in any string, at any depth.

    Numbers of more than 9 digits are no references.
    """
    return frozenset(number for number, _ in reference_uses(arguments))


def reference_uses(arguments: Iterable[object]) -> list[tuple[int, bool]]:
    """Find every use of a reference, in any string at any depth, dict keys included.

    Returns:
        Pairs (number, whole) in any order; whole: there is nothing else in the string.
    """
    found: list[tuple[int, bool]] = []
    pending: list[object] = list(arguments)
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            for match in _REFERENCE.finditer(value) if "$" in value else ():
                digits = match.group(1) or match.group(2)
                if len(digits) <= 9:
                    found.append((int(digits), match.group() == value))
        elif isinstance(value, dict):
            pending.extend((*value.keys(), *value.values()))
        elif isinstance(value, (list, tuple)):
            pending.extend(value)
    return found


def substitute(value: object, results: Mapping[int, object]) -> object:
    """Fill the results of earlier steps in for their references, in any string at any depth.

    A string that is nothing but a reference becomes the result itself; within a longer string its
    text is put in. One pass over the whole number, so that `$12` is never `$1` with a 2 behind it
    and a result that looks like a reference stays as it is. References to other steps stay too.
    """
    if isinstance(value, str):
        if "$" not in value:
            return value
        whole = _REFERENCE.fullmatch(value)
        if whole is not None and (number := _number(whole)) in results:
            return results[number]
        return _REFERENCE.sub(lambda m: str(results.get(_number(m), m.group())), value)
    if isinstance(value, dict):
        return {substitute(k, results): substitute(v, results) for k, v in value.items()}
    if isinstance(value, list):
        return [substitute(item, results) for item in value]
    return tuple(substitute(i, results) for i in value) if isinstance(value, tuple) else value


def _number(match: re.Match[str]) -> int:
    digits = match.group(1) or match.group(2)
    return int(digits) if len(digits) <= 9 else 0


def loose_steps(text: str) -> list[tuple[str, str, str]]:
    """Find the steps in any text as the published parser's one pattern finds them.

    That pattern is an optional thought line, white space, then a step, whose arguments reach to
    the last closing parenthesis of the line. So a line holds one step at most, the first that is
    closed. A thought takes its whole line with it, but only if a step follows right after.
    Going backwards line by line has the same outcome in linear time.

    Returns:
        Digits of the number, tool and text of the arguments of each.

    Source: output parser of github.com/SqueezeAILab/TinyAgent.
    """
    found: list[tuple[str, str, str]] = []
    step_follows = False
    for line in reversed(text.split("\n")):
        step, end = _LOOSE_STEP.search(line), line.rfind(")")
        if step is not None and end >= step.end():
            before = line[: step.start()]
            if not (step_follows and f"{_THOUGHT} " in before):
                found.append((step[1], step[2], line[step.end() : end]))
            step_follows = not before.strip()
        elif line.strip():
            step_follows = False
    return found[::-1]


def parse_joiner(text: str) -> JoinerAnswer:
    """Read a joiner's answer the way the TinyAgent app acts on it.

    The last line with an action counts, and "Replan" anywhere in it makes it a replan, so
    `Finish(Replanning is done)` is one. Unlike the app, a missing action is told apart from
    Finish, and an action without parentheses has an empty message.

    Source: SqueezeAILab/TinyAgent, src/utils/plan_utils.py.
    """
    thought, action, message = "", None, ""
    for line in text.split("\n"):
        _, marker, rest = line.partition("Action:")
        if marker:
            action = "Replan" if "Replan" in rest else "Finish"
            _, opened, inside = rest.partition("(")
            message = (inside.rpartition(")")[0] if ")" in inside else inside) if opened else ""
        elif line.startswith(_THOUGHT):
            thought = line[len(_THOUGHT) :].strip()
    return JoinerAnswer(thought, action, message)


def canonical_plan(text: str) -> str:
    """Write the plan of a text as `render_plan` does; a text that is no plan stays as it is."""
    try:
        return render_plan(parse_plan(text))
    except PlanError:
        return text
