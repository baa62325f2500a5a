"""Breaks commands off, lets them go on, and compares with what came of commands left alone.

    python tests/faults/kills.py --kills 220

They are broken off by SIGKILL, by Ctrl-C and SIGTERM, and by a disk that is full; and a second
process tries to write into the same folder. Every command runs in a fork of one process that has
imported all libraries, so that a kill costs about a second. Half of the signals fall on a random
moment, half on a random change of the file system (a file opened to be written, renamed, removed),
where the windows are too short for a clock. A full disk is a small tmpfs, which needs the right to
mount: without it that part says so and is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from tinyagent_fast.data.generation.catalogue import BUILT_IN_CATALOGUE
from tinyagent_fast.interrupts import NAMES, STOP_SIGNALS, exit_code

os.environ.update(
    CUDA_VISIBLE_DEVICES="",  # only a CPU gives equal runs to compare
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
    HF_HUB_ETAG_TIMEOUT="5",
    HF_HUB_OFFLINE="0",  # the hub is a server of this script
)
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_STOPPED = tuple(map(exit_code, STOP_SIGNALS))
_DEAD = (-signal.SIGKILL, -signal.SIGTERM)
"""Also by a SIGTERM that came while Python starts or ends, when nobody listens to it."""
_PATIENCE_S = 300.0
_FILL = 0
"""Stands for no signal: the disk becomes full."""
_FILLER = "filler"
_FULL = ("disk is full", "No space left", "disk is too small")
TRAIN_FLAGS = [
    "--preset",
    "smoke",
    "--name",
    "one",
    "--data.train",
    "data/training_data.json",
    "--data.test",
    "data/testing_data.json",
    "--data.limit-entries",
    "12",
    "--data.validation-entries",
    "4",
    "--model.max-length-tokens",
    "4096",
    "--train.max-steps",
    "6",
    "--train.accumulation",
    "1",
    "--train.evaluations",
    "3",
    "--train.save-every-steps",
    "2",
    "--lora.rank",
    "4",
    "--lora.dropout",
    "0.1",
    "--eval.sample",
    "3",
    "--eval.max-new-tokens",
    "6",
    "--eval.parity-prompts",
    "0",
]


@dataclass
class Command:
    """A command that is killed again and again until it is let end."""

    name: str
    first: Sequence[str]
    """Its arguments; the program may also be a function, see `work`."""
    again: Callable[[Path], Sequence[str]]
    """Arguments after a kill, by the folder."""
    result: Callable[[Path], Any]
    """What must be equal to that of no kill, as plain values."""
    prepared: Path | None = None
    """Copied into the folder before the first call."""
    work: Callable[[], int] | None = None
    """Stands for the command line."""


@dataclass
class Tally:
    """What came of breaking a command off."""

    kills: int = 0
    stops: int = 0
    """By Ctrl-C and SIGTERM."""
    full_disks: int = 0
    trials: int = 0
    differing: list[str] = field(default_factory=list)
    """What was lost, doubled or different, or was not said."""

    def summary(self) -> str:
        return (
            f"{self.kills} kills, {self.stops} stops, {self.full_disks} full disks in "
            f"{self.trials} runs, {len(self.differing)} differing"
        )

    def cells(self) -> str:
        counts = (self.kills, self.stops, self.full_disks, self.trials, len(self.differing))
        return " | ".join(map(str, counts))


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What a command does when it is left alone."""

    wanted: Any
    took_s: float
    changes: int
    """Of files."""
    disk_bytes: int
    """A disk that is large enough."""


