"""Run `gpu_check`'s measurements in processes of their own, and kill those that take too long."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_check_plan import Group, Measurement, Scale
from gpu_check_results import Results

LOG_LINES = 30
_NOTABLE = ("unsloth", "warn", "error", "compil", "fallback", "falling back", "patched")
_NOTABLE_LINES = 40
_POLL_S = 0.05


@dataclass
class Runner:
    """Starts workers, listens to them, and kills those that take too long."""

    results: Results
    work: Path
    scale: Scale
    deadline: float
    """As `time.time()` counts."""
    tiny: bool = False
    cap_gib: float = 0.0
    tokenizer: Path | None = None
    say: Callable[[str], None] = print
    worker: Sequence[str] = (
        sys.executable,
        str(Path(__file__).with_name("gpu_check_worker.py")),
    )
    start_limit_s: float = 120.0
    """How long a worker may take before it says that it is ready."""
    start_least_s: float = 12.0
    """With less time left no worker is started."""
    _process: Any = field(default=None, init=False)
    _jobs: int = field(default=0, init=False)

    def run(self, groups: Sequence[Group]) -> None:
        """Measure all groups; whatever happens in one, the next ones follow.

        Args:
            groups: In order of importance.
        """
        for group in groups:
            self._run_group(group)

    def stop(self) -> None:
        """Kill the worker and all its children."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.say("a worker could not be killed; it is left behind")

    def _run_group(self, group: Group) -> None:
        remaining = list(group.measurements)
        while remaining:
            remaining = self._without_hopeless(remaining)
            if not remaining:
                return
            left = self.deadline - time.time()
            needed = remaining[0].least_s + (0 if self.tiny else self.start_least_s)
            if left < needed:
                reason = f"{max(0.0, left):.0f} s were left, it needs {needed:.0f} s or more"
                self._give_up(remaining, reason)
                return
            remaining = self._run_worker(group, remaining)

    def _without_hopeless(self, remaining: list[Measurement]) -> list[Measurement]:
        """Leave out what needs a failed one, and shapes that hold one that lacked memory."""
        kept = []
        there = self.results.measurements
        for item in remaining:
            failed = [n for n in item.needs if n in there and not self.results.ok(n)]
            smaller = [name for name, result in there.items() if _holds(item, result)]
            if failed:
                self._give_up([item], f"it needs {', '.join(failed)}")
            elif smaller:
                self._give_up([item], f"memory did not suffice for {smaller[0]}")
            else:
                kept.append(item)
        return kept

    def _run_worker(self, group: Group, remaining: list[Measurement]) -> list[Measurement]:
        """Run one worker until it ends or is killed.

        Returns:
            What is still to be measured.
        """
        self._jobs += 1
        job_file = self.work / f"job-{self._jobs}.json"
        watch = _Watch(
            self.work / f"events-{self._jobs}.jsonl", self.work / f"log-{self._jobs}.txt"
        )
        job = {
            "work": str(self.work),
            "events": str(watch.events),
            "scale": asdict(self.scale),
            "tiny": self.tiny,
            "cap_gib": self.cap_gib,
            "tokenizer": str(self.tokenizer) if self.tokenizer else None,
            "deadline": self.deadline,
            "measurements": [item.to_json() for item in remaining],
        }
        job_file.write_text(json.dumps(job), encoding="utf-8")
        careful = group.after is not None and not self.results.ok(group.after)
        environment = {**group.environment, **(group.without if careful else {})}
        watch.environment = environment
        with watch.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.worker, str(job_file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        by_name = {item.name: item for item in remaining}
        killed = self._listen(watch, by_name)
        code = self._process.poll() if self._process is not None else None
        self.stop()
        for event in watch.new_events():
            self._take(event, watch, by_name)
        self.results.head.setdefault("logs", {})[f"{self._jobs} {group.name}"] = watch.notable()
        return self._after(watch, by_name, remaining, killed, code)

    def _listen(self, watch: _Watch, by_name: Mapping[str, Measurement]) -> str | None:
        """Take events until the worker ends; say why if it has to be killed."""
        assert self._process is not None, "the caller has started it"
        since = time.time()
        while True:
            ended = self._process.poll() is not None
            for event in watch.new_events():
                self._take(event, watch, by_name)
                since = time.time()
            if ended:
                return None
            now = time.time()
            if now > self.deadline:
                return "the time for the whole check was over"
            limit = by_name[watch.current].limit_s if watch.current else self.start_limit_s
            # Partial figures do not prolong a measurement, they only tell that it lives.
            started = watch.started if watch.current else since
            if now - started > limit:
                return f"it took longer than {limit:.0f} s"
            time.sleep(_POLL_S)

    def _take(
        self, event: Mapping[str, Any], watch: _Watch, by_name: Mapping[str, Measurement]
    ) -> None:
        kind = event["event"]
        if kind == "ready":
            watch.ready = True
        elif kind == "start":
            watch.current, watch.started = event["name"], time.time()
            self.results.record(
                by_name[watch.current], status="running", environment=watch.environment
            )
        elif kind == "partial" and watch.current:
            self.results.record(by_name[watch.current], figures=event["figures"])
        elif kind == "result":
            fields = {k: v for k, v in event.items() if k not in ("event", "name", "model_broken")}
            self.results.record(by_name[event["name"]], **fields)
            watch.done.append(event["name"])
            watch.model_broken = bool(event.get("model_broken"))
            watch.current = None
            self.say(f"{event['name']}: {event['status']} {event.get('reason') or ''}".rstrip())

    def _after(
        self,
        watch: _Watch,
        by_name: Mapping[str, Measurement],
        remaining: list[Measurement],
        killed: str | None,
        code: int | None,
    ) -> list[Measurement]:
        """Record what a worker's end means for the measurement it was at."""
        rest = [item for item in remaining if item.name not in watch.done]
        if watch.model_broken:
            model = self.results.measurements[watch.done[-1]]["model"]
            same = [item for item in rest if item.model and asdict(item.model) == model]
            self._give_up(same, "its model cannot be loaded")
            return [item for item in rest if item not in same]
        if watch.current is None and watch.done:
            return rest
        why = killed or f"the process ended with {code}"
        status = "timeout" if killed else "crashed"
        if watch.current is not None:
            failed = by_name[watch.current]
        elif not rest:
            return []
        else:
            failed, why = rest[0], f"before it began: {why}"
        self.results.record(failed, status=status, reason=why, log=watch.tail())
        self.say(f"{failed.name}: {status}, {why}")
        rest = [item for item in rest if item is not failed]
        if not watch.ready:
            self._give_up(rest, "the process of this group does not start")
            return []
        return rest

    def _give_up(self, items: Sequence[Measurement], reason: str) -> None:
        for item in items:
            self.results.record(item, status="not run", reason=reason)
            self.say(f"{item.name}: not run, {reason}")


@dataclass
class _Watch:
    """What is known of one worker."""

    events: Path
    log: Path
    ready: bool = False
    current: str | None = None
    started: float = 0.0
    done: list[str] = field(default_factory=list)
    model_broken: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    _read: int = 0

    def new_events(self) -> list[dict[str, Any]]:
        """Read the whole lines that came since the last call."""
        if not self.events.exists():
            return []
        content = self.events.read_bytes()[self._read :]
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.decode().splitlines()]

    def tail(self) -> list[str]:
        """Give the end of what the worker printed."""
        return self._lines()[-LOG_LINES:]

    def notable(self) -> list[str]:
        """Give what libraries said about how they run, each line once."""
        lines = dict.fromkeys(line.strip()[:300] for line in self._lines())
        told = [line for line in lines if any(word in line.lower() for word in _NOTABLE)]
        return told[:_NOTABLE_LINES]

    def _lines(self) -> list[str]:
        if not self.log.exists():
            return []
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()


def _holds(item: Measurement, result: Mapping[str, Any]) -> bool:
    """Tell whether a result is a lack of memory at a shape that an item's shape holds."""
    if result["status"] != "oom" or "batch" not in item.arguments:
        return False
    smaller = result["arguments"]
    model = asdict(item.model) if item.model else None
    return bool(
        result["kind"] == item.kind
        and result["model"] == model
        and smaller["batch"] <= item.arguments["batch"]
        and smaller["tokens"] <= item.arguments["tokens"]
    )
