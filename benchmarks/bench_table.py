"""The Markdown table of `bench`, with which figures were measured under which conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench_evaluation import SINGLE, STATIC
from bench_scaling import AXES

_HEAD = ("what", "ours", "the usual way", "times as fast", "conditions")


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the measured parts as a Markdown table.

    Args:
        parts: Figures by part.

    Returns:
        The table, and under it the conditions of every part.
    """
    rows = [_HEAD, ("---",) * len(_HEAD)]
    for name, figures in parts.items():
        rows += _ROWS[name](figures)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"- {name}: {_conditions(figures['run'])}" for name, figures in parts.items()]
    depths = {n: parts[n]["model"]["layers"] for n in ("training", "scaling") if n in parts}
    if depths:
        told = ", ".join(f"{layers} ({name})" for name, layers in depths.items())
        notes.insert(
            0,
            "- of the last layer, ours computes queries, output and MLP only where loss is: one "
            f"layer of {told}, of 22 in TinyLlama-1.1B, where it counts for less",
        )
    if any(figures["run"]["quick"] for figures in parts.values()):
        notes.insert(0, "- quick: sizes that show that everything runs, and nothing else")
    return "\n".join([*lines, "", *notes])


def _training(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    ways, usual = figures["ways"], figures["baseline"]
    shape = figures["model"]
    size = f"hidden {shape['hidden']}, {shape['layers']} layers"
    for name, way in ways.items():
        if not name.startswith("ours"):
            continue
        computed = figures["computed_tokens"][name] / figures["padded_tokens"]
        yield (
            f"training step, {name}",
            _rate(way["samples_per_s"]),
            f"{_rate(ways[usual]['samples_per_s'])} ({usual})",
            _times(way["ratio"]),
            f"{figures['rows']} rows of {figures['mean_tokens']:,.0f} tokens, "
            f"{100 * computed:.0f} % of the padded tokens computed, {size}",
        )


def _evaluation(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    shape = figures["model"]
    for kind, found in figures["prompts"].items():
        ways = found["ways"]
        conditions = (
            f"{found['prompts']} {kind} prompts of {found['mean_tokens']:,.0f} tokens, "
            f"{100 * found['shared_share']:.0f} % shared, batch {found['batch']}, "
            f"{found['new_tokens']} tokens written, hidden {shape['hidden']}, "
            f"{shape['layers']} layers"
        )
        for name in found["over_static"]:
            against = {SINGLE: ways[name]["ratio"], STATIC: found["over_static"][name]}
            for usual, ratio in against.items():
                yield (
                    f"evaluation, {name}",
                    _rate(ways[name]["samples_per_s"]),
                    f"{_rate(ways[usual]['samples_per_s'])} ({usual})",
                    _times(ratio),
                    conditions,
                )


def _scaling(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    model = figures["model"]
    for kind in ("training", "evaluation"):
        for axis in AXES:
            points = figures[axis]
            others = {k: points[0][k] for k in AXES if k != axis}
            yield (
                f"{kind} with {axis} {', '.join(str(p[axis]) for p in points)}",
                " / ".join(f"{_fastest(p[kind], -1):.2f} s" for p in points),
                " / ".join(f"{_fastest(p[kind], 0):.2f} s" for p in points),
                " / ".join(f"{p[kind]['ratio']['median']:.2f}" for p in points),
                ", ".join(f"{k} {v}" for k, v in others.items())
                + f", hidden {model['hidden']}, {model['layers']} layers",
            )


def _fastest(figures: Mapping[str, Any], at: int) -> float:
    """Give the median seconds of the usual way (0) or of ours (-1)."""
    seconds: float = list(figures["seconds"].values())[at]["median"]
    return seconds


def _data(figures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    ways, ratios = figures["ways"], figures["ratios"]
    units = {"read and validate": "entries/s", "tokenise and prove": "rows/s", "score": "pairs/s"}
    counts = {
        "read and validate": f"{figures['entries']:,} entries, {figures['size_mb']} MB",
        "tokenise and prove": f"{figures['rows']:,} rows, {figures['tokens']:,} tokens",
        "score": f"{figures['pairs']:,} pairs",
    }
    for name, unit in units.items():
        plain = next((key for key in ratios if key.startswith(name)), None)
        usual, times = "nothing comparable", "not applicable"
        if plain is not None:
            other = plain.partition(" : ")[2]
            usual = f"{ways[other]['per_s']['median']:,.0f} {unit} ({other})"
            times = _times(ratios[plain])
        mine = f"{ways[name]['per_s']['median']:,.0f} {unit}"
        if unit == "entries/s":
            mine += f", {figures['read_mb_per_s']['median']:.0f} MB/s"
        yield name, mine, usual, times, counts[name]


_ROWS = {"training": _training, "evaluation": _evaluation, "scaling": _scaling, "data": _data}


def _rate(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.4g} samples/s"


def _times(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} - {spread['max']:.2f})"


def _conditions(run: Mapping[str, Any]) -> str:
    versions = run["environment"]["versions"]
    load = " to ".join(f"{value:.1f}" for value in run["load_average"])
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"{run['rows']} rows, {run['rounds']} rounds, {run['threads']} of "
        f"{run['environment']['cpus']} CPU threads, load {load}, {told}; `{run['command']}`"
    )
