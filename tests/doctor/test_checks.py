"""What each check says of a machine and a config, and that its fix repairs it."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from tinyagent_fast.commands.config_flags import resolve_config
from tinyagent_fast.config import Config, DataConfig, ModelConfig
from tinyagent_fast.doctor import attention, checks, dataset, engine, hub, packages, resources
from tinyagent_fast.doctor.accelerator import check_bf16, check_gpu, check_gpu_memory
from tinyagent_fast.doctor.attention import check_attention, takes_unsloth, xformers_mismatch
from tinyagent_fast.doctor.findings import Finding, failure, ok, refuse_failures, warning
from tinyagent_fast.doctor.machine import Gpu, Machine, TorchBuild
from tinyagent_fast.doctor.packages import KnownVersions, compare_versions
from tinyagent_fast.doctor.probe import Probe
from tinyagent_fast.doctor.resources import Need, disk_finding
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.presets import preset_config

CUDA_12 = TorchBuild(version="2.10.0+cu128", cuda="12.8")
CUDA_13 = TorchBuild(version="2.11.0+cu130", cuda="13.0")
NO_CUDA = TorchBuild(version="2.13.0+cpu", cuda=None)
L4 = Gpu(name="L4", driver="550.54.15", total_gib=22.5, free_gib=22.2, capability=(8, 9))
T4 = replace(L4, name="T4", total_gib=15.0, free_gib=14.7, capability=(7, 5))
LAPTOP = Machine(
    python=(3, 11, 7),
    gpu=None,
    gpu_note=None,
    torch=NO_CUDA,
    memory_gib=16.0,
    available_gib=12.0,
)
WITH_L4 = replace(LAPTOP, gpu=L4, torch=CUDA_12)
GIB = 2**30


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)


# --- findings


def test_what_is_wrong_must_name_a_fix() -> None:
    with pytest.raises(AssertionError, match="needs a fix"):
        Finding(name="disk", status="warning", text="full")


def test_only_failures_stop_and_all_of_them_are_named() -> None:
    refuse_failures([ok("a", "fine"), warning("b", "slow", "faster")])
    with pytest.raises(TrainingError) as caught:
        refuse_failures(
            [failure("c", "bad", "mend c"), ok("a", "x"), failure("d", "odd", "mend d")]
        )
    text = str(caught.value)
    for part in ("2 check(s) failed", "c: bad", "d: odd", "mend c", "mend d", "doctor"):
        assert part in text


# --- Python and packages


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 9, 1), "failure"), ((3, 10, 0), "ok"), ((3, 12, 9), "ok"), ((3, 13, 0), "warning")],
)
def test_python_is_compared_with_the_tested_versions(
    version: tuple[int, int, int], status: str
) -> None:
    found = packages.check_python(replace(LAPTOP, python=version))
    assert found.status == status
    assert ".".join(map(str, version)) in found.text


def known(*lines: str) -> KnownVersions:
    return KnownVersions("lock.txt", [Requirement(line) for line in lines])


VERSIONS = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda v: f"{v[0]}.{v[1]}")


@given(st.dictionaries(st.sampled_from(["torch", "trl", "peft", "unsloth_zoo"]), VERSIONS))
def test_what_is_installed_as_pinned_is_all_right(pins: dict[str, str]) -> None:
    tested = known(*(f"{name}=={version}" for name, version in pins.items()))
    installed = {packages.canonical(name): version for name, version in pins.items()}
    (found,) = compare_versions(tested, installed, "install")
    assert (found.status, found.text) == ("ok", f"{len(pins)} as tested (lock.txt)")


def test_a_build_for_another_device_has_the_same_version() -> None:
    (found,) = compare_versions(known("torch==2.13.0"), {"torch": "2.13.0+cpu"}, "install")
    assert found.status == "ok"


def test_missing_packages_fail_and_other_versions_warn() -> None:
    tested = known("torch==2.10.0", "trl==1.14.2", "unsloth==1.0", "gguf==1.0")
    (found,) = compare_versions(tested, {"torch": "2.10.0"}, "install")
    assert (found.status, found.text, found.fix) == ("failure", "missing: trl", "install")
    (found,) = compare_versions(tested, {"torch": "2.11.0", "trl": "1.14.2"}, "install")
    assert (found.status, found.fix) == ("warning", "install")
    assert "torch 2.11.0 (tested: 2.10.0)" in found.text


def test_unsloth_is_compared_with_what_it_was_made_for() -> None:
    asked = [Requirement(line) for line in ("trl<=1.15.0", "rich>=99", 'triton; extra == "x"')]
    installed = {"unsloth": "1.0", "trl": "1.16.0", "rich": "15.0"}
    (found,) = packages.unsloth_ranges(asked, installed, "install")
    assert found.status == "warning"
    assert "trl 1.16.0 (it asks for <=1.15.0)" in found.text
    assert "rich" not in found.text
    assert packages.unsloth_ranges(asked, {**installed, "trl": "1.14.2"}, "install") == []


def test_a_trl_that_needs_triton_fails_without_it() -> None:
    (found,) = packages.known_not_to_work({"trl": "1.15.0"}, "install")
    assert found.status == "failure"
    assert packages.known_not_to_work({"trl": "1.15.0", "triton": "3.6.0"}, "install") == []
    assert packages.known_not_to_work({"trl": "1.14.2"}, "install") == []


def test_the_requirements_file_is_that_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.install_command(LAPTOP).endswith("requirements-cpu.txt")
    assert packages.install_command(WITH_L4).endswith("requirements.txt")
    lock = {r.name: str(r.specifier) for r in packages.tested_versions(gpu=True).requirements}
    assert lock["torch"].startswith("==2.10")
    assert {"xformers", "trl", "unsloth"} <= set(lock)
    monkeypatch.setattr(packages, "_ROOT", Path("nowhere"))
    assert packages.install_command(WITH_L4).endswith('"tinyagent-fast[gpu]"')
    tested = packages.tested_versions(gpu=False)
    assert tested.source == "the project's metadata"
    assert {"torch", "trl", "rich"} <= {r.name for r in tested.requirements}


def test_without_the_training_packages_the_fix_is_their_installation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packages, "installed_versions", lambda: {"rich": "15.0"})
    (found,) = packages.check_packages(LAPTOP, unsloth=False)
    assert found.status == "failure"
    assert str(found.fix).startswith("python -m pip install")


# --- GPU


def test_without_a_gpu_a_small_model_is_all_right_and_a_large_one_is_slow() -> None:
    assert check_gpu(preset_config("cpu"), LAPTOP, automatic=True).status == "ok"
    for preset in ("l4", "a100"):
        found = check_gpu(preset_config(preset), LAPTOP, automatic=False)
        assert found.status == "warning"
        assert "--preset cpu" in str(found.fix)
    broken = replace(LAPTOP, gpu_note="nvidia-smi says: no driver")
    assert check_gpu(preset_config("cpu"), broken, automatic=True).status == "warning"
    hidden = replace(LAPTOP, gpu_note="CUDA_VISIBLE_DEVICES='' hides every GPU")
    assert check_gpu(preset_config("cpu"), hidden, automatic=True).status == "ok"


@pytest.mark.parametrize(
    ("torch", "driver", "needle"),
    [
        (NO_CUDA, "550.54.15", "was built without CUDA"),
        (CUDA_13, "550.54.15", "needs driver 580"),
        (CUDA_12, "470.82", "needs driver 525"),
        (CUDA_12, "525.60.13", None),
        (CUDA_12, "580.1", None),
        (CUDA_13, "580.1", None),
        (CUDA_12, None, None),
        (replace(CUDA_12, cuda="99.1"), "1.0", None),
    ],
)
def test_torch_is_compared_with_the_driver(
    torch: TorchBuild, driver: str | None, needle: str | None
) -> None:
    machine = replace(WITH_L4, torch=torch, gpu=replace(L4, driver=driver))
    for config, automatic in ((preset_config("l4"), False), (preset_config("cpu"), True)):
        found = check_gpu(config, machine, automatic=automatic)
        assert found.status == ("ok" if needle is None else "failure")
        assert needle is None or needle in found.text
    named = check_gpu(preset_config("cpu"), machine, automatic=False)
    assert named.status == ("ok" if needle is None else "warning")


def test_an_old_driver_is_not_repaired_by_other_packages() -> None:
    machine = replace(WITH_L4, gpu=replace(L4, driver="470.82"))
    found = check_gpu(preset_config("l4"), machine, automatic=False)
    assert str(found.fix).startswith("install driver 525 or newer")
    too_new_torch = replace(WITH_L4, torch=CUDA_13)
    found = check_gpu(preset_config("l4"), too_new_torch, automatic=False)
    assert "requirements.txt" in str(found.fix)


def test_what_torch_says_is_wrong_with_the_gpu_fails() -> None:
    probe = Probe(problem="CUDA error: no kernel image")
    found = check_gpu(preset_config("l4"), WITH_L4, automatic=False, probe=probe)
    assert found.status == "failure"
    assert "no kernel image" in found.text
    fine = Probe(cuda=True, name="L4")
    assert check_gpu(preset_config("l4"), WITH_L4, automatic=False, probe=fine).status == "ok"


def test_bf16_is_missed_only_where_it_is_asked_for() -> None:
    on_t4 = replace(WITH_L4, gpu=T4)
    statuses = {
        (preset, name): getattr(check_bf16(preset_config(preset), machine), "status", None)
        for preset in ("l4", "a100")
        for name, machine in (("L4", WITH_L4), ("T4", on_t4), ("none", LAPTOP))
    }
    assert statuses == {
        ("l4", "L4"): "ok",
        ("l4", "T4"): "ok",
        ("l4", "none"): None,
        ("a100", "L4"): "ok",
        ("a100", "T4"): "warning",
        ("a100", "none"): None,
    }


def test_a_batch_that_may_not_fit_is_named_with_one_that_does() -> None:
    config = preset_config("a100")
    found = check_gpu_memory(config, WITH_L4, unsloth=True)
    assert found is not None
    assert found.status == "warning"
    flags = shlex.split(str(found.fix).partition(", or ")[0])
    smaller = resolve_config("train", ["--preset", "a100", *flags], lambda: "cpu")
    repaired = check_gpu_memory(smaller, WITH_L4, unsloth=True)
    assert repaired is not None
    assert repaired.status == "ok"
    before, after = config.train, smaller.train
    assert before.rows_per_batch * before.accumulation == after.rows_per_batch * after.accumulation


def test_an_automatic_batch_is_predicted_as_it_will_be_chosen() -> None:
    config = preset_config("a100")
    config = replace(config, train=replace(config.train, batch="auto"))
    found = check_gpu_memory(config, WITH_L4, unsloth=True)
    assert found is not None
    assert found.status == "ok"


def test_other_programs_on_the_gpu_are_named() -> None:
    config = preset_config("l4")
    busy = replace(WITH_L4, gpu=replace(L4, free_gib=2.0))
    found = check_gpu_memory(config, busy, unsloth=True)
    assert found is not None
    assert found.status == "warning"
    assert "other programs use the rest" in found.text
    assert "nvidia-smi" in str(found.fix)
    unknown = replace(WITH_L4, gpu=replace(L4, free_gib=None))
    assert check_gpu_memory(config, unknown, unsloth=True) is None


def test_a_base_of_unknown_size_is_no_fault() -> None:
    config = preset_config("l4")
    config = replace(config, model=replace(config.model, base="someone/model"))
    found = check_gpu_memory(config, WITH_L4, unsloth=True)
    assert found is not None
    assert (found.status, "not known" in found.text) == ("ok", True)
    assert resources.needed_memory_gib(config, WITH_L4) is None
    assert {need.what for need in resources.disk_needs(config)} == {"data", "cache"}


# --- attention


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that says which packages are found, with the origin of their specs."""

    def make(**found: str | None) -> None:
        def find_spec(name: str) -> Any:
            if name not in found:
                return None
            return SimpleNamespace(origin=found[name], submodule_search_locations=[found[name]])

        monkeypatch.setattr(attention, "find_spec", find_spec)
        monkeypatch.setattr("tinyagent_fast.models.loading.find_spec", find_spec)

    return make


