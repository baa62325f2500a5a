"""Renew what is written about packages: the locks with hashes, and docs/dependencies.md.

    python tests/locks.py             # both; asks the package registry; needs uv and pip 24.1
    python tests/locks.py --licences  # docs/dependencies.md alone

The pins themselves are chosen as the heads of the lock files say. A test holds that the page fits
the locks, pyproject.toml and the packages that are installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
LOCKS = {
    "requirements.txt": "CUDA",
    "requirements-cpu.txt": "CPU",
    "requirements-cpu-unsloth.txt": "CPU, Unsloth",
    "requirements-dev.txt": "tests",
}
"""The lock files, and how the page calls them."""
HASHED = ROOT / "locks"
"""Copies of the lock files with the hash of every file that may be installed."""
PAGE = ROOT / "docs" / "dependencies.md"
_PYTHONS = ("10", "11", "12")
_SHORT_LICENCE_CHARS = 60
_UNNAMED = "not named in its metadata"
_IN_LICENCE_FILES = {
    "cut-cross-entropy": "Apple's own (use, copies and changes allowed, no patents)",
    "hf-transfer": "Apache-2.0",
    "torchao": "BSD-3-Clause",
}
"""Of packages whose metadata name none: read in the licence files of the locked versions."""


def read_lock(name: str) -> list[tuple[Requirement, str]]:
    """Read a lock file: each requirement and its comment."""
    lines = (line.partition("#") for line in (ROOT / name).read_text("utf-8").splitlines())
    return [(Requirement(text), comment.strip()) for text, _, comment in lines if text.strip()]


def read_hashes(name: str) -> list[tuple[Requirement, list[str]]]:
    """Read the copy of a lock file that has hashes: each requirement with those of its files."""
    found = []
    for line in (HASHED / name).read_text("utf-8").replace("\\\n", " ").splitlines():
        text, *hashes = re.split(r"\s--hash=sha256:", line)
        if text.strip() and not text.startswith("#"):
            found.append((Requirement(text), [one.strip() for one in hashes]))
    return found


def direct_dependencies() -> dict[str, str]:
    """List direct dependencies with why they are there, as the lines that name them say it.

    Those of the package are in pyproject.toml, those of its tests in requirements-dev.txt.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = text[text.index("\ndependencies = [") : text.index("\n[project.scripts]")]
    found = {}
    for line in text.splitlines():
        named = re.match(r'    "([\w.-]+)[^"]*",(?:  # (.*))?$', line)
        if named and named[1] != "tinyagent-fast":
            name = canonicalize_name(named[1])
            found[name] = named[2] or found.get(name, "")
    for requirement, comment in read_lock("requirements-dev.txt"):
        kind, _, why = comment.partition(": ")
        if kind == "direct":
            found.setdefault(canonicalize_name(requirement.name), why)
    return dict(sorted(found.items()))


def licence_of(about: Message | Mapping[str, Any]) -> str:
    """Read a package's licence from its metadata, in the shortest form that they have."""

    def texts(name: str) -> list[str]:
        if isinstance(about, Message):
            return [str(value) for value in about.get_all(name) or []]
        value = about.get(name.lower().replace("-", "_")) or []
        return [value] if isinstance(value, str) else list(value)

    for text in texts("License-Expression"):
        return text.strip()
    named = [one.rpartition(" :: ")[2] for one in texts("Classifier") if one.startswith("License")]
    named = sorted({one for one in named if one != "OSI Approved"})
    whole = "".join(texts("License")).strip()
    says = bool(whole) and whole.upper() not in ("UNKNOWN", "DUAL LICENSE")
    if says and len(whole) <= _SHORT_LICENCE_CHARS and "\n" not in whole:
        return whole
    if named:
        return " and ".join(named)
    return whole.splitlines()[0].strip() if says else _UNNAMED


def locked() -> dict[str, set[str]]:
    """List all packages of all locks, each with the locks that have it."""
    found: dict[str, set[str]] = {}
    for name, short in LOCKS.items():
        for requirement, _ in read_lock(name):
            found.setdefault(canonicalize_name(requirement.name), set()).add(short)
    return dict(sorted(found.items()))


