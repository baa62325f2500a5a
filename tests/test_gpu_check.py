"""`benchmarks/gpu_check.py`: everything runs on the CPU in small, and no failure stops the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check  # noqa: E402
from gpu_check import FULL, RATIOS, TINY, Measurement, Results, Runner  # noqa: E402
from inputs import REAL_DATA  # noqa: E402

FAKE_WORKER = f"""
import faulthandler, json, os, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu_check import Measurement, Results
job = json.load(open(sys.argv[1]))
results = Results(Path(job["results"]))
every = [Measurement(**raw) for raw in job["measurements"]]
if any(item.arguments.get("do") == "never start" for item in every):
    print("cannot import it")
    sys.exit(5)
for item in every:
    do = item.arguments.get("do")
    results.record(item, status="running")
    print("at", item.name, flush=True)
    if do == "hang":
        results.record(item, figures={{"half": 1}})
        faulthandler.dump_traceback_later(item.limit_s, exit=True)
        time.sleep(100)
    if do == "crash":
        os.kill(os.getpid(), 9)
    if do in ("oom", "fail", "model"):
        status = "oom" if do == "oom" else "failed"
        results.record(item, status=status, reason=do, model_broken=do == "model")
        sys.exit(0)
    figures = {{"n": float(do) if do in ("nan", "inf") else 1}}
    results.record(item, status="ok", figures=figures, seconds=0.1)
"""


def item(name: str, do: str = "", **changes: object) -> Measurement:
    arguments = {"do": do} if do else {}
    made = Measurement(name=name, kind="k", limit_s=60.0, arguments=arguments)
    return replace(made, **changes)


@pytest.fixture
def run(tmp_path):
    """Measure with a worker that does what each measurement's arguments say."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)

    def measured(*every: Measurement, seconds: float = 60.0, least_s: float = 0.0) -> Results:
        results = Results(tmp_path / "out" / "check.json", {})
        job = {"work": str(tmp_path), "deadline": time.time() + seconds, "least_s": least_s}
        worker = (sys.executable, str(script))
        runner = Runner(results, job, say=lambda _: None, worker=worker)
        runner.run(every)
        on_disk = json.loads(results.path.read_text())
        assert on_disk["measurements"] == json.loads(json.dumps(results.measurements))
        assert set(on_disk["ratios"]) == set(RATIOS)
        return results

    return measured


def status(results: Results) -> dict[str, str]:
    return {name: entry["status"] for name, entry in results.measurements.items()}


@pytest.mark.parametrize(
    ("do", "expected"), [("fail", "failed"), ("oom", "oom"), ("crash", "crashed")]
)
def test_what_fails_leaves_the_others_their_results(run, do, expected):
    results = run(item("a"), item("b", do), item("c"), item("d", preset="l4"))
    assert status(results) == {"a": "ok", "b": expected, "c": "ok", "d": "ok"}
    assert results.measurements["c"]["figures"] == {"n": 1}
    assert results.measurements["b"]["figures"] is None


def test_a_crash_is_recorded_with_what_the_process_printed_last(run):
    results = run(item("b", "crash"))
    assert results.measurements["b"]["reason"] == "the process ended with -9"
    assert results.measurements["b"]["log"][-1].startswith("at b")


def test_a_hang_ends_at_its_limit_and_keeps_what_it_had_measured(run):
    started = time.monotonic()
    results = run(item("b", "hang", limit_s=1.0), item("c"))
    assert time.monotonic() - started < 30
    assert status(results) == {"b": "timeout", "c": "ok"}
    assert results.measurements["b"]["figures"] == {"half": 1}


def test_the_end_of_the_budget_kills_what_runs_and_starts_nothing_more(run):
    late = item("d", preset="l4")
    results = run(item("b", "hang"), item("c"), late, seconds=2.0, least_s=1.0)
    assert status(results) == {"b": "timeout", "c": "not run", "d": "not run"}
    assert results.measurements["d"]["figures"] is None


def test_a_process_that_does_not_start_is_tried_once(run):
    results = run(item("a", "never start"), item("b"), item("c", preset="l4"))
    assert status(results) == {"a": "crashed", "b": "crashed", "c": "ok"}
    assert results.measurements["a"]["log"] == ["cannot import it"]


def test_a_model_that_cannot_be_loaded_is_not_tried_again(run):
    broken = item("a", "model", preset="l4")
    results = run(broken, item("b", preset="l4"), item("c", preset="seed"))
    assert status(results) == {"a": "failed", "b": "not run", "c": "ok"}


