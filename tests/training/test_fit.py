"""A whole run: what it leaves behind, which adapter it keeps, and that it can learn."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tinyagent_fast.api import evaluate_run
from tinyagent_fast.config import Config, EvalConfig
from tinyagent_fast.distributed import Processes
from tinyagent_fast.errors import ConfigError, DataError, ModelError, TrainingError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.models.nano import PretrainSpec
from tinyagent_fast.prompts.retrieval import load_retriever
from tinyagent_fast.reports.charts import plot_training
from tinyagent_fast.runs import Run, create_run
from tinyagent_fast.training import fit
from tinyagent_fast.training.best import Best, Evaluation, read_best, why_better
from tinyagent_fast.training.callbacks import PlanSuccess

pytestmark = pytest.mark.usefixtures("no_picture")
MakeConfig = Callable[..., Config]


def losses_of(run: Run) -> list[float]:
    return [r["loss"] for r in run.history() if r["event"] == "step"]


def evaluations_of(run: Run) -> list[dict[str, Any]]:
    return [r for r in run.history() if r["event"] == "evaluation"]


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def evaluation(step: int, success: float, loss: float = 1.0) -> Evaluation:
    return Evaluation(
        step=step, success=success, success_dag=success, loss=loss, samples=3, seconds=0.1
    )


def script_evaluations(
    monkeypatch: pytest.MonkeyPatch, success: Sequence[float], loss: Sequence[float]
) -> None:
    """Let the evaluations of a run give these figures, the one before the first step included."""
    scores, losses = iter(success), iter(loss)

    def evaluate(*_: Any, **__: Any) -> Any:
        share = SimpleNamespace(share=next(scores))
        return SimpleNamespace(metrics=SimpleNamespace(success=share, success_dag=share, n=3))

    monkeypatch.setattr(fit, "evaluate_examples", evaluate)
    monkeypatch.setattr(fit, "validation_loss", lambda *_: next(losses))


def test_a_run_leaves_all_it_was_made_from_and_all_it_gave(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "plot_training", plot_training)
    config = tiny_config(
        train={"evaluations": 2},
        eval={"before_and_after": True, "before_limit": 1, "limit": 2, "sample": 3},
    )
    run = fit.train(config, quiet)
    assert run.config() == config
    names = {path.name for path in run.path.iterdir()}
    assert names >= {"config.yaml", "environment.json", "data.json", "parameters.json"}
    assert names >= {"history.jsonl", "samples", "checkpoints", "best", "adapter", "training.png"}
    assert names >= {"retriever.json", "retriever.npz"}
    assert (run.path.parent / "latest").resolve() == run.path.resolve()
    assert [e["step"] for e in evaluations_of(run)] == [0, 2, 4]
    assert [r["step"] for r in run.history() if r["event"] == "step"] == [1, 2, 3, 4]
    assert all(r["tokens_per_s"] > 0 for r in run.history() if r["event"] == "step")
    for folder in ("samples/step-000002", "test/before", "test/after"):
        assert (run.path / folder / "predictions.jsonl").exists()
    data = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    assert len(PredictionFile(run.path / "test" / "before").read()) == 1
    assert len(PredictionFile(run.path / "test" / "after").read()) == 2
    counts = {"train": 32, "left_out_as_leaks": 0, "validation": 8, "sample": 3, "test": 2}
    assert data["examples"] == counts
    text = quiet.file.getvalue()
    assert "rows through the trainer's collator equal ours" in text
    assert "before training: plan success" in text
    assert "after training: plan success" in text


@pytest.mark.parametrize("batching", ["shuffled", "packed"])
def test_how_often_the_steps_pass_over_the_rows_is_said_and_many_times_are_warned_of(
    tiny_config: MakeConfig, quiet: Any, batching: Any
) -> None:
    batch = {"batch": 32, "accumulation": 1, "evaluations": 0}
    for steps, fix in ((5, "--train.max-steps 4"), (4, None)):
        train = {**batch, "batching": batching, "max_steps": steps}
        fit.train(tiny_config(name=f"s{steps}", train=train), quiet)
        said = next(line for line in quiet.file.getvalue().splitlines() if "passes over" in line)
        quiet.file.truncate(quiet.file.seek(0))
        assert f"{steps} steps are {steps} passes" in said
        assert ("warning" in said) == (fix is not None)
        assert (fix or "") in said


@pytest.mark.parametrize(
    ("passes", "own_passes", "fix"),
    [(1, 4, None), (1, 40, "--data.own-passes 4"), (2, 3, "--data.own-passes 2"), (5, 1, "epochs")],
)
def test_what_counts_is_how_often_each_own_row_is_seen(
    tiny_config: MakeConfig, passes: int, own_passes: int, fix: str | None
) -> None:
    config = tiny_config(
        data={"own_passes": own_passes, "with_generated": True},
        train={"max_steps": None, "epochs": float(passes)},
    )
    said = fit._passes(config, 50 * passes, 100, 1)
    assert ("warning" in said) == (fix is not None)
    assert (fix or "") in said
    assert (f"each own row is seen {passes * own_passes} times" in said) == (own_passes > 1)


def test_what_is_known_before_any_long_work_is_said_first_and_once(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(
        data={"train": None, "test": None, "generated_entries": 30}, train={"max_steps": 2}
    )
    fit.train(config, quiet)
    text = quiet.file.getvalue()
    first = text[: text.index("generating entries")]
    known = ["30 generated entries", config.model.base, "2 steps of 2 x 1 rows, prefix-grouped"]
    header = text[text.index("tinyagent-fast train") :].partition("\u2570")[0]
    for fact in known:
        assert fact in first
        assert fact not in header
    assert str(Path("data", "generated")) in header


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"base": "nano"}}, ["nano (fp32), built once", f"{PretrainSpec().steps} steps"]),
        ({"data": {"train": Path("a.json"), "with_generated": True}}, ["a.json, among 8,000"]),
        ({"data": {"catalogue": Path("home.yaml"), "train": None}}, ["tools of home.yaml"]),
        ({"train": {"max_steps": None, "epochs": 1.0}}, ["1 epoch in steps of 2 x 1 rows"]),
        ({"train": {"batch": "auto"}}, ["4 steps of as many rows as fit"]),
    ],
)
def test_what_is_planned_names_what_a_config_leaves_to_the_run(
    tiny_config: MakeConfig, changes: dict[str, Any], told: list[str]
) -> None:
    said = "\n".join(fit._planned(tiny_config(**changes)))
    assert all(text in said for text in told), said


def test_one_pass_and_a_part_of_the_test_queries_are_said_as_such(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    train = {"batch": 32, "accumulation": 1, "max_steps": 1}
    fit.train(tiny_config(train=train, eval={"limit": 2}), quiet)
    text = " ".join(quiet.file.getvalue().split())
    assert "1 step is 1 pass over 32 rows" in text
    assert "; 2 of 6 test queries" in text


def test_without_a_test_file_nothing_is_measured_on_one_and_the_header_says_so(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(
        data={"test": None},
        train={"max_steps": 1, "evaluations": 1},
        eval={"before_and_after": True, "sample": 3},
    )
    run = fit.train(config, quiet)
    assert run.test_file() is None
    assert [e["samples"] for e in evaluations_of(run)] == [3, 3]
    assert not (run.path / "test").exists()
    text = " ".join(quiet.file.getvalue().split())
    assert "of which 3 are planned during training; no test file" in text
    assert "test queries" not in text
    assert f"make eval RUN={run.named} ARGS='--test FILE'" in text
    with pytest.raises(DataError, match="no test file"):
        evaluate_run(run)


def test_every_saved_adapter_is_read_by_older_programs_and_from_any_folder(
    tiny_base: Path, tiny_config: MakeConfig, quiet: Any
) -> None:
    base = os.path.relpath(tiny_base)  # as a base in runs/bases is named
    run = fit.train(tiny_config(model={"base": base}, train={"evaluations": 1}), quiet)
    folders = [run.adapter, run.best, *run.checkpoints.glob("checkpoint-*")]
    assert len(folders) == 3
    for folder in folders:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        assert {type(merge) for merge in model["merges"]} == {str}
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert adapter["base_model_name_or_path"] == str(tiny_base.resolve())


def test_an_adapters_card_says_what_it_is_and_names_no_path_of_the_machine(
    tiny_base: Path, tiny_config: MakeConfig, quiet: Any
) -> None:
    run = fit.train(tiny_config(model={"base": str(tiny_base)}, train={"evaluations": 1}), quiet)
    for folder in (run.adapter, run.best):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert run.path.name in card and tiny_base.name in card
        assert "plan success" in card
        assert str(tiny_base.parent) not in card and str(run.path.parent) not in card
        for block in re.findall(r"```python\n(.*?)```", card, flags=re.S):
            compile(block, "README.md", "exec")
    assert not list(run.checkpoints.glob("*/README.md"))


def test_each_process_on_a_cpu_gets_its_share_of_the_cores_that_they_may_use(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(_: Any, config: Config, *__: Any) -> Any:
        return config.train.threads

    four = Processes(rank=0, count=4, local_rank=0, local_count=4)
    monkeypatch.setattr(fit, "init_processes", lambda: four)
    monkeypatch.setattr(fit, "choose_compute", chosen)
    monkeypatch.setattr(fit, "why_not_shared", lambda *_: "not asked")
    config = tiny_config(train={"threads": None})
    for cores, threads in ((1, 1), (8, 2)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert fit._with_compute(config, None, Mock(), Mock(), None) == threads  # type: ignore[arg-type]


def test_a_run_with_retrieved_prompts_keeps_the_retriever_that_made_them(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(data={"prompts": "retrieved"}, train={"max_steps": 1})
    run = fit.train(config, quiet)
    retriever = load_retriever(run.path)
    assert retriever is not None
    data = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    assert data["retriever"] == retriever.facts()
    assert "prompts" in quiet.file.getvalue()
    assert retriever.figures.sentence() in " ".join(quiet.file.getvalue().split())


def test_the_adapter_folder_is_the_best_one_and_loads_for_generation(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    import torch

    from tinyagent_fast.models.loading import load_for_generation

    config = tiny_config(train={"evaluations": 2})
    run = fit.train(config, quiet)
    assert weights_of(run.adapter) == weights_of(run.best)
    best = read_best(run)
    assert best is not None
    assert best.step == max(evaluations_of(run), key=lambda e: (e["success"], -e["loss"]))["step"]
    assert json.loads((run.adapter / "best.json").read_text())["reason"] == best.reason
    assert (run.adapter / "tokenizer.json").exists()
    loaded = load_for_generation(config, config.model.base, run.adapter)
    assert not loaded.model.training
    bare = load_for_generation(config, config.model.base, None)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert not torch.allclose(loaded.model(ids).logits, bare.model(ids).logits)


def test_a_run_without_evaluations_keeps_its_last_adapter_and_says_so(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    run = fit.train(tiny_config(), quiet)
    assert read_best(run) is None
    assert "no evaluation was made: the last adapter is kept" in quiet.file.getvalue()
    checkpoint = sorted(run.checkpoints.glob("checkpoint-4"))[0]
    assert weights_of(run.adapter) == weights_of(checkpoint)


def test_generation_between_steps_leaves_the_next_losses_unchanged(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    """With dropout, so that a changed random state or mode would show."""
    settings: dict[str, Any] = {"lora": {"dropout": 0.3}}
    without = fit.train(tiny_config(name="without", **settings), quiet)
    between = fit.train(tiny_config(name="with", train={"evaluations": 4}, **settings), quiet)
    assert len(evaluations_of(between)) == 5
    assert losses_of(between) == losses_of(without)
    last = between.checkpoints / "checkpoint-4"
    assert weights_of(last) == weights_of(without.adapter)


def write_short_plans(path: Path) -> Path:
    """Write eight entries with short prompts and plans that all differ."""
    plans: dict[str, list[tuple[str, list[Any]]]] = {
        "answer Sid": [("get_email_address", ["Sid"]), ("reply_to_email", [["$1"], "", []])],
        "ideas": [("open_note", ["ideas", ""])],
        "text Ann": [("get_phone_number", ["Ann"]), ("send_sms", [["$1"], "hi"])],
        "where is Rome": [("maps_open_location", ["Rome"])],
        "sum up a.pdf": [("open_and_get_file_path", ["a.pdf"]), ("summarize_pdf", ["$1"])],
        "call Lutfi": [("get_phone_number", ["Lutfi"])],
        "buy milk": [("create_note", ["list", "milk", ""])],
        "email of Amir": [("get_email_address", ["Amir"])],
    }
    entries = {}
    for number, (wish, steps) in enumerate(plans.items()):
        query = f"{wish}, please: {wish}"
        messages = [
            {"role": "system", "content": "tools"},
            {"role": "user", "content": f"Question: {query}"},
        ]
        lines = [
            f"{at}. {tool}({json.dumps(args)[1:-1]})" for at, (tool, args) in enumerate(steps, 1)
        ]
        parsed = [{"tool_name": tool, "tool_args": args} for tool, args in steps]
        plan = {
            "type": "plan",
            "raw_input": repr(messages),
            "raw_output": "\n".join([*lines, f"{len(lines) + 1}. join()"]),
            "parsed_output": [*parsed, {"tool_name": "join", "tool_args": []}],
            "id": f"p{number}",
            "index": 0,
        }
        entries[f"k{number}"] = {"input": query, "output": [plan], "closest_5_queries": []}
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_a_small_model_learns_eight_plans_by_heart(
    tiny_config: MakeConfig, quiet: Any, tmp_path: Path
) -> None:
    """All parts together: rows, masks, loss, optimizer, adapter on disk, generation, scoring."""
    from tinyagent_fast.evaluation.running import EvaluationTask, evaluate_examples
    from tinyagent_fast.inference.torch_engine import TorchEngine
    from tinyagent_fast.models.loading import load_for_generation
    from tinyagent_fast.training.inputs import load_run_examples

    config = tiny_config(
        data={"train": write_short_plans(tmp_path / "short.json"), "validation_entries": 0},
        lora={"rank": 32, "alpha": 32},
        train={
            "max_steps": 110,
            "batch": 8,
            "learning_rate": 1e-2,
            "schedule": "cosine",
            "warmup": 0.05,
        },
    )
    run = fit.train(config, quiet)
    assert losses_of(run)[0] > 5
    assert losses_of(run)[-1] < 0.1
    examples = load_run_examples(config).train
    settings = EvalConfig(batch=8, max_new_tokens=60, parity_prompts=8)

    def success(adapter: Path | None) -> float:
        loaded = load_for_generation(config, config.model.base, adapter)
        folder = tmp_path / f"eval-{adapter is not None}"
        task = EvaluationTask(examples=examples, settings=settings, made_with={})
        result = evaluate_examples(TorchEngine(loaded), task, folder)
        if adapter is not None:
            assert {p.stop_reason for p in result.predictions} == {"stop"}
        return result.metrics.success.share

    assert len(examples) == 8
    assert success(run.adapter) == 1.0
    assert success(None) == 0.0


def test_the_best_adapter_survives_the_rotation_of_checkpoints(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_evaluations(monkeypatch, [0.1, 0.6, 0.2, 0.3, 0.1, 0.2], [5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
    config = tiny_config(train={"max_steps": 5, "evaluations": 5, "save_every_steps": 1})
    run = fit.train(config, quiet)
    left = sorted(path.name for path in run.checkpoints.glob("checkpoint-*"))
    assert left == ["checkpoint-4", "checkpoint-5"]
    best = read_best(run)
    assert best == Best(
        step=1, success=0.6, loss=4.0, reason="success 0.6000 higher than 0.1000 at step 0"
    )
    assert weights_of(run.adapter) == weights_of(run.best)
    assert all(weights_of(run.checkpoints / name) != weights_of(run.best) for name in left)
    assert [e["best"] for e in evaluations_of(run)] == [True, True, False, False, False, False]
    assert "best adapter: step 1, success 0.6000 higher" in quiet.file.getvalue()


def test_training_stops_early_after_so_many_evaluations_without_a_better_one(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_evaluations(monkeypatch, [0.1, 0.6, 0.7, 0.7, 0.6, 0.9], [1.0] * 6)
    config = tiny_config(train={"max_steps": 5, "evaluations": 5, "early_stopping": 2})
    run = fit.train(config, quiet)
    assert [e["step"] for e in evaluations_of(run)] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in run.history() if r["event"] == "early stop"] == [4]
    best = read_best(run)
    assert best is not None
    assert best.step == 2
    assert (run.checkpoints / "checkpoint-4" / "trainer_state.json").exists()


def test_a_later_better_evaluation_resets_the_patience(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_evaluations(monkeypatch, [0.5, 0.4, 0.6, 0.5, 0.7, 0.6], [1.0] * 6)
    config = tiny_config(train={"max_steps": 5, "evaluations": 5, "early_stopping": 2})
    run = fit.train(config, quiet)
    assert [e["step"] for e in evaluations_of(run)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("new", "best", "expected"),
    [
        ((0.5, 9.0), (0.4, 1.0), True),
        ((0.4, 1.0), (0.5, 9.0), False),
        ((0.5, 0.9), (0.5, 1.0), True),
        ((0.5, 1.0), (0.5, 1.0), False),
        ((0.5, 1.1), (0.5, 1.0), False),
        ((0.0, 1.0), None, True),
        ((0.9, math.nan), (0.1, 1.0), False),
        ((math.nan, 0.1), (0.1, 1.0), False),
        ((0.9, math.nan), None, False),
        ((0.9, math.inf), (0.9, 1.0), False),
    ],
)
def test_success_decides_then_loss_and_nan_never_wins(
    new: tuple[float, float], best: tuple[float, float] | None, expected: bool
) -> None:
    kept = None if best is None else evaluation(1, *best)
    assert (why_better(evaluation(2, *new), kept) is not None) is expected


def test_a_small_sample_before_the_first_step_is_no_measure_for_later_ones() -> None:
    first = replace(evaluation(0, 0.375, 0.84), samples=16)
    later = replace(evaluation(570, 0.3125, 0.27), samples=32)
    assert why_better(later, first) is not None
    assert why_better(replace(later, loss=math.nan), first) is None
    assert why_better(replace(first, step=600, success=1.0), later) is None


def plan_success(
    run: Run, figures: Sequence[tuple[float, float]], patience: int | None = None
) -> PlanSuccess:
    """Make the callback with scripted figures by step, saving only best.json."""

    def save(folder: Path, best: Best) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "best.json").write_text(json.dumps(vars(best)), encoding="utf-8")

    return PlanSuccess(
        run=run,
        measure=lambda step: evaluation(step, *figures[step]),
        save=save,
        say=lambda _: None,
        every_steps=1,
        patience=patience,
    )


def test_the_reason_names_the_rule_and_the_figures_that_decided(tmp_path: Path) -> None:
    run = Run(tmp_path)
    callback = plan_success(run, [(0.2, 3.0), (0.2, 2.5), (0.4, 2.6)])
    reasons = []
    for step in range(3):
        callback.evaluate(step)
        best = read_best(run)
        assert best is not None
        reasons.append(best.reason)
    assert reasons == [
        "first evaluation",
        "equal success 0.2000, loss 2.5000 lower than 3.0000 at step 0",
        "success 0.4000 higher than 0.2000 at step 1",
    ]


def test_a_loss_of_nan_is_recorded_but_kept_out_of_best(tmp_path: Path) -> None:
    run = Run(tmp_path)
    callback = plan_success(run, [(0.2, 3.0), (0.9, math.nan)])
    callback.evaluate(0)
    callback.evaluate(1)
    best = read_best(run)
    assert best is not None
    assert best.step == 0
    assert [r["best"] for r in run.history()] == [True, False]


def test_evaluations_made_again_after_a_resume_do_not_use_up_the_patience(tmp_path: Path) -> None:
    """A run was killed behind evaluation 3, the best, and goes on from step 1."""
    run = Run(tmp_path)
    figures = [(0.1, 1.0), (0.2, 1.0), (0.1, 1.0), (0.3, 1.0), (0.2, 1.0), (0.2, 1.0)]
    callback = plan_success(run, figures, patience=2)
    for step in (0, 1):
        callback.evaluate(step)
    kept = run.history_path.read_text()
    for step in (2, 3):
        callback.evaluate(step)
    run.history_path.write_text(kept)
    stops = []
    for step in (2, 3, 4, 5):
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        state = SimpleNamespace(global_step=step, max_steps=9)
        callback.on_step_end(None, state, control)
        stops.append(control.should_training_stop)
    assert stops == [False, False, False, True]
    assert [r["best"] for r in evaluations_of(run)] == [True, True, False, True, False, False]


def test_over_long_rows_that_were_left_out_are_said(tiny_config: MakeConfig, quiet: Any) -> None:
    config = tiny_config(
        model={"max_length_tokens": 320}, data={"over_long": "drop"}, train={"max_steps": 1}
    )
    run = fit.train(config, quiet)
    data = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    dropped = data["rows"]["train"]["dropped"]
    assert dropped
    assert f"dropped {len(dropped)} over-long train rows" in quiet.file.getvalue()
    assert data["rows"]["train"]["rows"] + len(dropped) == 32


def test_over_long_rows_stop_a_run_before_its_folder_is_made(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(model={"max_length_tokens": 150})
    with pytest.raises(DataError, match="have more than 150 tokens"):
        fit.train(config, quiet)
    assert not list(config.runs.glob("*"))


def test_plan_success_is_counted_over_queries_also_when_their_rows_were_dropped(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(
        model={"max_length_tokens": 150},
        data={"over_long": "drop"},
        train={"max_steps": 1, "evaluations": 1},
        eval={"sample": 8},
    )
    run = fit.train(config, quiet)
    data = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    assert data["rows"]["validation"]["rows"] < 8
    assert [e["samples"] for e in evaluations_of(run)] == [8, 8]


def test_a_run_is_never_overwritten(tiny_config: MakeConfig, quiet: Any) -> None:
    config = tiny_config()
    run = create_run(config)
    run.append_history({"event": "step", "step": 1})
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(ConfigError, match="never overwritten"):
        fit.train(config, quiet)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_bad_setting_is_refused_before_anything_is_done(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(train={"batch": 0})
    with pytest.raises(ConfigError, match=r"train\.batch"):
        fit.train(config, quiet)
    assert not list(config.runs.glob("*"))


def test_memory_that_runs_out_in_the_longest_batch_stops_the_run_with_flags(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("tinyagent_fast.training.preflight.rehearse", run_out)
    with pytest.raises(TrainingError, match=r"--train\.batch 1 --train\.accumulation 2"):
        fit.train(tiny_config(), quiet)


def test_an_automatic_batch_without_a_gpu_is_what_main_memory_holds(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    run = fit.train(tiny_config(train={"batch": "auto", "max_steps": 1, "accumulation": 2}), quiet)
    trained = run.config().train
    assert (trained.batch, trained.accumulation) == (4, 1)
    memory = json.loads((run.path / "memory.json").read_text(encoding="utf-8"))
    assert memory["predicted"]["total_gib"] < memory["usable_gib"]


def test_a_batch_that_needs_more_than_is_free_is_refused_with_flags_that_fit(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, 0.044)
    config = tiny_config(train={"batch": 4, "max_steps": 1})
    with pytest.raises(TrainingError, match="GiB are free") as caught:
        fit.train(config, quiet)
    assert not list(config.runs.glob("*"))
    flags = caught.value.fix.split(", or ")[0].split()
    assert flags[:3:2] == ["--train.batch", "--train.accumulation"]
    batch, accumulation = int(flags[1]), int(flags[3])
    assert batch * accumulation == 4
    fit.train(tiny_config(train={"batch": batch, "accumulation": accumulation, "max_steps": 1}))


def with_card(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Let a run think that it has a GPU of that size."""
    monkeypatch.setattr("tinyagent_fast.training.fit.usable_gib", lambda: gib)


