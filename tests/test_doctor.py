"""`doctor` and the checks before `train`: what they say of a machine, and that a fix repairs it."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast import doctor
from tinyagent_fast.cli import main
from tinyagent_fast.commands.config_flags import resolve_config
from tinyagent_fast.config import Config, DataConfig, ModelConfig
from tinyagent_fast.doctor import Finding, Gpu, Machine, read_machine
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.presets import preset_config

L4 = Gpu(name="L4", total_gib=22.5, free_gib=22.2, capability=(8, 9))
T4 = Gpu(name="T4", total_gib=15.0, free_gib=14.7, capability=(7, 5))
LAPTOP = Machine(gpu=None, gpu_problem=None, is_listed=False, memory_gib=64.0, available_gib=60.0)
WITH_L4 = replace(LAPTOP, gpu=L4, is_listed=True)
WITH_T4 = replace(WITH_L4, gpu=T4)
UNUSABLE = replace(LAPTOP, gpu_problem="torch says: the driver is too old", is_listed=True)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def with_changes(preset: str, **changes: Any) -> Config:
    """Make a preset's config with some settings of its sections changed, as `train__batch=2`."""
    config = preset_config(preset)
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        part = replace(getattr(config, section), **{setting: value})
        config = replace(config, **{section: part})
    return config


# --- findings


def test_what_is_wrong_must_name_a_fix() -> None:
    with pytest.raises(AssertionError, match="needs a fix"):
        Finding("disk", "warning", "full")


def test_only_failures_stop_and_all_of_them_are_named() -> None:
    fine = [Finding("a", "ok", "fine"), Finding("b", "warning", "slow", "faster")]
    doctor.refuse_failures(fine)
    bad = [Finding("c", "failure", "bad", "mend c"), Finding("d", "failure", "odd", "mend d")]
    with pytest.raises(TrainingError) as caught:
        doctor.refuse_failures([*fine, *bad])
    for part in ("c: bad", "d: odd", "mend c", "mend d"):
        assert part in str(caught.value)
    assert "slow" not in str(caught.value)


# --- what is read of the machine


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that puts a shell script in the place of nvidia-smi, or of Python."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "_DRIVER_FILES", ())
    monkeypatch.setattr(sys, "executable", str(folder / "python"))

    def make(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)

    return make


LISTED = """case "$*" in *--id=0*|*csv,noheader) echo 'NVIDIA L4';; *) exit 6;; esac"""
ANSWER = """echo noise; echo '["NVIDIA L4", 22.5, 22.2, [8, 9]]'"""


