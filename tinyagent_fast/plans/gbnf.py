r"""The grammar of plans as GBNF, so that a model can only write text that is a plan.

    line-k := thought? "k. " (join | call "\n" line-k+1)

Written from the tools, next to `grammar`, which reads what comes out. llama.cpp takes it as it is,
in torch `inference.constraint` does; export puts one with all tools beside a GGUF.
Every line has rules of its own, so a reference can only name a line above it. The grammar bounds
each text, because a model that is unsure need not ever close a string; it cannot bound the tokens
that a server lets a model write, and a text that is cut there is no plan.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from tinyagent_fast.plans.grammar import END_OF_PLAN, Plan, Step, render_call, render_plan
from tinyagent_fast.plans.tools import JOIN, Parameter, Tool

MAX_TEXT_UNITS = 1023
"""Longest string: characters, an escape counting as one, and references with what follows them."""

MAX_LIST_ITEMS = 32
"""Longest list."""

MAX_CALLS = 16
"""Longest plan, join not counted."""

NO_CHARACTERS = r"\uD800-\uDFFF\U00110000-\U001FFFFF"
"""Halves of a pair and numbers beyond the last: llama.cpp lets byte-level models write them."""
_NEVER = rf"\x00-\x1F\x7F{NO_CHARACTERS}"
# Texts are counted in blocks: llama.cpp makes one rule per repetition, 62 here instead of 1023.
_BLOCK_UNITS = 32
_DOLLARS_IN_A_ROW = 4

_SHARED = f"""\
thought ::= "Thought: " said-block{{0,15}} said{{1,{_BLOCK_UNITS}}} "\\n"
said-block ::= said{{{_BLOCK_UNITS}}}
said ::= [^{_NEVER}]
plain ::= [^"\\\\${_NEVER}]
after-dollar ::= [^0-9{{"\\\\${_NEVER}] | escape
escape ::= "\\\\" [nrt"\\\\]
int ::= "0" | "-"? [1-9] [0-9]{{0,8}}
bool ::= "True" | "False"
"""


def plan_grammar(
    tools: Mapping[str, Tool],
    *,
    begun: Sequence[Step] = (),
    following: Collection[str] | None = None,
) -> str:
    """Write the GBNF of all plans of some tools, given by name; its first rule is `root`.

    Whatever is written under it can be read by `grammar.parse_plan`: lines are numbered from 1,
    join comes last, followed by `<END_OF_PLAN>`, every call has its tool's number and kinds of
    arguments, those with choices one of these, and `$k` names an earlier line. Strings are written
    as `grammar.render_plan` writes them, without control characters other than escaped line breaks
    and tabs. In a string, `$` before any other number or before `{` is not possible, since an
    executor would take it for a reference: an amount is written `$ 500` or `USD 500`.

    Args:
        tools: The tools that may be called.
        begun: Calls that every plan begins with, fewer than `MAX_CALLS`.
        following: Tools of which one is called next, with results of the kinds that its parameters
            take and no others, where those are known; None lets the plan go on freely.

    Source: grammars/README.md of github.com/ggml-org/llama.cpp (the notation and its escapes).
    """
    longest, first = MAX_CALLS if tools else 0, len(begun) + 1
    there = render_plan(Plan(tuple(replace(s, number=n) for n, s in enumerate(begun, 1)))) + "\n"
    lines = [
        f"# Plans of up to {longest} calls; the text of a string has up to {MAX_TEXT_UNITS} units.",
        f"root ::= {_quoted(there) + ' ' if begun else ''}line-{first}",
        f"join ::= {_quoted(JOIN + '()' + END_OF_PLAN)}",
    ]
    for line in range(first, longest + 1):
        go_on = f'call-{line} "\\n" line-{line + 1}'
        if line == first and following is not None:
            kinds = {n: tools[step.tool].returns for n, step in enumerate(begun, 1)}
            lines.append(f'line-{line} ::= "{line}. " {go_on}')
            lines.extend(_call_rules([tools[name] for name in following], line, kinds))
        else:
            lines.append(f'line-{line} ::= thought? "{line}. " (join | {go_on})')
            lines.extend(_call_rules(tools.values(), line))
    lines.append(f'line-{longest + 1} ::= thought? "{longest + 1}. " join')
    return "\n".join(lines) + "\n" + _SHARED


def without_surrogates(grammar: str) -> str:
    """Write a grammar for libraries that know characters only, and refuse to exclude others."""
    return grammar.replace(NO_CHARACTERS, "")


def _call_rules(
    tools: Iterable[Tool], line: int, kinds: Mapping[int, str] | None = None
) -> Iterator[str]:
    """Write the rules for the calls of one line, which differ in what `$` may name.

    With the kinds of earlier results, references are held to what a parameter takes.
    """
    known: dict[tuple[int, ...], str] = {}
    calls = []
    for tool in tools:
        arguments = []
        for parameter in tool.parameters:
            named = tuple(
                number
                for number in range(1, line)
                if not (kinds and parameter.sources) or kinds[number] in ("", *parameter.sources)
            )
            key = known.setdefault(named, f"{line}" if not known else f"{line}-{len(known)}")
            arguments.append(_argument(parameter, key, named))
        inside = ' ", " '.join(arguments)
        calls.append(f"{_quoted(tool.name + '(')} {inside} {_quoted(')')}")
    for named, key in known.items():
        yield from _text_rules(key, named)
    yield f"call-{line} ::= " + " |\n  ".join(calls)


def _text_rules(key: str, named: Sequence[int]) -> Iterator[str]:
    """Write the rules for strings and lists in which `$` names some lines, or nothing."""
    dollar = '"$"'
    if named:
        earlier = " | ".join(f'"{number}"' for number in named)
        yield f"earlier-{key} ::= {earlier}"
        yield f'whole-{key} ::= "\\"$" earlier-{key} "\\""'
        dollar = f'("$" earlier-{key}?)'
    full, rest = divmod(MAX_TEXT_UNITS, _BLOCK_UNITS)
    yield f"dollar-{key} ::= {dollar}"
    yield f"unit-{key} ::= plain | escape | dollar-{key}{{1,{_DOLLARS_IN_A_ROW}}} after-dollar"
    yield f"block-{key} ::= unit-{key}{{{_BLOCK_UNITS}}}"
    at_end = f"dollar-{key}{{0,{_DOLLARS_IN_A_ROW}}}"
    yield f'str-{key} ::= "\\"" block-{key}{{0,{full}}} unit-{key}{{0,{rest}}} {at_end} "\\""'
    yield f'strs-{key} ::= "[" (str-{key} (", " str-{key}){{0,{MAX_LIST_ITEMS - 1}}})? "]"'


def _argument(parameter: Parameter, key: str, named: Sequence[int]) -> str:
    """Write what `tools.accepts` accepts for a parameter."""
    rule = {"str": f"str-{key}", "list[str]": f"strs-{key}"}.get(parameter.type, parameter.type)
    choices = [_quoted(render_call("", [text])[1:-1]) for text in parameter.choices] or [rule]
    if (parameter.choices or parameter.type != "str") and named:
        choices.append(f"whole-{key}")
    if parameter.nullable:
        choices.append('"None"')
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def _quoted(text: str) -> str:
    return '"' + re.sub(r'["\\]', r"\\\g<0>", text).replace("\n", "\\n") + '"'