def test_the_attention_that_unsloth_takes_is_named_with_its_cost(
    there: Callable[..., None], tmp_path: Path
) -> None:
    config = preset_config("l4")
    (tmp_path / "cpp_lib.json").write_text(
        json.dumps({"version": {"torch": "2.10.0+cu128", "cuda": 1208}})
    )
    there(unsloth="x", flash_attn="x", xformers=str(tmp_path))
    assert "flash-attn" in check_attention(config, WITH_L4).text
    there(unsloth="x", xformers=str(tmp_path))
    assert "xformers" in check_attention(config, WITH_L4).text
    for machine, found in (
        (replace(WITH_L4, torch=CUDA_13), {"unsloth": "x", "xformers": str(tmp_path)}),
        (WITH_L4, {"unsloth": "x"}),
        (WITH_L4, {"unsloth": "x", "flash_attn": None}),
        (replace(WITH_L4, gpu=T4), {"unsloth": "x", "flash_attn": "x"}),
    ):
        there(**found)
        said = check_attention(config, machine)
        assert said.status == "warning"
        assert "3.9 times the time and 7 times the memory" in said.text
        assert "unsloth PR #8957" in said.text
        assert "requirements.txt" in str(said.fix)


def test_what_ran_counts_more_than_what_is_installed(
    there: Callable[..., None], tmp_path: Path
) -> None:
    config = preset_config("l4")
    there(unsloth="x", xformers=str(tmp_path))
    probe = Probe(cuda=True, name="L4", flash_attn="not installed", xformers="no such symbol")
    said = check_attention(config, WITH_L4, probe)
    assert said.status == "warning"
    assert "xformers: no such symbol" in said.text
    there(unsloth="x")
    works = replace(probe, xformers=None)
    assert check_attention(config, WITH_L4, works).status == "ok"


