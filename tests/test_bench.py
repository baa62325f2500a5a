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
import bench_data  # noqa: E402
import bench_evaluation  # noqa: E402
import bench_inputs  # noqa: E402
import bench_rounds  # noqa: E402
import bench_scaling  # noqa: E402
import bench_sizes  # noqa: E402
import bench_table  # noqa: E402

TABLE_COLUMNS = 5


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "results" / "quick.json"
    environment = {k: v for k, v in os.environ.items() if k != bench.REAL_DATA}
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


def ratios(value):
    """Find every spread under a key that speaks of ratios."""
    if isinstance(value, dict):
        for key, below in value.items():
            if key in ("ratio", "cpu_ratio"):
                yield below
            elif key in ("ratios", "over_static"):
                yield from below.values()
            else:
                yield from ratios(below)
    elif isinstance(value, list):
        for below in value:
            yield from ratios(below)


@pytest.mark.parametrize("part", bench.PARTS)
def test_every_part_has_ratios_of_every_round_and_all_are_finite(quick, part):
    _, parts, _ = quick
    found = list(ratios(parts[part]))
    assert found
    for spread in found:
        assert len(spread["rounds"]) == bench_sizes.QUICK.rounds
        assert all(math.isfinite(v) and v > 0 for v in spread["rounds"])
        assert spread["min"] <= spread["median"] <= spread["max"]


def test_the_table_has_no_empty_cell(quick):
    done, parts, _ = quick
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) > 12
    assert {len(row) for row in rows} == {TABLE_COLUMNS}
    assert all(cell for row in rows for cell in row)
    assert bench_table.table(parts) in done.stdout
    assert "quick: sizes that show that everything runs" in done.stdout
    assert "one layer of 1 (training), 1 (scaling), of 22 in TinyLlama-1.1B" in done.stdout


def test_the_ways_of_a_training_step_give_the_same_loss_and_gradients(quick):
    _, parts, _ = quick
    compared = parts["training"]["differences_from_padded"]
    assert set(compared) == {"TRL packed", "TRL padding-free", "ours, nothing shared", "ours"}
    for found in compared.values():
        assert found["loss"] < 1e-5 and found["largest_gradient"] < 1e-4
    assert parts["training"]["baseline"].startswith("TRL")
    computed = parts["training"]["computed_tokens"]
    assert computed["ours"] < computed["ours, nothing shared"] <= parts["training"]["padded_tokens"]
    for points in (parts["scaling"][axis] for axis in bench_scaling.AXES):
        assert all(point["training"]["loss_difference"] < 1e-5 for point in points)


def test_the_ways_of_an_evaluation_write_the_same_texts(quick):
    _, parts, _ = quick
    prompts, singles = bench_sizes.QUICK.eval_batch, bench_sizes.QUICK.singles
    for figures in parts["evaluation"]["prompts"].values():
        equal = figures["equal_outputs"]
        assert set(equal["to_one_at_a_time"].values()) == {f"{singles} of {singles}"}
        assert equal["to_static"]["ours"] == f"{prompts} of {prompts}"
        assert figures["output_passes"]["ours"] == bench_sizes.QUICK.new_tokens
    shares = {k: v["shared_share"] for k, v in parts["evaluation"]["prompts"].items()}
    assert shares["training-shaped"] > 0.3 > 0.1 > shares["test-shaped"]


def test_every_part_says_under_which_conditions_it_was_measured(quick):
    _, parts, out = quick
    assert list(parts) == list(bench.PARTS)
    for figures in parts.values():
        run = figures["run"]
        assert run["quick"] and run["threads"] == 1 and run["rows"] == "generated"
        assert len(run["load_average"]) == 2
        assert run["environment"]["versions"]["torch"]
        assert run["command"] == "python benchmarks/bench.py --quick --out OUT"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_earlier_result_keeps_its_other_parts_unless_it_was_quick(quick, tmp_path, capsys):
    _, parts, out = quick
    assert bench._earlier(out, True) == parts
    assert bench._earlier(out, False) == {}
    assert "the earlier part data is left out" in capsys.readouterr().err
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    assert bench._earlier(broken, True) == {}
    assert bench._earlier(tmp_path / "absent.json", True) == {}


