"""`doctor` and the checks before `train`: what is printed, exit codes, and that it is quick."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.commands import doctor, train
from tinyagent_fast.doctor import checks, machine, probe
from tinyagent_fast.doctor.findings import failure, ok, warning
from tinyagent_fast.doctor.machine import Gpu, Machine, TorchBuild
from tinyagent_fast.doctor.probe import Probe, look_at_gpu, probe_gpu

LAPTOP = Machine(
    python=(3, 11, 7),
    gpu=None,
    gpu_note=None,
    torch=TorchBuild(version="2.13.0+cpu", cuda=None),
    memory_gib=64.0,
    available_gib=60.0,
)
L4 = Gpu(name="L4", driver="550.5", total_gib=22.5, free_gib=22.0, capability=(8, 9))


class Output:
    """What a call of the command line gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Output]:
    """Return a function that runs the command line in an empty folder, on a plain laptop."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "read_machine", lambda: LAPTOP)

    def run(*arguments: str) -> Output:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Output(code, captured.out, captured.err)

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace training by a list of what it was asked for."""
    asked: list[Any] = []
    module = types.ModuleType("tinyagent_fast.training.fit")
    module.__dict__["train"] = lambda config, console, resume=None: asked.append(config)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_a_laptop_is_ready_for_the_small_model(call: Callable[..., Output]) -> None:
    got = call("doctor")
    assert got.code == 0, got.out
    assert got.out.startswith("preset cpu: nano in fp32\n")
    for name in ("python", "packages", "gpu", "attention", "memory", "disk", "base", "data"):
        assert f" {name} " in got.out
    assert "0 failure(s)" in got.out
    assert "--online" in got.out
    assert all(line == line.rstrip() for line in got.out.splitlines())


def test_a_failure_is_shown_with_its_fix_and_gives_exit_code_1(
    call: Callable[..., Output],
) -> None:
    got = call("doctor", "--preset", "smoke", "--data.train", "missing.json")
    assert got.code == 1
    assert "failure data       missing.json is not there" in got.out
    assert "fix: name another with --data.train" in got.out
    assert "1 failure(s)" in got.out


def test_programs_get_json(call: Callable[..., Output]) -> None:
    got = call("doctor", "--json", "--preset", "smoke")
    found = json.loads(got.out)
    assert {"name", "status", "text", "fix"} == set(found[0])
    assert all(f["fix"] for f in found if f["status"] != "ok")


def test_a_gpu_that_torch_cannot_use_fails_unless_the_cpu_is_asked_for(
    call: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "read_machine", lambda: replace(LAPTOP, gpu=L4))
    got = call("doctor")
    assert got.code == 1
    assert "L4 is here, but torch 2.13.0+cpu was built without CUDA" in got.out
    assert call("doctor", "--preset", "cpu").code == 0


@pytest.mark.parametrize(
    ("total_gib", "capability", "preset"),
    [(14.6, (7, 5), "t4"), (22.2, (8, 9), "l4"), (39.4, (8, 0), "a100"), (31.7, (7, 0), "t4")],
)
def test_the_preset_is_that_of_the_gpu_which_torch_sees(
    call: Callable[..., Output],
    monkeypatch: pytest.MonkeyPatch,
    total_gib: float,
    capability: tuple[int, int],
    preset: str,
) -> None:
    seen = Probe(
        cuda=True, name="Card", total_gib=total_gib, free_gib=total_gib, capability=capability
    )
    there = replace(LAPTOP, gpu=L4, torch=TorchBuild(version="2.10.0", cuda="12.8"))
    monkeypatch.setattr(machine, "read_machine", lambda: there)
    monkeypatch.setattr(probe, "probe_gpu", lambda: seen)
    assert call("doctor").out.startswith(f"preset {preset}: ")
    monkeypatch.setattr(probe, "probe_gpu", lambda: Probe(problem="broken driver"))
    got = call("doctor")
    assert got.code == 1
    assert got.out.startswith("preset cpu: ")
    assert "broken driver" in got.out