def test_what_needs_the_inputs_is_not_run_without_them(run):
    results = run(item("inputs", "fail"), item("b", preset="l4"), item("c"))
    assert status(results) == {"inputs": "failed", "b": "not run", "c": "ok"}


def test_an_exception_becomes_a_result_with_the_end_of_its_traceback():
    def broken() -> dict:
        raise ValueError("two\nlines")

    result = gpu_check.measure(broken)
    assert result["status"] == "failed" and result["reason"] == "ValueError: two lines"
    assert result["log"][-1] == "lines" and len(result["log"]) <= 30
    assert gpu_check.measure(lambda: {"n": 1})["figures"] == {"n": 1}


def test_the_plan_names_every_row_once_and_says_what_it_recomputes():
    for scale in (FULL, TINY):
        names = [measurement.name for measurement in gpu_check.plan(scale)]
        assert len(names) == len(set(names))
        compared = {name for _, *both in RATIOS.values() for name in both if name}
        assert compared <= set(names)
    for measurement in gpu_check.plan(FULL):
        if "checkpointing" in measurement.name:
            assert measurement.settings["model.gradient_checkpointing"] == "unsloth"
        assert measurement.kind in gpu_check.KINDS
    shapes = [m.arguments for m in gpu_check.plan(FULL) if m.arguments]
    assert {"batch": 4, "tokens": 4608} in shapes and {"batch": 2, "tokens": 32768} in shapes


def test_what_is_trained_is_predicted_to_fit_under_the_cap(monkeypatch):
    """Also the longest rows; else a call on a rented card would end without the figure."""
    from tinyagent_fast.training.memory import RESERVE_GIB, MemoryEstimator, RowLengths

    monkeypatch.delenv(REAL_DATA, raising=False)
    cap_gib = gpu_check.parse_flags([]).cap_gib
    bench = gpu_check.Bench({"tiny": False, "work": "", "cap_gib": cap_gib, "real": None})
    for measured in gpu_check.plan(FULL):
        if measured.kind not in ("train", "numerics") or "tokens" in measured.arguments:
            continue
        config, longest, rows = bench.config(measured), FULL.row_max_tokens, None
        mean = FULL.row_lengths.mean
        if measured.kind == "numerics":  # the shortest rows
            longest = mean - FULL.row_lengths.deviation
            rows = gpu_check.NUMERICS_ROWS
        lengths = RowLengths(
            rows=FULL.rows,
            mean_tokens=min(longest, mean),
            longest_tokens=longest,
            supervised_tokens=100,
            shared_tokens=1000,
        )
        estimator = MemoryEstimator(
            config=config,
            shape=FULL.shape,
            lengths=lengths,
            backend=config.model.backend,
            usable_gib=cap_gib - RESERVE_GIB,
        )
        estimate = estimator.estimate(rows)
        assert estimate.fits(estimator.usable_gib, error_share=0.05), measured.name


def test_few_processes_are_started_and_the_figures_asked_for_come_first():
    """Each start loads libraries and a model, which takes a rented minute."""
    every = gpu_check.plan(FULL)
    starts = [
        item
        for before, item in zip([None, *every[:-1]], every, strict=True)
        if _other_model(before, item)
    ]
    assert len(starts) <= 12
    order = [item.name for item in every]
    asked = [gpu_check.L4, gpu_check.SEED, gpu_check.STOCK_PACKED, gpu_check.STOCK_PADDING_FREE]
    assert max(map(order.index, asked)) < order.index(gpu_check.PLAIN_EVALUATION)


def _other_model(before: Measurement | None, item: Measurement) -> bool:
    return before is None or before.model != item.model


def test_rates_are_those_of_the_median_step_whatever_one_of_them_took():
    def of(slowest_s):
        seconds = [9.0, 1.1, 1.0, slowest_s, 1.2, 1.1]
        return gpu_check.rates(seconds, [5, *[100] * 5], warmup=1, rows_per_step=4)

    for name in ("median_step_s", "tokens_per_s", "samples_per_s"):
        assert of(5.4)[name] == of(1.3)[name] > 0


