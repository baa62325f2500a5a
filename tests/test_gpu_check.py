"""`benchmarks/gpu_check.py`: every part runs on the CPU in small, and no failure stops the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check_parts  # noqa: E402
import gpu_check_worker  # noqa: E402
from gpu_check_decoding import pytest_counts, same_prefixes  # noqa: E402
from gpu_check_plan import (  # noqa: E402
    DECODING,
    FULL,
    SHARING,
    TINY,
    Group,
    Measurement,
    ModelSpec,
    groups,
)
from gpu_check_results import Results, finite, ratios, work_flop_per_token  # noqa: E402
from gpu_check_runner import Runner  # noqa: E402
from gpu_check_training import losses, rates  # noqa: E402

FAKE_WORKER = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
events = open(job["events"], "a")
def tell(**event):
    events.write(json.dumps(event) + "\\n")
    events.flush()
if any(item["arguments"].get("do") == "never start" for item in job["measurements"]):
    print("cannot import it")
    sys.exit(5)
tell(event="ready")
for item in job["measurements"]:
    name, do = item["name"], item["arguments"].get("do")
    tell(event="start", name=name)
    print("at", name, "with", os.environ.get("OF_THE_GROUP"), flush=True)
    if do == "hang":
        tell(event="partial", figures={"half": 1})
        time.sleep(100)
    if do == "crash":
        os.kill(os.getpid(), 9)
    if do in ("oom", "fail", "model"):
        status = "oom" if do == "oom" else "failed"
        tell(event="result", name=name, status=status, reason=do, model_broken=do == "model")
        sys.exit(0)
    tell(event="result", name=name, status="ok", figures={"n": 1}, seconds=0.1)
"""


def item(name: str, do: str = "", limit_s: float = 60.0, **changes: object) -> Measurement:
    made = Measurement(
        name=name, kind="k", least_s=0, limit_s=limit_s, arguments={"do": do} if do else {}
    )
    return replace(made, **changes)


@pytest.fixture
def run(tmp_path):
    """Run groups with a worker that does what each measurement's arguments say."""
    script = tmp_path / "worker.py"
    script.write_text(FAKE_WORKER)

    def run_groups(*every: Group, seconds: float = 60.0) -> Results:
        results = Results(tmp_path / "out" / "check.json", {"ratios": None})
        runner = Runner(
            results=results,
            work=tmp_path,
            scale=TINY,
            deadline=time.time() + seconds,
            tiny=True,
            say=lambda _: None,
            worker=(sys.executable, str(script)),
        )
        runner.run(every)
        on_disk = json.loads(results.path.read_text())
        assert on_disk["measurements"] == results.measurements
        return results

    return run_groups


def status(results: Results) -> dict[str, str]:
    return {name: entry["status"] for name, entry in results.measurements.items()}


@pytest.mark.parametrize(
    ("do", "expected"), [("fail", "failed"), ("oom", "oom"), ("crash", "crashed")]
)
def test_what_fails_leaves_the_others_their_results(run, do, expected):
    results = run(
        Group(name="one", measurements=(item("a"), item("b", do), item("c"))),
        Group(name="two", measurements=(item("d"),)),
    )
    assert status(results) == {"a": "ok", "b": expected, "c": "ok", "d": "ok"}
    assert results.measurements["c"]["figures"] == {"n": 1}
    assert results.measurements["b"]["figures"] is None


def test_a_crash_is_recorded_with_what_the_process_printed_last(run):
    results = run(Group(name="one", measurements=(item("b", "crash"),)))
    assert results.measurements["b"]["reason"] == "the process ended with -9"
    assert results.measurements["b"]["log"][-1].startswith("at b")


def test_a_hanging_part_is_killed_by_its_limit_and_keeps_what_it_had_measured(run):
    started = time.monotonic()
    results = run(Group(name="one", measurements=(item("b", "hang", limit_s=1.0), item("c"))))
    assert time.monotonic() - started < 30
    assert status(results) == {"b": "timeout", "c": "ok"}
    assert results.measurements["b"]["figures"] == {"half": 1}
    assert "longer than 1 s" in results.measurements["b"]["reason"]


