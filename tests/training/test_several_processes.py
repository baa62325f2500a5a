"""Two processes on CPU: the same rows, losses, plans and files as one, and one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast import distributed as processes_module
from tinyagent_fast.cli import main
from tinyagent_fast.config import Config, dump_config
from tinyagent_fast.distributed import Processes, launch_environment
from tinyagent_fast.errors import ConfigError, UserError
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.scoring import Prediction
from tinyagent_fast.runs import Run

ROWS = 13
EPOCHS = 2
STEPS = 4
"""Steps of an epoch: 13 rows in 2 x 2 of both processes."""

DRIVER = """
import json, shutil, sys
from dataclasses import replace
from pathlib import Path
from rich.console import Console
from tinyagent_fast.cli import main
from tinyagent_fast.config import parse_config
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.distributed import Processes, init_processes
from tinyagent_fast.runs import Run
from tinyagent_fast.training import fit

fit.plot_training = lambda _: None
here = init_processes()
build, rows = fit.build_trainer, []

def building(*arguments, **keywords):
    trainer = build(*arguments, **keywords)
    step = type(trainer).training_step
    def logging(self, model, inputs, *rest, **more):
        lengths = inputs["attention_mask"].sum(1).tolist()
        texts = [str(ids[:n].tolist()) for ids, n in zip(inputs["input_ids"], lengths)]
        rows.append((self.state.global_step, texts))
        return step(self, model, inputs, *rest, **more)
    type(trainer).training_step = logging
    return trainer

fit.build_trainer = building
config = parse_config(Path(sys.argv[1]).read_text())
out = Path(sys.argv[2])
run = fit.train(config, Console(highlight=False, width=200))
(out / f"length-grouped-{here.rank}.json").write_text(json.dumps(rows))

def half() -> Run:
    shutil.copytree(run.path, run.path.with_name("half"))
    shutil.rmtree(run.path.with_name("half") / "checkpoints" / "checkpoint-8")
    return Run(run.path.with_name("half"))

fit.train(config, Console(highlight=False), resume=here.on_main_process(half))

rows.clear()
fit.train(
    replace(
        config,
        name="shuffled",
        train=replace(config.train, batching="shuffled", evaluations=0),
        eval=replace(config.eval, before_and_after=False),
    ),
    Console(quiet=True),
)
(out / f"shuffled-{here.rank}.json").write_text(json.dumps(rows))

Processes.leave = lambda self: None
arguments = ["eval", "--run", str(run.path), "--out", str(out / "eval"), "--parity-prompts", "2"]
assert main(arguments) == 0
assert main([*arguments[:-2], "--engine", "gguf"]) == 2

def spoiling(*arguments, **keywords):
    trainer = build(*arguments, **keywords)
    whole = trainer.packed_gradients
    def spoilt(packed, *rest, **more):
        bad = here.rank == 1 and trainer.state.global_step == 1
        return whole(packed, *rest, **more) * (float("nan") if bad else 1.0)
    trainer.packed_gradients = spoilt
    return trainer

fit.build_trainer = spoiling
spoilt = replace(config, name="spoilt", eval=replace(config.eval, before_and_after=False))
try:
    fit.train(spoilt, Console(highlight=False))
except TrainingError as error:
    (out / f"error-{here.rank}.txt").write_text(error.what)