def test_the_backend_is_the_one_that_training_takes(there: Callable[..., None]) -> None:
    there()
    config = preset_config("l4")
    assert check_attention(config, WITH_L4).status == "warning"  # slower without unsloth
    assert check_attention(preset_config("seed"), WITH_L4).status == "ok"
    wanted = replace(config, model=replace(config.model, backend="unsloth"))
    for machine in (WITH_L4, LAPTOP):
        found = check_attention(wanted, machine)
        assert found.status == "failure"
        assert "--model.backend transformers" in str(found.fix)
    assert check_attention(config, LAPTOP).status == "ok"
    there(unsloth="x")
    assert takes_unsloth(config, WITH_L4)
    assert not takes_unsloth(config, LAPTOP)
    rounded = replace(config, train=replace(config.train, qat="q4_k_m"))
    assert not takes_unsloth(rounded, WITH_L4)
    assert check_attention(rounded, WITH_L4).status == "ok"


def test_xformers_of_another_cuda_cannot_load(tmp_path: Path) -> None:
    about = tmp_path / "cpp_lib.json"
    assert xformers_mismatch(about, CUDA_12) is None  # nothing speaks against it
    about.write_text(json.dumps({"version": {"torch": "2.10.0+cu128", "cuda": 1208}}))
    assert xformers_mismatch(about, CUDA_12) is None
    said = str(xformers_mismatch(about, CUDA_13))
    assert "torch 2.10.0+cu128 (CUDA 12.8)" in said
    assert "CUDA 13.0" in said
    for odd in ("{", "[]", '{"version": {"torch": "2", "cuda": null}}'):
        about.write_text(odd)
        assert xformers_mismatch(about, CUDA_13) is None


