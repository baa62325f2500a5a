"""Python and the installed packages, compared with what the project is tested with.

The tested versions are the pins of the requirements file beside the sources, or else the ranges in
the metadata of the installed project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tinyagent_fast.doctor.findings import Finding, failure, ok, warning
from tinyagent_fast.doctor.machine import Machine

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PROJECT = "tinyagent-fast"
_ROOT = Path(__file__).resolve().parents[2]
_PYTHONS = ((3, 10), (3, 12))
_OTHER_CHECKS = frozenset({"gguf", "xllamacpp"})
"""Exports need them and training does not; the check of llama.cpp looks at them."""
_GPU_ONLY = frozenset({"torchao", "torchvision", "triton", "unsloth", "unsloth-zoo", "xformers"})
_UNSLOTH_NAMES = ("torch", "transformers", "trl", "datasets", "peft", "unsloth-zoo")
"""What Unsloth patches, so that its own ranges matter."""


@dataclass(frozen=True)
class KnownVersions:
    """Which versions of which packages are tested, and where that is written."""

    source: str
    requirements: Sequence[Requirement]


def install_command(machine: Machine) -> str:
    """Give the command that installs what the project is tested with.

    Args:
        machine: With or without a GPU.

    Returns:
        The command.
    """
    path = requirements_file(gpu=machine.gpu is not None)
    if path is None:
        extra = "gpu" if machine.gpu else "train"
        return f'python -m pip install "{_PROJECT}[{extra}]"'
    return f"python -m pip install -r {_from_here(path)}"


def requirements_file(*, gpu: bool) -> Path | None:
    """Find the requirements file beside the sources.

    Args:
        gpu: Whether it is the one for a machine with a GPU.

    Returns:
        Its path; none for a project that was installed without its sources.
    """
    path = _ROOT / ("requirements.txt" if gpu else "requirements-cpu.txt")
    return path if path.exists() and (_ROOT / "pyproject.toml").exists() else None


def check_python(machine: Machine) -> Finding:
    """Compare Python with the versions that the project is tested with.

    Args:
        machine: Its Python.

    Returns:
        A failure for an older one and a warning for a newer one.
    """
    version = ".".join(map(str, machine.python))
    first, last = _PYTHONS
    fix = f"make a new environment: python{last[0]}.{last[1]} -m venv .venv (make: PYTHON=...)"
    if machine.python[:2] < first:
        return failure("python", f"{version} is older than {first[0]}.{first[1]}", fix)
    if machine.python[:2] > last:
        return warning("python", f"{version}; tested up to {last[0]}.{last[1]}", fix)
    return ok("python", version)


def check_packages(machine: Machine, *, unsloth: bool) -> list[Finding]:
    """Compare installed packages with what the project is tested with.

    Args:
        machine: With or without a GPU.
        unsloth: Whether the run will use it.

    Returns:
        One finding, and one more for each combination that is known not to work.
    """
    installed = installed_versions()
    if "packaging" not in installed:
        # Every package that trains needs it, so none of them is there.
        return [failure("packages", "those for training are missing", install_command(machine))]
    try:
        tested = tested_versions(gpu=machine.gpu is not None)
    except metadata.PackageNotFoundError:
        text = "nothing says which versions are tested: the project is not installed"
        return [warning("packages", text, "python -m pip install --no-deps -e .")]
    found = compare_versions(tested, installed, install_command(machine))
    if unsloth and "unsloth" in installed:
        required = [_requirement(line) for line in metadata.requires("unsloth") or ()]
        found += unsloth_ranges(required, installed, install_command(machine))
    return [*found, *known_not_to_work(installed, install_command(machine))]


def tested_versions(*, gpu: bool) -> KnownVersions:
    """Read which versions are tested.

    Args:
        gpu: Whether for a machine with a GPU.

    Returns:
        The lines that hold for this Python.

    Raises:
        PackageNotFoundError: There is neither a requirements file nor metadata.
    """
    path = requirements_file(gpu=gpu)
    if path is not None:
        lines = path.read_text(encoding="utf-8").splitlines()
        # The other lines follow from these.
        chosen = [line.partition("#")[0] for line in lines if line.endswith("# direct")]
        requirements = [_requirement(line) for line in chosen]
        return KnownVersions(path.name, [r for r in requirements if _holds(r)])
    named = {}
    for extra in ("train", "gpu") if gpu else ("train",):
        # The ranges of the extra for a GPU are within those for training.
        requirements = [_requirement(line) for line in metadata.requires(_PROJECT) or ()]
        named.update({canonical(r.name): r for r in requirements if _holds(r, extra)})
    named.pop(_PROJECT, None)
    return KnownVersions("the project's metadata", list(named.values()))


def _holds(requirement: Requirement, extra: str = "") -> bool:
    """Say whether a line is meant for this Python and platform."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def compare_versions(
    tested: KnownVersions, installed: Mapping[str, str], install: str
) -> list[Finding]:
    """Compare what is installed with what is tested.

    Args:
        tested: Which versions are.
        installed: Version by canonical name.
        install: The command that installs those.

    Returns:
        One finding: missing packages fail, other versions are a warning.
    """
    names = [r for r in tested.requirements if canonical(r.name) not in _OTHER_CHECKS]
    missing = [
        r.name
        for r in names
        if canonical(r.name) not in installed and canonical(r.name) not in _GPU_ONLY
    ]
    if missing:
        return [failure("packages", f"missing: {', '.join(sorted(missing))}", install)]
    there = [r for r in names if canonical(r.name) in installed]
    other = [
        f"{r.name} {installed[canonical(r.name)]} (tested: {str(r.specifier).removeprefix('==')})"
        for r in there
        if not r.specifier.contains(installed[canonical(r.name)], prereleases=True)
    ]
    if other:
        return [warning("packages", f"not as tested: {', '.join(other)}", install)]
    return [ok("packages", f"{len(there)} as tested ({tested.source})")]