here.wait()
"""


@dataclass(frozen=True)
class Launch:
    """What two processes and one have left."""

    folder: Path
    pair: Run
    single: Run
    config: Config
    output: str

    def rows(self, batching: str) -> dict[int, list[list[str]]]:
        """Give the rows of each step, one list for each process."""
        found: dict[int, list[list[str]]] = {}
        for rank in (0, 1):
            for step, texts in json.loads((self.folder / f"{batching}-{rank}.json").read_text()):
                found.setdefault(step, []).append(texts)
        return found


def losses_of(run: Run) -> list[float]:
    return [r["loss"] for r in run.history() if r["event"] == "step"]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, config_in: Callable[..., Config]) -> Launch:
    """Train and evaluate in two processes and in one, each once for all tests."""
    from rich.console import Console

    from tinyagent_fast.training import fit

    folder = tmp_path_factory.mktemp("launch")
    config = config_in(
        folder,
        name="pair",
        data={"limit_entries": ROWS},
        train={
            "max_steps": None,
            "epochs": EPOCHS,
            "batching": "length-grouped",
            "evaluations": 2,
            "save_every_steps": 4,
            "learning_rate": 1e-2,
        },
        eval={"before_and_after": True, "limit": 5, "sample": 3},
    )
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "driver.py", "config.yaml", str(folder)],
        cwd=folder,
        env={**os.environ, "TINYAGENT_FAST_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    alone = replace(
        config,
        name="single",
        train=replace(config.train, accumulation=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TINYAGENT_FAST_CACHE", str(folder / "cache"))
        patch.setattr(fit, "plot_training", lambda _: None)
        with (folder / "single.txt").open("w") as stream:
            single = fit.train(alone, Console(file=stream))
    return Launch(folder, Run(folder / "runs" / "pair"), single, config, done.stdout)


@pytest.mark.parametrize("batching", ["length-grouped", "shuffled"])
def test_every_row_comes_once_an_epoch_but_for_those_that_fill_the_last_step(
    batching: str, launch: Launch
) -> None:
    rows = launch.rows(batching)
    assert sorted(rows) == list(range(STEPS * EPOCHS))
    assert all(len(batches) == 2 for batches in rows.values())
    orders = []
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS, (epoch + 1) * STEPS)
        order = [text for step in steps for batch in rows[step] for text in batch]
        counts = Counter(order)
        assert len(counts) == ROWS
        assert len(order) == 16
        again = [text for text, count in counts.items() if count == 2]
        assert sorted(again) == sorted(order[: 16 - ROWS])
        orders.append(order)
    assert set(orders[0]) == set(orders[1])
    assert orders[0] != orders[1]


def test_losses_are_those_of_one_process_with_twice_the_accumulation(launch: Launch) -> None:
    pair, single = losses_of(launch.pair), losses_of(launch.single)
    assert len(pair) == len(single) == STEPS * EPOCHS
    # The fourth step of two processes has rows again, which changes all after it a little.
    assert pair[:3] == pytest.approx(single[:3], rel=1e-4)
    assert pair[3:] != pytest.approx(single[3:], rel=1e-4)
    assert pair[-1] < pair[0]


def test_the_tokens_of_all_processes_are_counted(launch: Launch) -> None:
    pair, single = (
        [r["tokens_padded"] for r in run.history() if r["event"] == "step"]
        for run in (launch.pair, launch.single)
    )
    assert pair[:3] == single[:3]


def test_evaluations_during_training_measure_each_query_once_and_as_one_process_does(
    launch: Launch,
) -> None:
    pair, single = (
        [r for r in run.history() if r["event"] == "evaluation"]
        for run in (launch.pair, launch.single)
    )
    assert [e["step"] for e in pair] == [0, 4, 8]
    assert pair[0]["loss"] == pytest.approx(single[0]["loss"], rel=1e-5)
    assert pair[0]["success"] == single[0]["success"]
    for step in (0, 4, 8):
        folder = launch.pair.path / "samples" / f"step-{step:06d}"
        assert len(PredictionFile(folder).read()) == 3
        assert not list(folder.glob("predictions-rank*"))


def test_the_test_queries_get_the_plans_that_one_process_writes(launch: Launch) -> None:
    pair, single = (
        {p.key: p.prediction for p in PredictionFile(run.path / "test" / "before").read()}
        for run in (launch.pair, launch.single)
    )
    assert len(pair) == 5
    assert pair == single


def test_one_evaluation_in_two_processes_equals_one_in_one(launch: Launch) -> None:
    out = launch.folder / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(launch.folder)
        patch.setenv("TINYAGENT_FAST_CACHE", str(launch.folder / "cache"))
        assert main(["eval", "--run", str(launch.pair.path), "--out", str(out)]) == 0
    two, one = (PredictionFile(folder).read() for folder in (launch.folder / "eval", out))
    assert {p.key: p.prediction for p in two} == {p.key: p.prediction for p in one}
    assert len(two) == len(one) == 5
    metrics = [
        json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for folder in (launch.folder / "eval", out)
    ]
    for found in metrics:
        del found["generation"]
        found.pop("seconds_per_plan", None)
    assert metrics[0] == metrics[1]


def test_a_resumed_pair_ends_as_if_it_had_never_stopped(launch: Launch) -> None:
    from safetensors.torch import load_file

    half = Run(launch.pair.path.with_name("half"))
    assert losses_of(half) == losses_of(launch.pair)
    for folder in ("best", "checkpoints/checkpoint-8"):
        one, other = (
            load_file(str(run.path / folder / "adapter_model.safetensors"))
            for run in (half, launch.pair)
        )
        assert all(bool((one[name] == other[name]).all()) for name in one)


def test_a_loss_that_is_not_finite_in_one_process_stops_both_before_the_step(
    launch: Launch,
) -> None:
    first, second = ((launch.folder / f"error-{rank}.txt").read_text() for rank in (0, 1))
    assert first == "the loss is not finite in another process before optimizer step 2"
    assert second == "the loss is nan before optimizer step 2"


def test_the_first_process_alone_makes_the_run_and_speaks(launch: Launch) -> None:
    assert launch.output.count("step      1/8") == 2  # the run and the one that is spoilt
    assert launch.output.count("trained in") == 2  # the run and its second half
    assert "2: 4 rows of all processes per step" in launch.output
    assert "take 3 of its first rows again" in launch.output
    assert {path.name for path in launch.pair.path.parent.iterdir()} >= {"pair", "half", "spoilt"}
    data = json.loads((launch.pair.path / "data.json").read_text(encoding="utf-8"))
    assert data["processes"] == 2
    alone = json.loads((launch.single.path / "data.json").read_text(encoding="utf-8"))
    assert "processes" not in alone


def prediction(key: str, text: str = "1. join()") -> Prediction:
    return Prediction(
        key=key, query="q", label="1. join()", prediction=text, stop_reason="stop", new_tokens=3
    )


def test_parts_that_a_stop_left_behind_count_once_in_the_next_evaluation(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path)
    file.start({"adapter": "a"})
    file.append([prediction("k0")])
    for rank, keys in enumerate((["k0", "k1"], ["k2"])):
        file.part(rank).append(prediction(key, text="2") for key in keys)
    with file.part(1).path.open("a") as stream:
        stream.write('{"key": "k3", "que')  # the stop came while this was written
    there = file.start({"adapter": "a"})
    assert sorted(there) == ["k0", "k1", "k2"]
    assert there["k0"].prediction == "1. join()"
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["predictions.jsonl"]


def test_parts_of_another_adapter_are_put_aside_with_its_predictions(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path)
    file.start({"adapter": "a"})
    file.part(1).append([prediction("k1")])
    assert file.start({"adapter": "b"}) == {}
    names = {path.name for path in tmp_path.glob("*.jsonl")}
    assert names == {"predictions.previous.jsonl"}


@given(items=st.lists(st.integers(), unique=True), count=st.integers(1, 9))
def test_every_item_is_in_exactly_one_share_and_shares_are_even(
    items: list[int], count: int
) -> None:
    shares = [Processes(rank=rank, count=count).shard(items) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_s_variables_are_read(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": 4, "RANK": rank + 2, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch_environment() == Processes(rank=rank + 2, count=4, local_rank=rank, local_count=2)


def test_without_a_launcher_there_is_one_process_that_does_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = launch_environment()
    assert alone == Processes()
    assert alone.is_main_process
    assert alone.all_reduce_sum(1.5, 2) == [1.5, 2]
    assert alone.on_main_process(lambda: 7) == alone.main_process_first(lambda: 7) == 7
    alone.wait()
    alone.leave()


@pytest.mark.parametrize("rank", [None, "first"])
def test_half_a_launcher_s_variables_are_refused(
    rank: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ConfigError, match="torchrun or accelerate launch"):
        launch_environment()


@pytest.mark.parametrize(("rank", "waits"), [(0, []), (1, [5.0])])
def test_a_later_process_lets_the_first_one_report_an_error(
    rank: int, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(processes_module.time, "sleep", slept.append)
    with pytest.raises(UserError), Processes(rank=rank, count=2).main_process_reports():
        raise UserError("what", "why", "fix")
    assert slept == waits


def test_prefixes_are_shared_in_every_process(launch: Launch) -> None:
    assert launch.output.count("shared prefixes on: computes") == 3  # all but the quiet run
    for run in (launch.pair, launch.single):
        steps = [r for r in run.history() if r["event"] == "step"]
        assert all(0 < r["tokens_computed"] < r["tokens_padded"] for r in steps)


def test_averaged_gradients_are_those_of_one_process(launch: Launch) -> None:
    norms = [
        [r["grad_norm"] for r in run.history() if r["event"] == "step"][:3]
        for run in (launch.pair, launch.single)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