def test_the_command_is_repeatable_and_names_no_folder():
    given = ["--quick", "--real", "/somewhere/data", "--out=/elsewhere/x.json", "--rounds", "2"]
    wanted = "python benchmarks/bench.py --quick --real REAL --out=OUT --rounds 2"
    assert bench._command(given) == wanted
    assert bench._command([]) == "python benchmarks/bench.py"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--parts", "data,speed"], "speed"),
        (["--parts", ""], "--parts is empty"),
        (["--rounds", "0"], "--rounds 0"),
        (["--hidden", "100"], "a multiple of 64"),
        (["--real", "no/such/folder"], "training_data.json"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_with_the_reason(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench._flags(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_flags_change_the_sizes_and_quick_has_a_result_file_of_its_own(monkeypatch):
    monkeypatch.delenv(bench.REAL_DATA, raising=False)
    flags = bench._flags(["--hidden", "512", "--layers", "2", "--batch", "4", "--rounds", "5"])
    sizes = bench._sizes(flags)
    assert sizes.shape == bench_sizes.Shape.of(512, 2)
    assert (sizes.batch, sizes.rounds, sizes.new_tokens) == (4, 5, 88)
    assert flags.out == BENCHMARKS / "results" / "bench.json"
    flags = bench._flags(["--quick"])
    assert bench._sizes(flags) == bench_sizes.QUICK
    assert ROOT not in flags.out.parents


def test_the_default_model_has_the_sizes_that_are_published():
    shape = bench_sizes.FULL.shape
    sizes = (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.ffn, shape.vocab)
    assert sizes == (1024, 6, 16, 4, 2816, 32000)


def test_ways_run_in_turns_and_ratios_are_made_within_a_round():
    ran = []

    def way(name, seconds):
        def run():
            ran.append(name)
            time.sleep(seconds)
            return name

        return run

    timed = bench_rounds.in_turns({"slow": way("slow", 0.04), "fast": way("fast", 0.01)}, 2)
    assert ran == ["slow", "fast", "slow", "fast"]
    assert timed.results == {"slow": "slow", "fast": "fast"}
    seconds = {"slow": [4.0, 40.0, 8.0], "fast": [2.0, 10.0, 2.0]}
    cpu = {"slow": [2.0, 2.0, 2.0], "fast": [1.0, 1.0, 1.0]}
    timed = bench_rounds.Timed(seconds, cpu, {})
    found = bench_rounds.summary(timed, {"slow": 2, "fast": 4}, "slow")
    assert found["fast"]["cpu_ratio"]["rounds"] == [4.0, 4.0, 4.0]
    assert found["fast"]["ratio"] == {
        "median": 8.0,
        "min": 4.0,
        "max": 8.0,
        "rounds": [4.0, 8.0, 8.0],
    }
    assert found["slow"]["samples_per_s"]["median"] == 0.25
    assert found["slow"]["ratio"]["rounds"] == [1.0, 1.0, 1.0]


def test_generated_rows_have_the_lengths_that_are_asked_for():
    plans = bench_sizes.PLANS
    rows = bench_inputs.generated_rows(plans, 200, 32000)
    lengths = [len(row["input_ids"]) for row in rows]
    assert abs(sum(lengths) / len(rows) - 3490) < 60
    assert max(lengths) <= plans.longest() and len(set(lengths)) > 100
    assert len({tuple(row["input_ids"][: plans.shared]) for row in rows}) == 1
    for row in rows:
        assert len(row["labels"]) == len(row["input_ids"])
        assert sum(label != -100 for label in row["labels"]) == 88
        assert row["labels"][-88:] == row["input_ids"][-88:]
    # Between two rows of a micro-batch, the prefix is what they share and nothing more.
    ids = [row["input_ids"] for row in rows[:8]]
    assert bench_inputs.shared_share(ids) == pytest.approx(
        7 * plans.shared / sum(map(len, ids)), abs=1e-3
    )


def test_tokens_per_pass_counts_the_guesses_that_hold():
    prompt = [1, 10, 11, 12, 13, 14, 15, 16]
    copied = bench_inputs.Prompts(ids=[prompt], plans=[[10, 11, 12, 13, 14, 15]])
    # The first token comes with the prompt, then one pass writes four guesses and one more.
    assert bench_evaluation.tokens_per_pass(copied) == 3.0
    new = bench_inputs.Prompts(ids=[prompt], plans=[[20, 21, 22, 23]])
    assert bench_evaluation.tokens_per_pass(new) == 1.0
    assert bench_evaluation.tokens_per_pass(bench_inputs.Prompts(ids=[prompt], plans=None)) is None


def test_half_of_the_scored_pairs_are_right_by_construction():
    pairs = bench_data._pairs(["a", "b", "c", "d", "e"], 10)
    assert len(pairs) == 10
    assert all(label == found for label, found in pairs[1::2])


def test_real_rows_have_the_published_lengths():
    folder = os.environ.get(bench.REAL_DATA)
    if not folder:
        pytest.skip(f"{bench.REAL_DATA} names no folder with the published data")
    tokenizer = bench_inputs.real_tokenizer(Path(folder))
    kinds = bench_inputs.prompts_by_kind(Path(folder), tokenizer, bench_sizes.FULL)
    found = {
        kind: (len(prompts.ids), bench_inputs.shared_share(prompts.ids))
        for kind, prompts in kinds.items()
    }
    assert {count for count, _ in found.values()} == {bench_sizes.FULL.eval_batch}
    assert found["training-shaped"][1] > 0.4 > 0.1 > found["test-shaped"][1]
    assert bench_evaluation.tokens_per_pass(kinds["training-shaped"]) > 1
