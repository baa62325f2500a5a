"""`memory`: what fits a card, what is recommended for it, and where the figures come from."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.commands.config_flags import resolve_config

Plan = Callable[..., dict[str, Any]]


@pytest.fixture
def text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function that runs `memory` in an empty folder and gives all that it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str, code: int = 0) -> str:
        assert main(["memory", *words]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run


@pytest.fixture
def plan(text: Callable[..., str]) -> Plan:
    """Return a function that gives the answer as JSON."""
    decoder = json.JSONDecoder()  # behind the JSON stands what took long, on stderr
    return lambda *words: dict(decoder.raw_decode(text(*words, "--json"))[0])


def cell(answer: dict[str, Any], batch: int, weights: str, checkpointing: str) -> dict[str, Any]:
    (found,) = (
        row
        for row in answer["predictions"]
        if (row["batch"], row["weights"], row["checkpointing"]) == (batch, weights, checkpointing)
    )
    return dict(found)


def test_the_published_rows_on_an_l4_are_planned_without_torch(tmp_path: Path) -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "numpy", "pyarrow"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from tinyagent_fast.cli import main
sys.exit(main(["memory", "--card", "l4"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "39,030, mean 3,490 tokens, longest 4,608 (as published",
        "not measured on this card",
        "recommended: 8 x 2 rows, checkpointing auto, nf4",
        "tinyagent-fast train --preset l4 --train.batch 8",
        "time per epoch at 70-85 % of 57 TFLOP/s",
    ):
        assert words in done.stdout


def test_every_batch_weight_and_checkpointing_has_a_prediction(plan: Plan) -> None:
    answer = plan()
    assert len(answer["predictions"]) == 5 * 2 * 3
    for row in answer["predictions"]:
        parts = ("weights", "adapter_and_optimizer", "activations", "logits", "overhead")
        assert row["total_gib"] == pytest.approx(sum(row[f"{p}_gib"] for p in parts), abs=0.01)
        assert row["fits"] in ("fits", "perhaps", "no")
    assert cell(answer, 1, "nf4", "unsloth")["fits"] == "fits"
    assert cell(answer, 16, "nf4", "off")["fits"] == "no"
    assert len(plan("--model.backend", "transformers")["predictions"]) == 5 * 2 * 2


def test_the_table_says_what_does_not_fit(text: Callable[..., str]) -> None:
    shown = text("--card", "l4")
    row = next(line for line in shown.splitlines() if line.startswith("\u2502    8 "))
    assert " x " in row
    assert "x does not fit" in shown
    assert "not even one row fits" in text("--gpu-gib", "1.5")


@pytest.mark.parametrize(
    ("words", "gib", "tflops", "preset"),
    [
        (["--card", "t4"], 14.6, 24, "t4"),
        (["--card", "a100"], 40.0, 265, "a100"),
        (["--gpu-gib", "80", "--tflops", "300"], 80.0, 300, "a100"),
        (["--gpu-gib", "16"], 16.0, 24, "t4"),
        (["--preset", "t4"], 14.6, 24, "t4"),
        (["--preset", "seed"], 22.16, 57, "seed"),
        ([], 22.16, 57, "l4"),
    ],
)
def test_the_card_is_named_or_that_of_the_preset(
    plan: Plan, words: list[str], gib: float, tflops: float, preset: str
) -> None:
    answer = plan(*words)
    assert (answer["gpu_gib"], answer["tflops"]) == (gib, tflops)
    assert answer["usable_gib"] < gib
    assert f"--preset {preset} " in answer["recommendation"]["command"]


@pytest.mark.parametrize(
    ("given", "rows_per_step"),
    [
        (["--lora.rank", "64", "--train.batch", "8", "--data.points=all"], 16),
        (["--preset", "seed", "--train.accumulation=4"], 4),
        (["--preset=a100", "--name", "my run", "--train.batch=4"], 4),
        (["--model.gradient-checkpointing", "true", "--lora.alpha", "8"], 16),
        (["--train.batch", "auto"], 16),
    ],
)
def test_the_recommended_command_is_the_one_given_with_a_batch_that_fits(
    plan: Plan, given: list[str], rows_per_step: int
) -> None:
    """What was asked for besides stays, and an optimizer step has as many rows as before."""
    found = plan(*given, "--gpu-gib", "22")["recommendation"]
    command = shlex.split(found["command"])
    assert command[:2] == ["tinyagent-fast", "train"]
    assert found["fits"]
    config = resolve_config("train", command[2:], lambda: "none")
    assert config.train.rows_per_batch == found["batch"]
    assert config.train.rows_per_batch * config.train.accumulation == rows_per_step
    before = resolve_config("train", given, lambda: "l4")
    ours = {"batch": found["batch"], "accumulation": found["accumulation"]}
    assert config.train == replace(before.train, **ours)
    how = config.model.gradient_checkpointing
    assert config.model == replace(before.model, gradient_checkpointing=how)
    assert replace(config, train=before.train, model=before.model) == before


def test_a_card_s_preset_is_planned_for_the_card_whatever_its_weights(plan: Plan) -> None:
    answer = plan("--preset", "a100", "--model.weights", "fp32", "--model.backend", "transformers")
    assert answer["gpu_gib"] == 40.0


@pytest.mark.parametrize("preset", ["cpu", "nano"])
def test_without_a_gpu_memory_is_this_machine_s_and_no_hours_are_promised(
    preset: str, plan: Plan, text: Callable[..., str]
) -> None:
    import psutil

    answer = plan("--preset", preset)
    assert (answer["gpu_gib"], answer["tflops"], answer["preset"]["hours"]) == (None, None, None)
    assert answer["usable_gib"] < answer["memory_gib"] <= psutil.virtual_memory().total / 2**30
    assert {row["weights"] for row in answer["predictions"]} == {"fp32"}
    said = text("--preset", preset)
    assert "TFLOP/s" not in said and "not predicted" in said
    with_card = plan("--preset", preset, "--card", "l4")
    assert (with_card["gpu_gib"], with_card["tflops"]) == (22.16, 57)


def test_a_dry_run_stands_beside_the_estimate(plan: Plan, text: Callable[..., str]) -> None:
    small = ("--model.base", "random", "--model.weights", "bf16", "--lengths", "300,400")
    small += ("--model.backend", "transformers")
    answer = plan(*small, "--dry-run")
    counted = answer["dry_run"]
    assert counted["backend"] == "transformers"
    assert counted["computed_tokens"] <= counted["padded_tokens"] == counted["batch"] * 400
    assert counted["estimated_gib"] == pytest.approx(counted["peak_gib"], rel=0.25, abs=0.01)
    assert "dry_run" not in plan(*small)
    assert "counted in a dry run" in text(*small, "--dry-run")


def test_three_epochs_on_an_l4_take_a_working_day(plan: Plan) -> None:
    asked = plan("--preset", "l4")["preset"]
    best, worst = asked["hours"]
    assert 6 < best < 7 < worst < 7.75
    assert asked["mean_micro_batch_tokens"] < asked["kept_micro_batch_tokens"]
    assert asked["fits"]


def test_lengths_that_are_given_are_taken(plan: Plan) -> None:
    answer = plan("--lengths", "500,900")
    assert (answer["row_tokens"], answer["lengths"]["mean_tokens"]) == (900, 500)
    assert answer["lengths"]["source"] == "as given"
    assert cell(answer, 4, "nf4", "off")["total_gib"] < cell(plan(), 4, "nf4", "off")["total_gib"]


def test_rows_of_a_base_made_on_the_spot_count_as_the_longest_allowed(plan: Plan) -> None:
    answer = plan("--preset", "nano")
    assert answer["lengths"]["longest_tokens"] == answer["lengths"]["mean_tokens"] == 1024
    assert "not counted" in answer["lengths"]["source"]
    assert answer["lengths"]["rows"] == 24_200 - 200
    assert answer["shape"]["hidden"] == 256
    assert plan("--preset", "smoke")["shape"]["hidden"] == 64
    assert plan("--preset", "cpu")["shape"]["hidden"] == 576


def test_the_rows_of_a_file_of_ones_own_are_its_own_and_those_that_are_mixed_in(
    plan: Plan, tiny_base: Path, tiny_data: Path
) -> None:
    own = ["--data.train", str(tiny_data / "training_data.json"), "--data.validation-entries", "8"]
    mixed = ["--data.prompts", "short", "--data.with-generated", "--data.generated-entries", "70"]
    passes = ["--data.own-passes", "3"]
    for base in ([], ["--model.base", str(tiny_base)]):  # with a tokenizer, and without
        assert plan(*base, *own)["lengths"]["rows"] == 32
        assert plan(*base, *own, *mixed, *passes)["lengths"]["rows"] == 3 * 32 + 70


@pytest.mark.parametrize("prompts", [["as-is"], ["short"], ["short", "--data.with-generated"]])
def test_rows_are_counted_as_training_has_them_where_data_and_a_tokenizer_are_there(
    plan: Plan, tiny_base: Path, tiny_data: Path, prompts: list[str]
) -> None:
    from tinyagent_fast.prompts.loading import load_tokenizer
    from tinyagent_fast.prompts.tokens import PromptTokenizer
    from tinyagent_fast.training.inputs import encode_run_rows, load_run_examples

    train = tiny_data / "training_data.json"
    words = ["--model.base", str(tiny_base), "--data.train", str(train), "--data.prompts", *prompts]
    words += ["--data.validation-entries", "8", "--data.generated-entries", "70"]
    answer = plan(*words)
    config = resolve_config("train", words, lambda: "l4")
    config = replace(config, data=replace(config.data, test=None))
    tokenizer = PromptTokenizer(load_tokenizer(tiny_base))
    rows = encode_run_rows(config, load_run_examples(config), tokenizer).train.statistics
    assert answer["lengths"]["rows"] == rows.rows
    assert answer["lengths"]["longest_tokens"] == rows.longest_tokens
    assert answer["lengths"]["mean_tokens"] == pytest.approx(rows.mean_tokens)
    assert str(train) in answer["lengths"]["source"]
    shape = json.loads((tiny_base / "config.json").read_text(encoding="utf-8"))
    assert answer["shape"]["hidden"] == shape["hidden_size"]


@pytest.mark.parametrize(
    "words",
    [
        ["--data.train", "FILE", "--data.joins-per-plan", "0.1"],
        ["--data.train", "FILE", "--data.limit-entries", "20"],
        ["--data.train", "FILE", "--data.prompts", "short", "--data.with-generated"],
        ["--preset", "nano"],
    ],
)
def test_rows_of_all_points_are_as_many_as_are_trained_on(
    plan: Plan, tiny_data: Path, words: list[str]
) -> None:
    from tinyagent_fast.training.inputs import load_run_examples

    words = [str(tiny_data / "training_data.json") if word == "FILE" else word for word in words]
    words += ["--data.points", "all", "--data.validation-entries", "8"]
    words += ["--data.generated-entries", "40"]
    config = resolve_config("train", words, lambda: "l4")
    config = replace(config, data=replace(config.data, test=None))
    rows = len(load_run_examples(config).train)
    for lengths in ([], ["--lengths", "300,400"]):
        assert plan(*words, *lengths)["lengths"]["rows"] == rows


def test_a_training_file_that_is_not_there_is_refused_unless_it_is_the_published_one(
    text: Callable[..., str],
) -> None:
    assert "typo.json" in text("--data.train", "typo.json", code=2)
    assert "39,030" in text("--data.train", "data/training_data.json")


def test_published_lengths_are_not_taken_for_those_of_rewritten_prompts(plan: Plan) -> None:
    source = plan("--data.prompts", "short")["lengths"]["source"]
    assert "rewritten" in source and "rewritten" not in plan()["lengths"]["source"]


def test_hours_follow_the_rate_and_the_rows(plan: Plan) -> None:
    slow, fast = plan("--tflops", "50"), plan("--tflops", "100")
    for how, (best, worst) in slow["hours_per_epoch"].items():
        assert best < worst
        assert fast["hours_per_epoch"][how][0] == pytest.approx(best / 2, rel=0.01)
    half = plan("--tflops", "50", "--data.limit-entries", str(39_030 // 2))
    for how, (best, _) in slow["hours_per_epoch"].items():
        assert half["hours_per_epoch"][how][0] == pytest.approx(best / 2, rel=0.01)
    assert slow["hours_per_epoch"]["off"][0] < slow["hours_per_epoch"]["true"][0]


def test_a_short_training_takes_some_time_all_the_same(
    plan: Plan, text: Callable[..., str]
) -> None:
    nano = ["--preset", "nano", "--card", "l4"]
    assert 0 < plan(*nano)["preset"]["hours"][0] < 0.1
    said = re.search(r"([\d.]+)-([\d.]+) minutes for 1 epoch", text(*nano))
    assert said and 0 < float(said[1]) < float(said[2])


def test_hours_are_those_of_the_steps_that_are_made(plan: Plan, text: Callable[..., str]) -> None:
    l4 = ("--preset", "l4", "--train.shared-prefix", "off", "--model.gradient-checkpointing")
    l4 = (*l4, "false", "--tflops", "1", "--lengths", "1000,2000")
    whole = plan(*l4, "--train.epochs", "1")["preset"]
    half = plan(*l4, "--train.max-steps", str(math.ceil(39_030 / 16) // 2))["preset"]
    assert (whole["epochs"], half["epochs"]) == (1, pytest.approx(0.5, abs=0.001))
    assert half["hours"] == pytest.approx([hours / 2 for hours in whole["hours"]], rel=0.01)
    packed = plan(*l4, "--train.batching", "packed", "--train.max-steps", "100")["preset"]
    assert packed["epochs"] > 3 * plan(*l4, "--train.max-steps", "100")["preset"]["epochs"]
    said = text("--preset", "cpu", "--card", "l4")
    assert "600 steps, 0.387 epochs" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.base", "someone/model"], "put its config.json into a folder"),
        (["--lengths", "900,500"], "the mean and the longest"),
        (["--lengths", "900"], "the mean and the longest"),
        (["--lengths", "a,b"], "the mean and the longest"),
        (["--gpu-gib", "0"], "it must be more than 0"),
        (["--tflops", "nan"], "it must be more than 0"),
        (["--card", "l4", "--gpu-gib", "22"], "both name the memory"),
        (["--card", "v100"], "invalid choice"),
        (["--train.batch", "0"], "train.batch must be 1 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_to_give(
    text: Callable[..., str], words: list[str], message: str
) -> None:
    assert message in text(*words, code=2)


def test_a_config_of_a_base_without_sizes_is_refused(
    text: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    for content, message in (("[]", "hidden_size is None"), ("{", "its sizes are not known")):
        (tmp_path / "base" / "config.json").write_text(content, encoding="utf-8")
        assert message in text("--model.base", "base", code=2)
