"""System texts of planners, taken apart into tools, guidelines and examples, and put together.

Nothing here knows a prompt's wording. A tool list is a run of lines `1. name(parameter: type) ->`
that counts upwards, or one line that ends in names of tools; a guideline that names tools belongs
to them; a solved example begins with `Question: ` and ends with `###`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinyagent_fast.data.schema import called_tools
from tinyagent_fast.plans.tools import JOIN, TINYAGENT

_SIGNATURE = re.compile(r"^(\d+)\. (\w+)\((?:\w+: .*)?\)(?: -> .*|:)$", re.M)
_SHORT_LIST = re.compile(r"([^\n]*?: )(\w+(?:, \w+)*)")
_EXAMPLE_END = "###\n"
_QUESTION = "Question: "
_WORD = re.compile(r"\w+")
_MOMENT = re.compile(r"\b[A-Z][a-z]+day \d{4}-\d\d-\d\d \d\d:\d\d\b")


@dataclass(frozen=True)
class ToolBlock:
    """One entry of the tool list."""

    name: str
    text: str
    """What follows its number: signature, description and empty line; or just the name."""


@dataclass(frozen=True)
class Guideline:
    """One line after the tool list."""

    text: str
    tools: tuple[str, ...] = ()
    """It is there if any of these is in the list; empty for a line that is always there."""


@dataclass(frozen=True)
class SolvedExample:
    """One solved request."""

    text: str
    tools: tuple[str, ...]
    """Tools that its plan calls."""


@dataclass(frozen=True, kw_only=True)
class SystemText:
    """A system text in its parts; one of another build has a preamble only."""

    preamble: tuple[str, ...]
    """What stands before the tool list; two parts if the number of entries stands between them."""
    blocks: tuple[ToolBlock, ...] = ()
    """The tool list, join included where the text lists it."""
    numbered: bool = False
    guidelines: tuple[Guideline, ...] = ()
    examples: tuple[SolvedExample, ...] = ()
    rest: str = ""
    """What follows the last example."""

    @property
    def tools(self) -> tuple[str, ...]:
        """Names of the listed tools, join left out."""
        return tuple(block.name for block in self.blocks if block.name != JOIN)

    def restricted(self, tools: Iterable[str]) -> SystemText:
        """Keep some tools, the guidelines that any of them calls for, and examples with no others.

        The tools keep their order.
        """
        wanted = set(tools)
        return replace(
            self,
            blocks=tuple(b for b in self.blocks if b.name in wanted or b.name == JOIN),
            guidelines=tuple(g for g in self.guidelines if not g.tools or wanted & set(g.tools)),
            examples=tuple(e for e in self.examples if wanted.issuperset(e.tools)),
        )

    def with_examples(self, solved: Sequence[tuple[str, str]]) -> SystemText:
        """Replace the examples, in the form that those of the text have; without any it stays.

        Args:
            solved: Queries with their plans, which end in `join()`.
        """
        endings = Counter(e.text.rpartition(f"{JOIN}()")[2] for e in self.examples)
        if not endings:
            return self
        (ending, _), *_ = endings.most_common(1)
        made = [
            SolvedExample(f"{_QUESTION}{query}\n{plan}{ending}", called_tools(plan))
            for query, plan in solved
        ]
        return replace(self, examples=tuple(made))

    def with_own_lines(self, own: SystemText) -> SystemText:
        """Take the lines that belong to no tool, such as the date, from another text of the build.

        Where the two do not have equally many such lines only the time is taken.
        """
        bound = {line.text for line in self.guidelines if line.tools}
        free = [g for g in own.guidelines if not g.tools and g.text not in bound]
        if not free or len(free) != sum(not line.tools for line in self.guidelines):
            told = _MOMENT.search("".join((*own.preamble, *(line.text for line in free))))
            return self.dated(told[0]) if told else self
        lines = iter(free)
        return replace(
            self, guidelines=tuple(g if g.tools else next(lines) for g in self.guidelines)
        )

    def dated(self, moment: str) -> SystemText:
        """Let what tells the time tell another one, such as `Monday 2024-01-01 10:00`."""
        lines = (replace(g, text=_MOMENT.sub(moment, g.text)) for g in self.guidelines)
        preamble = (_MOMENT.sub(moment, text) for text in self.preamble)
        return replace(self, preamble=tuple(preamble), guidelines=tuple(lines))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SystemText:
        """Make it of what `dataclasses.asdict` gave."""
        return cls(
            preamble=tuple(values["preamble"]),
            blocks=tuple(ToolBlock(**block) for block in values["blocks"]),
            numbered=values["numbered"],
            guidelines=tuple(Guideline(g["text"], tuple(g["tools"])) for g in values["guidelines"]),
            examples=tuple(SolvedExample(e["text"], tuple(e["tools"])) for e in values["examples"]),
            rest=values["rest"],
        )


def render(parts: SystemText) -> str:
    """Put a system text together."""
    if parts.numbered:
        listed = "".join(f"{number}. {b.text}" for number, b in enumerate(parts.blocks, start=1))
    else:
        listed = ", ".join(block.text for block in parts.blocks)
    lines = [line.text for line in parts.guidelines]
    solved = [example.text for example in parts.examples]
    return "".join([str(len(parts.blocks)).join(parts.preamble), listed, *lines, *solved]) + (
        parts.rest
    )


def parse(text: str, known: Iterable[str] = TINYAGENT) -> SystemText:
    """Take a system text apart; `render` gives it back byte for byte.

    A text of another build is all preamble. `known` are tools beside the listed ones that
    guidelines may name, and that a list without signatures may hold.
    """
    known = set(known)
    parts = _with_signatures(text, known) or _names_only(text, known)
    whole = SystemText(preamble=(text,))
    return parts if parts is not None and render(parts) == text else whole


def _names_only(text: str, known: set[str]) -> SystemText | None:
    found = _SHORT_LIST.fullmatch(text)
    names = found[2].split(", ") if found else []
    if not found or len(set(names)) != len(names) or not known.issuperset(names):
        return None
    return SystemText(preamble=(found[1],), blocks=tuple(ToolBlock(n, n) for n in names))


def _with_signatures(text: str, known: set[str]) -> SystemText | None:
    heads: list[re.Match[str]] = []
    for match in _SIGNATURE.finditer(text):
        if match[1] != str(len(heads) + 1):
            break
        heads.append(match)
    names = [match[2] for match in heads]
    if not heads or len(set(names)) != len(names):
        return None
    # The last entry ends with the first empty line after it.
    empty = text.find("\n\n", heads[-1].end())
    list_end = len(text) if empty < 0 else empty + 2
    ends = [*(match.start() for match in heads[1:]), list_end]
    blocks = [
        ToolBlock(match[2], text[match.start(2) : end])
        for match, end in zip(heads, ends, strict=True)
    ]
    guidelines, examples, rest = _after_the_list(text[list_end:], known.union(names))
    return SystemText(
        preamble=_preamble(text[: heads[0].start()], len(blocks)),
        blocks=tuple(blocks),
        numbered=True,
        guidelines=guidelines,
        examples=examples,
        rest=rest,
    )


def _preamble(text: str, entries: int) -> tuple[str, ...]:
    counts = list(re.finditer(rf"(?<!\d){entries}(?!\d)", text))
    return (text[: counts[-1].start()], text[counts[-1].end() :]) if counts else (text,)


def _after_the_list(
    text: str, known: set[str]
) -> tuple[tuple[Guideline, ...], tuple[SolvedExample, ...], str]:
    first = 0 if text.startswith(_QUESTION) else text.find(f"\n{_QUESTION}") + 1
    begins = text.startswith(_QUESTION, first)
    start = first if begins else len(text)
    end = text.rfind(_EXAMPLE_END, start)
    end = start if end < 0 else end + len(_EXAMPLE_END)
    lines = [
        Guideline(line, tuple(n for n in _named(line) if n in known and n != JOIN))
        for line in re.findall(r"[^\n]*\n|[^\n]+$", text[:start])
    ]
    solved = [
        SolvedExample(f"{part}{_EXAMPLE_END}", called_tools(part))
        for part in text[start:end].split(_EXAMPLE_END)[:-1]
    ]
    return tuple(lines), tuple(solved), text[end:]


def _named(line: str) -> list[str]:
    """List the words that look like names of functions; `search` may be an ordinary word."""
    return list(dict.fromkeys(word for word in _WORD.findall(line) if "_" in word))


def united(texts: Sequence[SystemText], order: Iterable[str] = TINYAGENT) -> SystemText:
    """Make one text with the tools of many, from which `restricted` gives each of them again.

    A guideline that is missing in some texts belongs to the tools that those texts never list;
    where that tells nothing it belongs to the tools that it names.

    Args:
        texts: At least one, of one build.
        order: Tools in the order of the list; others follow as they come.

    Returns:
        The text with the most guidelines, with the tools and their guidelines that it lacks.
    """
    base = max(texts, key=lambda t: (len(t.guidelines), len(t.blocks)))
    blocks = {b.name: b for text in (*texts, base) for b in text.blocks if b.name != JOIN}
    names = [*(n for n in order if n in blocks), *(n for n in blocks if n not in set(order))]
    lines = list(base.guidelines)
    for text in texts:
        for at, line in enumerate(text.guidelines):
            there = [other.text for other in lines]
            if line.tools and line.text not in there:
                before = text.guidelines[at - 1].text if at else None
                lines.insert(there.index(before) + 1 if before in there else len(lines), line)
    listed = [(set(text.tools), {g.text for g in text.guidelines}) for text in texts]
    bound = []
    for line in lines:
        without = [tools for tools, written in listed if line.text not in written]
        never = set(names).difference(*without) if without else set()
        bound.append(replace(line, tools=tuple(n for n in names if n in never) or line.tools))
    join = tuple(b for b in base.blocks if b.name == JOIN)
    return replace(base, blocks=(*(blocks[name] for name in names), *join), guidelines=tuple(bound))