def page(licences: Mapping[str, str]) -> str:
    """Write docs/dependencies.md."""
    lines = [
        "# What the project depends on",
        "",
        "Written by `python tests/locks.py` from pyproject.toml, the lock files and the packages'",
        "own metadata; a test holds it against all three.",
        "",
        "The folder `locks/` has the same pins with the hash of every file that may be installed,",
        "so that pip refuses any other: `make setup REQUIREMENTS=locks/requirements.txt`. Without",
        "CUDA that is `locks/requirements-cpu.txt`; on Linux install torch's CPU build before it,",
        "since what the default one needs of CUDA is in no lock for the CPU.",
        "",
        "## Direct dependencies",
        "",
        "| package | why it is there | licence |",
        "|---|---|---|",
    ]
    direct, there = direct_dependencies(), locked()
    # vLLM is in no lock: it has an environment of its own.
    lines += [f"| {n} | {why} | {licences.get(n, 'see there')} |" for n, why in direct.items()]
    lines += ["", "## All packages", "", "| package | licence | lock |", "|---|---|---|"]
    lines += [f"| {n} | {licences[n]} | {'; '.join(sorted(there[n]))} |" for n in there]
    return "\n".join(lines) + "\n"


def _files(package: Mapping[str, Any], *, linux_only: bool) -> list[str]:
    """Choose the hashes of a package's files that a machine of ours may install."""
    hashes = []
    for wheel in package.get("wheels", []):
        *_, tags = parse_wheel_filename(wheel["url"].rpartition("/")[2])
        if any(_fits(tag, linux_only=linux_only) for tag in tags):
            hashes.append(wheel["hashes"]["sha256"])
    if not hashes or package["name"] == "multiprocess":
        hashes.append(package["sdist"]["hashes"]["sha256"])
    return sorted(hashes)


def _fits(tag: Any, *, linux_only: bool) -> bool:
    of_python = re.fullmatch(r"(?:cp|py)3(\d*)", tag.interpreter)
    if tag.abi in ("abi3", "none"):
        python = bool(of_python) and int(of_python[1] or 0) <= int(_PYTHONS[-1])
    else:
        python = bool(of_python) and of_python[1] in _PYTHONS and tag.abi == tag.interpreter
    linux = re.fullmatch(r"(manylinux\w*|linux)_(x86_64|aarch64)", tag.platform)
    apple = re.fullmatch(r"macosx_\w+_(arm64|universal2)", tag.platform)
    if linux_only:
        return python and (tag.platform == "any" or bool(linux and linux[2] == "x86_64"))
    return python and bool(tag.platform == "any" or linux or apple)


def renew_hashes(name: str) -> None:
    """Write the copy of a lock file that has the hashes of all its files."""
    import tomllib

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pylock.toml"
        flags = ["--universal", "--python-version", "3.10", "--no-deps", "--format", "pylock.toml"]
        subprocess.run(["uv", "pip", "compile", *flags, "-q", "-o", out, ROOT / name], check=True)
        packages = tomllib.loads(out.read_text(encoding="utf-8"))["packages"]
    linux_only = name == "requirements.txt"
    hashes = {(p["name"], p["version"]): _files(p, linux_only=linux_only) for p in packages}
    lines = [f"# {name} with the hash of every file that may be installed; by tests/locks.py."]
    lines += ["#", f"#   pip install -r locks/{name}", ""]
    for line in (ROOT / name).read_text("utf-8").splitlines():
        pin = line.partition("#")[0].strip()
        if pin:
            requirement = Requirement(pin)
            (specifier,) = requirement.specifier
            found = hashes[canonicalize_name(requirement.name), specifier.version]
            lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{one}" for one in found)]))
    (HASHED / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def licences_of(names: Iterable[str]) -> dict[str, str]:
    """Read licences where packages are installed, and ask the registry for those of the others."""
    found, elsewhere = {}, []
    for name in names:
        try:
            found[name] = licence_of(metadata.metadata(name))
        except metadata.PackageNotFoundError:
            elsewhere.append(name)
    pins = {
        canonicalize_name(requirement.name): str(requirement.specifier)
        for requirement, _ in read_lock("requirements.txt")
    }
    for_linux = ["--python-version", "3.11", "--only-binary=:all:"]
    for libc in ("2_28", "2_27", "2_17", "2_12"):
        for_linux += ["--platform", f"manylinux_{libc}_x86_64"]
    for_linux += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-"]
    wanted = [f"{name}{pins[name]}" for name in elsewhere]
    if wanted:
        into = ["--no-deps", "--ignore-installed", "--target", tempfile.gettempdir()]
        answer = subprocess.run(
            [*pip, *into, *for_linux, *wanted], check=True, stdout=-1, text=True
        )
        for item in json.loads(answer.stdout)["install"]:
            found[canonicalize_name(item["metadata"]["name"])] = licence_of(item["metadata"])
    return {
        name: _IN_LICENCE_FILES.get(name, licence) if licence == _UNNAMED else licence
        for name, licence in found.items()
    }


if __name__ == "__main__":
    if "--licences" not in sys.argv:
        for lock in LOCKS:
            renew_hashes(lock)
    PAGE.write_text(page(licences_of(locked())), encoding="utf-8")
