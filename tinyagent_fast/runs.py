"""Run folders: everything a run was made from and gave, under `runs/<name>/`.

config.yaml, environment.json, data.json (hashes and counts), history.jsonl, samples/, checkpoints/,
best/ (the chosen adapter and best.json), adapter/ (a copy to use), training.png, eval/,
retriever.json and .npz.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

from tinyagent_fast.config import Config, dump_config, parse_config
from tinyagent_fast.errors import ConfigError

# fmt: off
_PACKAGES = (
    "tinyagent-fast", "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets",
    "bitsandbytes", "unsloth", "unsloth_zoo", "xformers", "flash-attn", "tokenizers",
    "sentencepiece", "safetensors", "numpy", "pyarrow", "tyro", "gguf", "xllamacpp",
)
# fmt: on
_RESERVED = ("latest", "bases")
"""Names under `runs/` that are no runs: the link to the newest one, and base models made here."""


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    path: Path

    @property
    def named(self) -> str:
        """Name it for a command in this folder: by its name if it lies in runs/, else by path."""
        here = self.path.resolve().parent == Path("runs").resolve()
        return self.path.name if here else str(self.path)

    @property
    def config_path(self) -> Path:
        """The resolved config as YAML."""
        return self.path / "config.yaml"

    @property
    def history_path(self) -> Path:
        """One JSON object a line for every logged step and evaluation."""
        return self.path / "history.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Resumable checkpoints of the trainer."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The best adapter so far; rotation never touches it."""
        return self.path / "best"

    @property
    def adapter(self) -> Path:
        """The adapter that evaluation and export use."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        """Predictions and metrics on the test file."""
        return self.path / "eval"

    def config(self) -> Config:
        """Read the run's resolved config.

        Raises:
            ConfigError: It is missing or was edited into something unreadable.
        """
        if not self.config_path.exists():
            raise ConfigError(
                f"run {self.path}",
                "it holds no config.yaml, so it is no run of this program",
                "name a folder under runs/, or train one",
            )
        text = self.config_path.read_text(encoding="utf-8")
        config = parse_config(text, source=str(self.config_path))
        data = config.data
        train, test, catalogue = (
            None if path is None else self.locate(path)
            for path in (data.train, data.test, data.catalogue)
        )
        return replace(config, data=replace(data, train=train, test=test, catalogue=catalogue))

    def locate(self, recorded: str | Path) -> Path:
        """Find a path that the run recorded, also when the program runs in another folder now.

        It may be relative to the folder that holds `runs/`, or to where the run was started.
        """
        if not Path(recorded).exists():
            for folder in (self.path.resolve().parents[1], self._started_in()):
                if (folder / recorded).exists():
                    return folder / recorded
        return Path(recorded)

    def _started_in(self) -> Path:
        record = self.path / "environment.json"
        known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        return Path(known.get("folder", ""))

    def located(self, config: Config) -> Config:
        """Name the run's data files, base and folder where they lie now.

        Files that were generated and a base that was built for the run are named too, if they are
        still there; else the config says how to make them again.
        """
        data, train, test = config.data, self.train_file(), self.test_file()
        if train is not None and train.exists() and (test is None or test.exists()):
            data = replace(data, train=train, test=test)
        base = self.base_of(config)
        model = replace(config.model, base=base) if Path(base).exists() else config.model
        return replace(config, data=data, model=model, runs=self.path.resolve().parent)

    def base_of(self, config: Config) -> str:
        """Find the base model: its whole path, or its hub name; what `nano` became, too."""
        base = self.locate(self._data_record().get("base", config.model.base))
        return str(base.resolve() if base.exists() else base)

    def test_file(self) -> Path | None:
        """Find the test file of this run, also a generated one; nothing may lie there any more."""
        return self._data_file("test_file", self.config().data.test)

    def train_file(self) -> Path | None:
        """Find the training file of this run, as `test_file` does."""
        return self._data_file("train_file", self.config().data.train)

    def _data_file(self, name: str, configured: Path | None) -> Path | None:
        recorded = self._data_record().get(name)
        named = recorded["path"] if recorded else configured
        return None if named is None else self.locate(named)

    def _data_record(self) -> dict[str, Any]:
        """Read data.json; empty if the run ended before it was written."""
        path = self.path / "data.json"
        record: dict[str, Any] = {}
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
        return record

    def find_adapter(self, wanted: str = "best") -> Path:
        """Find a folder with adapter weights: the run's `best`, or the one that is named.

        Raises:
            ConfigError: There are none.
        """
        # A run that was broken off has its best adapter only.
        folders = [self.adapter, self.best] if wanted == "best" else [Path(wanted)]
        for folder in folders:
            if (folder / "adapter_model.safetensors").exists():
                return folder
        raise ConfigError(
            f"adapter {folders[0]}",
            "it holds no adapter_model.safetensors",
            f"finish the run (make train ARGS='--resume {self.named}'), or name a folder",
        )

    def append_history(self, record: Mapping[str, Any]) -> None:
        """Add one line of plain values to history.jsonl."""
        with self.history_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Read the records of history.jsonl in order; an empty list where the file is absent.

        Raises:
            ConfigError: A line is no JSON object, such as one that was cut off by a full disk.
        """
        if not self.history_path.exists():
            return []
        records: list[dict[str, Any]] = []
        lines = self.history_path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = None
            with suppress(ValueError):
                record = json.loads(line)
            if not isinstance(record, dict):
                raise ConfigError(
                    f"{self.history_path}, line {number}",
                    f"it is no JSON object: {line[:80]!r}",
                    "delete that line",
                )
            records.append(record)
        return records