def call(
    folder: Path,
    command: Command,
    arguments: Sequence[str],
    at_change: int = 0,
    number: int = signal.SIGKILL,
) -> int:
    """Start a command in a fork, which gets a signal at a change of the file system; give its id.

    Instead of a signal, `_FILL` lets the disk be full from then on. What the command prints goes
    into a file beside the folder, where there is space.
    """
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        os.environ["TINYAGENT_FAST_CACHE"] = str(folder / "cache")
        log = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        changes = 0

        def watch(event: str, values: Any) -> None:
            nonlocal changes
            if event == "open":
                mode, flags = values[1], values[2]
                changed = bool(flags & (os.O_WRONLY | os.O_RDWR)) or (mode or "r")[0] in "wax"
            else:
                changed = event in _CHANGES
            if changed:
                changes += 1
                if changes == at_change and number == _FILL:
                    fill_disk(folder)
                elif changes == at_change:
                    os.kill(os.getpid(), number)

        sys.addaudithook(watch)
        from tinyagent_fast.cli import main

        code = command.work() if command.work else main(list(arguments))
        log_of(folder).with_suffix(".changes").write_text(str(changes))
    finally:
        sys.stdout.flush()
        os._exit(code)


def fill_disk(folder: Path) -> None:
    """Leave no space on the disk of a folder."""
    space = os.statvfs(folder)
    with (folder / _FILLER).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize))


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def ended(child: int, within_s: float, *, number: int = signal.SIGKILL) -> int | None:
    """Give a child's exit code, -9 if killed; it gets the signal when the time is over."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, number)
    if number == signal.SIGKILL:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return ended(child, _PATIENCE_S)


def new_folder(root: Path, command: Command, data: Path, tmpfs_bytes: int = 0) -> Path:
    """Make a folder with the data, and what the command needs to be there."""
    folder = Path(tempfile.mkdtemp(prefix=f"{command.name.replace(' ', '-')}-", dir=root))
    if tmpfs_bytes:
        mount("-t", "tmpfs", "-o", f"size={tmpfs_bytes}", "none", str(folder))
    shutil.copytree(data, folder / "data")
    if command.prepared is not None:
        shutil.copytree(command.prepared, folder, dirs_exist_ok=True)
    return folder


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def may_mount(root: Path) -> bool:
    """Say whether this process may mount a tmpfs."""
    probe = root / "probe"
    probe.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=4096", "none", str(probe))
    except (OSError, subprocess.CalledProcessError):
        return False
    return subprocess.run(["umount", str(probe)], check=False).returncode == 0


def size_of(folder: Path) -> int:
    """Count the bytes of a folder's files, in whole blocks."""
    return sum(-(-p.lstat().st_size // 4096) * 4096 for p in folder.rglob("*") if not p.is_dir())


def left_alone(root: Path, data: Path, command: Command) -> Whole:
    """Let a command run to its end."""
    folder = new_folder(root, command, data)
    started = time.monotonic()
    code = ended(call(folder, command, command.first), _PATIENCE_S)
    took_s = time.monotonic() - started
    assert code == 0, f"{command.name}: {code}\n{log_of(folder).read_text()[-2000:]}"
    return Whole(
        wanted=command.result(folder),
        took_s=took_s,
        changes=int(log_of(folder).with_suffix(".changes").read_text()),
        disk_bytes=3 * size_of(folder) + (32 << 20),
    )


class Breaker:
    """Breaks one command off in all ways, and counts."""

    def __init__(self, root: Path, data: Path, command: Command, seed: int) -> None:
        self.root, self.data, self.command = root, data, command
        self.rng = random.Random(seed)
        self.tally = Tally()
        self.whole = left_alone(root, data, command)

    def signals(self, kills: int, stops: int) -> None:
        """Send signals until there were so many, several to one run, which then goes on."""
        tally = self.tally
        while tally.kills < kills or tally.stops < stops:
            folder = new_folder(self.root, self.command, self.data)
            tally.trials += 1
            arguments: Sequence[str] = self.command.first
            code: int | None = 0
            for _ in range(self.rng.randint(1, 4)):
                stop = self.rng.random() * (kills + stops) > kills
                number = (
                    self.rng.choice((signal.SIGINT, signal.SIGTERM)) if stop else signal.SIGKILL
                )
                code = self._once(folder, arguments, number)
                tally.kills += code == -signal.SIGKILL
                tally.stops += code in _STOPPED
                if code not in (0, *_DEAD, *_STOPPED):
                    break
                arguments = self.command.again(folder)
            if code in (0, *_DEAD, *_STOPPED):
                code = ended(call(folder, self.command, arguments), _PATIENCE_S)
            self._compare(folder, code)

    def _once(self, folder: Path, arguments: Sequence[str], number: int) -> int | None:
        said = log_of(folder).stat().st_size if log_of(folder).exists() else 0
        if self.rng.random() < 0.5 and self.whole.changes:
            at = self.rng.randint(1, self.whole.changes)
            code = ended(call(folder, self.command, arguments, at, number), _PATIENCE_S)
        else:
            moment = self.rng.uniform(0 if number == signal.SIGKILL else 0.05, self.whole.took_s)
            code = ended(call(folder, self.command, arguments), moment, number=number)
        if code in _STOPPED:
            with log_of(folder).open(errors="replace") as log:
                log.seek(said)
                text = log.read()
            name = NAMES[code - 128]
            if "Traceback" in text or f"by {name}" not in text:
                self._differs(f"{folder}: {name} says {text[-1500:]}")
        return code

    def full_disks(self, times: int) -> None:
        """Let the disk be full from so many different changes of a file on, then give it space."""
        for _ in range(times):
            folder = new_folder(self.root, self.command, self.data, self.whole.disk_bytes)
            try:
                at = self.rng.randint(1, self.whole.changes)
                call_it = call(folder, self.command, self.command.first, at, _FILL)
                code = ended(call_it, _PATIENCE_S)
                text = log_of(folder).read_text(errors="replace")
                self.tally.full_disks += code != 0
                self.tally.trials += 1
                refused = code == 2 and "fix:" in text and any(said in text for said in _FULL)
                if not (refused or code == 0) or "Traceback" in text:
                    self._differs(f"{folder}, full at {at}: {code}\n{text[-2500:]}")
                    continue
                (folder / _FILLER).unlink(missing_ok=True)
                again = self.command.again(folder)
                self._compare(folder, ended(call(folder, self.command, again), _PATIENCE_S))
            finally:
                subprocess.run(["umount", str(folder)], check=False)

    def second_process(self) -> None:
        """Let a second process try to write into the run that a first one writes."""
        folder = new_folder(self.root, self.command, self.data)
        first = call(folder, self.command, self.command.first)
        lock = folder / "runs" / "one" / ".lock"
        end = time.monotonic() + _PATIENCE_S
        while not (lock.exists() and lock.read_text().startswith(f"{first} ")):
            assert time.monotonic() < end, f"{self.command.name} holds nothing"
            time.sleep(0.001)
        os.kill(first, signal.SIGSTOP)  # or it might end before the second one looks
        asked = ["train", "--resume", "one"], ["eval", "--run", "one"]
        for words in asked if self.command.name == "train" else [self.command.first]:
            code = ended(call(folder, self.command, words), _PATIENCE_S)
            text = log_of(folder).read_text(errors="replace")
            if code != 2 or f"process {first} on" not in text.rpartition("error:")[2]:
                self._differs(f"{folder}: {words} beside it: {code}\n{text[-1500:]}")
        os.kill(first, signal.SIGCONT)
        self._compare(folder, ended(first, _PATIENCE_S))

    def _differs(self, text: str) -> None:
        self.tally.differing.append(text)
        print(text, flush=True)

    def _compare(self, folder: Path, code: int | None) -> None:
        found = self.command.result(folder) if code == 0 else f"exit code {code}"
        if found != self.whole.wanted:
            end = log_of(folder).read_text(errors="replace")[-1500:]
            difference = _difference(self.whole.wanted, found)
            self._differs(f"{folder}: {difference}\n{end}")
        elif not folder.is_mount():
            shutil.rmtree(folder)


def _difference(wanted: Any, found: Any) -> str:
    if isinstance(wanted, dict) and isinstance(found, dict):
        names = [n for n in {**wanted, **found} if wanted.get(n) != found.get(n)]
        return "; ".join(f"{n}: {wanted.get(n)!r:.300} -> {found.get(n)!r:.300}" for n in names)
    return f"{wanted!r:.300} -> {found!r:.300}"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def lines_of(path: Path, leave_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read JSON Lines; every line must be whole."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in record.items() if k not in leave_out} for record in records]


def predictions(folder: Path) -> list[tuple[str, str]]:
    """Give key and text of each prediction, in the order of keys, doubled ones twice."""
    rows = lines_of(folder / "predictions.jsonl")
    return sorted((row["key"], row["prediction"]) for row in rows)


def left_over(folder: Path) -> list[str]:
    """Find what a kill left and nobody will ever remove."""
    marks = (".part", ".former", ".unfinished", ".work-")
    return [p.name for p in folder.rglob("*") if any(mark in p.name for mark in marks)]


def trained(folder: Path) -> dict[str, Any]:
    run = folder / "runs" / "one"
    return {
        "adapter": sha(run / "adapter" / "adapter_model.safetensors"),
        "best": json.loads((run / "best" / "best.json").read_text()),
        "history": lines_of(run / "history.jsonl", ("tokens_per_s", "seconds")),
        "samples": {p.name: predictions(p) for p in sorted((run / "samples").iterdir())},
        "before": predictions(run / "test" / "before"),
        "after": predictions(run / "test" / "after"),
        # A stop adds one, and the one before the last may be another.
        "last checkpoint": max(p.name for p in (run / "checkpoints").glob("checkpoint-*")),
        "latest": (folder / "runs" / "latest").resolve().name,
        "left over": left_over(run),
    }


def evaluated(folder: Path) -> dict[str, Any]:
    evaluation = folder / "runs" / "one" / "eval"
    metrics = json.loads((evaluation / "metrics.json").read_text())
    del metrics["generation"]
    return {"predictions": predictions(evaluation), "metrics": metrics}


def exported(folder: Path) -> dict[str, Any]:
    export = folder / "runs" / "one" / "export"
    record = json.loads((export / "export.json").read_text())
    return {
        "files": {a["path"]: a["sha256"] for a in record["artefacts"]},
        "gguf": {p.name: sha(p) for p in (export / "gguf").iterdir() if p.suffix == ".gguf"},
        "left over": left_over(export),
    }


def cached(folder: Path) -> dict[str, Any]:
    """Give what was read through the cache, which a second reading must find."""
    found = {p.name: sha(p) for p in (folder / "retriever").iterdir() if p.suffix == ".json"}
    tables = [p for p in (folder / "cache").iterdir() if p.name != "sources"]
    return {"retriever": found, "tables": sorted(p.name for p in tables)}


def generated(folder: Path) -> dict[str, Any]:
    return {p.name: "" if p.is_dir() else sha(p) for p in (folder / "generated").iterdir()}


def downloaded(folder: Path) -> dict[str, Any]:
    return {p.name: sha(p) for p in (folder / "fetched").glob("*.json")}


class Hub(BaseHTTPRequestHandler):
    """A small hub on the loopback address, slow enough to be interrupted."""

    files: ClassVar[dict[str, bytes]] = {}
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked was killed
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        content = self.files[self.path.rsplit("/", 1)[-1].split("?")[0]]
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        for at in range(start, len(content) if body else start, 1 << 14):
            try:
                self.wfile.write(content[at : at + (1 << 14)])
            except OSError:
                return
            time.sleep(0.01)


def start_hub(data: Path) -> str:
    """Serve the data files; give the address."""
    Hub.files = {p.name: p.read_bytes() + b" " * (1 << 19) for p in data.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def download() -> int:
    """Fetch with a hub cache of this folder's own."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = str(Path("hub").absolute())
    from tinyagent_fast.cli import main

    return main(["data", "download", "--out", "fetched", "--repo", "some/data"])


def go_on_training(folder: Path) -> list[str]:
    if (folder / "runs" / "one" / "config.yaml").exists():
        return ["train", "--resume", "one"]
    return ["train", *TRAIN_FLAGS]


def commands(root: Path, data: Path) -> list[tuple[Command, float]]:
    """Give each command with its share of the kills; one with none is only told to stop."""

    def same(arguments: Sequence[str]) -> Callable[[Path], Sequence[str]]:
        return lambda _: arguments

    train = Command("train", ["train", *TRAIN_FLAGS], go_on_training, trained)
    made = new_folder(root, train, data)
    code = ended(call(made, train, train.first), _PATIENCE_S)
    assert code == 0, log_of(made).read_text()[-3000:]
    evaluate = ["eval", "--run", "one"]
    export = ["export", "--run", "one", "--quant", "f16,q8_0", "--gates", "off"]
    retrieve = ["data", "retrieval", "data/training_data.json", "--out", "retriever"]
    generate = ["data", "generate", "--out", "generated", "--train-entries", "60", "--overwrite"]
    only_told = {
        "data check": ["data", "check", "data/training_data.json"],
        "data roundtrip": ["data", "roundtrip", "data/training_data.json"],
        "score": ["score", "runs/one"],
        "report": ["report", "--run", "one"],
        "compare": ["compare", "one", "two"],
        "agent-eval": ["agent-eval", "--run", "one", "--time-scale", "0", "--limit", "2"],
        "chat": ["chat", "--run", "one", "--once", "Call Ann", "--max-new-tokens", "6"],
        "memory": ["memory", "--preset", "smoke", "--data.train", "data/training_data.json"],
        "tools check": ["tools", "check", "tools.yaml"],
    }
    shutil.copytree(made / "runs" / "one", made / "runs" / "two")
    shutil.copy(BUILT_IN_CATALOGUE, made / "tools.yaml")
    return [
        (train, 0.3),
        (Command("eval", evaluate, same(evaluate), evaluated, made), 0.15),
        (Command("export", export, same(export), exported, made), 0.15),
        (Command("data retrieval", retrieve, same(retrieve), cached), 0.15),
        (Command("data generate", generate, same(generate), generated), 0.1),
        (Command("data download", [], same([]), downloaded, work=download), 0.15),
        *((Command(n, words, same(words), bool, made), 0.0) for n, words in only_told.items()),
    ]


def import_everything() -> None:
    """Import before the first fork what takes seconds; no thread may be started by it."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import tinyagent_fast.export.pipeline
    import tinyagent_fast.training.callbacks
    import tinyagent_fast.training.fit  # noqa: F401

    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--stops", type=int, default=40, help="by Ctrl-C and SIGTERM")
    parser.add_argument("--full-disks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    flags = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    data = root / "data"
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset

    generate_dataset(GenerationSpec(train_entries=24, test_entries=6, seed=3), data)
    os.environ["HF_ENDPOINT"] = start_hub(data)
    import_everything()
    disks = flags.full_disks if may_mount(root) else 0
    if disks < flags.full_disks:
        print("full disks are left out: a tmpfs cannot be mounted here")
    rows: list[tuple[str, Tally, float]] = []
    for command, share in commands(root, data):
        if flags.only not in (None, command.name):
            continue
        started = time.monotonic()
        breaker = Breaker(root, data, command, flags.seed)
        kills, stops = (math.ceil(number * share) for number in (flags.kills, flags.stops))
        breaker.signals(kills, stops or math.ceil(flags.stops / 20))
        breaker.full_disks(math.ceil(disks * share))
        if command.name in ("train", "eval", "export"):
            breaker.second_process()
        rows.append((command.name, breaker.tally, time.monotonic() - started))
        print(f"{command.name}: {breaker.tally.summary()}, {rows[-1][2]:.0f} s", flush=True)
    print("\n| command | kills | Ctrl-C, SIGTERM | full disks | runs | lost or differing | s |")
    print("|---|---|---|---|---|---|---|")
    for name, tally, seconds in rows:
        print(f"| {name} | {tally.cells()} | {seconds:.0f} |")
    differing = [text for _, tally, _ in rows for text in tally.differing]
    kills, seconds = sum(t.kills for _, t, _ in rows), sum(s for *_, s in rows)
    print(f"\n{kills} kills, {len(differing)} differing, {seconds:.0f} s")
    if not differing:
        shutil.rmtree(root)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