def unsloth_ranges(
    required: Sequence[Requirement], installed: Mapping[str, str], install: str
) -> list[Finding]:
    """Compare what Unsloth patches with the versions that it was made for.

    Args:
        required: Unsloth's own requirements.
        installed: Version by canonical name.
        install: The command that installs versions which fit.

    Returns:
        A warning, or nothing.
    """
    outside = [
        f"{r.name} {installed[canonical(r.name)]} (it asks for {r.specifier})"
        for r in required
        if _holds(r)
        and canonical(r.name) in _UNSLOTH_NAMES
        and canonical(r.name) in installed
        and not r.specifier.contains(installed[canonical(r.name)], prereleases=True)
    ]
    if not outside:
        return []
    text = f"Unsloth {installed['unsloth']} was not made for {', '.join(outside)}"
    return [warning("unsloth", text, install)]


def known_not_to_work(installed: Mapping[str, str], install: str) -> list[Finding]:
    """Name combinations that install without a complaint and then fail.

    Args:
        installed: Version by canonical name.
        install: The command that installs versions which fit.

    Returns:
        A failure for each.

    Source: run on a machine without triton; its requirements file has the message.
    """
    if installed.get("trl", "").startswith("1.15.") and "triton" not in installed:
        text = f"trl {installed['trl']} cannot train without triton"
        return [failure("trl", text, f"{install} (or: python -m pip install trl==1.14.2)")]
    return []


def installed_versions() -> dict[str, str]:
    """List what is installed.

    Returns:
        Version by canonical name; the first on the path counts, as it does for imports.
    """
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # the remains of a broken installation have none
            versions.setdefault(canonical(name), distribution.version)
    return versions


def canonical(name: str) -> str:
    """Write a package's name as PEP 503 does.

    Args:
        name: Any spelling.

    Returns:
        The one spelling.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _requirement(line: str) -> Requirement:
    from packaging.requirements import Requirement

    return Requirement(line)


def _from_here(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
