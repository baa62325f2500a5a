"""Resume only what is the same run, from a whole checkpoint.

Config, data and trainable parameters are compared with those of the run. A checkpoint gets its name
when all its files are written, the last of them with their checksums.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinyagent_fast.config import Config, to_mapping
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.runs import (
    Run,
    cut_broken_line,
    read_json,
    why_not_whole,
    write_checksums,
    write_json,
    write_text,
)

_LISTED = 20


def keep_checkpoint(written: Path, target: Path) -> None:
    """Give a checkpoint that was written its name, with the checksums of its files."""
    write_checksums(written)
    shutil.rmtree(target, ignore_errors=True)
    written.replace(target)


def last_checkpoint(run: Run, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """Find the folder of a run's newest whole checkpoint.

    Args:
        run: The run.
        say: Is told of newer ones that are not whole.

    Returns:
        The checkpoint; None if the run was broken off before its first one.

    Raises:
        TrainingError: There are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for checkpoint in checkpoints(run):
        problem = why_not_whole(checkpoint)
        if problem is None:
            for line in problems:
                say(f"{line}: {checkpoint.name} is taken instead")
            return checkpoint
        problems.append(f"{checkpoint.name} is not whole ({problem})")
    if not problems:
        return None
    raise TrainingError(
        f"run {run.path.name} has no whole checkpoint to go on from",
        "; ".join(problems),
        f"put the files back from a copy, or remove {run.checkpoints}: --resume then begins with "
        "the first step",
    )


def checkpoints(run: Run) -> list[Path]:
    """List the folders of a run's checkpoints, the newest first; whether they are whole is open."""
    found = run.checkpoints.glob("checkpoint-*")
    numbered = (path for path in found if path.name.rpartition("-")[2].isdigit())
    return sorted(numbered, key=_step_of, reverse=True)


def training_is_over(run: Run, checkpoint: Path, steps: int) -> bool:
    """Say whether a checkpoint is the last of a run's steps, or one where it stopped early.

    A trainer that goes on from such a checkpoint would make one step too many.
    """
    step = _step_of(checkpoint)
    stops = [r["step"] for r in run.history() if r.get("event") == "early stop"]
    return step >= steps or step in stops


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def forget_after(run: Run, checkpoint: Path | None) -> int:
    """Drop what came behind a checkpoint, which is made once more; count the records of history.

    Args:
        run: The run.
        checkpoint: Where it goes on; None drops everything.
    """
    step = -1 if checkpoint is None else _step_of(checkpoint)
    for other in [path for path in checkpoints(run) if _step_of(path) > step]:
        shutil.rmtree(other)
    cut_broken_line(run.history_path)
    history = run.history()
    kept = [record for record in history if record.get("step", 0) <= step]
    if len(kept) < len(history):
        write_text(run.history_path, "".join(json.dumps(record) + "\n" for record in kept))
    return len(history) - len(kept)


def refuse_changed_config(run: Run, config: Config) -> None:
    """Compare the config now with the one that a run was started with.

    How their files and the folder of runs are reached is no part of them.

    Raises:
        TrainingError: They differ; every difference is listed.
        ConfigError: The run's tool catalogue is gone.
    """

    def comparable(config: Config) -> dict[str, Any]:
        plain = to_mapping(replace(config, runs=run.path.parent))
        for name in ("train", "test", "catalogue"):
            path = plain["data"][name]
            plain["data"][name] = path and str(run.locate(path).resolve())
        return plain

    _refuse_difference(run, "config", comparable(run.config()), comparable(config))
    run.catalogue()


def trainable_parameters(model: Any) -> dict[str, list[int]]:
    """Give name and shape of each trainable parameter."""
    return {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}


def remember_or_compare(
    run: Run, data: Mapping[str, Any], parameters: Mapping[str, Any], *, resumed: bool
) -> None:
    """Write what a later resume must find unchanged, or compare with what was written.

    Raises:
        TrainingError: Data or parameters differ; every difference is listed.
    """
    for name, now in (("data", data), ("parameters", parameters)):
        path = run.path / f"{name}.json"
        plain = json.loads(json.dumps(now))
        if resumed and path.exists():
            before = read_json(path)
            if "catalogue_file" not in before:  # earlier versions kept no hash of it
                plain.pop("catalogue_file", None)
            _refuse_difference(run, name, _without_places(before), _without_places(plain))
        else:
            write_json(path, plain)


def _without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where files lay, which differs from folder to folder."""
    kept = {name: value for name, value in _flat(record).items() if not name.endswith(".path")}
    return kept | ({"base": Path(kept["base"]).name} if "base" in kept else {})


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "seconds":  # how long reading took is no part of the data
            flat[prefix + key] = value
    return flat


def _refuse_difference(
    run: Run, what: str, then: Mapping[str, Any], today: Mapping[str, Any]
) -> None:
    before, now, absent = _flat(then), _flat(today), "(absent)"
    different = [
        f"{key}: {before.get(key, absent)} -> {now.get(key, absent)}"
        for key in sorted({*before, *now})
        if before.get(key, absent) != now.get(key, absent)
    ]
    if different:
        more = f"\n       and {len(different) - _LISTED} more" if len(different) > _LISTED else ""
        raise TrainingError(
            f"run {run.path.name} cannot be resumed: its {what} changed",
            "\n       ".join(different[:_LISTED]) + more,
            "undo the change, or start a new run under another --name",
        )
