"""The lock files stay complete, exact, in step with each other and inside the known-good ranges."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from locks import (
    HASHED,
    LOCKS,
    PAGE,
    direct_dependencies,
    licence_of,
    licences_of,
    locked,
    page,
    read_hashes,
    read_lock,
)

ROOT = Path(__file__).resolve().parents[1]
GPU = "requirements.txt"
CPU = "requirements-cpu.txt"
CPU_UNSLOTH = "requirements-cpu-unsloth.txt"
DEV = "requirements-dev.txt"
ALL_FILES = tuple(LOCKS)
PYTHONS = ("3.10", "3.11", "3.12")

# Import names that differ from the name of the distribution they come from.
DISTRIBUTION_OF = {"google": "protobuf", "PIL": "pillow", "yaml": "pyyaml"}
DISTRIBUTION_OF |= {"sklearn": "scikit-learn"}
# Need CUDA, or come with unsloth: never in the lock for a machine without a GPU.
GPU_ONLY = frozenset({"torchao", "torchvision", "triton", "unsloth", "unsloth-zoo", "xformers"})

MUST_AGREE = {
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
    "tyro",
}
BOTH_LOCKS_NAME = MUST_AGREE | {"torch", "rich", "pyyaml", "pyarrow", "matplotlib", "numpy"}
BOTH_LOCKS_NAME |= {"sentencepiece", "protobuf", "huggingface-hub", "gguf", "tokenizers"}

# Source: package metadata (Requires-Dist) of unsloth and unsloth_zoo 2026.10.7
# and 2026.10.9; single excluded releases left out.
UNSLOTH_RANGES = {
    "torch": ">=2.4.0,<2.15.0",
    "transformers": ">=4.52.4,<=5.17.0",
    "trl": ">=0.18.2,<=1.15.0",
    "datasets": ">=3.4.1,<5.0.0",
    "peft": ">=0.18.0",
}
# One CUDA 12.8 set: xformers' file is built for this torch, the others are released with it.
# Source: cpp_lib.json in the xformers wheel; Requires-Dist of torch and torchvision.
TORCH_SET = {
    "torch": "2.10.0",
    "torchvision": "0.25.0",
    "triton": "3.6.0",
    "torchao": "0.16.0",
    "xformers": "0.0.35",
}

URL_OR_HOST = re.compile(
    r"[a-z][a-z0-9+.-]*://|\b(?:[a-z0-9-]+\.)+(?:ai|cloud|co|com|dev|edu|internal|io|lan|local|net|org)\b",
    re.IGNORECASE,
)
PIP_OPTION = re.compile(r"^\s*-")


def read_requirements(name: str) -> list[Requirement]:
    """Parse one requirements file; a line that is not a plain requirement raises."""
    return [requirement for requirement, _ in read_lock(name)]


def version_of(requirement: Requirement) -> str:
    """Give the one version that an exact pin allows; anything but `==X` fails the test."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", f"{requirement}: not an exact pin"
    assert "*" not in specifier.version, f"{requirement}: not an exact pin"
    return specifier.version


def versions_on_linux(name: str, python: str) -> dict[str, list[str]]:
    """Versions that each package of a file gets on Linux x86-64, [] where no line applies."""
    environment = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.1",
        "python_version": python,
        "sys_platform": "linux",
    }
    versions: dict[str, list[str]] = {}
    for requirement in read_requirements(name):
        found = versions.setdefault(canonicalize_name(requirement.name), [])
        if requirement.marker is None or requirement.marker.evaluate(environment):
            found.append(version_of(requirement))
    return versions


def lock_on_linux(name: str, python: str) -> dict[str, str]:
    """The packages that a file installs on Linux x86-64, each with its version."""
    return {k: v[0] for k, v in versions_on_linux(name, python).items() if v}


# Imported only when asked for by name; their extras in pyproject.toml say which versions.
OF_AN_EXTRA = {"vllm", "mcp"}


