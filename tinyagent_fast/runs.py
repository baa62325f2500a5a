"""Run folders: everything a run was made from and gave, under `runs/<name>/`.

config.yaml, environment.json, data.json (hashes and counts), history.jsonl, samples/, checkpoints/,
best/ (the chosen adapter and best.json), adapter/ (a copy to use), training.png, eval/,
retriever.json and .npz, and retriever-encoder/ where an encoder scores the tools.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from tinyagent_fast.config import Config, dump_config, parse_config, typed
from tinyagent_fast.errors import ConfigError, DataError, did_you_mean, plainly, wrong_type
from tinyagent_fast.strict_yaml import read_yaml_text

# fmt: off
_PACKAGES = (
    "tinyagent-fast", "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets",
    "bitsandbytes", "unsloth", "unsloth_zoo", "xformers", "flash-attn", "tokenizers",
    "sentencepiece", "safetensors", "numpy", "pyarrow", "tyro", "gguf", "xllamacpp",
)
# fmt: on
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_CHECKSUMS = "checksums.json"
_LATEST = "latest"
_RESERVED = (_LATEST, "bases")
"""Names under `runs/` that are no runs: the link to the newest one, and base models made here."""


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    path: Path

    def __post_init__(self) -> None:
        """Refuse a name, which says nothing of where the folder lies."""
        if not isinstance(self.path, Path):
            raise wrong_type("run", self.path, "the folder as a Path, or ask find_run()")

    @property
    def named(self) -> str:
        """Name it for a shell in this folder: by its name if it lies in runs/, else by path."""
        here = self.path.resolve().parent == Path("runs").resolve()
        return shlex.quote(self.path.name if here else str(self.path))

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
        """Read the run's resolved config, with its data files where they lie now.

        Raises:
            ConfigError: It is missing or was edited into something unreadable.
        """
        config = self.recorded_config()
        data = config.data
        train, test, catalogue = (
            None if path is None else self.locate(path)
            for path in (data.train, data.test, data.catalogue)
        )
        return replace(config, data=replace(data, train=train, test=test, catalogue=catalogue))

    def recorded_config(self) -> Config:
        """Read the run's resolved config as it was written, with the paths that it had then.

        Raises:
            ConfigError: It is missing or was edited into something unreadable.
        """
        if not self.config_path.exists():
            raise ConfigError(
                f"run {self.path}",
                "it holds no config.yaml, so it is no run of this program",
                "name a folder under runs/, or train one",
            )
        try:
            text = read_yaml_text(self.config_path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                str(self.config_path),
                f"it cannot be read: {plainly(error)}",
                "put the file back as it was written, from another copy, or train again",
            ) from error
        return parse_config(text, source=str(self.config_path), whole=True)

    def locate(self, recorded: str | Path) -> Path:
        """Find a path that the run recorded, also when the program runs in another folder now.

        It may be relative to the folder that holds `runs/`, or to where the run was started.
        """
        if not Path(recorded).exists():
            started_in = str(self._record("environment.json").get("folder", ""))
            for folder in (self.path.resolve().parents[1], Path(started_in)):
                if (folder / recorded).exists():
                    return folder / recorded
        return Path(recorded)

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
        base = self.locate(self._record("data.json").get("base", config.model.base))
        return str(base.resolve() if base.exists() else base)

    def test_file(self) -> Path | None:
        """Find the test file of this run, also a generated one; nothing may lie there any more."""
        return self._data_file("test_file", self.config().data.test)

    def train_file(self) -> Path | None:
        """Find the training file of this run, as `test_file` does."""
        return self._data_file("train_file", self.config().data.train)

    def mixed_in_file(self) -> Path | None:
        """Find the generated file whose rows stand among those of the training file, if any do."""
        return self._data_file("generated", None)

    def catalogue(self) -> Path | None:
        """Find the tool catalogue of this run; None stands for TinyAgent's own tools.

        Raises:
            ConfigError: It is gone.
        """
        path = self.config().data.catalogue
        if path is not None and not path.exists():
            raise ConfigError(
                f"tool catalogue {path}",
                f"run {self.path.name} names it, and there is no such file",
                "put it back, name it with --catalogue where the command has that flag, or by "
                f"`catalogue` under `data` in {self.config_path}",
            )
        return path

    def changed_catalogue(self) -> str | None:
        """Say that the catalogue is not what it was when the run was trained.

        Returns:
            One line; None where it is the same, or where an earlier version kept no hash of it.

        Raises:
            ConfigError: It is gone.
        """
        path = self.catalogue()
        recorded = {} if path is None else self._recorded_file("catalogue_file")
        if path is None or recorded.get("sha256") in (None, sha256_of(path)):
            return None
        return f"tool catalogue {path} has changed since run {self.path.name} was trained with it"

    def _data_file(self, name: str, configured: Path | None) -> Path | None:
        named = self._recorded_file(name).get("path", configured)
        return None if named is None else self.locate(str(named))

    def _recorded_file(self, name: str) -> dict[str, Any]:
        """Take what data.json says of a file; empty where it says nothing, or is damaged there."""
        recorded = self._record("data.json").get(name)
        return recorded if isinstance(recorded, dict) else {}

    def _record(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run; empty if the run ended before it was written."""
        path = self.path / name
        return read_json(path) if path.exists() else {}

    @typed
    def find_adapter(self, adapter: str | Path = "best") -> Path:
        """Find a folder with adapter weights: the run's `best`, or the one that is named.

        Raises:
            ConfigError: There are none.
        """
        # A run that was broken off has its best adapter only.
        folders = [self.adapter, self.best] if adapter == "best" else [Path(adapter)]
        for folder in folders:
            if (folder / ADAPTER_WEIGHTS).exists():
                return folder
        why = f"it holds no {ADAPTER_WEIGHTS}"
        fix = "name a folder with one, such as a checkpoint's"
        if adapter == "best":
            fix = f"finish the run (tinyagent-fast train --resume {self.named}), or name a folder"
        elif not folders[0].is_dir():
            why = "there is no such folder"
        raise ConfigError(f"adapter {folders[0]}", why, fix)

    def unfinished(self) -> str | None:
        """Say how far a training came that has not ended, and whose adapter stands for the run.

        Returns:
            What follows after "the training is"; None where it has ended.
        """
        if (self.adapter / ADAPTER_WEIGHTS).exists():
            return None
        steps: list[dict[str, Any]] = []
        best: object = None
        with suppress(ConfigError):  # what is damaged is named by whoever needs its figures
            steps = [r for r in self.history() if type(r.get("step")) is int]
        with suppress(ConfigError):
            best = read_json(self.best / "best.json", "step")["step"]
        saved = [path.name.rpartition("-")[2] for path in self.checkpoints.glob("checkpoint-*")]
        at = max([0, *(int(s) for s in saved if s.isdecimal()), *(r["step"] for r in steps)])
        of = next((f" of {r['of']:,}" for r in steps if type(r.get("of")) is int), "")
        # What was edited into something else is not printed.
        adapter = f"the adapter is that of step {best if type(best) is int else 'unknown'}"
        if not (self.best / ADAPTER_WEIGHTS).exists():
            adapter = "there is no adapter yet"
        elif best == 0:
            adapter += ", which is the untrained base"
        return f"unfinished: at step {at:,}{of}; {adapter}"

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
        lines = self.history_path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            record = None
            with suppress(ValueError, RecursionError):
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
    refuse_taken_name(config)
    config.runs.mkdir(parents=True, exist_ok=True)
    # A kill leaves a run with its config, or none.
    with unfinished_folder(config.runs, "new") as whole:
        write_text(whole / "config.yaml", dump_config(config))
        write_json(whole / "environment.json", environment())
        run = _claim(config, whole)
    point_latest(run)
    return run