def create_run(config: Config) -> Run:
    """Make a new run's folder, with config.yaml and environment.json, and point `latest` to it.

    Raises:
        ConfigError: A run of that name exists, or no folder can have the name.
    """
    run = _claim(config)
    write_text(run.config_path, dump_config(config))
    write_json(run.path / "environment.json", environment())
    point_latest(run)
    return run


def _claim(config: Config) -> Run:
    """Make the folder of a run, so that no other run can get it."""
    name = config.name
    if name is None:
        start = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        # Two runs may start within one second.
        names = (start if number == 1 else f"{start}-{number}" for number in count(1))
        return Run(next(config.runs / name for name in names if _make_folder(config.runs / name)))
    if name in _RESERVED or not name or name.startswith(".") or name != Path(name).name:
        raise ConfigError(
            f"run name {name!r}",
            f"it must be the name of one folder, and not {' or '.join(_RESERVED)}",
            "take another --name",
        )
    refuse_taken_name(config)
    _make_folder(config.runs / name)
    return Run(config.runs / name)


def refuse_taken_name(config: Config) -> None:
    """Refuse a name that a run has already, before hours of work rather than after.

    Raises:
        ConfigError: The folder exists and is not empty.
    """
    path = config.runs / (config.name or "")
    if config.name and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"run name {config.name!r}",
            f"{path} exists, and a run is never overwritten",
            f"go on with it (--resume {config.name}), or take another --name",
        )


def _make_folder(path: Path) -> bool:
    """Make a folder and say whether it is new."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(
            f"run folder {path}", f"it cannot be made: {error}", "name another folder with --runs"
        ) from error
    return True


def find_run(name: str, runs: Path | str = Path("runs")) -> Run:
    """Find a run by its name under `runs`, by its path, or as `latest`.

    Raises:
        ConfigError: There is none; the message lists those that are there.
    """
    runs = Path(runs)
    for path in (runs / name, Path(name)):
        if (path / "config.yaml").exists():
            return Run(path.resolve())
    there = sorted(p.parent.name for p in runs.glob("*/config.yaml") if p.parent.name != "latest")
    raise ConfigError(
        f"run {name!r}",
        f"there is no such run under {runs}/; there: {', '.join(there) or 'none'}",
        "train one first (make train), or name one of these",
    )


def point_latest(run: Run) -> None:
    """Let `runs/latest` point to a run, in one step."""
    link = run.path.parent / "latest"
    temporary = run.path.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.path.name)
    temporary.replace(link)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or as it was before."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """Record what a result depends on besides config and data; a GPU only if torch is loaded."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)  # None: not installed
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "gpu": _gpu(),
        "git": _git(),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _gpu() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def _git() -> dict[str, Any] | None:
    def ask(*arguments: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "clean": not ask("status", "--porcelain")}
    except (OSError, subprocess.SubprocessError):
        return None