# --- disk and memory


def needs(train_gib: float, export_gib: float) -> list[Need]:
    here = Path()
    return [
        Need(what="rows", folder=here, size_bytes=train_gib * GIB, purpose="train"),
        Need(what="merged", folder=here, size_bytes=export_gib * GIB, purpose="export"),
    ]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 300))
def test_a_disk_must_hold_the_training_and_should_hold_the_export(
    train: float, export: float, free: float
) -> None:
    status = disk_finding(needs(train, export), free).status
    if train * 1.001 < free and (train + export) * 1.001 < free:
        assert status == "ok"
    elif train > free * 1.001 + 1e-6:
        assert status == "failure"
    elif train * 1.001 < free and train + export > free * 1.001:
        assert status == "warning"


def test_what_is_there_already_is_not_counted_again(tmp_path: Path) -> None:
    config = replace(preset_config("l4"), runs=tmp_path / "runs")
    sizes = {need.what: need.size_bytes for need in resources.disk_needs(config)}
    assert sizes["data"] == 734_000_000
    assert sizes["base"] == pytest.approx(2.2e9, rel=0.05)
    assert sizes["merged"] == sizes["base"]
    assert sizes["f32 to compare with"] == 2 * sizes["base"]
    folder = tmp_path / "hub" / "models--Doctor-Shotgun--TinyLlama-1.1B-32k-Instruct" / "snapshots"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "model.safetensors").touch()
    data = tmp_path / "hub" / "datasets--squeeze-ai-lab--TinyAgent-dataset" / "snapshots" / "d"
    data.mkdir(parents=True)
    (data / "training_data.json").touch()
    (tmp_path / "cache" / "rows").mkdir(parents=True)
    (tmp_path / "cache" / "rows" / "a.arrow").touch()
    (tmp_path / "cache" / "b.arrow").touch()
    sizes = {need.what: need.size_bytes for need in resources.disk_needs(config)}
    assert sizes["base"] == 0
    assert not {"data", "rows", "cache"} & set(sizes)