def _claim(config: Config, whole: Path) -> Run:
    """Give a folder that is ready the name of the run, unless another run has it."""
    start = f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    # Two runs may start within one second.
    numbered = (start if number == 1 else f"{start}-{number}" for number in count(1))
    names = numbered if config.name is None else [config.name]
    for name in names:
        try:
            # It replaces an empty folder, and no other.
            whole.rename(config.runs / name)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        else:
            return Run(config.runs / name)
    raise _taken(config)


def refuse_taken_name(config: Config) -> None:
    """Refuse a name that a run cannot have, before hours of work rather than after.

    Raises:
        ConfigError: The folder exists and is not empty, no folder can have the name, or none can
            be made there.
    """
    name = config.name
    reserved = name in _RESERVED or name == "" or (name or "").startswith(".")
    if name is not None and (reserved or name != Path(name).name or not name.isprintable()):
        raise ConfigError(
            f"run name {name!r}",
            "it must be the name of one folder, without control characters, and not "
            + " or ".join(_RESERVED),
            "take another --name",
        )
    path = config.runs / (name or "")
    try:
        if name and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise _taken(config)
        config.runs.mkdir(parents=True, exist_ok=True)
        if name and not path.exists():
            path.mkdir()  # whether the name is too long, only the file system knows
            path.rmdir()
    except (OSError, ValueError) as error:  # the latter: no file system has such characters
        fix = "name another folder with --runs" + (", or a shorter --name" if name else "")
        raise ConfigError(
            f"run folder {path}", f"it cannot be made: {plainly(error)}", fix
        ) from error
    refuse_unwritable(config.runs, "name another folder with --runs")


