"""export.json: what was exported from what, whole or not at all, so that a stop costs one artefact.

An artefact enters the record when it is complete, with its sha256. Started again with the same
adapter, base and settings, an export keeps the artefacts that still have that hash.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import ModelError
from tinyagent_fast.runs import write_json

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file or folder that an export made."""

    path: str
    """Relative to the export's folder."""
    kind: str
    """`merged`, `gguf` or `importance`."""
    quant: str
    """`f16`, `q4_k_m` and so on; the dtype of a merged folder."""
    sha256: str
    size_bytes: int
    seconds: float
    made_from: str
    """Hash of everything it depends on."""
    details: Mapping[str, Any] = field(default_factory=dict)


class ExportRecord:
    """The record of one export folder, written after every artefact and every gate."""

    def __init__(self, folder: Path) -> None:
        """Read what is there.

        Args:
            folder: The export's folder; export.json may be absent.
        """
        self.folder = folder
        self.path = folder / "export.json"
        self.content: dict[str, Any] = {"artefacts": [], "gates": [], "passed": None}
        if self.path.exists():
            self.content.update(json.loads(self.path.read_text(encoding="utf-8")))

    @property
    def artefacts(self) -> list[Artefact]:
        """All whole artefacts."""
        return [Artefact(**item) for item in self.content["artefacts"]]

    def update(self, **facts: Any) -> None:
        """Set top-level facts and write the file.

        Args:
            facts: Plain values by name.
        """
        self.content.update(facts)
        write_json(self.path, self.content)

    def kept(self, path: str, made_from: str) -> Artefact | None:
        """Find a whole artefact that can be used again.

        Args:
            path: Relative path.
            made_from: Hash of what it must depend on.

        Returns:
            It, or none if it is missing, damaged or made from other things.
        """
        for artefact in self.artefacts:
            if artefact.path != path or artefact.made_from != made_from:
                continue
            there = self.folder / path
            if there.exists() and sha256_of(there) == artefact.sha256:
                return artefact
        return None

    def add(self, artefact: Artefact) -> None:
        """Enter a whole artefact.

        Args:
            artefact: It replaces one of the same path.
        """
        others = [item for item in self.content["artefacts"] if item["path"] != artefact.path]
        self.update(artefacts=[*others, dict(vars(artefact))])

    def make(
        self, path: str, made_from: str, work: Callable[[Path], tuple[str, str, float, Any]]
    ) -> tuple[Artefact, bool]:
        """Keep an artefact or make it under a temporary name.

        Args:
            path: Relative path of the file or folder.
            made_from: Hash of what it depends on.
            work: Makes it at the path given; returns kind, quant, seconds and details.

        Returns:
            The artefact, and whether it was there already.
        """
        there = self.kept(path, made_from)
        if there is not None:
            return there, True
        final = self.folder / path
        temporary = final.with_name(f"{final.name}.part")
        _remove(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        kind, quant, seconds, details = work(temporary)
        _remove(final)
        temporary.replace(final)
        artefact = Artefact(
            path=path,
            kind=kind,
            quant=quant,
            sha256=sha256_of(final),
            size_bytes=size_of(final),
            seconds=seconds,
            made_from=made_from,
            details=details,
        )
        self.add(artefact)
        return artefact, False


def sha256_of(path: Path) -> str:
    """Hash a file, or a folder by the names and contents of its files.

    Args:
        path: File or folder.

    Returns:
        Hex digits.
    """
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Sum the bytes of a file or folder.

    Args:
        path: File or folder.

    Returns:
        Bytes.
    """
    return sum(file.stat().st_size for file in _files(path))


def key_of(parts: Iterable[object]) -> str:
    """Name what something depends on.

    Args:
        parts: Plain values.

    Returns:
        The first 20 hex digits of their sha256.
    """
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:20]


def refuse_full_disk(folder: Path, needed_bytes: Mapping[str, int]) -> str:
    """Compare what artefacts will take with what is free, before any work.

    Args:
        folder: Where they go.
        needed_bytes: Size by artefact; those that are there already count 0.

    Returns:
        One line that says needed and free.

    Raises:
        ModelError: The disk is too small.
    """
    free, needed = shutil.disk_usage(folder).free, sum(needed_bytes.values())
    listed = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needed_bytes.items() if size)
    line = f"disk: {needed / _GIB:.2f} GiB needed ({listed or 'all there'}), {free / _GIB:.1f} free"
    if needed * 1.02 > free:
        raise ModelError(
            f"export into {folder}",
            f"the disk is too small; {line}",
            "free space, name another folder with --out, or leave files out with --quant",
        )
    return line


def refuse_small_memory(needed_bytes: int, what: str) -> str:
    """Compare what a step needs in memory with what is available, before any work.

    Args:
        needed_bytes: Peak of the step.
        what: What needs it.

    Returns:
        One line that says needed and available.

    Raises:
        ModelError: Too little is available.
    """
    import psutil

    available = psutil.virtual_memory().available
    line = f"memory: {needed_bytes / _GIB:.2f} GiB for {what}, {available / _GIB:.1f} available"
    if needed_bytes > available:
        raise ModelError(
            "export",
            f"there is too little memory; {line}",
            "close other programs, or export with --gates off and compare on a larger machine",
        )
    return line


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
