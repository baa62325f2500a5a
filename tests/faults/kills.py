"""Kills commands at random moments, lets them go on, and compares with what came of no kill.

    python tests/faults/kills.py --kills 200

Every command runs in a fork of one process that has imported all libraries, so that a kill costs
about a second. Half of the kills fall on a random moment, half on a random change of the file
system (a file opened to be written, renamed, removed), where the windows are too short for a clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
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

os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
    HF_HUB_ETAG_TIMEOUT="5",
    HF_HUB_OFFLINE="0",  # the hub is a server of this script
)
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
_PATIENCE_S = 300.0
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
    """What came of the kills of a command."""

    kills: int = 0
    trials: int = 0
    differing: list[str] = field(default_factory=list)
    """What was lost, doubled or different."""


def call(folder: Path, command: Command, arguments: Sequence[str], at_change: int = 0) -> int:
    """Start a command in a fork, which kills itself at a change of the file system; give its id."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.chdir(folder)
        os.environ["TINYAGENT_FAST_CACHE"] = str(folder / "cache")
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
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
                if changes == at_change:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        from tinyagent_fast.cli import main

        code = command.work() if command.work else main(list(arguments))
        (folder / "changes").write_text(str(changes))
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int, within_s: float, *, number: int = signal.SIGKILL) -> int | None:
    """Give a child's exit code, -9 if killed; it gets the signal when the time is over."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def new_folder(root: Path, command: Command, data: Path) -> Path:
    """Make a folder with the data, and what the command needs to be there."""
    folder = Path(tempfile.mkdtemp(prefix=f"{command.name.replace(' ', '-')}-", dir=root))
    shutil.copytree(data, folder / "data")
    if command.prepared is not None:
        shutil.copytree(command.prepared, folder, dirs_exist_ok=True)
    return folder


def kill_and_go_on(
    root: Path,
    data: Path,
    command: Command,
    kills: int,
    rng: random.Random,
    say: Callable[[str], None],
) -> Tally:
    """Kill a command so many times over several trials, and compare each trial's end."""
    tally = Tally()
    whole = new_folder(root, command, data)
    started = time.monotonic()
    code = ended(call(whole, command, command.first), _PATIENCE_S)
    took_s = time.monotonic() - started
    assert code == 0, (
        f"{command.name} without a kill: {code}\n{(whole / 'log').read_text()[-2000:]}"
    )
    changes = int((whole / "changes").read_text())
    wanted = command.result(whole)
    say(f"{command.name}: {took_s:.1f} s and {changes} changes of files without a kill")
    while tally.kills < kills:
        folder = new_folder(root, command, data)
        tally.trials += 1
        arguments: Sequence[str] = command.first
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.5:
                child = call(folder, command, arguments, rng.randint(1, changes))
                code = ended(child, _PATIENCE_S)
            else:
                code = ended(call(folder, command, arguments), rng.uniform(0, took_s))
            tally.kills += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                break
            arguments = command.again(folder)
        if code in (0, -signal.SIGKILL):
            code = ended(call(folder, command, arguments), _PATIENCE_S)
        found = command.result(folder) if code == 0 else f"exit code {code}"
        if found == wanted:
            shutil.rmtree(folder)
        else:
            end = (folder / "log").read_text(errors="replace")[-1500:]
            tally.differing.append(f"{folder}: {_difference(wanted, found)}\n{end}")
    return tally


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
        "last checkpoint": sorted(p.name for p in (run / "checkpoints").glob("checkpoint-*")),
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
    return json.loads((folder / "cached.json").read_text())


def fill_cache() -> int:
    """Read examples through the cache, and write down what came out."""
    from tinyagent_fast.data.cache import load_examples

    table = load_examples("data/training_data.json", on_bad_entry="error")
    keys = [[example.key, example.output] for example in table]
    digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    Path("cached.json").write_text(json.dumps({"examples": len(table), "sha256": digest}))
    return 0


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
    """Give each command with its share of the kills."""

    def same(arguments: Sequence[str]) -> Callable[[Path], Sequence[str]]:
        return lambda _: arguments

    train = Command("train", ["train", *TRAIN_FLAGS], go_on_training, trained)
    made = new_folder(root, train, data)
    code = ended(call(made, train, train.first), _PATIENCE_S)
    assert code == 0, (made / "log").read_text()[-3000:]
    evaluate = ["eval", "--run", "one"]
    export = ["export", "--run", "one", "--quant", "f16,q8_0", "--gates", "off"]
    return [
        (train, 0.5),
        (Command("eval", evaluate, same(evaluate), evaluated, made), 0.15),
        (Command("export", export, same(export), exported, made), 0.15),
        (Command("cache", [], same([]), cached, work=fill_cache), 0.1),
        (Command("data download", [], same([]), downloaded, work=download), 0.1),
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
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    flags = parser.parse_args(arguments)
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    data = root / "data"
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset

    generate_dataset(GenerationSpec(train_entries=24, test_entries=6, seed=3), data)
    os.environ["HF_ENDPOINT"] = start_hub(data)
    import_everything()
    rng = random.Random(flags.seed)
    rows: list[tuple[str, Tally]] = []
    for command, share in commands(root, data):
        if flags.only in (None, command.name):
            kills = max(1, round(flags.kills * share))
            rows.append((command.name, kill_and_go_on(root, data, command, kills, rng, print)))
            print(
                f"  {rows[-1][1].kills} kills, {len(rows[-1][1].differing)} differing", flush=True
            )
    print("\n| command | kills | runs let end | lost or differing |\n|---|---|---|---|")
    for name, tally in rows:
        print(f"| {name} | {tally.kills} | {tally.trials} | {len(tally.differing)} |")
    differing = [text for _, tally in rows for text in tally.differing]
    kills = sum(tally.kills for _, tally in rows)
    print(f"\n{kills} kills, {len(differing)} differing, {time.monotonic() - started:.0f} s")
    for text in differing:
        print(text)
    if not differing:
        shutil.rmtree(root)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