def _taken(config: Config) -> ConfigError:
    return ConfigError(
        f"run name {config.name!r}",
        f"{config.runs / str(config.name)} exists, and a run is never overwritten",
        f"go on with it (--resume {config.name}), or take another --name",
    )


def refuse_unwritable(folder: Path, fix: str) -> None:
    """Find out before the work that its results cannot be written into a folder; it is made.

    Raises:
        ConfigError: The folder cannot be made or written.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("can this be written?", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"folder {folder}", f"it cannot be written: {plainly(error)}", fix
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


@contextmanager
def holding(folder: Path, work: str, fix: str) -> Iterator[None]:
    """Let no other process write into a folder meanwhile; a killed one holds nothing.

    The other is told the `work` of this one, and with `fix` what it can do instead of waiting.

    Raises:
        ConfigError: Another process holds it, or it cannot be written.
    """
    refuse_unwritable(folder, fix)
    here = f"{os.getpid()} {socket.gethostname()} {work}"
    with (folder / ".lock").open("a+", encoding="utf-8") as stream:
        if not _lock(stream):
            stream.seek(0)
            number, _, rest = stream.read().partition(" ")
            host, _, what = rest.partition(" ")
            raise ConfigError(
                f"folder {folder} is in use",
                f"process {number or '?'} on {host or '?'} writes into it ({what or 'starting'})",
                f"wait until it has ended, end it (kill {number}), or {fix}",
            )
        stream.truncate(0)
        stream.write(here)
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)


def _lock(stream: TextIO) -> bool:
    """Take the lock of an open file; where there are no locks, by the process that it names."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, and some network file systems
        stream.seek(0)
        number, _, rest = stream.read().partition(" ")
        there = number.isdigit() and rest.partition(" ")[0] == socket.gethostname()
        return not (there and int(number) != os.getpid() and _is_alive(int(number)))
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@typed
def find_run(name: str | Path, runs: Path | str = Path("runs")) -> Run:
    """Find a run by its name under `runs`, by its path, or as `latest`.

    Raises:
        ConfigError: There is none; the message lists those that are there.
    """
    runs = Path(runs)
    with suppress(OSError, ValueError):  # no file can have that name
        for path in map(followed, (runs / name, Path(name))):
            if (path / "config.yaml").exists():
                return Run(path.resolve())
    raise unknown_run(str(name), runs)


def unknown_run(name: str, runs: Path, what: str = "run") -> ConfigError:
    """Say that `what` of that name is not there, and which runs are."""
    names = {path.parent.name for path in runs.glob("*/config.yaml")} - {_LATEST}
    there = sorted(name for name in names if not name.startswith("."))
    near = did_you_mean(name, there)
    return ConfigError(
        f"{what} {name!r}",
        f"there is no such run under {runs}/{near}; there: {', '.join(there) or 'none'}",
        "train one first (make train)" + ", or name one of these" * bool(there),
    )


def point_latest(run: Run) -> None:
    """Let `runs/latest` point to a run, in one step.

    It is a link, or where the file system has none (some cloud drives and memory cards) a file with
    the run's name.

    Raises:
        ConfigError: Something else has that name.
    """
    link = run.path.parent / _LATEST
    temporary = run.path.parent / f".{_LATEST}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.symlink_to(run.path.name)
    except (OSError, NotImplementedError):
        temporary.write_text(run.path.name, encoding="utf-8")
    try:
        temporary.replace(link)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(
            str(link), f"it cannot name the newest run: {plainly(error)}", f"move {link} away"
        ) from error


