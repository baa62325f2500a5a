"""Resuming: a stopped run ends as if it had never stopped, and only the same run goes on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config
from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE
from tinyagent_fast.errors import Stopped, TrainingError, UserError
from tinyagent_fast.interrupts import Terminated
from tinyagent_fast.runs import Run, find_run, point_latest, read_json, write_json
from tinyagent_fast.training import fit, inputs
from tinyagent_fast.training.callbacks import History
from tinyagent_fast.training.resume import (
    checkpoints,
    forget_after,
    keep_checkpoint,
    last_checkpoint,
    refuse_changed_config,
    remember_or_compare,
    training_is_over,
)

pytestmark = pytest.mark.usefixtures("no_picture")
MakeConfig = Callable[..., Config]
TIMES = ("tokens_per_s", "seconds")


class Kill(BaseException):
    """Stands for a kill at a step: nothing in the program catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = History.on_log

    def on_log(self: History, args: Any, state: Any, *rest: Any, **keywords: Any) -> None:
        original(self, args, state, *rest, **keywords)
        if state.global_step == step:
            raise Kill

    monkeypatch.setattr(History, "on_log", on_log)


def history_of(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in run.history()]


def adapter_of(run: Run, folder: str = "adapter") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(str(run.path / folder / "adapter_model.safetensors"))