def test_doctor_takes_seconds_and_no_torch_without_a_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; from tinyagent_fast.cli import main; "
        "code = main(['doctor', '--preset', 'cpu']); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": str(tmp_path),
            "TINYAGENT_FAST_CACHE": str(tmp_path / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        },
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "False", done.stderr
    # Processor time: the clock on the wall counts what else this machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_train_stops_before_anything_heavy(
    call: Callable[..., Output], trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(*_: object) -> None:
        raise AssertionError("libraries were prepared")

    monkeypatch.setattr("tinyagent_fast.models.libraries.prepare_libraries", too_early)
    got = call("train", "--preset", "smoke", "--data.train", "missing.json")
    assert got.code == 2
    assert "this machine is not ready: 1 check(s) failed" in got.err
    assert "data: missing.json is not there" in got.err
    assert trained == []


def test_train_prints_a_line_for_each_warning_and_goes_on(
    call: Callable[..., Output], trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [ok("a", "fine"), warning("b", "slow " * 40, "mend [b]"), warning("c", "odd", "mend c")]
    monkeypatch.setattr(checks, "quick_checks", lambda *_, **__: found)
    got = call("train", "--preset", "smoke")
    assert got.code == 0, got.err
    lines = [line for line in got.out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2
    assert lines[0].endswith("fix: mend [b]")
    assert len(trained) == 1
    found.append(failure("d", "bad", "mend d"))
    assert call("train", "--preset", "smoke").code == 2
    assert len(trained) == 1


def test_train_says_nothing_where_nothing_is_wrong(
    call: Callable[..., Output], trained: list[Any]
) -> None:
    got = call("train", "--preset", "smoke")
    assert (got.code, got.out) == (0, "")
    assert len(trained) == 1


def test_train_tells_a_preset_that_it_chose_from_one_that_was_named(
    call: Callable[..., Output], trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "read_machine", lambda: replace(LAPTOP, gpu=L4))
    monkeypatch.setattr(train, "choose_preset", lambda: ("smoke", "no CUDA device was found"))
    assert call("train").code == 2
    assert trained == []
    assert call("train", "--preset", "smoke").code == 0
    assert len(trained) == 1


def test_the_probe_says_what_torch_says() -> None:
    import torch

    said = probe_gpu()
    assert said.cuda == torch.cuda.is_available()
    if not said.cuda:
        assert said == look_at_gpu()
        assert "is_available() is False" in str(said.problem)


@pytest.mark.gpu
def test_the_probe_computes_on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    said = probe_gpu()
    assert (said.cuda, said.problem) == (True, None)
    assert said.name
    assert said.free_gib is not None
    assert said.total_gib is not None
    assert 0 < said.free_gib <= said.total_gib


@pytest.mark.parametrize(
    ("program", "needle"),
    [
        ("echo 'Aborted here' >&2; exit 134", "ended with code 134: Aborted here"),
        ("exit 0", "ended with code 0: nothing"),
        ("exec sleep 9", "no answer in 1 s"),
    ],
)
def test_a_torch_that_dies_takes_only_its_own_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, needle: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(probe, "_TIMEOUT_S", 1)
    monkeypatch.setattr(sys, "executable", str(python))
    said = probe_gpu()
    assert not said.cuda
    assert needle in str(said.problem)


def test_kernels_of_another_build_are_a_reason_and_no_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise OSError("undefined symbol: _ZN\nmore")

    assert probe._reason(broken, "json") == "undefined symbol: _ZN"
    assert probe._reason(lambda: None, "json") is None
    assert probe._reason(broken, "no_such_package_here") == "not installed"


def test_the_preset_without_a_gpu_is_that_of_a_laptop() -> None:
    assert doctor._preset(None) == "cpu"
    assert doctor._preset(LAPTOP) == "cpu"