def test_every_disk_is_looked_at_once() -> None:
    (found,) = resources.check_disk(preset_config("smoke"))
    assert found.name == "disk"


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_the_hubs_cache_is_found_as_its_library_finds_it(
    environment: dict[str, str], folder: str
) -> None:
    assert resources.hub_cache(environment) == Path(folder)


def test_memory_is_compared_with_what_training_needs() -> None:
    config = preset_config("cpu")
    needed = resources.needed_memory_gib(config, LAPTOP)
    assert needed is not None
    assert 0.6 < needed < 4
    for total, available, status in (
        (16.0, 12.0, "ok"),
        (16.0, needed / 2, "warning"),
        (needed * 0.95, needed * 0.9, "warning"),
        (needed / 2, needed / 3, "failure"),
    ):
        machine = replace(LAPTOP, memory_gib=total, available_gib=available)
        assert resources.check_memory(config, machine).status == status
    unknown = replace(LAPTOP, memory_gib=None, available_gib=None)
    assert resources.check_memory(config, unknown).status == "ok"


def test_on_a_cpu_half_precision_weights_take_whole_ones() -> None:
    config = preset_config("a100")
    whole = replace(config, model=replace(config.model, weights="fp32"))
    assert resources.needed_memory_gib(config, LAPTOP) == resources.needed_memory_gib(whole, LAPTOP)
    t4 = preset_config("t4")
    on_gpu = resources.needed_memory_gib(t4, WITH_L4)
    plain = replace(t4, model=replace(t4.model, gradient_checkpointing="true"))
    without = resources.needed_memory_gib(plain, WITH_L4)
    assert on_gpu is not None
    assert without is not None
    assert on_gpu > without + 0.5  # offloaded checkpoints are kept in the host's memory


# --- data and base


def config_of(train: Path | None, **changes: Any) -> Config:
    return Config(data=DataConfig(train=train, **changes))


def statuses(found: list[Finding]) -> list[str]:
    return [finding.status for finding in found]


