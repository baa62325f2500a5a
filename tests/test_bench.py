"""`benchmarks/bench.py`: the quick run measures every part, and its table is whole."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402
from inputs import REAL_DATA, generated_rows  # noqa: E402


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results" / "quick.json"
    environment = {k: v for k, v in os.environ.items() if k != REAL_DATA}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done, json.loads(out.read_text(encoding="utf-8"))["parts"], out


def spreads(value):
    """Find every figure that was measured in each round."""
    if isinstance(value, dict) and "rounds" in value and "median" in value:
        yield value
    elif isinstance(value, dict):
        for below in value.values():
            yield from spreads(below)


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_has_figures_of_every_round_and_all_are_finite(quick, part):
    _, parts, _ = quick
    found = list(spreads(parts[part]["figures"]))
    assert found
    for figure in found:
        assert len(figure["rounds"]) == bench.QUICK.rounds
        assert all(math.isfinite(v) and v > 0 for v in figure["rounds"])
        assert figure["min"] <= figure["median"] <= figure["max"]


def test_the_table_has_no_empty_cell(quick):
    done, parts, _ = quick
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) > 12
    assert len({len(row) for row in rows}) == 1
    assert all(cell for row in rows for cell in row)
    assert bench.table(parts) in done.stdout
    assert "quick sizes" in done.stdout


def test_the_ways_of_a_training_step_give_the_same_loss_and_gradients(quick):
    _, parts, _ = quick
    figures = parts["training"]["figures"]["training step"]
    compared = figures["differences_from_padded"]
    assert set(compared) == {bench.PACKED, bench.PADDING_FREE, bench.UNSHARED, bench.SHARED}
    for found in compared.values():
        assert found["loss"] < 1e-5 and found["largest_gradient"] < 1e-4
    for usuals in figures["ratios"].values():
        assert all(name.startswith("TRL") for name in usuals)
    computed = figures["computed_tokens"]
    assert computed[bench.SHARED] < computed[bench.UNSHARED] <= figures["padded_tokens"]


def test_the_ways_of_an_evaluation_write_the_same_texts(quick):
    _, parts, _ = quick
    prompts, singles = bench.QUICK.eval_batch, bench.QUICK.single_prompts
    kinds = parts["evaluation"]["figures"]
    for figures in kinds.values():
        for equal in figures["equal_outputs"].values():
            assert equal[bench.SINGLE] == f"{singles} of {singles}"
            assert equal[bench.STATIC] == f"{prompts} of {prompts}"
    assert kinds["evaluation, training-shaped"]["shared_share"] > 0.3
    assert kinds["evaluation, test-shaped"]["shared_share"] < 0.1


def test_every_part_says_under_which_conditions_it_was_measured(quick):
    _, parts, out = quick
    assert list(parts) == list(bench.PARTS)
    for part in parts.values():
        run = part["run"]
        assert run["quick"] and run["threads"] == 1 and run["rows"] == "generated"
        assert len(run["load_average"]) == 2
        assert run["environment"]["versions"]["torch"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_earlier_result_keeps_its_other_parts_unless_it_was_quick(quick, tmp_path, capsys):
    _, parts, out = quick
    assert bench.earlier_parts(out, True) == parts
    assert bench.earlier_parts(out, False) == {}
    assert "none is kept" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    assert bench.earlier_parts(broken, True) == {}
    assert bench.earlier_parts(tmp_path / "absent.json", True) == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "data", "speed"], "speed"),
        (["--rounds", "0"], "--rounds 0"),
        (["--real", "no/such/folder"], "training_data.json"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_with_the_reason(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.parse_flags(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_flags_change_the_sizes_and_quick_has_a_result_file_of_its_own(monkeypatch):
    monkeypatch.delenv(REAL_DATA, raising=False)
    flags = bench.parse_flags(["--rounds", "7", "--batch", "4"])
    sizes = bench.resolve_sizes(flags)
    assert (sizes.rounds, sizes.batch, sizes.new_tokens) == (7, 4, 88)
    assert sizes.shape == bench.FULL.shape
    assert flags.out == BENCHMARKS / "results" / "bench.json"
    flags = bench.parse_flags(["--quick"])
    assert bench.resolve_sizes(flags) == bench.QUICK
    assert ROOT not in flags.out.parents


def test_ways_run_in_turns_and_ratios_are_made_within_a_round():
    ran = []

    def way(name, seconds):
        def run():
            ran.append(name)
            time.sleep(seconds)
            return name

        return run

    timed = bench.in_turns({"slow": way("slow", 0.04), "fast": way("fast", 0.01)}, 2)
    assert ran == ["slow", "fast", "slow", "fast"]
    assert timed.results == {"slow": "slow", "fast": "fast"}
    seconds = {"slow": [4.0, 40.0, 8.0], "fast": [2.0, 10.0, 2.0]}
    cpu = {"slow": [2.0, 2.0, 2.0], "fast": [1.0, 1.0, 1.0]}
    samples = {"slow": 2, "fast": 4}
    found = bench.Timed(seconds, cpu, {}).figures(samples, {"fast": ["slow"]})
    assert found["cpu_ratios"]["fast"]["slow"]["rounds"] == [4.0, 4.0, 4.0]
    assert found["ratios"]["fast"]["slow"]["rounds"] == [4.0, 8.0, 8.0]
    assert found["ratios"]["fast"]["slow"]["median"] == 8.0
    assert found["ways"]["slow"]["samples_per_s"]["median"] == 0.25


def test_generated_rows_have_the_lengths_that_are_asked_for():
    plans = bench.FULL.training_rows
    rows = generated_rows(plans, 200, 32000)
    lengths = [len(row["input_ids"]) for row in rows]
    assert abs(sum(lengths) / len(rows) - 3490) < 60 and len(set(lengths)) > 100
    assert len({tuple(row["input_ids"][: plans.shared]) for row in rows}) == 1
    for row in rows:
        assert len(row["labels"]) == len(row["input_ids"])
        assert sum(label != -100 for label in row["labels"]) == 88
        assert row["labels"][-88:] == row["input_ids"][-88:]
    ids = [row["input_ids"] for row in rows[:8]]
    shared = 7 * plans.shared / sum(map(len, ids))
    assert bench.shared_share(ids) == pytest.approx(shared, abs=1e-3)


def test_real_prompts_share_what_the_published_ones_share():
    folder = os.environ.get(REAL_DATA)
    if not folder:
        pytest.skip(f"{REAL_DATA} names no folder with the published data")
    kinds = bench.prompts_by_kind(Path(folder), bench.FULL)
    shares = {kind: bench.shared_share(ids) for kind, ids in kinds.items()}
    assert {len(prompts) for prompts in kinds.values()} == {bench.FULL.eval_batch}
    assert shares["training-shaped"] > 0.4 > 0.1 > shares["test-shaped"]


def test_a_published_shape_is_measured_with_its_own_sizes_and_as_many_rounds_as_asked():
    import torch

    flags = bench.parse_flags(["--shape", "smollm2-135m", "--rounds", "5", "--batch", "2"])
    sizes = bench.resolve_sizes(flags)
    assert (sizes.rounds, sizes.batch, sizes.shape.hidden, sizes.shape.layers) == (5, 2, 576, 30)
    with torch.device("meta"):
        model = bench.random_llama(sizes.shape, 4096)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
