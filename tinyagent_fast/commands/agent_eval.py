"""`agent-eval`: plans of a run are carried out in a sandbox, and what came of them is counted."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from tinyagent_fast.agent.evaluate import AgentEvalOptions


def run(arguments: Sequence[str]) -> int:
    """Evaluate; gives 0 when the evaluation has finished."""
    options = tyro.cli(AgentEvalOptions, args=list(arguments), prog="tinyagent-fast agent-eval")
    from rich.console import Console

    from tinyagent_fast.agent.evaluate import evaluate_agent
    from tinyagent_fast.display import Display

    evaluate_agent(options, Display(Console(highlight=False)))
    return 0
