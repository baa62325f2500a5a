"""predictions.jsonl: appended while plans are generated, resumed after a stop, scored at will."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import ConfigError, DataError
from tinyagent_fast.evaluation.scoring import Prediction
from tinyagent_fast.runs import cut_broken_line, followed, read_json, unknown_run, write_json

MAIN_EVALUATIONS = ("eval", "test/after")
"""Folders of a run whose predictions stand for it: `eval` writes later than `train`'s own test."""


@dataclass(frozen=True)
class PredictionFile:
    """A folder's predictions and what they were made with."""

    folder: Path
    name: str = "predictions.jsonl"

    @property
    def path(self) -> Path:
        """The predictions, one JSON object a line."""
        return self.folder / self.name

    @property
    def made_with_path(self) -> Path:
        """What the predictions depend on; others are never mixed with them."""
        return self.folder / "made_with.json"

    def part(self, rank: int) -> PredictionFile:
        """Give the file beside this one that a process appends to, until `gather_parts`."""
        return PredictionFile(self.folder, f"predictions-rank{rank}.jsonl")

    def gather_parts(self) -> None:
        """Move what processes have written into this file, each query once.

        A stop may leave parts behind, and may come between the copy of a part and its removal.
        """
        parts = sorted(self.folder.glob("predictions-rank*.jsonl"))
        if not parts:
            return
        there = {prediction.key for prediction in self.read(repair=True)}
        for path in parts:
            found = PredictionFile(self.folder, path.name).read(repair=True)
            new = {p.key: p for p in found if p.key not in there}
            self.append(new.values())
            there |= new.keys()
            path.unlink()

    def start(self, made_with: Mapping[str, Any]) -> dict[str, Prediction]:
        """Open for appending: keep predictions made with the same things, put others aside.

        Returns:
            The predictions that are kept, by key.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.gather_parts()
        wanted = json.loads(json.dumps(made_with))
        if self.path.exists():
            there = None
            if self.made_with_path.exists():
                with suppress(ConfigError):  # damaged, so what it tells of is put aside
                    there = read_json(self.made_with_path)
            if there == wanted:
                return {p.key: p for p in self.read(repair=True)}
            self.path.replace(self.path.with_suffix(".previous.jsonl"))
        write_json(self.made_with_path, wanted)
        return {}

    def forget(self) -> None:
        """Let `start` take what is there for made with other things, and put it aside."""
        self.made_with_path.unlink(missing_ok=True)

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions at the end."""
        with self.path.open("a", encoding="utf-8") as stream:
            for prediction in predictions:
                stream.write(json.dumps(prediction.to_json(), ensure_ascii=False) + "\n")

    def read(self, *, repair: bool = False) -> list[Prediction]:
        """Read all predictions in file order; `repair` cuts off a last line that is half-written.

        Raises:
            DataError: The file is missing, a line is no prediction, or two are of one query.
        """
        if not self.path.exists() and not repair:
            raise DataError(
                f"{self.path}", "it is not there", "generate it with `tinyagent-fast eval`"
            )
        if repair:
            cut_broken_line(self.path)
        content = self.path.read_bytes() if self.path.exists() else b""
        # Not splitlines: a query may hold a separator that JSON leaves as it is, such as U+2028.
        lines = content.split(b"\n")
        found: dict[str, Prediction] = {}
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            prediction = _parse(self.path, number, line)
            if prediction.key in found:
                why = f"another line has the same key, {prediction.key!r}"
                raise DataError(f"{self.path}, line {number}", why, "remove one of them")
            found[prediction.key] = prediction
        return list(found.values())


def find_predictions(name: str | Path, runs: Path = Path("runs")) -> dict[str, PredictionFile]:
    """Find the predictions of a run, by its name under `runs`, or in a folder or file of some.

    Returns:
        Files by the folder in the run, "" where what was named has or is the file, the first choice
        first.

    Raises:
        ConfigError: There is no such run, folder or file, or it holds no predictions.
    """
    there = [path for path in map(followed, (runs / name, Path(name))) if path.exists()]
    for path in there:
        if path.is_file():
            return {"": PredictionFile(path.parent, path.name)}
        files = {folder: PredictionFile(path / folder) for folder in ("", *MAIN_EVALUATIONS)}
        if found := {folder: file for folder, file in files.items() if file.path.exists()}:
            return found
    if not there:
        raise unknown_run(str(name), runs, "run, folder or file")
    raise ConfigError(
        f"predictions of {name}",
        f"{there[0]} holds no predictions.jsonl, eval/ or test/after/",
        f"make them with `tinyagent-fast eval --run {shlex.quote(str(name))}`, "
        "or name a folder or file with them",
    )


def _parse(path: Path, number: int, line: bytes) -> Prediction:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise DataError(
            f"{path}, line {number}", f"it is no JSON: {error}", "remove the line, or generate anew"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}", "it is no JSON object", "remove the line")
    return Prediction.from_json(row)
