"""What is read of a machine: its GPU by nvidia-smi, torch's build by a file, its memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.doctor import machine
from tinyagent_fast.doctor.machine import Gpu, TorchBuild, read_machine
from tinyagent_fast.doctor.probe import Probe

L4 = "0, GPU-aaaa-1, 550.54.15, 23034, 22528, 8.9, NVIDIA L4"
T4 = "1, GPU-bbbb-2, 550.54.15, 15360, 15000, 7.5, Tesla T4"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that puts a shell script in the place of nvidia-smi."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(script: str) -> None:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        program.chmod(0o755)

    return make


def answer(*rows: str) -> str:
    return "cat <<'END'\n" + "\n".join(rows) + "\nEND"


def test_the_gpu_is_what_nvidia_smi_says(smi: Callable[[str], None]) -> None:
    smi(answer(L4, T4))
    read = read_machine()
    assert read.gpu == Gpu(
        name="NVIDIA L4",
        driver="550.54.15",
        total_gib=23034 / 1024,
        free_gib=22.0,
        capability=(8, 9),
    )
    assert read.gpu.bf16
    assert read.gpu_note is None
    assert read.python == sys.version_info[:3]


@pytest.mark.parametrize(
    ("visible", "name", "note"),
    [
        ("0", "NVIDIA L4", None),
        ("1,0", "Tesla T4", None),
        ("GPU-bbbb", "Tesla T4", None),
        ("MIG-11", "NVIDIA L4", None),
        ("", None, "hides every GPU"),
        ("-1", None, "hides every GPU"),
        ("7", None, "names no GPU"),
    ],
)
def test_cuda_visible_devices_is_followed(
    smi: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str,
    name: str | None,
    note: str | None,
) -> None:
    smi(answer(L4, T4))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    read = read_machine()
    assert (read.gpu.name if read.gpu else None) == name
    assert (note is None and read.gpu_note is None) or str(note) in str(read.gpu_note)


def test_an_old_driver_without_compute_capability_is_asked_again(
    smi: Callable[[str], None],
) -> None:
    smi(
        'case "$*" in *compute_cap*) echo \'Field "compute_cap" is not a valid field\'; exit 2;; '
        "*) echo '0, GPU-c, 470.1, 15360, 15000, Tesla T4';; esac"
    )
    gpu = read_machine().gpu
    assert gpu is not None
    assert (gpu.name, gpu.capability, gpu.bf16) == ("Tesla T4", None, None)


def test_memory_that_is_shared_with_the_host_is_not_known(smi: Callable[[str], None]) -> None:
    smi(answer("0, GPU-d, 580.1, [N/A], [N/A], 12.1, NVIDIA GB10"))
    gpu = read_machine().gpu
    assert gpu is not None
    assert (gpu.total_gib, gpu.free_gib, gpu.capability) == (None, None, (12, 1))


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo 'Failed to initialize NVML: mismatch' >&2; exit 18", "Failed to initialize NVML"),
        ("exit 9", "exit code 9"),
        ("echo 'No devices were found'", "No devices were found"),
        ("true", "nothing"),
    ],
)
def test_what_nvidia_smi_complains_of_is_noted(
    smi: Callable[[str], None], script: str, note: str
) -> None:
    smi(script)
    read = read_machine()
    assert read.gpu is None
    assert note in str(read.gpu_note)


def test_an_nvidia_smi_that_hangs_is_given_up(
    smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SMI_TIMEOUT_S", 0.2)
    smi("exec sleep 5")
    read = read_machine()
    assert read.gpu is None
    assert "timed out" in str(read.gpu_note)


def test_without_nvidia_smi_there_is_no_gpu_and_nothing_to_note(
    smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    read = read_machine()
    assert (read.gpu, read.gpu_note) == (None, None)


NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1).map(str.strip)


@given(NAMES.filter(bool), st.integers(1, 10**6))
def test_every_name_of_a_card_is_read_whole(name: str, mib: int) -> None:
    row = dict(
        zip(
            machine._ASKED,
            f"0, GPU-x, 550.1, {mib}, {mib}, 9.0, {name}".split(", ", 6),
            strict=True,
        )
    )
    gpu = machine._gpu(row)
    assert (gpu.name, gpu.total_gib) == (name, mib / 1024)


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    code = (
        "import sys; from tinyagent_fast.doctor.machine import read_machine; "
        "print(read_machine().torch.version); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().partition("+")[0] == metadata.version("torch").partition("+")[0]


@pytest.mark.parametrize(
    ("lines", "cuda"),
    [
        ("__version__ = '2.10.0+cu128'\ncuda: Optional[str] = '12.8'", "12.8"),
        ("__version__ = '2.10.0+cu128'\ncuda = '12.8'\nx, y = 1, 2", "12.8"),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: str", None),
        ("__version__ = '2.13.0'", None),
    ],
)
def test_every_form_of_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, cuda: str | None
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "torch" / "version.py").write_text(lines, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    build = machine.read_torch_build()
    assert build is not None
    assert build.cuda == cuda
    (tmp_path / "torch" / "version.py").write_text("def (", encoding="utf-8")
    assert machine.read_torch_build() is None


def test_a_containers_limit_is_the_memory_there_is(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("4294967296\n")
    (tmp_path / "memory.current").write_text("3221225472\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1073741824\n")
    assert machine._container_memory(tmp_path) == (4 * 2**30, 2 * 2**30)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._container_memory(tmp_path) == (None, None)
    older = tmp_path / "memory"
    older.mkdir()
    (older / "memory.limit_in_bytes").write_text("1000")
    (older / "memory.usage_in_bytes").write_text("600")
    (older / "memory.stat").write_text("total_inactive_file 100\n")
    assert machine._container_memory(tmp_path) == (1000, 500)


def test_a_machine_is_as_large_as_its_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_machine()
    (tmp_path / "memory.max").write_text(str(2**26))
    (tmp_path / "memory.current").write_text(str(2**25))
    (tmp_path / "memory.stat").write_text("")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    read = read_machine()
    assert whole.memory_gib is not None
    assert (read.memory_gib, read.available_gib) == (2**-4, 2**-5)


def test_what_torch_says_of_the_gpu_counts_more_than_nvidia_smi(
    smi: Callable[[str], None],
) -> None:
    smi(answer(L4))
    read = read_machine()
    probe = Probe(cuda=True, name="A part", total_gib=10.0, free_gib=9.0, capability=(8, 0))
    gpu = read.as_probed(probe).gpu
    assert gpu is not None
    assert (gpu.name, gpu.driver, gpu.total_gib) == ("A part", "550.54.15", 10.0)
    assert read.as_probed(None) is read
    assert read.as_probed(Probe(problem="broken")) is read


def test_a_build_without_cuda_sees_no_gpu(smi: Callable[[str], None]) -> None:
    smi(answer(L4))
    from dataclasses import replace

    read = replace(read_machine(), torch=TorchBuild(version="2.13.0+cpu", cuda=None))
    assert not read.torch_sees_gpu
    assert replace(read, torch=TorchBuild(version="2.10.0", cuda="12.8")).torch_sees_gpu
