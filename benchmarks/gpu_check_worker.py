"""The process in which `gpu_check` measures: one job file in, one line of JSON an event out.

A measurement that fails ends the process, because CUDA's state is then unknown; the runner starts
a fresh one for the rest. What a measurement found before it was killed is in its `partial` lines.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRACEBACK_LINES = 30

Part = Callable[["Bench", Mapping[str, Any]], dict[str, Any]]


class ModelNotLoaded(Exception):
    """The model of a group cannot be loaded, so nothing that needs it can be measured."""


class Bench:
    """What measurements share: sizes, folders, the loaded model, a way to tell figures early."""

    def __init__(self, job: Mapping[str, Any], tell: Callable[[Mapping[str, Any]], None]) -> None:
        """Keep the job.

        Args:
            job: As written by the runner.
            tell: Writes one event.
        """
        from gpu_check_plan import Scale

        self.job = job
        self.work = Path(job["work"])
        self.scale = Scale(**{k: _tuples(v) for k, v in job["scale"].items()})
        self.cuda = False
        self._tell = tell
        self._spec: Mapping[str, Any] | None = None
        self._loaded: Any = None
        self.config: Any = None

    @property
    def base(self) -> Path:
        """Folder of the base model."""
        return self.work / "base"

    @property
    def tiny(self) -> bool:
        """Whether this run only shows that everything runs."""
        return bool(self.job["tiny"])

    def partial(self, figures: Mapping[str, Any]) -> None:
        """Tell what has been measured so far; it stays if the measurement is killed.

        Args:
            figures: Plain values.
        """
        self._tell({"event": "partial", "figures": figures})

    def limit_memory(self) -> None:
        """Look for CUDA and hold the allocator to the cap."""
        import torch

        self.cuda = torch.cuda.is_available()
        cap = self.job["cap_gib"]
        if self.cuda and cap:
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))

    def rows(self) -> Any:
        """Open the encoded rows.

        Returns:
            A `datasets.Dataset`.
        """
        from datasets import Dataset

        return Dataset.from_file(str(self.work / "rows" / "rows.arrow"))

    def loaded(self, spec: Mapping[str, Any]) -> Any:
        """Load a model as the project does, or give the one at hand.

        Args:
            spec: A `ModelSpec` as plain values.

        Returns:
            A `LoadedModel`.

        Raises:
            ModelNotLoaded: Loading failed.
        """
        if self._spec == spec:
            return self._loaded
        self._loaded, self._spec = None, None
        release(self.cuda)
        try:
            self.config = config_of(spec, self.tiny)
            if self.config.model.backend == "unsloth":
                import unsloth  # noqa: F401  # patches transformers, so it must come first
            from tinyagent_fast.models.loading import load_for_training

            self._loaded = load_for_training(self.config, str(self.base))
        except Exception as error:
            raise ModelNotLoaded(f"{type(error).__name__}: {error}") from error
        self._spec = spec
        return self._loaded


def config_of(spec: Mapping[str, Any], tiny: bool) -> Any:
    """Turn a model spec into a config of the project.

    Args:
        spec: A `ModelSpec` as plain values.
        tiny: Take plain transformers whatever the spec says.

    Returns:
        The preset's config with what the spec changes.
    """
    from dataclasses import replace

    from tinyagent_fast.presets import preset_config

    config = preset_config(spec["preset"])
    changes = {
        "backend": "transformers" if tiny else spec["backend"],
        "max_length_tokens": spec["max_length_tokens"],
        "weights": spec["weights"] or config.model.weights,
        "gradient_checkpointing": spec["checkpointing"] or config.model.gradient_checkpointing,
    }
    return replace(config, model=replace(config.model, **changes))


def release(cuda: bool) -> None:
    """Give back memory that nothing refers to any more, and start the peak counters anew.

    Args:
        cuda: Whether there is a device; without one there is nothing to do.
    """
    if not cuda:
        return
    import gc

    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, is a lack of GPU memory.

    Args:
        error: The error.

    Returns:
        Whether it is.
    """
    while error is not None:
        text = str(error)
        if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text:
            return True
        if "ALLOC_FAILED" in text or "cudaErrorMemoryAllocation" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def run_job(
    measurements: list[Mapping[str, Any]],
    parts: Mapping[str, Part],
    bench: Bench,
    tell: Callable[[Mapping[str, Any]], None],
    deadline: float,
) -> None:
    """Measure one after the other until one fails or time is up.

    Args:
        measurements: Plain values of each `Measurement`.
        parts: The functions by kind.
        bench: What they share.
        tell: Writes one event.
        deadline: When the whole check must end, as `time.time()` counts.
    """
    for item in measurements:
        left = deadline - time.time()
        if left < item["least_s"]:
            reason = f"{left:.0f} s were left, it needs {item['least_s']:.0f} s or more"
            tell({"event": "result", "name": item["name"], "status": "not run", "reason": reason})
            continue
        tell({"event": "start", "name": item["name"]})
        result = measure(item, parts, bench)
        tell({"event": "result", "name": item["name"], **result})
        if result["status"] != "ok":
            return


def measure(item: Mapping[str, Any], parts: Mapping[str, Part], bench: Bench) -> dict[str, Any]:
    """Run one measurement and turn whatever happens into a result.

    Args:
        item: Plain values of a `Measurement`.
        parts: The functions by kind.
        bench: What they share.

    Returns:
        Status, seconds and figures, or the reason and the end of the traceback.
    """
    started = time.perf_counter()
    try:
        figures = parts[item["kind"]](bench, item)
    except Exception as error:
        status = "oom" if out_of_memory(error) else "failed"
        return {
            "status": status,
            "reason": " ".join(f"{type(error).__name__}: {error}".split())[:500],
            "log": traceback.format_exc().splitlines()[-TRACEBACK_LINES:],
            "model_broken": isinstance(error, ModelNotLoaded),
            "seconds": round(time.perf_counter() - started, 3),
        }
    seconds = round(time.perf_counter() - started, 3)
    return {"status": "ok", "figures": figures, "seconds": seconds}


def all_parts() -> dict[str, Part]:
    """Import the measuring functions.

    Returns:
        The functions by kind.
    """
    import gpu_check_decoding
    import gpu_check_parts
    import gpu_check_sharing
    import gpu_check_training

    modules = (gpu_check_parts, gpu_check_training, gpu_check_decoding, gpu_check_sharing)
    return {kind: part for module in modules for kind, part in module.PARTS.items()}


def main(job_file: str) -> None:
    """Do the job and leave at once; libraries' threads are not waited for.

    Args:
        job_file: Path of the job, a JSON file.
    """
    faulthandler.enable()
    for folder in (ROOT, ROOT / "benchmarks"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    events = Path(job["events"]).open("a", encoding="utf-8")  # noqa: SIM115  # open to the end

    def tell(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event, default=str) + "\n")
        events.flush()

    _die_with_the_runner()
    bench = Bench(job, tell)
    parts = all_parts()
    bench.limit_memory()
    tell({"event": "ready"})
    run_job(job["measurements"], parts, bench, tell, job["deadline"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _die_with_the_runner() -> None:
    """Ask Linux to kill this process when the runner is killed, so that it never stays behind."""
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1])
