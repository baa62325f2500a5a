"""Time and memory of everything between a data file and the first step, by the number of rows.

`python benchmarks/load.py` generates full-length rows, then checks, reads, splits, tokenises and
orders them into micro-batches, each step in a process of its own, and writes load.json and load.png
into benchmarks/results/. 160,000 rows need about 12 GB of disk and an hour of one core;
`--rows 1000 4000` takes a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from processes import measured

RESULT = Path(__file__).resolve().parent / "results" / "load.json"
ROWS = (1_000, 10_000, 40_030, 160_000)
_VOCABULARY_PIECES = 32_000
_TOKENIZER_ROWS = 300


def _file(folder: Path) -> Path:
    return folder / "training_data.json"


def _table(folder: Path, name: str = "training_data.json") -> Any:
    from tinyagent_fast.data.cache import load_examples

    return load_examples(folder / name, on_bad_entry="error")


def generate(folder: Path, rows: int) -> None:
    """Write the data file, in the build and length of the published prompts."""
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset

    spec = GenerationSpec(train_entries=rows, test_entries=200, prompt_style="full", seed=1)
    generate_dataset(spec, folder)


def check(folder: Path, rows: int) -> None:
    """Do what `data check` does, with words instead of tokens."""
    from tinyagent_fast.data.report import Measure, check_file
    from tinyagent_fast.prompts.templates import render

    found = check_file(_file(folder), Measure(render=lambda example: render(example, "alpaca")))
    assert found.read.entries == rows


def read(folder: Path, rows: int) -> None:
    """Read and check all entries into the cache."""
    assert len(_table(folder)) == rows


def split(folder: Path, rows: int) -> None:
    """Set validation rows aside, leave out leaks, report them."""
    from tinyagent_fast.data.splits import leak_report, split_validation, without_leaks

    table, test = _table(folder), _table(folder, "testing_data.json").column("query")
    keys, queries = table.column("entry_key"), table.column("query")
    found = split_validation(keys, queries, validation_entries=rows // 10, seed=0)
    assert without_leaks(found.train, queries, test, "drop") == found.train
    leak_report({"train": [queries[row] for row in found.train], "test": test})


def tokenise(folder: Path, rows: int) -> None:
    """Turn examples into proved rows of token ids."""
    from tinyagent_fast.models.nano import train_bpe_tokenizer
    from tinyagent_fast.prompts.rows import encode_examples
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    table = _table(folder)
    texts = [f"{e.system}{e.user}{e.output}" for e in table[:_TOKENIZER_ROWS]]
    tokenizer = PromptTokenizer(train_bpe_tokenizer(texts, _VOCABULARY_PIECES))
    rows_file = encode_examples(table, tokenizer, folder / "rows", max_length_tokens=100_000)
    assert rows_file.statistics.rows == rows


def batch(folder: Path, rows: int) -> None:
    """Order one epoch by shared beginnings, and pack a sample of its micro-batches."""
    from datasets import Dataset

    from tinyagent_fast.config import TrainConfig
    from tinyagent_fast.shared_prefix.order import length_grouped
    from tinyagent_fast.shared_prefix.packing import pack
    from tinyagent_fast.shared_prefix.training import prefix_order

    dataset = Dataset.from_file(str(folder / "rows" / "rows.arrow"))
    order = list(prefix_order(dataset, TrainConfig(batch=8)) or ())
    assert sorted(order) == list(range(rows))
    assert len(list(length_grouped(list(dataset["length"]), 16, 0))) == rows
    for start in range(0, rows, 8 * max(1, rows // 800)):
        pack([dataset[at] for at in order[start : start + 8]])


STEPS: Mapping[str, Callable[[Path, int], None]] = {
    step.__name__: step for step in (generate, check, read, split, tokenise, batch)
}


def measure(sizes: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Measure every step at every size, each in a process of its own."""
    found = []
    for rows in sizes:
        place = folder / str(rows)
        place.mkdir()
        os.environ["TINYAGENT_FAST_CACHE"] = str(place / "cache")
        for name, step in STEPS.items():
            one = {"rows": rows, "step": name, **measured(step, place, rows)}
            if name == "generate":
                one["file_mb"] = round(_file(place).stat().st_size / 1e6, 1)
            found.append(one)
            print(json.dumps(one), flush=True)
        shutil.rmtree(place)
    return found


def growth(found: Sequence[Mapping[str, Any]], value: str) -> dict[str, float]:
    """Fit the power of the number of rows by which each step's CPU seconds or memory grow.

    It is that between the two largest sizes: 1 is linear, 0 does not grow.
    """
    powers = {}
    for name in STEPS:
        points = [(one["rows"], max(0.01, one[value])) for one in found if one["step"] == name]
        (few, less), (many, more) = sorted(points)[-2:]
        powers[name] = round(math.log(more / less) / math.log(many / few), 2)
    return powers


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw seconds and memory by rows, both axes in powers of ten."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for name in STEPS:
        points = sorted((one["rows"], one) for one in found if one["step"] == name)
        for axis, value in zip(axes, ("cpu_s", "peak_mib"), strict=True):
            axis.plot([n for n, _ in points], [one[value] for _, one in points], "o-", label=name)
    for axis, title in zip(axes, ("CPU seconds", "peak memory, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="rows", title=title)
        axis.grid(alpha=0.3)
    sizes = sorted({one["rows"] for one in found})
    top = max(one["cpu_s"] for one in found)
    axes[0].plot(sizes, [top * n / sizes[-1] for n in sizes], "k:", label="linear")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, and write figures and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--folder", type=Path, help="where files go; temporary without it")
    parser.add_argument("--out", type=Path, default=RESULT)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load-", dir=flags.folder) as folder:
        found = measure(flags.rows, Path(folder))
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, of which a step uses one",
        "command": f"python benchmarks/load.py --rows {' '.join(map(str, flags.rows))}",
        "power_of_rows": {value: growth(found, value) for value in ("cpu_s", "peak_mib")},
        "steps": found,
    }
    flags.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(found, flags.out.with_suffix(".png"))
    print(json.dumps(result["power_of_rows"], indent=2))


if __name__ == "__main__":
    main()