def test_the_gpu_is_what_torch_says(program: Callable[[str, str], None]) -> None:
    program("nvidia-smi", LISTED)
    program("python", ANSWER)
    read = read_machine()
    assert (read.gpu, read.gpu_problem) == (replace(L4, name="NVIDIA L4"), None)
    assert read.gpu is not None and read.gpu.bf16


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_hidden_gpu_is_not_asked_for(
    program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    program("nvidia-smi", LISTED)
    program("python", ANSWER)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    read = read_machine()
    assert (read.gpu, read.is_listed) == (None, False)
    assert "CUDA_VISIBLE_DEVICES" in str(read.gpu_problem)
    assert doctor.check_gpu(preset_config("cpu"), read, automatic=True).status == "ok"


@pytest.mark.parametrize("visible", ["NoDevFiles", "7", "-1,0"])
def test_a_variable_that_names_no_gpu_leaves_the_cpu(
    program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    program("nvidia-smi", LISTED)
    program("python", "echo 'No CUDA GPUs are available' >&2; exit 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    read = read_machine()
    assert (read.gpu, read.is_listed) == (None, False)
    found = doctor.check_gpu(preset_config("cpu"), read, automatic=True)
    assert found.status == "warning"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert read_machine().is_listed


@pytest.mark.parametrize(
    "script",
    [
        "echo broken >&2; exit 18",
        "exit 9",
        "echo 'No devices were found'",
        "true",
        r"printf '\377' >&2; exit 9",
    ],
)
def test_an_nvidia_smi_that_fails_is_a_reason_to_look_at_the_driver(
    program: Callable[[str, str], None], script: str
) -> None:
    program("nvidia-smi", script)
    read = read_machine()
    assert read.gpu is None
    assert read.gpu_problem
    assert doctor.check_gpu(preset_config("cpu"), read, automatic=True).status == "warning"


def test_without_nvidia_smi_there_is_no_gpu_and_nothing_wrong(
    program: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    read = read_machine()
    assert (read.gpu, read.gpu_problem) == (None, None)


def test_torch_is_asked_where_a_driver_runs_without_nvidia_smi(
    program: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(doctor, "_DRIVER_FILES", (tmp_path,))
    program("python", ANSWER)
    assert read_machine().gpu is not None
    # A container without a GPU on a machine that has one.
    program("python", "echo 'Torch not compiled with CUDA enabled' >&2; exit 1")
    read = read_machine()
    assert (read.gpu, read.gpu_problem) == (None, None)


@pytest.mark.parametrize(
    ("script", "needle"),
    [("echo 'Aborted here' >&2; exit 134", "Aborted here"), ("exit 139", "139")],
)
def test_a_torch_that_dies_takes_only_its_own_process(
    program: Callable[[str, str], None], script: str, needle: str
) -> None:
    program("nvidia-smi", LISTED)
    program("python", script)
    read = read_machine()
    assert read.gpu is None
    found = doctor.check_gpu(preset_config("l4"), read, automatic=False)
    assert found.status == "failure"
    assert needle in found.text


def test_this_torch_says_why_it_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, problem = doctor._ask_torch()
    assert gpu is None
    assert re.search("CUDA|NVIDIA|GPU", str(problem))
    assert "Error" not in str(problem)


def test_a_program_that_hangs_is_given_up() -> None:
    assert doctor._run(["/bin/sh", "-c", "exec sleep 9"], timeout_s=0.2)[1]


@pytest.mark.gpu
def test_torch_computes_on_a_gpu() -> None:
    gpu = read_machine().gpu
    assert gpu is not None
    assert 0 < gpu.free_gib <= gpu.total_gib


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    whole, _ = doctor.main_memory_gib(tmp_path)
    assert whole is not None
    (tmp_path / "memory.current").write_text(str(2**25))
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**24}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.main_memory_gib(tmp_path)[0] == whole
    (tmp_path / "memory.max").write_text(str(2**26))
    assert doctor.main_memory_gib(tmp_path) == (2**-4, (2**26 - 2**25 + 2**24) / 2**30)


# --- packages


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (["rich>=13", "xllamacpp-not-here==1; extra == 'gpu'"], "ok"),
        (["rich>=99"], "warning"),
        (["no-such-package-here>=1"], "failure"),
        (["no-such-package-here>=1; extra == 'train'"], "failure"),
        (["no-such-package-here>=1; extra == 'vllm'"], "ok"),
        (["no-such-package-here>=1; python_version < '3'"], "ok"),
    ],
)
def test_packages_are_compared_with_those_that_are_tested(
    monkeypatch: pytest.MonkeyPatch, asked: list[str], status: str
) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: asked)
    found = doctor.check_packages(LAPTOP)
    assert found.status == status
    assert status == "ok" or found.fix == doctor.install_command(LAPTOP)


def test_a_project_that_runs_from_its_folder_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", unknown)
    assert doctor.check_packages(LAPTOP).status == "warning"


def test_the_requirements_file_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.install_command(LAPTOP).endswith("requirements-cpu.txt")
    assert doctor.install_command(WITH_L4).endswith("requirements.txt")
    monkeypatch.setattr(doctor, "_ROOT", Path("nowhere"))
    assert doctor.install_command(WITH_L4).endswith('"tinyagent-fast[gpu]"')


# --- GPU and memory


def test_without_a_gpu_a_small_model_is_all_right_and_a_large_one_is_slow() -> None:
    assert doctor.check_gpu(preset_config("cpu"), LAPTOP, automatic=True).status == "ok"
    found = doctor.check_gpu(preset_config("l4"), LAPTOP, automatic=False)
    assert found.status == "warning"
    assert "--preset cpu" in str(found.fix)


@pytest.mark.parametrize(("layers", "status"), [(18, "ok"), (200, "warning")])
def test_a_large_vocabulary_makes_no_model_slow(tmp_path: Path, layers: int, status: str) -> None:
    sizes = {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "vocab_size": 262_144, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = preset_config("cpu")
    config = replace(config, model=replace(config.model, base=str(tmp_path)))
    assert doctor.check_gpu(config, LAPTOP, automatic=False).status == status


@pytest.mark.parametrize(
    ("preset", "automatic", "status"),
    [("l4", False, "failure"), ("cpu", True, "failure"), ("cpu", False, "warning")],
)
def test_a_gpu_that_torch_cannot_use_is_passed_over_only_if_that_was_asked_for(
    preset: str, automatic: bool, status: str
) -> None:
    found = doctor.check_gpu(preset_config(preset), UNUSABLE, automatic=automatic)
    assert found.status == status
    assert "the driver is too old" in found.text
    assert "requirements.txt" in str(found.fix)


@pytest.mark.parametrize(
    ("preset", "machine", "status"),
    [("a100", WITH_L4, "ok"), ("l4", WITH_T4, "ok"), ("a100", WITH_T4, "warning")],
)
def test_bf16_is_missed_only_where_it_is_asked_for(
    preset: str, machine: Machine, status: str
) -> None:
    found = doctor.check_gpu(preset_config(preset), machine, automatic=False)
    assert found.status == status
    assert ("no bf16" in found.text) == (machine is WITH_T4)


def test_a_batch_that_may_not_fit_is_named_with_one_that_does() -> None:
    whole = ("--model.gradient-checkpointing", "false")
    config = with_changes("a100", model__gradient_checkpointing="false")
    found = doctor.check_memory(config, WITH_L4)
    assert found.status == "warning"
    flags = shlex.split(str(found.fix).partition(", or ")[0])
    smaller = resolve_config("train", ["--preset", "a100", *whole, *flags], lambda: "cpu")
    assert doctor.check_memory(smaller, WITH_L4).status == "ok"
    before, after = config.train, smaller.train
    assert before.rows_per_batch * before.accumulation == after.rows_per_batch * after.accumulation
    automatic = with_changes("a100", train__batch="auto")
    assert doctor.check_memory(automatic, WITH_L4).status == "ok"


def test_other_programs_on_the_gpu_are_named() -> None:
    # With `auto` a step is cut down to a single row, so that little memory is enough.
    busy = replace(WITH_L4, gpu=replace(L4, free_gib=1.0))
    found = doctor.check_memory(preset_config("l4"), busy)
    assert found.status == "warning"
    assert "nvidia-smi" in str(found.fix)


def test_a_base_of_unknown_size_is_no_fault() -> None:
    config = with_changes("l4", model__base="someone/model")
    assert doctor.check_memory(config, WITH_L4).status == "ok"
    assert doctor.check_memory(config, LAPTOP).status == "ok"
    assert not {what for what, _, _ in doctor.disk_uses(config)} & {"base", "export"}


def test_main_memory_is_compared_with_what_training_needs() -> None:
    config = preset_config("nano")
    for total, available, status in (
        (16.0, 12.0, "ok"),
        (16.0, 0.7, "warning"),
        (0.7, 0.65, "failure"),
    ):
        machine = replace(LAPTOP, memory_gib=total, available_gib=available)
        assert doctor.check_memory(config, machine).status == status
    unknown = replace(LAPTOP, memory_gib=None, available_gib=None)
    assert doctor.check_memory(config, unknown).status == "ok"


def test_on_a_cpu_16_bit_weights_are_held_in_32_bits() -> None:
    texts = {
        doctor.check_memory(with_changes("a100", model__weights=weights), LAPTOP).text
        for weights in ("fp32", "bf16", "fp16")
    }
    assert len(texts) == 1


# --- backend


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that says which packages are found."""

    def make(*names: str) -> None:
        def find_spec(name: str) -> object | None:
            return name if name in names else None

        monkeypatch.setattr(doctor, "find_spec", find_spec)
        monkeypatch.setattr("tinyagent_fast.models.loading.find_spec", find_spec)

    return make


@pytest.mark.parametrize(
    ("machine", "batching", "packages", "status"),
    [
        (WITH_L4, "prefix-grouped", ["unsloth"], "ok"),
        (WITH_L4, "packed", ["unsloth"], "warning"),
        (WITH_L4, "packed", ["unsloth", "flash_attn"], "ok"),
        (WITH_L4, "packed", ["unsloth", "xformers"], "ok"),
        (WITH_T4, "prefix-grouped", ["unsloth"], "warning"),
        (WITH_T4, "prefix-grouped", ["unsloth", "flash_attn"], "warning"),  # needs 8.0
        (WITH_T4, "prefix-grouped", ["unsloth", "xformers"], "ok"),
    ],
)
def test_torchs_attention_is_a_warning_only_where_it_is_slow(
    installed: Callable[..., None],
    machine: Machine,
    batching: str,
    packages: list[str],
    status: str,
) -> None:
    installed(*packages)
    config = with_changes("l4", train__batching=batching)
    assert doctor.check_backend(config, machine).status == status


def test_the_backend_is_the_one_that_training_takes(installed: Callable[..., None]) -> None:
    installed()
    config = preset_config("l4")
    assert doctor.check_backend(config, WITH_L4).status == "warning"  # slower without unsloth
    assert doctor.check_backend(preset_config("seed"), WITH_L4).status == "ok"
    assert doctor.check_backend(config, LAPTOP).status == "ok"
    wanted = with_changes("l4", model__backend="unsloth")
    for machine in (WITH_L4, LAPTOP):
        found = doctor.check_backend(wanted, machine)
        assert found.status == "failure"
        assert "--model.backend transformers" in str(found.fix)
    installed("unsloth")
    assert doctor.takes_unsloth(config, WITH_L4)
    assert not doctor.takes_unsloth(config, LAPTOP)
    exact = with_changes("l4", model__weights="fp32")
    assert not doctor.takes_unsloth(exact, WITH_L4)
    assert doctor.check_backend(exact, WITH_L4).status == "ok"
    rounded = with_changes("l4", train__qat="q4_k_m")
    assert not doctor.takes_unsloth(rounded, WITH_L4)
    assert doctor.check_backend(rounded, WITH_L4).status == "ok"


# --- disk, base and data


def test_a_disk_must_hold_the_training_and_should_hold_the_export() -> None:
    uses = {"cache": 3.0, "export": 4.0}
    statuses = [doctor.disk_finding(uses, free).status for free in (2.9, 3.1, 6.9, 7.1)]
    assert statuses == ["failure", "warning", "warning", "ok"]


def cached(folder: Path, repo: str, name: str) -> None:
    """Put an empty file where huggingface_hub keeps a downloaded one."""
    commit = folder / "hub" / repo / "snapshots" / "a"
    commit.mkdir(parents=True)
    (commit / name).touch()
    (folder / "hub" / repo / "refs").mkdir()
    (folder / "hub" / repo / "refs" / "main").write_text("a")


BASE = ("models--Doctor-Shotgun--TinyLlama-1.1B-32k-Instruct", "model.safetensors")
DATASET = ("datasets--squeeze-ai-lab--TinyAgent-dataset", "training_data.json")


def test_what_is_downloaded_already_needs_no_space(tmp_path: Path) -> None:
    config = preset_config("l4")
    sizes = {what: size * 2**30 for what, _, size in doctor.disk_uses(config)}
    assert sizes["data"] == 734_000_000
    assert sizes["base"] == pytest.approx(2.2e9, rel=0.05)
    cached(tmp_path, *BASE)
    left = {what for what, _, _ in doctor.disk_uses(config)}
    assert set(sizes) - left == {"base"}
    (found,) = doctor.check_disk(preset_config("smoke"))  # one disk, one line
    assert found.status == "ok"


def test_only_encoded_rows_take_space_for_each_pass_over_the_own_rows(tiny_data: Path) -> None:
    def sizes(**data: Any) -> dict[str, float]:
        config = preset_config("cpu")
        data = {"train": tiny_data / "training_data.json", "with_generated": True, **data}
        return {
            what: size * 2**30
            for what, _, size in doctor.disk_uses(
                replace(config, data=replace(config.data, **data))
            )
        }

    once, often = sizes(own_passes=1), sizes(own_passes=40)
    size = (tiny_data / "training_data.json").stat().st_size
    assert often["data"] == once["data"] == sizes(train=None)["data"] > 0
    assert often["cache"] - once["cache"] == pytest.approx(39 * size)
    assert sizes(train=Path("data/training_data.json"))["data"] > 734_000_000


def test_downloads_are_all_right_unless_they_are_forbidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    config = preset_config("l4")

    def statuses() -> list[str]:
        found = [*doctor.check_data(config), doctor.check_base(config)]
        return [finding.status for finding in found]

    assert statuses() == ["ok", "ok"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert statuses() == ["failure", "failure"]
    cached(tmp_path, *BASE)
    cached(tmp_path, *DATASET)
    assert statuses() == ["ok", "ok"]


def test_whole_files_are_all_right_and_missing_ones_fail(tiny_data: Path) -> None:
    train, test = tiny_data / "training_data.json", tiny_data / "testing_data.json"
    found = doctor.check_data(Config(data=DataConfig(train=train, test=test)))
    assert [f.status for f in found] == ["ok", "ok"]
    found = doctor.check_data(Config(data=DataConfig(train=train, test=Path("no.json"))))
    assert [f.status for f in found] == ["ok", "failure"]
    assert "--data.test" in str(found[1].fix)
    (found_generated,) = doctor.check_data(Config())
    assert found_generated.status == "ok"
    mixed = DataConfig(train=train, with_generated=True, generated_entries=77)
    assert [("77 entries" in f.text) for f in doctor.check_data(Config(data=mixed))] == [
        True,
        False,
    ]


def test_a_test_file_that_was_lost_is_downloaded_again(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = (tiny_data / "training_data.json").read_bytes()
    (tmp_path / "data" / "training_data.json").write_bytes(content)
    train, test = doctor.check_data(preset_config("l4"))
    assert (train.status, test.status) == ("ok", "failure")
    assert test.fix == "tinyagent-fast data download"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"  \n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"a": {"input": "x"', "cut off"),
        (None, "is a folder"),
    ],
)
def test_a_damaged_file_fails_at_once(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "data.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (found,) = doctor.check_data(Config(data=DataConfig(train=path)))
    assert found.status == "failure"
    assert problem in found.text


@pytest.mark.parametrize(
    ("base", "status"),
    [
        ("nano", "ok"),
        ("someone/model", "ok"),
        ("./missing", "failure"),
        ("a/b/c", "failure"),
        ("empty", "failure"),
        ("model", "ok"),
    ],
)
def test_the_base_model_is_looked_for(tmp_path: Path, base: str, status: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert doctor.check_base(Config(model=ModelConfig(base=base))).status == status


# --- export and hub


def test_llama_cpp_is_needed_for_exports_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    assert doctor.check_export(LAPTOP).status == "ok"
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for script, fix in (
        ("echo 'ImportError: libgomp.so.1: cannot open' >&2; exit 1", "libgomp1"),
        ("exit 132", "requirements"),
    ):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        found = doctor.check_export(LAPTOP)
        assert found.status == "warning"
        assert fix in str(found.fix)
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert doctor.check_export(LAPTOP).status == "warning"


def test_the_hub_is_asked_only_if_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **_: asked.append(url))
    config = preset_config("l4")
    doctor.find_out(config, LAPTOP, automatic=False)
    assert asked == []
    found = doctor.find_out(config, LAPTOP, automatic=False, online=True)
    assert [f.status for f in found if f.name == "hub"] == ["ok", "ok"]
    assert "TinyLlama" in asked[0]
    assert "TinyAgent-dataset" in asked[1]
    encoder = replace(config.data, prompts="retrieved", retriever="encoder")
    doctor.find_out(replace(config, data=encoder), LAPTOP, automatic=False, online=True)
    assert any(encoder.retriever_encoder in url for url in asked[2:])

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    refused = doctor.check_hub(config)
    assert [hub.status for hub in refused] == ["failure", "failure"]
    assert "no route" in refused[0].text
    for preset in ("nano", "smoke", "cpu"):  # none of them needs anything of the hub
        assert [hub.status for hub in doctor.check_hub(preset_config(preset))] == ["ok"]


# --- the commands


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line on a plain laptop: code, output, errors."""
    monkeypatch.setattr(doctor, "read_machine", lambda: LAPTOP)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace training by a list of what it was asked for."""
    asked: list[Any] = []
    module = types.ModuleType("tinyagent_fast.training.fit")
    module.__dict__["train"] = lambda config, console, resume=None: asked.append(config)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_a_laptop_is_ready_for_the_small_model(call: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = call("doctor")
    assert code == 0, out
    assert out.startswith("preset cpu: ")
    for name in ("packages", "gpu", "memory", "backend", "disk", "base", "data", "export"):
        assert f" {name} " in out


def test_a_failure_is_shown_with_its_fix_and_gives_exit_code_1(
    call: Callable[..., tuple[int, str, str]],
) -> None:
    code, out, _ = call("doctor", "--preset", "smoke", "--data.train", "missing.json")
    assert code == 1
    assert "missing.json: there is no such file" in out
    assert "fix: name another file with --data.train" in out
    code, out, _ = call("doctor", "--preset", "smoke", "--data.train", "missing.json", "--json")
    assert code == 1
    assert [f["name"] for f in json.loads(out) if f["status"] == "failure"] == ["data"]


def test_every_check_is_made_where_the_training_file_is_cut_off_and_none_reads_it(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.data import cache

    def too_early(*_: object, **__: object) -> None:
        raise AssertionError("the data was read")

    monkeypatch.setattr(cache, "check_head", too_early)  # with which every reading begins
    (tmp_path / "bad.json").write_text('{"a": {"input": "x"')
    code, out, err = call("doctor", "--preset", "cpu", "--data.train", "bad.json", "--json")
    assert code == 1, err
    found = {finding["name"]: finding["status"] for finding in json.loads(out)}
    assert {name for name, status in found.items() if status == "failure"} == {"data"}
    assert {"packages", "gpu", "memory", "backend", "disk", "base", "export"} < set(found)


@pytest.mark.parametrize("base", ["./missing", "a/b/c", "missing.gguf", "-odd-"])
def test_a_base_that_is_not_there_is_a_failure_and_no_bug(
    call: Callable[..., tuple[int, str, str]], base: str
) -> None:
    code, out, err = call("doctor", "--preset", "nano", f"--model.base={base}", "--json")
    named = [found["name"] for found in json.loads(out) if found["status"] == "failure"]
    assert (code, named) == ((0, []) if base == "-odd-" else (1, ["base"])), err


@pytest.mark.parametrize(
    ("total_gib", "capability", "preset"),
    [(14.6, (7, 5), "t4"), (22.2, (8, 9), "l4"), (39.4, (8, 0), "a100"), (31.7, (7, 0), "t4")],
)
def test_the_preset_is_that_of_the_gpu_which_torch_can_use(
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    total_gib: float,
    capability: tuple[int, int],
    preset: str,
) -> None:
    card = replace(L4, total_gib=total_gib, free_gib=total_gib, capability=capability)
    machine = replace(WITH_L4, gpu=card)
    monkeypatch.setattr(doctor, "read_machine", lambda: machine)
    assert call("doctor")[1].startswith(f"preset {preset}: ")
    monkeypatch.setattr(doctor, "read_machine", lambda: UNUSABLE)
    code, out, _ = call("doctor")
    assert (code, out.startswith("preset cpu: ")) == (1, True)
    assert "the driver is too old" in out


def test_doctor_takes_seconds_and_no_torch_without_a_gpu(tmp_path: Path) -> None:
    code = (
        "import sys; from tinyagent_fast.cli import main; "
        "code = main(['doctor', '--preset', 'cpu']); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {"TINYAGENT_FAST_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path), **environment},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.strip() == "False", done.stderr
    # Processor time: the clock on the wall counts what else this machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_train_stops_before_anything_heavy(
    call: Callable[..., tuple[int, str, str]],
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_early(*_: object) -> None:
        raise AssertionError("libraries were prepared")

    monkeypatch.setattr("tinyagent_fast.models.libraries.prepare_libraries", too_early)
    code, _, err = call("train", "--preset", "smoke", "--data.train", "missing.json")
    assert code == 2
    assert "data: missing.json: there is no such file" in err
    assert trained == []


def test_train_prints_a_line_for_each_warning_and_goes_on(
    call: Callable[..., tuple[int, str, str]],
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [Finding("b", "warning", "slow " * 40, "mend [b]"), Finding("c", "warning", "x", "y")]
    monkeypatch.setattr(doctor, "find_out", lambda *_, **__: found)
    code, out, err = call("train", "--preset", "smoke")
    assert code == 0, err
    lines = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2
    assert lines[0].endswith("fix: mend [b]")
    found.append(Finding("d", "failure", "bad", "mend d"))
    assert call("train", "--preset", "smoke")[0] == 2
    assert len(trained) == 1


def test_train_says_nothing_where_nothing_is_wrong(
    call: Callable[..., tuple[int, str, str]], trained: list[Any]
) -> None:
    assert call("train", "--preset", "smoke")[:2] == (0, "preset smoke: as asked for\n")
    assert len(trained) == 1


def test_train_tells_a_preset_that_it_chose_from_one_that_was_named(
    call: Callable[..., tuple[int, str, str]],
    trained: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "read_machine", lambda: UNUSABLE)
    monkeypatch.setattr(
        "tinyagent_fast.commands.train.choose_preset", lambda: ("smoke", "no CUDA device")
    )
    assert call("train")[0] == 2
    assert trained == []
    assert call("train", "--preset", "smoke")[0] == 0
    assert len(trained) == 1


def test_a_catalogue_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    config = Config(data=DataConfig(catalogue=tmp_path / "absent.yaml"))
    [found] = doctor.check_catalogue(config)
    assert found.status == "failure" and "absent.yaml" in found.text
    assert doctor.check_catalogue(Config()) == []