def imported_modules(folder: Path) -> Iterator[str]:
    """Top-level names of all absolute imports below a folder, also those inside functions."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0]


def needed_distributions(folder: Path) -> set[str]:
    """Distributions that the code in a folder imports, without stdlib and the package itself."""
    own = {"tinyagent_fast", *sys.stdlib_module_names}
    modules = set(imported_modules(folder)) - own
    return {canonicalize_name(DISTRIBUTION_OF.get(module, module)) for module in modules}


def test_import_collector_sees_nested_and_renamed_imports(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "module.py").write_text(
        "import json\nfrom . import near\nfrom tinyagent_fast import errors\n"
        "def load() -> None:\n    import yaml\n    from huggingface_hub.utils import x\n"
    )
    assert needed_distributions(tmp_path) == {"pyyaml", "huggingface-hub"}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_import_of_the_package_is_pinned(python: str) -> None:
    needed = needed_distributions(ROOT / "tinyagent_fast") - OF_AN_EXTRA
    assert needed, "found no third-party import: the check would say nothing"
    assert needed - lock_on_linux(GPU, python).keys() == set()
    assert needed - GPU_ONLY - lock_on_linux(CPU, python).keys() == set()


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_line_is_an_exact_pin(name: str) -> None:
    requirements = read_requirements(name)
    assert requirements
    for requirement in requirements:
        assert version_of(requirement)
        assert not requirement.extras
        assert requirement.url is None


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", ALL_FILES)
def test_markers_choose_one_version_of_each_package(name: str, python: str) -> None:
    lines_of: dict[str, int] = {}
    for requirement in read_requirements(name):
        key = canonicalize_name(requirement.name)
        lines_of[key] = lines_of.get(key, 0) + 1
    for package, versions in versions_on_linux(name, python).items():
        assert len(versions) <= 1, f"{package} on Python {python}: {versions}"
        # A backport may have one line for old Pythons only; a split version must leave no gap.
        if lines_of[package] > 1:
            assert versions, f"{package} has {lines_of[package]} lines, none for Python {python}"


@pytest.mark.parametrize("python", PYTHONS)
def test_both_locks_hold_the_named_libraries(python: str) -> None:
    for name in (GPU, CPU):
        assert BOTH_LOCKS_NAME - lock_on_linux(name, python).keys() == set(), name


@pytest.mark.parametrize("python", PYTHONS)
def test_named_libraries_agree_between_the_locks(python: str) -> None:
    gpu, cpu = lock_on_linux(GPU, python), lock_on_linux(CPU, python)
    assert {k: gpu[k] for k in MUST_AGREE} == {k: cpu[k] for k in MUST_AGREE}


@pytest.mark.parametrize("python", PYTHONS)
def test_only_torch_differs_between_the_locks(python: str) -> None:
    gpu, cpu = lock_on_linux(GPU, python), lock_on_linux(CPU, python)
    assert {k for k in gpu.keys() & cpu.keys() if gpu[k] != cpu[k]} == {"torch"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", [GPU, CPU])
def test_dev_tools_install_beside_either_lock(lock: str, python: str) -> None:
    dev, other = lock_on_linux(DEV, python), lock_on_linux(lock, python)
    assert {k: (dev[k], other[k]) for k in dev.keys() & other.keys() if dev[k] != other[k]} == {}


@pytest.mark.parametrize("name", [GPU, CPU])
def test_trl_is_a_release_that_trains_without_triton(name: str) -> None:
    versions = {version_of(r) for r in read_requirements(name) if r.name == "trl"}
    # 1.15.0: the loss needs a Triton kernel and fails on a CPU ("'NoneType' object has no
    # attribute 'apply'"). 1.16.0: refused by unsloth (trl<=1.15.0). Both need Python 3.11.
    assert versions
    assert not versions & {"1.15.0", "1.16.0"}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", [GPU, CPU])
def test_locks_stay_inside_the_ranges_of_unsloth(name: str, python: str) -> None:
    lock = lock_on_linux(name, python)
    outside = {
        k: lock[k] for k, allowed in UNSLOTH_RANGES.items() if lock[k] not in SpecifierSet(allowed)
    }
    assert outside == {}


@pytest.mark.parametrize("python", PYTHONS)
def test_gpu_lock_keeps_torch_and_its_matches_together(python: str) -> None:
    lock = lock_on_linux(GPU, python)
    assert {k: lock[k] for k in TORCH_SET} == TORCH_SET
    # Two generations of CUDA libraries in one lock would mean a mixed set.
    assert {k.rpartition("-")[2] for k in lock if k.startswith("nvidia-")} == {"cu12"}


@pytest.mark.parametrize("name", [GPU, CPU_UNSLOTH])
def test_unsloth_and_its_zoo_are_pinned_to_one_release(name: str) -> None:
    lock = lock_on_linux(name, "3.11")
    assert lock["unsloth"] == lock["unsloth-zoo"]


def test_cpu_lock_names_no_cuda_package_and_no_torch_build() -> None:
    names = {canonicalize_name(r.name) for r in read_requirements(CPU)}
    assert {n for n in names if n.startswith(("nvidia-", "cuda-"))} | (names & GPU_ONLY) == set()
    # A local version (+cpu, +cu128) is on no default index, so it would not install elsewhere.
    assert not [r for name in ALL_FILES for r in read_requirements(name) if "+" in version_of(r)]


@pytest.mark.parametrize("name", ALL_FILES)
def test_no_file_names_an_index_or_a_host(name: str) -> None:
    text = (ROOT / name).read_text()
    assert URL_OR_HOST.findall(text) == []
    assert [line for line in text.splitlines() if PIP_OPTION.match(line)] == []


@pytest.mark.parametrize(
    "text", ["see https://x", "files.pythonhosted.org", "Index at mirror.example.com:8080", "a.lan"]
)
def test_host_pattern_finds_urls_and_hosts(text: str) -> None:
    assert URL_OR_HOST.search(text)


def test_exact_pins_of_the_package_metadata_agree_with_the_locks() -> None:
    pins = re.findall(r'"([\w.-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pins, "pyproject.toml has no exact pin any more: drop this test"
    for python in PYTHONS:
        gpu = lock_on_linux(GPU, python)
        assert {(n, v) for n, v in pins if gpu.get(canonicalize_name(n)) != v} == set()


@pytest.mark.parametrize("name", ALL_FILES)
def test_every_pin_has_a_copy_with_the_hashes_of_its_files(name: str) -> None:
    hashed = read_hashes(name)
    assert [str(one) for one, _ in hashed] == [str(one) for one in read_requirements(name)]
    for requirement, hashes in hashed:
        assert hashes, f"{requirement} has no hash, so pip would take none of the others' either"
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes), requirement
        assert len(set(hashes)) == len(hashes), requirement
    assert URL_OR_HOST.findall((HASHED / name).read_text(encoding="utf-8")) == []


def test_equal_pins_have_equal_hashes() -> None:
    for_all: dict[str, set[str]] = {}
    for name in ALL_FILES:
        for requirement, hashes in read_hashes(name):
            pin = f"{canonicalize_name(requirement.name)}{requirement.specifier}"
            known = for_all.setdefault(pin, set(hashes))
            # The lock for CUDA names files for Linux on x86-64 alone.
            assert known <= set(hashes) or set(hashes) <= known, f"{pin}: renew with tests/locks.py"


def test_every_direct_dependency_is_declared_with_a_line_on_why_it_is_there() -> None:
    direct = direct_dependencies()
    assert needed_distributions(ROOT / "tinyagent_fast") <= direct.keys()
    assert {name: why for name, why in direct.items() if len(why.split()) < 2} == {}
    marked = {
        canonicalize_name(requirement.name)
        for name in (GPU, CPU, DEV)
        for requirement, comment in read_lock(name)
        if comment.startswith("direct")
    }
    # Unsloth's torch set is chosen by hand too, but nothing here imports it.
    assert marked - direct.keys() <= GPU_ONLY
    assert direct.keys() - marked <= {"vllm"}


def test_the_page_of_dependencies_fits_the_locks_and_what_is_installed() -> None:
    written = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line[:2] == "| "]
    listed = written[written.index("## All packages") :]
    licences = {row[0]: row[1] for row in rows if f"| {row[0]} | {row[1]} | " in listed}
    assert written == page(licences), "renew it: python tests/locks.py --licences"
    checked = 0
    for name in locked():
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        pinned = {str(r.specifier) for lock in LOCKS for r, _ in read_lock(lock) if r.name == name}
        if f"=={about['Version']}" in pinned:
            assert licences_of([name]) == {name: licences[name]}
            checked += 1
    assert checked > 50
    assert [name for name in locked() if licences[name].startswith("not named")] == []


@pytest.mark.parametrize(
    ("about", "licence"),
    [
        ({"license_expression": "MIT", "license": "Apache"}, "MIT"),
        ({"license": "BSD 3-Clause"}, "BSD 3-Clause"),
        ({"license": "Apache License\nVersion 2.0 ..."}, "Apache License"),
        ({"license": "x" * 100, "classifier": ["License :: OSI Approved :: MIT License"]},
         "MIT License"),
        ({"license": "UNKNOWN", "classifier": ["License :: OSI Approved", "Topic :: X"]},
         "not named in its metadata"),
    ],
)  # fmt: skip
def test_a_licence_is_read_in_its_shortest_form(about: dict[str, Any], licence: str) -> None:
    assert licence_of(about) == licence
