"""Measure this project against the usual ways on a CPU: `make bench`, `--quick` in a minute.

All ways of a part run in turns in one process, and only ratios within a round are made, so a busy
machine changes seconds more than ratios. Weights are random: the time of a step does not depend on
them. A GPU is measured by `make gpu-check`. The result is one JSON file, a picture and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

for _folder in (Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

if TYPE_CHECKING:
    from bench_sizes import Sizes

FORMAT = 1
PARTS = ("training", "evaluation", "scaling", "data")
REAL_DATA = "TINYAGENT_FAST_REAL_DATA"
_RESULT = Path(__file__).resolve().parent / "results" / "bench.json"
_QUICK_RESULT = Path(tempfile.gettempdir()) / "tinyagent-fast-bench" / "quick.json"
_PATH_FLAGS = ("--real", "--out")

Tell = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print.

    Args:
        arguments: Without the program's name; none takes those of the process.

    Returns:
        0.
    """
    flags = _flags(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    _set_threads(flags.threads)
    from bench_plot import plot
    from bench_table import table

    from tinyagent_fast.models.libraries import quieten
    from tinyagent_fast.runs import write_json

    quieten()

    sizes = _sizes(flags)
    parts = _earlier(flags.out, flags.quick)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    for name in flags.parts:
        with _progress(name) as tell:
            parts[name] = _measured(name, flags, sizes, given, tell)
        # After every part, so that what was measured stays whatever comes.
        parts = {key: parts[key] for key in PARTS if key in parts}
        write_json(flags.out, {"format": FORMAT, "parts": parts})
    picture = plot(parts, flags.out.with_suffix(".png"))
    print(table(parts))
    print(f"\nresults: {flags.out}" + (f", {picture}" if picture else ""))
    return 0


def _flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, under a minute")
    parser.add_argument("--out", type=Path, help="the JSON; other parts that it holds are kept")
    real = os.environ.get(REAL_DATA)
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(real) if real else None,
        help=f"folder of real data (or ${REAL_DATA}); without it rows are generated",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    for name in ("rounds", "layers", "hidden", "batch", "eval-batch", "new-tokens"):
        parser.add_argument(f"--{name}", type=int, help="another size than the default")
    parser.add_argument("--single-prompts", type=int, help="prompts that go one at a time")
    flags = parser.parse_args(arguments)
    flags.parts = [name for name in flags.parts.split(",") if name]
    if unknown := [name for name in flags.parts if name not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: parts are {', '.join(PARTS)}")
    if not flags.parts:
        parser.error(f"--parts is empty: parts are {', '.join(PARTS)}")
    for name, value in vars(flags).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if flags.hidden is not None and flags.hidden % 64:
        parser.error(f"--hidden {flags.hidden}: it must be a multiple of 64, the size of a head")
    if flags.real is not None:
        _check_real(parser, flags.real)
    flags.out = flags.out or (_QUICK_RESULT if flags.quick else _RESULT)
    return flags


def _check_real(parser: argparse.ArgumentParser, folder: Path) -> None:
    names = ("training_data.json", "testing_data.json", "llama_tokenizer.model")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        parser.error(f"--real {folder}: it holds no {', '.join(missing)}; leave it out to generate")


def _set_threads(threads: int) -> None:
    """Limit every library before it starts threads of its own."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import logging as python_logging

    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(threads)
    disable_progress_bars()
    logging.set_verbosity_error()
    # TRL warns of flattened batches without FlashAttention; their gradients are compared here.
    python_logging.getLogger("trl").setLevel(python_logging.ERROR)


def _sizes(flags: argparse.Namespace) -> Sizes:
    """Resolve the sizes: the defaults, or those of `--quick`, and what flags change."""
    from bench_sizes import FULL, QUICK, Shape

    sizes = QUICK if flags.quick else FULL
    before = sizes.shape
    shape = Shape.of(flags.hidden or before.hidden, flags.layers or before.layers)
    vocab = FULL.shape.vocab if flags.real else before.vocab
    changes = {
        "batch": flags.batch,
        "eval_batch": flags.eval_batch,
        "new_tokens": flags.new_tokens,
        "singles": flags.single_prompts,
        "rounds": flags.rounds,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(sizes, shape=replace(shape, vocab=vocab), **given)


def _earlier(out: Path, quick: bool) -> dict[str, Any]:
    """Read the parts of an earlier run that is no different in kind."""
    if not out.exists():
        return {}
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        print(f"{out} is no result of this program: it is replaced", file=sys.stderr)
        return {}
    parts = content["parts"]
    kept = {k: v for k, v in parts.items() if k in PARTS and v["run"]["quick"] == quick}
    for name in parts.keys() - kept.keys():
        print(f"{out}: the earlier part {name} is left out (--quick or not)", file=sys.stderr)
    return kept


@contextmanager
def _progress(part: str) -> Iterator[Tell]:
    """Show which way runs, and how many have run."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:.0f} timings"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(part)

        def tell(way: str) -> None:
            progress.update(task, description=f"{part}: {way}", advance=1)
            if not console.is_terminal:
                print(f"{time.strftime('%H:%M:%S')} {part}: {way}", file=sys.stderr, flush=True)

        yield tell


def _measured(
    name: str, flags: argparse.Namespace, sizes: Sizes, given: Sequence[str], tell: Tell
) -> dict[str, Any]:
    """Measure one part, and record under which conditions."""
    from tinyagent_fast.runs import environment

    load, started = os.getloadavg()[0], time.time()
    figures = _PARTS[name](flags, sizes, tell)
    machine = environment()
    machine.pop("command")
    run = {
        "command": _command(given),
        "quick": flags.quick,
        "rows": "real" if flags.real and name != "scaling" else "generated",
        "rounds": sizes.rounds,
        "threads": flags.threads,
        "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.time() - started, 1),
        "environment": {**machine, "cpu": _cpu()},
    }
    return {"run": run, **figures}


def _command(given: Sequence[str]) -> str:
    """Write the command so that it can be repeated; folders of this machine are nobody's."""
    words = ["python", "benchmarks/bench.py"]
    for before, word in zip(["", *given], given, strict=False):
        flag, equals, _ = word.partition("=")
        if before in _PATH_FLAGS:
            words.append(before.removeprefix("--").upper())
        elif flag in _PATH_FLAGS and equals:
            words.append(f"{flag}={flag.removeprefix('--').upper()}")
        else:
            words.append(word)
    return shlex.join(words)


def _cpu() -> dict[str, str | None]:
    """Name the processor and the instructions that torch uses."""
    import torch

    found = None
    about = Path("/proc/cpuinfo")
    if about.exists():
        lines = about.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        found = names[0] if names else None
    return {"name": found, "instructions": str(torch.backends.cpu.get_cpu_capability())}


def _training(flags: argparse.Namespace, sizes: Sizes, tell: Tell) -> dict[str, Any]:
    from bench_inputs import LORA_RANK, random_llama, tokenizer_for, training_rows, with_adapter
    from bench_training import measure_training

    tokenizer = tokenizer_for(flags.real, sizes.shape.vocab)
    rows = training_rows(flags.real, tokenizer, sizes)
    longest = max(len(row["input_ids"]) for row in rows)
    model = with_adapter(random_llama(sizes.shape, longest))
    figures = measure_training(model, tokenizer.hf, rows, sizes.rounds, tell)
    return {"model": {**vars(sizes.shape), "lora_rank": LORA_RANK, "weights": "fp32"}, **figures}


def _evaluation(flags: argparse.Namespace, sizes: Sizes, tell: Tell) -> dict[str, Any]:
    from bench_evaluation import measure_evaluation, never_stopping
    from bench_inputs import prompts_by_kind, random_llama, tokenizer_for

    tokenizer = tokenizer_for(flags.real, sizes.shape.vocab)
    prompts = prompts_by_kind(flags.real, tokenizer, sizes)
    longest = max(len(ids) for kind in prompts.values() for ids in kind.ids)
    model = random_llama(sizes.shape, longest + sizes.new_tokens).eval()
    found = {
        kind: measure_evaluation(
            model,
            never_stopping(tokenizer),
            chosen,
            sizes,
            partial(_tell_kind, tell, kind),
        )
        for kind, chosen in prompts.items()
    }
    return {"model": {**vars(sizes.shape), "weights": "fp32"}, "prompts": found}


def _tell_kind(tell: Tell, kind: str, way: str) -> None:
    tell(f"{kind} prompts, {way}")


def _scaling(flags: argparse.Namespace, sizes: Sizes, tell: Tell) -> dict[str, Any]:
    from bench_scaling import FULL, QUICK, measure_scaling

    return measure_scaling(QUICK if flags.quick else FULL, sizes.rounds, tell)


def _data(flags: argparse.Namespace, sizes: Sizes, tell: Tell) -> dict[str, Any]:
    from bench_data import FULL, QUICK, measure_data

    with tempfile.TemporaryDirectory() as work:
        chosen = QUICK if flags.quick else FULL
        return measure_data(chosen, flags.real, Path(work), sizes.rounds, tell)


_PARTS: Mapping[str, Callable[[argparse.Namespace, Sizes, Tell], dict[str, Any]]] = {
    "training": _training,
    "evaluation": _evaluation,
    "scaling": _scaling,
    "data": _data,
}


if __name__ == "__main__":
    sys.exit(main())
