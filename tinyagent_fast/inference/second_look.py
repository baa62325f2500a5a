"""Plans that are looked at when they are written, and asked for once more where a call is doubtful.

The calls before the doubtful one stay. What follows is written anew under a grammar whose next call
has arguments of the right kinds, so this works with every engine. What is looked up twice in a plan
is looked up once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.inference.engine import Completion, Engine, Limits, OnToken, Prompt
from tinyagent_fast.plans.doubts import Doubt, doubts, without_repeats
from tinyagent_fast.plans.gbnf import MAX_CALLS, plan_grammar
from tinyagent_fast.plans.grammar import Plan, PlanError, parse_plan, render_plan
from tinyagent_fast.plans.tools import Tool, tools_by_name
from tinyagent_fast.prompts.builder import listed_tools

SECOND_LOOK_VERSION = 3
"""Raised when other plans come out of it, as predictions of two versions are not mixed.

No hash of its sources: that would put predictions aside for a comment."""


def generate_plans(
    engine: Engine,
    prompts: Sequence[Prompt],
    limits: Limits,
    on_token: OnToken | None = None,
    *,
    tools: Mapping[str, Tool] | None,
) -> Iterator[tuple[int, Completion]]:
    """Complete prompts as `Engine.generate` does, and doubtful plans of those with a grammar twice.

    A second plan replaces the first if it has fewer doubts and leaves no call out but needless
    look-ups: each tool is called as often. The cost is that of both. `on_token` gets only empty
    texts of a second plan; `tools` are all by name, and None stands for TinyAgent's own. Look-ups
    that a plan of theirs repeats are left out.
    """
    again: list[tuple[int, Completion, Prompt, Plan]] = []
    for index, written in engine.generate(prompts, limits, on_token):
        prompt = prompts[index]
        completion = _shortened(prompt, written, tools)
        plan, found = _plan(completion), doubts_left(prompt, completion, tools)
        if plan and found and len(found[0].before) < MAX_CALLS:
            listed = _listed(prompt, tools)
            grammar = plan_grammar(listed, begun=found[0].before, following=found[0].instead)
            again.append((index, completion, replace(prompt, grammar=grammar), plan))
        else:
            yield index, completion

    def waiting(at: int, _text: str) -> None:
        if on_token is not None:
            on_token(again[at][0], "")

    if again:
        prompts = [prompt for _, _, prompt, _ in again]
        for at, written in engine.generate(prompts, limits, waiting):
            index, first, prompt, plan = again[at]
            second = _shortened(prompt, written, tools)
            other = _plan(second)
            better = other is not None and _is_better(other, plan, _listed(prompt, tools))
            yield (
                index,
                replace(
                    second if better else first,
                    new_tokens=first.new_tokens + second.new_tokens,
                    seconds=first.seconds + second.seconds,
                ),
            )


def doubts_left(prompt: Prompt, done: Completion, tools: Mapping[str, Tool] | None) -> list[Doubt]:
    """Find the doubts about a plan; none without a grammar, as nothing is looked at then."""
    listed = _listed(prompt, tools)
    plan = _plan(done) if listed else None
    return doubts(plan, listed) if plan else []


def known_tools(tools: Mapping[str, Tool] | None) -> Mapping[str, Tool]:
    """Give tools by name; None stands for TinyAgent's own, with the kinds of what they take."""
    return _own_tools() if tools is None else tools


def _listed(prompt: Prompt, tools: Mapping[str, Tool] | None) -> Mapping[str, Tool]:
    return listed_tools(prompt, known_tools(tools)) if prompt.grammar is not None else {}


def _shortened(prompt: Prompt, done: Completion, tools: Mapping[str, Tool] | None) -> Completion:
    """Leave repeated look-ups out of a plan; other texts stay as they are, to the letter."""
    plan = _plan(done) if prompt.grammar is not None else None
    # A look-up is one also where no tool that takes its result is listed.
    shorter = without_repeats(plan, known_tools(tools)) if plan else None
    return done if shorter is None or shorter == plan else replace(done, text=render_plan(shorter))


def _plan(done: Completion) -> Plan | None:
    """Read what was written; None if it is no whole plan."""
    try:
        return parse_plan(done.text)
    except PlanError:
        return None


def _is_better(second: Plan, first: Plan, tools: Mapping[str, Tool]) -> bool:
    """Say whether a second plan is less in doubt than the first and does no less."""
    found = doubts(first, tools)
    needless = {len(doubt.before) for doubt in found if doubt.needless}
    wanted = Counter(s.tool for at, s in enumerate(first.steps) if at not in needless)
    dropped = wanted - Counter(step.tool for step in second.steps)
    return not dropped and len(doubts(second, tools)) < len(found)


@cache
def _own_tools() -> Mapping[str, Tool]:
    return tools_by_name(load_catalogue().tools)
