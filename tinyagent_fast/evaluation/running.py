"""Generate plans for examples and score them: prompts in, predictions.jsonl and metrics out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.config import EvalConfig
from tinyagent_fast.data.schema import Example
from tinyagent_fast.distributed import Processes
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import markdown_report
from tinyagent_fast.evaluation.scoring import (
    Metrics,
    Prediction,
    ScoredPlan,
    score_all,
    summarise,
)
from tinyagent_fast.inference.engine import Completion, Engine, Prompt
from tinyagent_fast.inference.parity import ParityReport, compare_batches
from tinyagent_fast.inference.second_look import generate_plans
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.builder import held_to_tools
from tinyagent_fast.runs import write_json, write_text

_HELD = (
    "grammar: plans can only call the tools that their prompt lists, with right arguments; "
    "where an argument is of another kind than its parameter takes, the plan is asked for again"
)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation measured and how."""

    metrics: Metrics
    plans: Sequence[ScoredPlan]
    """In the order of the examples."""
    parity: ParityReport | None
    """None when every prediction was there already."""
    reused: int
    """Predictions kept from an earlier, broken-off evaluation."""
    seconds: float
    notes: Sequence[str] = ()
    """What the engine had to say before it began."""

    @property
    def predictions(self) -> list[Prediction]:
        """What was generated, in the order of the examples."""
        return [plan.prediction for plan in self.plans]

    def to_json(self) -> dict[str, Any]:
        """Give plain values for metrics.json."""
        return {
            **self.metrics.to_json(),
            "generation": {
                "reused_predictions": self.reused,
                "seconds": round(self.seconds, 3),
                "parity": asdict(self.parity) if self.parity else None,
                "notes": list(self.notes),
            },
        }


def evaluate_examples(
    engine: Engine,
    examples: Sequence[Example],
    settings: EvalConfig,
    folder: Path,
    *,
    made_with: Mapping[str, Any],
    tools: Mapping[str, Tool] | None = None,
    grammar: bool = False,
    title: str = "evaluation",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    say: Callable[[str], None] = lambda _: None,
    processes: Processes = Processes(),  # noqa: B008 - frozen, and the ordinary case
) -> EvaluationResult:
    """Generate the plans that are missing, then score all of them.

    Args:
        engine: Writes the plans.
        examples: Plans to predict; their outputs are the labels.
        settings: Batch, limits and the comparison of batches.
        folder: Gets predictions.jsonl, metrics.json and report.md.
        made_with: What the predictions depend on besides engine and settings, such as the
            adapter's hash.
        tools: Tools by name for scoring; None stands for TinyAgent's own.
        grammar: Whether plans are held to the tools that their prompt lists.
        title: Heading of the report.
        on_progress: Called with predictions done and in all.
        say: Prints one line for the user.
        processes: Each generates its share; the first one writes what came of all.
    """
    started = time.perf_counter()
    limits: dict[str, Any] = {"stop": END_OF_PLAN, "max_new_tokens": settings.max_new_tokens}
    identity = {**engine.identity(), **made_with, "max_new_tokens": settings.max_new_tokens}
    if grammar:
        identity |= {"grammar": "on", "second_look": True}
    file = PredictionFile(folder)
    there = processes.on_main_process(lambda: file.start(identity))
    missing = [example for example in examples if example.key not in there]
    kept = len(examples) - len(missing)
    if kept:
        say(f"{kept} predictions are there, made with the same things; they are kept")
    if len(there) > kept:
        say(f"{len(there) - kept} predictions of other queries are there; no figure counts them")
    parity: ParityReport | None = None
    notes: Sequence[str] = ()
    if missing:
        prompts = _prompts(missing, tools, grammar)
        notes = [*engine.notes(prompts), *([_HELD] if grammar else [])]
        for note in notes:
            say(note)
        batch, sample = settings.batch, settings.parity_prompts
        parity = processes.on_main_process(
            lambda: compare_batches(engine, prompts, batch=batch, sample=sample, **limits)
        )
        say(parity.sentence())
        mine = processes.shard(missing)
        part = file.part(processes.rank) if processes.count > 1 else file
        completions = generate_plans(
            engine, _prompts(mine, tools, grammar), tools=tools, batch=parity.safe_batch, **limits
        )
        for here, (index, completion) in enumerate(completions, start=1):
            part.append([_prediction(mine[index], completion)])  # as soon as it is there
            # The other processes are about as far.
            done = min(len(examples), kept + here * processes.count)
            on_progress(done, len(examples))
        processes.wait()
        processes.on_main_process(file.gather_parts)
    by_key = {prediction.key: prediction for prediction in file.read()}
    plans = score_all((by_key[example.key] for example in examples), tools)
    result = EvaluationResult(
        metrics=summarise([plan.score for plan in plans]),
        plans=plans,
        parity=parity,
        reused=kept,
        seconds=time.perf_counter() - started,
        notes=notes,
    )
    strange = result.metrics.label_problems.get("unknown_tool", 0)
    if strange:
        say(f"{strange} labels call unknown tools; --data.catalogue names tools of your own")
    if processes.is_main_process:
        write_json(folder / "metrics.json", result.to_json())
        write_text(folder / "report.md", markdown_report(title, result.metrics, plans, tools))
    return result


def _prompts(
    examples: Sequence[Example], tools: Mapping[str, Tool] | None, grammar: bool
) -> list[Prompt]:
    prompts = [Prompt(system=example.system, user=example.user) for example in examples]
    return [held_to_tools(prompt, tools) for prompt in prompts] if grammar else prompts


def _prediction(example: Example, completion: Completion) -> Prediction:
    return Prediction(
        key=example.key,
        query=example.query,
        label=example.output,
        prediction=completion.text,
        stop_reason=completion.stop_reason,
        new_tokens=completion.new_tokens,
        seconds=round(completion.seconds, 4),
    )
