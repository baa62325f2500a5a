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
from collections.abc import Iterator, Mapping

from tinyagent_fast.plans.grammar import END_OF_PLAN
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


def plan_grammar(tools: Mapping[str, Tool]) -> str:
    """Write the GBNF of all plans of some tools, given by name; its first rule is `root`.

    Whatever is written under it can be read by `grammar.parse_plan`: lines are numbered from 1,
    join comes last, followed by `<END_OF_PLAN>`, every call has its tool's number and kinds of
    arguments, and `$k` names an earlier line. Strings are written as `grammar.render_plan` writes
    them, without control characters other than escaped line breaks and tabs. In a string, `$`
    before any other number or before `{` is not possible, since an executor would take it for a
    reference: an amount is written `$ 500` or `USD 500`.

    Source: grammars/README.md of github.com/ggml-org/llama.cpp (the notation and its escapes).
    """
    longest = MAX_CALLS if tools else 0
    lines = [
        f"# Plans of up to {longest} calls; the text of a string has up to {MAX_TEXT_UNITS} units.",
        "root ::= line-1",
        f"join ::= {_quoted(JOIN + '()' + END_OF_PLAN)}",
    ]
    for line in range(1, longest + 1):
        following = f'(join | call-{line} "\\n" line-{line + 1})'
        lines.append(f'line-{line} ::= thought? "{line}. " {following}')
        lines.extend(_argument_rules(line))
        calls = " |\n  ".join(_call(tool, line) for tool in tools.values())
        lines.append(f"call-{line} ::= {calls}")
    lines.append(f'line-{longest + 1} ::= thought? "{longest + 1}. " join')
    return "\n".join(lines) + "\n" + _SHARED


def without_surrogates(grammar: str) -> str:
    """Write a grammar for libraries that know characters only, and refuse to exclude others."""
    return grammar.replace(NO_CHARACTERS, "")


def _argument_rules(line: int) -> Iterator[str]:
    """Write the rules for strings and lists of one line, which differ in what `$` may name."""
    dollar = '"$"'
    if line > 1:
        earlier = " | ".join(f'"{number}"' for number in range(1, line))
        yield f"earlier-{line} ::= {earlier}"
        yield f'whole-{line} ::= "\\"$" earlier-{line} "\\""'
        dollar = f'("$" earlier-{line}?)'
    full, rest = divmod(MAX_TEXT_UNITS, _BLOCK_UNITS)
    yield f"dollar-{line} ::= {dollar}"
    yield f"unit-{line} ::= plain | escape | dollar-{line}{{1,{_DOLLARS_IN_A_ROW}}} after-dollar"
    yield f"block-{line} ::= unit-{line}{{{_BLOCK_UNITS}}}"
    yield (
        f'str-{line} ::= "\\"" block-{line}{{0,{full}}} unit-{line}{{0,{rest}}} '
        f'dollar-{line}{{0,{_DOLLARS_IN_A_ROW}}} "\\""'
    )
    yield f'strs-{line} ::= "[" (str-{line} (", " str-{line}){{0,{MAX_LIST_ITEMS - 1}}})? "]"'


def _call(tool: Tool, line: int) -> str:
    arguments = ' ", " '.join(_argument(parameter, line) for parameter in tool.parameters)
    return f"{_quoted(tool.name + '(')} {arguments} {_quoted(')')}"


def _argument(parameter: Parameter, line: int) -> str:
    """Write what `tools.accepts` accepts for a parameter."""
    rule = {"str": f"str-{line}", "list[str]": f"strs-{line}"}.get(parameter.type, parameter.type)
    choices = [rule]
    if parameter.type != "str" and line > 1:
        choices.append(f"whole-{line}")
    if parameter.nullable:
        choices.append('"None"')
    return choices[0] if len(choices) == 1 else f"({' | '.join(choices)})"


def _quoted(text: str) -> str:
    return '"' + re.sub(r'["\\]', r"\\\g<0>", text) + '"'