def test_whole_files_are_all_right_and_missing_ones_fail(tiny_data: Path) -> None:
    train, test = tiny_data / "training_data.json", tiny_data / "testing_data.json"
    for thorough in (False, True):
        found = dataset.check_data(config_of(train, test=test), thorough=thorough)
        assert statuses(found) == ["ok", "ok"], found
        found = dataset.check_data(config_of(train, test=Path("no.json")), thorough=thorough)
        assert statuses(found) == ["ok", "failure"]
        assert "--data.test" in str(found[1].fix)
    assert statuses(dataset.check_data(config_of(None), thorough=True)) == ["ok"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        (b"[1, 2]", "no JSON object"),
        (b'{"a": {"input": "x"', "cut off"),
    ],
)
def test_a_damaged_file_fails_at_once(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    (found,) = dataset.check_data(config_of(path), thorough=False)
    assert found.status == "failure"
    assert problem in found.text


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    (found,) = dataset.check_data(config_of(tmp_path), thorough=False)
    assert "is no file" in found.text


def test_the_first_entries_are_checked_thoroughly(tiny_data: Path, tmp_path: Path) -> None:
    entries = json.loads((tiny_data / "training_data.json").read_text(encoding="utf-8"))
    key = next(iter(entries))
    del entries[key]["input"]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert statuses(dataset.check_data(config_of(path), thorough=False)) == ["ok"]
    (found,) = dataset.check_data(config_of(path), thorough=True)
    assert found.status == "failure"
    assert f"entry {key}: input is missing" in found.text
    (found,) = dataset.check_data(config_of(path, on_bad_entry="skip"), thorough=True)
    assert found.status == "warning"
    path.write_text('{"a": {,}}', encoding="utf-8")
    (found,) = dataset.check_data(config_of(path), thorough=True)
    assert "no valid JSON" in found.text


def test_a_file_is_compared_with_the_record_of_its_download(
    tiny_data: Path, tmp_path: Path
) -> None:
    content = (tiny_data / "testing_data.json").read_bytes()
    path = tmp_path / "data.json"
    path.write_bytes(content)
    record = tmp_path / ".data.json.source.json"
    sha256 = hashlib.sha256(content).hexdigest()
    record.write_text(json.dumps({"sha256": sha256}))
    (found,) = dataset.check_data(config_of(path), thorough=True)
    assert (found.status, f"{sha256[:12]} as downloaded" in found.text) == ("ok", True)
    record.write_text(json.dumps({"sha256": "0" * 64}))
    (found,) = dataset.check_data(config_of(path), thorough=True)
    assert found.status == "warning"
    assert "is not that of the download" in found.text


def test_entries_are_counted_where_the_file_was_read_before(tiny_data: Path) -> None:
    from tinyagent_fast.data.cache import cache_folder, load_examples

    path = tiny_data / "training_data.json"
    load_examples(path, on_bad_entry="error", cache_dir=cache_folder())
    (found,) = dataset.check_data(config_of(path), thorough=True)
    assert ", 40 entries" in found.text


def test_the_published_files_are_downloaded_unless_that_is_forbidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = preset_config("l4")
    (found,) = dataset.check_data(config, thorough=False)
    assert (found.status, "downloads" in found.text) == ("ok", True)
    assert checks.check_base(config).status == "ok"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (found,) = dataset.check_data(config, thorough=False)
    assert found.status == "failure"
    assert checks.check_base(config).status == "failure"
    for kind, name in (
        ("datasets--squeeze-ai-lab--TinyAgent-dataset", "training_data.json"),
        ("models--Doctor-Shotgun--TinyLlama-1.1B-32k-Instruct", "model.safetensors"),
    ):
        folder = tmp_path / "hub" / kind / "snapshots" / "a"
        folder.mkdir(parents=True)
        (folder / name).touch()
    assert statuses(dataset.check_data(config, thorough=False)) == ["ok"]
    assert checks.check_base(config).status == "ok"


def test_a_test_file_that_was_lost_is_downloaded_again(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    content = (tiny_data / "training_data.json").read_bytes()
    (tmp_path / "data" / "training_data.json").write_bytes(content)
    found = dataset.check_data(preset_config("l4"), thorough=False)
    assert statuses(found) == ["ok", "failure"]
    assert found[1].fix == "tinyagent-fast data download"


def test_a_catalogue_is_read(tmp_path: Path) -> None:
    from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE

    found = dataset.check_data(config_of(None, catalogue=BUILT_IN_CATALOGUE), thorough=False)
    assert [f.name for f in found] == ["catalogue", "data"]
    assert "16 tools" in found[0].text
    faulty = tmp_path / "tools.yaml"
    faulty.write_text("tools: 3", encoding="utf-8")
    found = dataset.check_data(config_of(None, catalogue=faulty), thorough=False)
    assert found[0].status == "failure"


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
    assert checks.check_base(Config(model=ModelConfig(base=base))).status == status


# --- llama.cpp and the hub


def test_llama_cpp_is_needed_for_exports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    found = engine.check_llama_cpp("install")
    assert found.status == "ok"
    assert "xllamacpp 2" in found.text
    monkeypatch.setattr(engine, "find_spec", lambda _: None)
    found = engine.check_llama_cpp("install")
    assert (found.status, found.fix) == ("warning", "install")
    assert "training does not" in found.text


@pytest.mark.parametrize(
    ("program", "needle", "fix"),
    [
        ("echo 'ImportError: libgomp.so.1: cannot open' >&2; exit 1", "libgomp.so.1", "libgomp1"),
        ("exit 132", "ended with code 132", "install"),
        ("exec sleep 9", "no answer", "install"),
    ],
)
def test_a_llama_cpp_that_does_not_load_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, needle: str, fix: str
) -> None:
    pytest.importorskip("xllamacpp")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(engine, "_TIMEOUT_S", 1)
    monkeypatch.setattr(sys, "executable", str(python))
    found = engine.check_llama_cpp("install")
    assert found.status == "warning"
    assert needle in found.text
    assert fix in str(found.fix)


def test_the_hub_is_asked_only_if_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(repo: str, *_: object) -> Finding:
        asked.append(repo)
        return ok("hub", repo)

    monkeypatch.setattr(hub, "_ask", ask)
    checks.all_checks(preset_config("l4"), LAPTOP, automatic=False)
    assert asked == []
    found = checks.all_checks(preset_config("l4"), LAPTOP, automatic=False, online=True)
    base = preset_config("l4").model.base
    assert asked == [base, "squeeze-ai-lab/TinyAgent-dataset"]
    assert [f.text for f in found if f.name == "hub"] == asked


def test_a_hub_that_cannot_be_reached_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    import httpx
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    (found,) = hub.check_hub(preset_config("cpu"), base_is_here=True)
    assert found.status == "failure"
    assert "no route" in found.text
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    (found,) = hub.check_hub(preset_config("cpu"), base_is_here=True)
    assert found.status == "ok"


# --- torch is asked


def test_torch_is_asked_where_that_says_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Probe(cuda=True, name="seen", total_gib=9.0, free_gib=8.0, capability=(8, 0))
    monkeypatch.setattr("tinyagent_fast.doctor.probe.probe_gpu", lambda: seen)
    monkeypatch.setattr(checks, "driver_is_loaded", lambda: True)
    for machine, always, asked in (
        (LAPTOP, True, False),  # this torch sees no GPU
        (WITH_L4, False, False),
        (WITH_L4, True, True),
        (replace(LAPTOP, torch=CUDA_12), False, True),  # a driver without nvidia-smi
        (replace(LAPTOP, torch=CUDA_12, gpu_note="hidden"), True, False),
        (replace(WITH_L4, torch=None), True, False),
    ):
        after, probe = checks.ask_torch(machine, always=always)
        assert (probe is seen) == asked
        assert (after.gpu is not None and after.gpu.name == "seen") == asked