def followed(path: Path) -> Path:
    """Give the run that `runs/latest` names where it is no link; another path stays as it is."""
    if path.name == _LATEST and path.is_file():
        return path.parent / path.read_text(encoding="utf-8", errors="replace").strip()
    return path


def cut_broken_line(path: Path) -> None:
    """Cut off a last line that a kill or a full disk has left half-written."""
    if path.exists():
        content = path.read_bytes()
        # A stop may also fall into the middle of a character, so bytes are cut, not text.
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as stream:
                stream.truncate(whole)


def read_text(path: Path) -> str:
    """Read a text that a user wrote; the byte-order mark of some editors is no part of it.

    Raises:
        OSError: The file cannot be read.
        UnicodeDecodeError: It is no UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def strict_json(text: str) -> Any:
    """Read JSON that a user wrote, in which a name that stands twice is a mistake.

    Raises:
        ValueError: It is no JSON, or an object has a name twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{name!r} stands twice in one object")
        return found

    return json.loads(text, object_pairs_hook=once)


def read_list(what: str, path: Path, fix: str) -> list[Any]:
    """Read a JSON list that a user wrote, or objects one in a line.

    Args:
        what: What the file is and its name, for errors.
        path: The file.
        fix: What to do where it is something else.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    try:
        text = read_text(path).strip()
        lines = text.split("\n") if text.startswith("{") else None
        found = strict_json(text) if lines is None else list(map(strict_json, lines))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(what, f"it cannot be read as JSON: {plainly(error)}", fix) from error
    if not isinstance(found, list):
        raise DataError(what, "the top level is no list", fix)
    return found


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the place of a file beside its own, to which it moves only when it is whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or as it was before."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """Read what `write_json` wrote into a run or an export.

    Raises:
        ConfigError: It is damaged, lacks a key that is needed, or was edited into something else.
    """
    try:
        value = json.loads(read_text(path))
        lacks = [key for key in needed if key not in value]
        if not isinstance(value, dict) or lacks:
            raise ValueError(f"it lacks {', '.join(lacks)}" if lacks else "it is no JSON object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            str(path),
            f"it cannot be read: {plainly(error)}",
            "put the file back as it was written, from another copy, or make it anew",
        ) from error
    return value


def sha256_of(path: Path) -> str:
    """Hash a file, or a folder by the names and contents of its files; in blocks, of any size."""
    digest = hashlib.sha256()
    for file in files_of(path):
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """List all files of a folder in their order, or the file itself."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def write_checksums(folder: Path) -> None:
    """Write the sha256 of all files that are in a folder into one more, for `why_not_whole`."""
    sums = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files_of(folder)}
    write_json(folder / _CHECKSUMS, sums)


def why_not_whole(folder: Path) -> str | None:
    """Compare a folder's files with its checksums; None if all are as they were written."""
    try:
        sums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, sha256 in sums.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if sha256_of(folder / name) != sha256:
                return f"{name} is damaged"
    except (OSError, ValueError, AttributeError) as error:
        return f"{_CHECKSUMS}, which is written last, cannot be read: {plainly(error)}"
    return None


def key_of(parts: Iterable[object]) -> str:
    """Name plain values that something depends on by 20 hex digits of their sha256."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:20]


@contextmanager
def unfinished_folder(parent: Path, work: str) -> Iterator[Path]:
    """Make a hidden folder for what is not ready yet; what is ready is moved out of it.

    It is removed in the end, and so is what killed processes of this machine have left of the same
    work, which is one word; several processes can be at the same work at once.
    """
    here = f".{work}-{socket.gethostname()}-"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.iterdir():
        process = left.name.removeprefix(here).partition("-")[0]
        if left.name.startswith(here) and process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{here}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the other's name and place only when it is whole."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    replace_folder(temporary, folder)


def replace_folder(whole: Path, folder: Path) -> None:
    """Put a folder in another one's place, so that a kill hardly ever leaves none there."""
    former = folder.with_name(f"{folder.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.replace(former)
    whole.replace(folder)
    shutil.rmtree(former, ignore_errors=True)


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