def test_the_end_of_the_budget_kills_what_runs_and_starts_nothing_more(run):
    results = run(
        Group(name="one", measurements=(item("b", "hang"), item("c", least_s=5))),
        Group(name="two", measurements=(item("d", least_s=5),)),
        seconds=2.0,
    )
    assert status(results) == {"b": "timeout", "c": "not run", "d": "not run"}
    assert "were left" in results.measurements["d"]["reason"]
    assert results.measurements["d"]["figures"] is None


def test_a_process_that_does_not_start_is_tried_once(run):
    results = run(
        Group(name="one", measurements=(item("a", "never start"), item("b"))),
        Group(name="two", measurements=(item("c"),)),
    )
    assert status(results) == {"a": "crashed", "b": "not run", "c": "ok"}
    assert results.measurements["a"]["log"] == ["cannot import it"]


def test_a_model_that_cannot_be_loaded_is_not_tried_again(run):
    spec, other = ModelSpec(), ModelSpec(preset="seed")
    results = run(
        Group(
            name="one",
            measurements=(
                item("a", "model", model=spec),
                item("b", model=spec),
                item("c", model=other),
            ),
        )
    )
    assert status(results) == {"a": "failed", "b": "not run", "c": "ok"}


def test_a_shape_that_holds_one_without_enough_memory_is_not_tried(run):
    def shape(name: str, batch: int, tokens: int, do: str = "") -> Measurement:
        arguments = {"batch": batch, "tokens": tokens, "do": do}
        return item(name, model=ModelSpec(), arguments=arguments)

    results = run(
        Group(
            name="one",
            measurements=(
                shape("2 x 9", 2, 9, "oom"),
                shape("4 x 9", 4, 9),
                shape("1 x 9", 1, 9),
                shape("4 x 8", 4, 8),
            ),
        )
    )
    assert status(results) == {"2 x 9": "oom", "4 x 9": "not run", "1 x 9": "ok", "4 x 8": "ok"}


def test_what_needs_a_failed_measurement_is_not_run(run):
    results = run(
        Group(name="one", measurements=(item("a", "fail"), item("b", needs=("a",)))),
        Group(name="two", measurements=(item("c", needs=("b",)), item("d"))),
    )
    assert status(results) == {"a": "failed", "b": "not run", "c": "not run", "d": "ok"}


def test_a_groups_environment_reaches_its_process(run):
    results = run(
        Group(name="one", measurements=(item("b", "crash"),), environment={"OF_THE_GROUP": "yes"})
    )
    assert results.measurements["b"]["log"] == ["at b with yes"]


def test_a_group_does_without_what_may_have_broken_an_earlier_measurement(run):
    careful = {"after": "a", "without": {"OF_THE_GROUP": "careful"}}
    results = run(
        Group(name="one", measurements=(item("a", "fail"),)),
        Group(name="two", measurements=(item("b", "crash"),), **careful),
    )
    assert results.measurements["b"]["log"] == ["at b with careful"]
    assert results.measurements["b"]["environment"] == {"OF_THE_GROUP": "careful"}
    unharmed = run(
        Group(name="one", measurements=(item("a"),)),
        Group(name="two", measurements=(item("b", "crash"),), **careful),
    )
    assert unharmed.measurements["b"]["log"] == ["at b with None"]


def test_a_worker_turns_an_exception_into_a_result_and_stops_there():
    events = []

    def broken(bench, item):
        raise ValueError("two\nlines")

    parts = {"good": lambda bench, item: {"n": 1}, "bad": broken}
    todo = [
        {"name": name, "kind": kind, "least_s": 0}
        for name, kind in (("a", "good"), ("b", "bad"), ("c", "good"))
    ]
    gpu_check_worker.run_job(todo, parts, None, events.append, time.time() + 60)
    results = {e["name"]: e for e in events if e["event"] == "result"}
    assert results["a"]["status"] == "ok" and results["a"]["figures"] == {"n": 1}
    assert results["b"]["status"] == "failed" and results["b"]["reason"] == "ValueError: two lines"
    assert results["b"]["log"][-1] == "lines" and len(results["b"]["log"]) <= 30
    assert "c" not in results


def test_a_lack_of_memory_is_recognised_through_other_errors():
    class OutOfMemoryError(RuntimeError):
        pass

    def wrapped(inner):
        try:
            try:
                raise inner
            except RuntimeError as error:
                raise ValueError("cannot train") from error
        except ValueError as error:
            return error

    assert gpu_check_worker.out_of_memory(wrapped(OutOfMemoryError("no")))
    assert gpu_check_worker.out_of_memory(RuntimeError("CUDA out of memory. Tried"))
    assert not gpu_check_worker.out_of_memory(wrapped(RuntimeError("other")))