@pytest.mark.parametrize(("gib", "batch"), [(20.0, 4), (0.049, 2)])
def test_an_automatic_batch_is_the_largest_that_fits_and_is_what_the_run_remembers(
    gib: float, batch: int, tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, gib)
    changes = {"batch": "auto", "accumulation": 2, "max_steps": 1}
    run = fit.train(tiny_config(train=changes), quiet)
    trained = run.config().train
    assert (trained.batch, trained.accumulation) == (batch, 4 // batch)
    shown = quiet.file.getvalue()
    assert f"batch auto: {batch} x {4 // batch} rows" in shown
    memory = json.loads((run.path / "memory.json").read_text(encoding="utf-8"))
    assert (memory["batch"], memory["usable_gib"], memory["peak_gib"]) == (batch, gib, None)
    predicted = memory["predicted"]["total_gib"]
    assert 0 < memory["longest_batch_predicted_gib"] <= predicted
    assert f"predicted {predicted:.1f} GiB +-15 % for the longest micro-batch" in shown


def test_a_base_without_known_sizes_trains_without_a_prediction(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_card(monkeypatch, 20.0)

    def unknown(*_: Any) -> None:
        raise ModelError("config.json: hidden_size is None", "why", "fix")

    monkeypatch.setattr("tinyagent_fast.models.families.ModelShape.from_config", unknown)
    run = fit.train(tiny_config(train={"max_steps": 1}), quiet)
    assert "memory cannot be predicted: config.json: hidden_size is None" in quiet.file.getvalue()
    assert not (run.path / "memory.json").exists()
    with pytest.raises(ModelError, match="hidden_size"):
        fit.train(tiny_config(name="other", train={"batch": "auto"}), quiet)


def test_equal_configs_give_equal_runs(tiny_config: MakeConfig, quiet: Any) -> None:
    one, other = (
        fit.train(tiny_config(name=name, lora={"dropout": 0.2}), quiet) for name in ("one", "other")
    )
    assert losses_of(one) == losses_of(other)
    assert weights_of(one.adapter) == weights_of(other.adapter)


def test_another_seed_gives_another_run(tiny_config: MakeConfig, quiet: Any) -> None:
    one, other = (
        fit.train(tiny_config(name=f"s{seed}", train={"seed": seed, "max_steps": 1}), quiet)
        for seed in (1, 2)
    )
    assert weights_of(one.adapter) != weights_of(other.adapter)


def test_all_points_can_be_trained_while_success_is_measured_on_plans(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    config = tiny_config(
        data={"points": "all"}, train={"max_steps": 1, "evaluations": 1}, eval={"sample": 8}
    )
    run = fit.train(config, quiet)
    data = json.loads((run.path / "data.json").read_text(encoding="utf-8"))
    assert data["examples"]["train"] >= 64  # a plan and a join each, and plans made again
    assert data["examples"]["sample"] == 8
    assert replace(config, name=None).data.points == "all"
