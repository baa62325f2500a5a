"""Prompt texts of the generated dataset, in our own words."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from tinyagent_fast.data.generation.catalogue import Catalogue
from tinyagent_fast.plans.tools import signature

PromptStyle = Literal["short", "full"]
_MOMENT = "%A %Y-%m-%d %H:%M"


def short_planner_prompt(tool_names: Sequence[str], now: datetime) -> str:
    """Write a one-line system prompt: when it is, and the retrieved tools, for small models."""
    return f"It is {now:{_MOMENT}}. Plan with: {', '.join(tool_names)}"


def full_planner_prompt(catalogue: Catalogue, examples: Sequence[str], now: datetime) -> str:
    """Write a system prompt of the published data's build and length: tools, rules, examples.

    An example is `Question: ...` and its plan. All before the date is the same for the same tools.
    """
    tools = catalogue.tools
    lines = [
        "You turn a request into a plan: a numbered list of function calls that may run side by "
        f"side wherever they can. You may call these {len(tools) + 1} functions:",
    ]
    for number, tool in enumerate(tools, start=1):
        lines.append(f"{number}. {signature(tool)}")
        lines += [f" - {text}" for text in tool.description]
        lines.append("")
    lines += [
        f"{len(tools) + 1}. join() -> str",
        " - Gathers the results of the calls before it. It is always the last call of a plan.",
        " - Call it when the request is answered, or when a result is needed to go on.",
        "",
        "Rules:",
        " - Number the calls from 1 upwards, one call a line.",
        " - Give every function exactly the arguments that its signature lists, in that order.",
        " - Write arguments as Python literals: strings in double quotes, lists in brackets.",
        " - Use $1, $2 and so on, inside a string, for the result of an earlier call.",
        " - Call nothing that is not listed, and nothing that the request does not need.",
        " - Calls that do not need each other's results must not refer to each other.",
        " - Look addresses and numbers up by name; never make them up.",
        " - Write no comments and no explanation.",
        " - End with join() and then <END_OF_PLAN>.",
    ]
    lines += [f" - Now it is {now:{_MOMENT}}.", "", "Examples:", ""]
    lines += [f"{example}<END_OF_PLAN>\n###" for example in examples]
    return "\n".join(lines) + "\n"


def joiner_prompt(query: str, scratchpad: str) -> str:
    """Write the one user message that asks for a verdict on what `agent.loop.scratchpad` wrote."""
    return (
        "Look at the results of a plan and decide what comes next.\n"
        " - Write a line `Thought: ` and then a line `Action: `.\n"
        " - Action is Finish(Task completed!) when all was done, Finish(<answer>) when the user "
        "asked a question, and Replan when a result shows that another plan is needed.\n\n"
        f"Question: {query}\n\n{scratchpad}\n"
    )