def test_with_a_device_memory_is_capped_and_read(monkeypatch):
    import torch

    gib = 2**30
    card = SimpleNamespace(
        name="Card", total_memory=88 * gib, major=9, minor=0, multi_processor_count=132
    )
    calls = []
    fakes = {
        "is_available": lambda: True,
        "get_device_properties": lambda _: card,
        "set_per_process_memory_fraction": calls.append,
        "is_bf16_supported": lambda including_emulation: not including_emulation,
        "synchronize": lambda: calls.append("synchronize"),
        "empty_cache": lambda: calls.append("empty"),
        "reset_peak_memory_stats": lambda: calls.append("reset"),
        "memory_allocated": lambda: gib,
        "max_memory_allocated": lambda: 2 * gib,
        "max_memory_reserved": lambda: 3 * gib,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    job = {"work": "/nowhere", "scale": {}, "tiny": False, "cap_gib": 22.0}
    bench = gpu_check_worker.Bench(job, lambda _: None)
    bench.limit_memory()
    assert bench.cuda and calls == [0.25]
    gpu_check_worker.release(bench.cuda)
    assert calls[1:] == ["synchronize", "empty", "reset"]
    peaks = {"allocated_gib": 1.0, "peak_allocated_gib": 2.0, "peak_reserved_gib": 3.0}
    assert gpu_check_parts.memory(bench) == peaks
    seen = gpu_check_parts.machine(bench, {})["card"]
    assert seen["capability"] == "9.0" and seen["memory_gib"] == 88.0 and seen["bf16"] is True


def test_names_of_measurements_are_different_at_both_scales():
    for scale in (FULL, TINY):
        names = [m.name for g in groups(scale) for m in g.measurements]
        assert len(names) == len(set(names))
    shapes = {n.partition(":")[0] for n in names_of(FULL) if n.startswith("step")}
    assert {"step 4 x 4608", "step 8 x 4608", "step 1 x 32768", "step 4 x 32768"} <= shapes


def names_of(scale) -> list[str]:
    return [m.name for g in groups(scale) for m in g.measurements]


def test_rates_leave_the_warm_up_out_and_are_none_without_measured_steps():
    figures = rates([9.0, 1.0, 3.0], [5, 100, 300], warmup=1, rows_per_step=4)
    assert figures["first_step_s"] == 9.0 and figures["median_step_s"] == 2.0
    assert figures["tokens_per_s"] == 100.0 and figures["samples_per_s"] == 2.0
    nothing = rates([9.0], [5], warmup=1, rows_per_step=4)
    assert nothing["tokens_per_s"] is nothing["samples_per_s"] is nothing["median_step_s"] is None


def test_losses_that_rise_or_are_not_finite_are_not_plausible():
    def judged(*values):
        return losses([{"loss": v} for v in values] + [{"train_loss": 1.0}])["loss_plausible"]

    assert judged(10.0, 9.9) is True
    assert judged(10.0, 11.0) is False
    assert judged(10.0, float("nan")) is False
    assert judged() is None


def test_ratios_of_what_was_not_measured_are_none():
    def ok(**figures):
        return {"status": "ok", "figures": figures}

    measured = {
        "train: l4 preset": ok(samples_per_s=6.0, tokens_per_s=600.0),
        "train: seed preset": {"status": "timeout", "figures": {"samples_per_s": 2.0}},
        "generate": ok(plans_per_s_batch_1=2.0, plans_per_s_batch_16=7.0),
    }
    found = ratios(measured, FULL)
    assert found["l4_over_seed_samples_per_s"] is None
    assert found["batch_16_over_1_plans_per_s"] == 3.5
    assert found["batch_32_over_1_plans_per_s"] is None
    assert found["l4_work_over_matmul_rate"] is None
    measured["train: seed preset"] = ok(samples_per_s=2.0)
    assert ratios(measured, FULL)["l4_over_seed_samples_per_s"] == 3.0


def test_the_work_of_a_token_is_that_of_the_published_shape():
    # 969 million weights in the layers' products, forwards and backwards to the activations.
    assert work_flop_per_token(FULL, 0) == pytest.approx(4 * 968.9e6, rel=1e-3)
    assert work_flop_per_token(FULL, 3500) == pytest.approx(4.98e9, rel=5e-3)


def test_the_json_holds_no_nan():
    assert finite({"a": [float("nan"), 1.5], "b": (2,)}) == {"a": ["nan", 1.5], "b": [2]}


def test_texts_are_compared_by_their_common_beginning():
    found = same_prefixes({0: "abcd", 1: "xy"}, {0: "abXX", 1: "xy", 2: "not compared"})
    assert found == {"compared": 2, "equal": 1, "mean_common_share": 0.75}


def test_pytest_counts_are_read_from_the_last_summary():
    assert pytest_counts(["x", "2 failed, 3 passed, 9 deselected in 1.2s"]) == {
        "failed": 2,
        "passed": 3,
        "deselected": 9,
    }
    assert pytest_counts(["nothing"]) == {}


def test_measuring_modules_leave_transformers_to_be_imported_after_unsloth():
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(BENCHMARKS)!r}]; "
        "import gpu_check_worker; gpu_check_worker.all_parts(); "
        "print([m for m in ('transformers', 'trl', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_cuda_it_says_so_and_exits_2(tmp_path):
    done = _gpu_check("--out", str(tmp_path), environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "no CUDA device was found" in done.stdout
    [path] = tmp_path.glob("gpu-check-*.json")
    assert json.loads(path.read_text())["measurements"]["machine"]["status"] == "ok"


def test_stopped_from_outside_it_leaves_a_whole_file_and_no_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--tiny", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: any(_children(process.pid)))
    children = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped from outside" in out
    [path] = tmp_path.glob("gpu-check-*.json")
    content = json.loads(path.read_text())
    assert content["finished"] is not None
    assert "running" not in {m["status"] for m in content["measurements"].values()}
    assert not [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists()]


def test_every_part_runs_on_the_cpu_in_small(tmp_path):
    done = _gpu_check("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [path] = tmp_path.glob("gpu-check-cpu-tiny-*.json")
    content = json.loads(path.read_text())
    measured = content["measurements"]
    assert list(measured) == ["machine", *names_of(TINY)]
    assert {name for name, entry in measured.items() if entry["status"] != "ok"} == set()
    assert measured["machine"]["figures"]["versions"]["torch"]
    training = [e["figures"] for e in measured.values() if e["kind"].startswith("train_")]
    assert len(training) == 12
    for figures in training:
        assert figures["tokens_per_s"] > 0 and figures["loss_plausible"] is True
        assert figures["peak_reserved_gib"] is figures["predicted_over_measured"] is None
        assert figures["predicted_gib"] > 0
    off, on = (measured[name]["figures"] for name in SHARING)
    assert [off["shared_prefix"], on["shared_prefix"]] == [False, True]
    assert on["computed_share"] < 0.9 and off["computed_share"] == 1
    assert measured[SHARING[0]]["model"] == measured[SHARING[1]]["model"]
    assert on["losses"] == pytest.approx(off["losses"], rel=0.05)
    decoded = [measured[name]["figures"] for name in DECODING]
    assert [f["path"] for f in decoded] == ["left padding", "shared prefix", "shared prefix"]
    assert decoded[0]["shared_share"] > 0.1
    for figures in decoded[1:]:
        same = figures["agreement_with_the_first"]
        assert same["equal"] == same["compared"] == TINY.prompts
    assert measured["rows"]["figures"]["dropped"] == 0
    numerics = measured["numerics: transformers"]["figures"]
    assert numerics["loss_relative_difference"] < 1e-6
    assert abs(numerics["gradient_cosine"] - 1) < 1e-6
    assert numerics["padded_pair_relative_difference"] < 1e-5
    assert numerics["masked_loss_relative_difference"] < 1e-5
    assert measured["preflight"]["figures"]["report"]["checked_rows"] >= 2
    assert content["ratios"]["l4_over_seed_samples_per_s"] > 0
    assert content["ratios"]["shared_prefix_on_over_off_samples_per_s"] > 0
    assert content["ratios"]["generate_lookup_over_off_plans_per_s"] > 0
    assert content["finished"] and content["seconds"] > 0
    assert str(path) in done.stdout
    assert "samples_per_s" in done.stdout


def _gpu_check(*arguments: str, environment: dict[str, str] | None = None):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        check=False,
    )


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == str(pid):
            found.append(int(stat.parent.name))
    return found


def _wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
