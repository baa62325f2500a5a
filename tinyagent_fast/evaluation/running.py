"""Generate plans for examples and score them: prompts in, predictions.jsonl and metrics out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyagent_fast.config import EvalConfig
from tinyagent_fast.data.schema import Example
from tinyagent_fast.distributed import ALONE, Processes
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import markdown_report
from tinyagent_fast.evaluation.scoring import (
    Metrics,
    Prediction,
    ScoredPlan,
    score_all,
    summarise,
)
from tinyagent_fast.inference.engine import Completion, Engine, Limits, Prompt
from tinyagent_fast.inference.parity import ParityReport, compare_batches
from tinyagent_fast.inference.second_look import SECOND_LOOK_VERSION, generate_plans
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


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """Plans to predict, and what predictions of them depend on besides the engine."""

    examples: Sequence[Example]
    """Their outputs are the labels."""
    settings: EvalConfig
    made_with: Mapping[str, Any]
    """What tells predictions apart besides engine and settings, such as the adapter's hash."""
    tools: Mapping[str, Tool] | None = None
    """By name, for scoring; None stands for TinyAgent's own."""
    grammar: bool = False
    """Whether plans are held to the tools that their prompt lists."""
    title: str = "evaluation"
    """Heading of the report."""
    note: str = ""
    """What the report says of the prompts."""

    @property
    def limits(self) -> Limits:
        """Where generation ends, and the batch that is asked for."""
        most, batch = self.settings.max_new_tokens, self.settings.batch
        return Limits(stop=END_OF_PLAN, max_new_tokens=most, batch=batch)

    def identity(self) -> dict[str, Any]:
        """Give what predictions may not be mixed across."""
        held = {"grammar": "on", "second_look": SECOND_LOOK_VERSION} if self.grammar else {}
        return {**self.made_with, "max_new_tokens": self.settings.max_new_tokens, **held}

    def prompts(self, examples: Sequence[Example]) -> list[Prompt]:
        """Write the prompts of some of the examples."""
        prompts = [Prompt(system=example.system, user=example.user) for example in examples]
        return [held_to_tools(p, self.tools) for p in prompts] if self.grammar else prompts


def evaluate_examples(
    engine: Engine,
    task: EvaluationTask,
    folder: Path,
    *,
    processes: Processes = ALONE,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    say: Callable[[str], None] = lambda _: None,
) -> EvaluationResult:
    """Generate the plans that are missing, then score all of them.

    Args:
        engine: Writes the plans.
        task: What to predict.
        folder: Gets predictions.jsonl, metrics.json and report.md.
        processes: All that evaluate this; each writes its share.
        on_progress: Called with predictions done and in all.
        say: Prints one line for the user.
    """
    started = time.perf_counter()
    examples, file = task.examples, PredictionFile(folder)
    identity = {**engine.identity(), **task.identity()}
    held = file.path.exists()
    there = processes.on_main_process(lambda: file.start(identity))
    if held and not file.path.exists():
        say(
            f"{folder} held predictions made with other things, such as another test file; they "
            "are now its predictions.previous.jsonl"
        )
    missing = [example for example in examples if example.key not in there]
    kept = len(examples) - len(missing)
    if kept:
        say(f"{kept} predictions are there, made with the same things; they are kept")
    if len(there) > kept:
        say(f"{len(there) - kept} predictions of other queries are there; no figure counts them")
    parity: ParityReport | None = None
    notes: Sequence[str] = ()
    if missing:
        prompts = task.prompts(missing)
        notes = [*engine.notes(prompts), *([_HELD] if task.grammar else [])]
        for note in notes:
            say(note)
        sample = task.settings.parity_prompts
        parity = processes.on_main_process(
            lambda: compare_batches(engine, prompts, task.limits, sample=sample)
        )
        say(parity.sentence())
        for done in _generate(engine, task, missing, parity.safe_batch, file, processes):
            on_progress(min(len(examples), kept + done), len(examples))
    by_key = {prediction.key: prediction for prediction in file.read()}
    plans = score_all((by_key[example.key] for example in examples), task.tools)
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
        report = markdown_report(task.title, result.metrics, plans, task.tools, task.note)
        write_text(folder / "report.md", report)
    return result


def _generate(
    engine: Engine,
    task: EvaluationTask,
    missing: Sequence[Example],
    batch: int,
    file: PredictionFile,
    processes: Processes,
) -> Iterator[int]:
    """Write this process's share of plans, each as soon as it is there.

    Yields:
        How many are done in all processes, which are about as far as this one.
    """
    mine = processes.shard(missing)
    part = file.part(processes.rank) if processes.count > 1 else file
    limits = replace(task.limits, batch=batch)
    completions = generate_plans(engine, task.prompts(mine), limits, tools=task.tools)
    for here, (index, completion) in enumerate(completions, start=1):
        part.append([_prediction(mine[index], completion)])
        yield here * processes.count
    processes.wait()
    processes.on_main_process(file.gather_parts)


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