def test_rates_leave_the_warm_up_out_and_are_none_without_measured_steps():
    figures = gpu_check.rates([9.0, 1.0, 3.0], [5, 100, 300], warmup=1, rows_per_step=4)
    assert figures["first_step_s"] == 9.0 and figures["median_step_s"] == 2.0
    assert figures["tokens_per_s"] == 100.0 and figures["samples_per_s"] == 2.0
    nothing = gpu_check.rates([9.0], [5], warmup=1, rows_per_step=4)
    assert nothing["tokens_per_s"] is nothing["samples_per_s"] is nothing["median_step_s"] is None


def test_ratios_of_what_was_not_measured_are_none():
    def ok(**figures):
        return {"status": "ok", "figures": figures}

    stopped = {"status": "timeout", "figures": {"samples_per_s": 2.0}}
    measured = {gpu_check.L4: ok(samples_per_s=6.0), gpu_check.SEED: stopped}
    assert gpu_check.ratios(measured)["l4_over_seed"] is None
    measured[gpu_check.SEED] = ok(samples_per_s=2.0)
    assert gpu_check.ratios(measured)["l4_over_seed"] == 3.0
    assert gpu_check.ratios(measured)["bf16_over_nf4"] is None


def test_the_json_holds_no_nan(run):
    results = run(item("a", "nan"), item("b", "inf"))
    figures = [entry["figures"]["n"] for entry in results.measurements.values()]
    assert figures == ["NaN", "Infinity"]


def test_it_leaves_transformers_to_be_imported_after_unsloth():
    code = (
        f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}]; import gpu_check; "
        "print([m for m in ('transformers', 'trl', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def gpu_check_process(*arguments: str, **environment: str):
    inherited = {name: value for name, value in os.environ.items() if name != REAL_DATA}
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
    )


def test_without_cuda_it_says_so_and_exits_2(tmp_path):
    process = gpu_check_process("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "no CUDA device was found" in said
    assert list(tmp_path.iterdir()) == []


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == str(pid):
            found.append(int(stat.parent.name))
    return found


def workers_of(pid: int) -> list[int]:
    """Leave out other children, such as the git that names the checkout."""
    with suppress(OSError):
        return [
            child
            for child in children(pid)
            if b"--work" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    return []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_stopped_from_outside_it_leaves_a_whole_file_and_no_process(tmp_path):
    process = gpu_check_process("--tiny", "--out", str(tmp_path))
    end = time.monotonic() + 60
    while not (workers := workers_of(process.pid)):
        assert time.monotonic() < end, "no worker was started"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert "stopped from outside" in said
    [path] = tmp_path.glob("gpu-check-*.json")
    content = json.loads(path.read_text())
    assert content["seconds"] is not None
    assert "running" not in {entry["status"] for entry in content["measurements"].values()}
    assert not [pid for pid in workers if Path(f"/proc/{pid}/cmdline").exists()]


def test_everything_runs_on_the_cpu_in_small(tmp_path):
    process = gpu_check_process("--tiny", "--out", str(tmp_path))
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said[-4000:]
    [path] = tmp_path.glob("gpu-check-cpu-tiny-*.json")
    content = json.loads(path.read_text())
    measured = content["measurements"]
    assert list(measured) == [item.name for item in gpu_check.plan(TINY)]
    assert {name for name, entry in measured.items() if entry["status"] != "ok"} == set()
    assert content["machine"]["versions"]["torch"]
    for entry in (e for e in measured.values() if e["kind"] in ("train", "stock")):
        figures = entry["figures"]
        assert figures["samples_per_s"] > 0 and figures["peak_reserved_gib"] is None
    shared, whole = (
        measured[f"train: transformers, {way}"]["figures"]
        for way in ("shared prefix", "whole rows")
    )
    assert shared["computed_share"] < 0.95 and whole["computed_share"] == 1
    assert shared["losses"] == pytest.approx(whole["losses"], rel=0.05)
    exact = measured["numerics: transformers, NF4"]["figures"]
    for way in ("shared prefix", "prefix once a step"):
        compared = exact[f"transformers, {way}, against transformers, whole rows"]
        assert compared["loss_relative_difference"] < 1e-6
        assert compared["gradient_relative_difference"] < 1e-5
    decoded = measured["evaluation: transformers, NF4"]["figures"]
    assert decoded["batch_against_one_at_a_time"] == f"{TINY.single_prompts} of 2"
    assert decoded["batch_against_left_padded"] == f"{TINY.single_prompts} of 2"
    assert decoded["lookup_against_batch"] == f"{TINY.prompts} of {TINY.prompts}"
    assert all(value > 0 for value in content["ratios"].values())
    assert str(path) in said
