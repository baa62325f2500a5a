"""export.json: what was exported from what, whole or not at all, so that a stop costs one artefact.

An artefact enters the record when it is complete, with its sha256. Started again with the same
adapter, base and settings, an export keeps the artefacts that still have that hash.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinyagent_fast.config import typed
from tinyagent_fast.runs import files_of, read_json, sha256_of, write_json

Kind = Literal["merged", "gguf", "importance"]
Work = Callable[[Path], tuple[str, Mapping[str, Any]]]
"""Makes an artefact at a path; gives its `quant` and details."""


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """One file or folder that an export made."""

    path: str
    """Relative to the export's folder."""
    kind: Kind
    quant: str
    """`f16`, `q4_k_m` and so on; the dtypes of a merged folder."""
    sha256: str
    size_bytes: int
    seconds: float
    made_from: str
    """Hash of everything it depends on."""
    details: Mapping[str, Any] = field(default_factory=dict)


class ExportRecord:
    """The record of one export folder, written after every artefact and every gate."""

    def __init__(self, folder: Path) -> None:
        """Read what is in the export's folder; export.json may be absent."""
        self.folder = folder
        self.path = folder / "export.json"
        self.content: dict[str, Any] = {"artefacts": [], "gates": [], "passed": None}
        if self.path.exists():
            self.content.update(read_json(self.path))

    @property
    def artefacts(self) -> list[Artefact]:
        """All whole artefacts."""
        return [typed(Artefact)(**item) for item in self.content["artefacts"]]

    def update(self, **facts: Any) -> None:
        """Set top-level facts, which are plain values, and write the file."""
        self.content.update(facts)
        write_json(self.path, self.content)

    def make(self, path: str, kind: Kind, made_from: str, work: Work) -> tuple[Artefact, bool]:
        """Keep a file or folder, or make it under a temporary name.

        Returns:
            The artefact, and whether it was there, whole and made from the same things.
        """
        final = self.folder / path
        others = [artefact for artefact in self.artefacts if artefact.path != path]
        for artefact in self.artefacts:
            fits = artefact.path == path and artefact.made_from == made_from
            if fits and final.exists() and sha256_of(final) == artefact.sha256:
                return artefact, True
        temporary = final.with_name(f"{final.name}.part")
        _remove(temporary)
        final.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        quant, details = work(temporary)
        seconds = round(time.perf_counter() - started, 2)
        _remove(final)
        temporary.replace(final)
        artefact = Artefact(
            path=path,
            kind=kind,
            quant=quant,
            sha256=sha256_of(final),
            size_bytes=sum(file.stat().st_size for file in files_of(final)),
            seconds=seconds,
            made_from=made_from,
            details=details,
        )
        self.update(artefacts=[dict(vars(one)) for one in (*others, artefact)])
        return artefact, False


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
