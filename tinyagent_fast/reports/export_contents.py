"""export.json as typed values for a report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinyagent_fast.evaluation.statistics import Proportion


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """One exported file; `success` is that on validation prompts, if a gate measured it."""

    path: str
    kind: str
    quant: str
    size_bytes: int
    bits_per_weight: float | None
    success: Proportion | None

    @property
    def stem(self) -> str:
        """Name without folder and ending, as evaluations of files are named."""
        return Path(self.path).stem


@dataclass(frozen=True, kw_only=True)
class GateOutcome:
    """One check of the export."""

    name: str
    passed: bool
    rule: str


@dataclass(frozen=True, kw_only=True)
class ExportContents:
    """What an export made; `passed` is None where the gates were switched off."""

    files: tuple[ExportedFile, ...]
    gates: tuple[GateOutcome, ...]
    passed: bool | None

    def verdict(self) -> str:
        """Say in one sentence how the gates came out.

        Returns:
            For the report.
        """
        failed = [gate.name for gate in self.gates if not gate.passed]
        if failed:
            return f"{len(failed)} of {len(self.gates)} gates failed: {', '.join(failed)}."
        if self.passed is None or not self.gates:
            return "Nothing was proved: no gate was run to its end."
        return f"All {len(self.gates)} gates passed."


def read_export(run: Path, notes: list[str]) -> ExportContents | None:
    """Read a run's export.json.

    Args:
        run: The run's folder.
        notes: Gets a line if the file is missing or cannot be read.

    Returns:
        What was exported, or none.
    """
    path = run / "export" / "export.json"
    if not path.exists():
        notes.append(f"nothing was exported; `tinyagent-fast export --run {run.name}` does it")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        successes = content.get("success_on_validation", {})
        return ExportContents(
            files=tuple(_files(content["artefacts"], successes)),
            gates=tuple(
                GateOutcome(name=gate["name"], passed=gate["passed"] is True, rule=gate["rule"])
                for gate in content["gates"]
            ),
            passed=content["passed"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        notes.append(f"export/export.json cannot be read and is left out: {error!r}")
        return None


def _files(
    artefacts: Iterable[Mapping[str, object]], successes: Mapping[str, Mapping[str, int]]
) -> Iterable[ExportedFile]:
    for artefact in artefacts:
        kind, quant = str(artefact["kind"]), str(artefact["quant"])
        if kind == "importance":
            continue
        details, size = artefact.get("details"), artefact["size_bytes"]
        bits = details.get("bits_per_weight") if isinstance(details, dict) else None
        success = successes.get(quant) if kind == "gguf" else None
        if not isinstance(size, int):
            raise TypeError(f"size_bytes is {size!r}")
        yield ExportedFile(
            path=str(artefact["path"]),
            kind=kind,
            quant=quant,
            size_bytes=size,
            bits_per_weight=float(bits) if isinstance(bits, (int, float)) else None,
            success=Proportion(success["count"], success["total"]) if success else None,
        )