def assert_same(one: Run, other: Run) -> None:
    import torch

    assert history_of(one) == history_of(other)
    left, right = adapter_of(one), adapter_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "train",
    [
        {"batching": "shuffled", "optimizer": "adamw_torch"},
        {"batching": "length-grouped", "optimizer": "adamw_8bit", "accumulation": 2},
    ],
    ids=["shuffled", "length-grouped, 8-bit"],
)
def test_six_steps_are_three_and_three_after_a_kill(
    train: dict[str, Any], tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs with dropout and evaluations between: order, noise and optimizer must go on."""
    settings: dict[str, Any] = {
        "data": {"limit_entries": 8},
        "lora": {"dropout": 0.2, "rank": 64},
        "train": {"max_steps": 6, "save_every_steps": 3, "evaluations": 2, **train},
    }
    whole = fit.train(tiny_config(name="whole", **settings), quiet)
    config = tiny_config(name="killed", **settings)
    with monkeypatch.context() as patch:
        kill_at(patch, step=5)
        with pytest.raises(Kill):
            fit.train(config, quiet)
    killed = Run(config.runs / "killed")
    assert [r["step"] for r in killed.history() if r["event"] == "step"] == [1, 2, 3, 4, 5]
    assert getattr(last_checkpoint(killed), "name", None) == "checkpoint-3"
    assert fit.train(config, quiet, resume=killed).path == killed.path
    assert "going on from checkpoint-3: 2 later records" in quiet.file.getvalue()
    assert_same(killed, whole)
    assert len({r["loss"] for r in whole.history() if r["event"] == "step"}) == 6


def test_times_are_written_while_a_run_trains_so_that_a_kill_leaves_them(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: dict[str, float] = {}
    original = History.on_log

    def on_log(self: History, *rest: Any, **keywords: Any) -> None:
        original(self, *rest, **keywords)
        path, end = self.run.path / "timings.json", time.monotonic() + 20
        while "steps and validation" not in left and time.monotonic() < end:
            left.update(read_json(path) if path.exists() else {})

    monkeypatch.setattr(History, "on_log", on_log)
    monkeypatch.setattr(fit, "_TIMES_EVERY_S", 0.01)
    config = tiny_config(data={"limit_entries": 8}, train={"max_steps": 1})
    run = fit.train(config, quiet)
    assert left["all"] > left["steps and validation"] > 0 and left["reading data"] > 0
    ended = read_json(run.path / "timings.json")
    assert all(ended[name] >= seconds for name, seconds in left.items())
    assert list(ended)[-1] == "all"


def test_ctrl_c_saves_a_checkpoint_and_resuming_ends_as_if_never_stopped(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "data": {"limit_entries": 8},
        "train": {"max_steps": 4, "save_every_steps": 4},
    }
    whole = fit.train(tiny_config(name="whole", **settings), quiet)
    config = tiny_config(name="stopped", **settings)
    original = History.on_log

    def on_log(self: History, args: Any, state: Any, *rest: Any, **keywords: Any) -> None:
        original(self, args, state, *rest, **keywords)
        if state.global_step == 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(History, "on_log", on_log)
        with pytest.raises(Stopped, match=r"stopped at step 2 of 4[\s\S]*--resume stopped") as got:
            fit.train(config, quiet)
    assert got.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) == before
    stopped = Run(config.runs / "stopped")
    assert getattr(last_checkpoint(stopped), "name", None) == "checkpoint-2"
    assert not stopped.adapter.exists()
    first_s = read_json(stopped.path / "timings.json")
    point_latest(whole)  # a kill right after the folder was made leaves it so
    fit.train(config, quiet, resume=stopped)
    assert_same(stopped, whole)
    both_s = read_json(stopped.path / "timings.json")
    for name in ("reading data", "steps and validation", "all"):
        assert both_s[name] > first_s[name] > 0
    assert both_s["all"] >= both_s["steps and validation"]
    assert find_run("latest", config.runs).path == stopped.path.resolve()


@pytest.mark.parametrize(
    ("when", "stop", "code", "named"),
    [
        ("before", Terminated, 143, set()),
        ("before", KeyboardInterrupt, 130, set()),
        ("after", Terminated, 143, {"checkpoint-2"}),
    ],
)
def test_a_stop_beside_the_steps_names_only_checkpoints_that_are_there(
    when: str,
    stop: type[KeyboardInterrupt],
    code: int,
    named: set[str],
    tiny_config: MakeConfig,
    quiet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(_: Any, now: str) -> None:
        if now == when:
            raise stop

    monkeypatch.setattr(fit._Prepared, "measure_test_queries", measure)
    config = tiny_config(
        data={"limit_entries": 8}, train={"max_steps": 2, "save_every_steps": 1, "evaluations": 0}
    )
    with pytest.raises(Stopped, match="--resume tiny") as got:
        fit.train(config, quiet)
    assert got.value.exit_code == code
    assert set(re.findall(r"checkpoint-\d+", str(got.value))) == named
    assert "made again" not in str(got.value)  # no step is left behind the last checkpoint
    assert {path.name for path in checkpoints(Run(config.runs / "tiny"))} >= named


@pytest.mark.parametrize("where", ["encode_run_rows", "_record"])
def test_a_run_to_go_on_with_is_named_once_it_is_there_and_never_before(
    where: str, tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise Terminated

    config = tiny_config(train={"max_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr(fit, where, stop)
        with pytest.raises((Stopped, Terminated)) as got:
            fit.train(config, quiet)
    named = re.findall(r"--resume (\S+)", str(got.value))
    assert named == [path.parent.name for path in config.runs.glob("tiny/config.yaml")]
    assert bool(named) == (where == "_record")
    if not named:
        fit.train(config, quiet)
        return
    run = find_run(named[0], config.runs)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="--resume tiny") as got:
        patch.setattr(fit, "_read", stop)
        fit.train(config, quiet, resume=run)
    assert got.value.exit_code == 143
    assert fit.train(config, quiet, resume=run).adapter.exists()


@pytest.fixture
def finished(tiny_config: MakeConfig, quiet: Any) -> tuple[Config, Run]:
    config = tiny_config(data={"limit_entries": 8}, train={"max_steps": 2, "save_every_steps": 2})
    return config, fit.train(config, quiet)


def test_a_finished_run_can_be_resumed_and_makes_no_further_step(
    finished: tuple[Config, Run], quiet: Any
) -> None:
    config, run = finished
    before = history_of(run), {n: t.clone() for n, t in adapter_of(run).items()}
    shutil.rmtree(run.adapter)
    fit.train(config, quiet, resume=run)
    assert "checkpoint-2 is the last one" in quiet.file.getvalue()
    assert history_of(run) == before[0]
    assert all(bool((before[1][n] == t).all()) for n, t in adapter_of(run).items())


def test_a_changed_config_is_refused_and_every_difference_is_shown(
    finished: tuple[Config, Run], quiet: Any
) -> None:
    config, run = finished
    changed = replace(
        config,
        train=replace(config.train, learning_rate=5e-4, max_steps=9),
        lora=replace(config.lora, rank=8),
    )
    with pytest.raises(TrainingError) as caught:
        fit.train(changed, quiet, resume=run)
    text = str(caught.value)
    assert "its config changed" in text
    assert "train.learning_rate: 0.001 -> 0.0005" in text
    assert "train.max_steps: 2 -> 9" in text
    assert "lora.rank: 4 -> 8" in text
    assert "data." not in text


def test_changed_data_under_the_same_name_is_refused(
    tiny_config: MakeConfig, tiny_data: Path, tmp_path: Path, quiet: Any
) -> None:
    data = tmp_path / "training_data.json"
    shutil.copy(tiny_data / "training_data.json", data)
    config = tiny_config(
        data={"train": data, "limit_entries": 8}, train={"max_steps": 2, "save_every_steps": 1}
    )
    run = fit.train(config, quiet)
    entries = json.loads(data.read_text(encoding="utf-8"))
    del entries[next(iter(entries))]
    data.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(TrainingError) as caught:
        fit.train(config, quiet, resume=run)
    assert "its data changed" in str(caught.value)
    assert "train_file.sha256" in str(caught.value)


def test_another_catalogue_under_the_same_name_is_refused(
    tiny_config: MakeConfig, tmp_path: Path, quiet: Any
) -> None:
    path = tmp_path / "tools.yaml"
    built_in = BUILT_IN_CATALOGUE.read_bytes()
    path.write_bytes(built_in)
    config = tiny_config(data={"limit_entries": 8, "catalogue": path}, train={"max_steps": 1})
    run = fit.train(config, quiet)
    path.write_bytes(built_in + b"# a wish\n")
    with pytest.raises(TrainingError) as caught:
        fit.train(config, quiet, resume=run)
    assert "its data changed" in str(caught.value)
    assert "catalogue_file.sha256" in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=f"run {run.path.name} names it"):
        fit.train(config, quiet, resume=run)
    path.write_bytes(built_in)
    record = read_json(run.path / "data.json")
    del record["catalogue_file"]  # as earlier versions wrote it
    write_json(run.path / "data.json", record)
    path.write_bytes(built_in + b"# a wish\n")
    fit.train(config, quiet, resume=run)


def test_a_run_on_mixed_rows_goes_on_with_them_whatever_the_generator_would_make_now(
    tiny_config: MakeConfig, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {"prompts": "short", "with_generated": True, "generated_entries": 40}
    config = tiny_config(
        data=mixed, model={"max_length_tokens": 1024}, train={"max_steps": 2, "evaluations": 1}
    )
    run = fit.train(config, quiet)
    monkeypatch.setattr(inputs, "_generation_key", lambda _: "another generator")
    monkeypatch.setattr(inputs, "generate_dataset", lambda *_: pytest.fail("generated anew"))
    fit.train(config, quiet, resume=run)
    generated = run.mixed_in_file()
    assert generated is not None
    generated.write_bytes(generated.read_bytes() + b"\n")
    with pytest.raises(TrainingError, match=r"generated\.sha256"):
        fit.train(config, quiet, resume=run)


def test_the_adapters_card_is_the_same_whether_or_not_the_run_was_resumed(
    tiny_config: MakeConfig, quiet: Any
) -> None:
    data = {"train": None, "test": None, "generated_entries": 40, "limit_entries": 8}
    config = tiny_config(data=data, model={"base": "random", "max_length_tokens": 4096})
    run = fit.train(config, quiet)
    card = run.adapter / "README.md"
    written = card.read_text(encoding="utf-8")
    shutil.rmtree(run.adapter)
    fit.train(config, quiet, resume=run)
    assert card.read_text(encoding="utf-8") == written
    assert "generated by tinyagent_fast" in written and "`random`" in written


def test_another_set_of_trained_parameters_is_refused(
    finished: tuple[Config, Run], quiet: Any
) -> None:
    config, run = finished
    path = run.path / "parameters.json"
    parameters = json.loads(path.read_text(encoding="utf-8"))
    name = next(iter(parameters))
    parameters["some.lora_A.weight"] = parameters.pop(name)
    write_json(path, parameters)
    with pytest.raises(TrainingError) as caught:
        fit.train(config, quiet, resume=run)
    assert "its parameters changed" in str(caught.value)
    assert f"{name}: (absent) -> " in str(caught.value)
    assert "some.lora_A.weight: [" in str(caught.value)


def test_a_changed_config_is_found_before_anything_is_read(
    tiny_config: MakeConfig, tmp_path: Path, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.runs import create_run

    config = tiny_config()
    run = create_run(config)
    monkeypatch.setattr(fit, "load_run_examples", lambda *_: pytest.fail("data was read"))
    with pytest.raises(TrainingError, match="config changed"):
        fit.train(replace(config, preset="other"), quiet, resume=run)


def test_the_same_config_is_accepted(tiny_config: MakeConfig) -> None:
    from tinyagent_fast.runs import create_run

    config = tiny_config(train={"epochs": 1.5, "max_steps": None})
    refuse_changed_config(create_run(config), config)


def write_checkpoint(run: Run, step: int) -> Path:
    """Write one with two files, as the trainer's is kept."""
    written, target = run.path / "written", run.checkpoints / f"checkpoint-{step}"
    (written / "inner").mkdir(parents=True)
    (written / "trainer_state.json").write_text("{}")
    (written / "inner" / "optimizer.pt").write_bytes(bytes(range(200)))
    target.parent.mkdir(exist_ok=True)
    keep_checkpoint(written, target)
    return target


def test_a_run_that_was_broken_off_before_its_first_checkpoint_has_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".unfinished" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-x").mkdir()
    assert last_checkpoint(Run(tmp_path)) is None


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [lose, cut, flip])
@pytest.mark.parametrize("name", ["inner/optimizer.pt", "checksums.json"])
def test_the_newest_checkpoint_that_is_whole_is_taken_and_it_is_said(
    tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    run = Run(tmp_path)
    whole, newer = write_checkpoint(run, 9), write_checkpoint(run, 10)
    said: list[str] = []
    assert last_checkpoint(run, said.append) == newer
    assert said == []
    harm(newer / name)
    assert last_checkpoint(run, said.append) == whole
    assert len(said) == 1 and "checkpoint-10" in said[0] and name in said[0]
    harm(whole / name)
    with pytest.raises(TrainingError) as caught:
        last_checkpoint(run, said.append)
    assert "checkpoint-9" in caught.value.why and "checkpoint-10" in caught.value.why


def test_a_checkpoint_that_is_written_again_takes_the_place_of_the_former(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = write_checkpoint(run, 2)
    (first / "left").write_text("of before")
    assert write_checkpoint(run, 2) == first == last_checkpoint(run)
    assert not (first / "left").exists()


def test_training_is_over_after_its_last_step_or_an_early_stop(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert training_is_over(run, tmp_path / "checkpoint-6", steps=6)
    assert not training_is_over(run, tmp_path / "checkpoint-4", steps=6)
    run.append_history({"event": "early stop", "step": 4})
    assert training_is_over(run, tmp_path / "checkpoint-4", steps=6)
    assert not training_is_over(run, tmp_path / "checkpoint-2", steps=6)


def test_history_behind_the_checkpoint_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    records = [{"event": "evaluation", "step": 0}, *({"event": "step", "step": n} for n in (1, 2))]
    for record in [*records, {"event": "step", "step": 3}, {"event": "evaluation", "step": 4}]:
        run.append_history(record)
    assert forget_after(run, tmp_path / "checkpoint-2") == 2
    assert run.history() == records
    assert forget_after(run, tmp_path / "checkpoint-2") == 0


def test_what_a_run_was_made_from_is_written_once_and_compared_later(tmp_path: Path) -> None:
    run = Run(tmp_path)
    data = {"rows": {"train": {"rows": 3, "dropped": (("k", 9),)}}, "read": {"seconds": 1.5}}
    remember_or_compare(run, data, {"a.lora": [2, 3]}, resumed=False)
    slower = {**data, "read": {"seconds": 99.0}}
    remember_or_compare(run, slower, {"a.lora": [2, 3]}, resumed=True)
    with pytest.raises(TrainingError, match=r"a\.lora: \[2, 3\] -> \[2, 4\]"):
        remember_or_compare(run, data, {"a.lora": [2, 4]}, resumed=True)
    other = {**data, "rows": {"train": {"rows": 4, "dropped": (("k", 9),)}}}
    with pytest.raises(TrainingError, match=r"rows\.train\.rows: 3 -> 4"):
        remember_or_compare(run, other, {"a.lora": [2, 3]}, resumed=True)


def test_many_differences_are_cut_off_with_their_count(tmp_path: Path) -> None:
    run = Run(tmp_path)
    remember_or_compare(run, {}, {f"p{n}": [n] for n in range(30)}, resumed=False)
    with pytest.raises(TrainingError, match="and 10 more"):
        remember_or_compare(run, {}, {}, resumed=True)


def test_a_run_goes_on_from_another_folder_with_the_files_and_the_base_that_it_has(
    tiny_config: MakeConfig,
    tiny_data: Path,
    tmp_path: Path,
    quiet: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Paths are relative, the base is built; then data is generated: nothing is made again."""
    shutil.copytree(tiny_data, tmp_path / "mine")
    train = {"max_steps": 4, "save_every_steps": 2}
    named = {"train": Path("mine/training_data.json"), "test": Path("mine/testing_data.json")}
    generated = {"train": None, "test": None, "generated_entries": 40}
    configs = []
    for name, data in (("named", named), ("generated", generated)):
        config = tiny_config(name=name, data={**data, "limit_entries": 8}, train=train)
        model = replace(config.model, base="random", max_length_tokens=4096)
        configs.append(replace(config, runs=Path("runs"), model=model))
    for config in configs:
        with monkeypatch.context() as patch:
            kill_at(patch, step=3)
            with pytest.raises(Kill):
                fit.train(config, quiet)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for config in configs:
        run = find_run(str(config.name), tmp_path / "runs")
        fit.train(replace(config, runs=tmp_path / "runs"), quiet, resume=run)
        assert run.adapter.exists()
    assert list(elsewhere.iterdir()) == []
