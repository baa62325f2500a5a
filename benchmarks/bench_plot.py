"""One picture of what `bench` measured: bars for steps and evaluation, lines for scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_TRAINING_COLOUR, _EVALUATION_COLOUR, _USUAL_COLOUR = "#1f6f8b", "#c8553d", "#9aa5ad"
_SCALING_LABELS = {
    "share": "share of the tokens that is the prefix",
    "batch": "rows together",
    "length": "tokens of a row",
}


def plot(parts: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Draw the parts that were measured.

    Args:
        parts: Figures by part.
        path: Target, a PNG.

    Returns:
        The path, or none if no part has a picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = _bars(parts)
    scaling = parts.get("scaling")
    if not bars and scaling is None:
        return None
    heights = [3.4] * (bool(bars) + (scaling is not None))
    figure = plt.figure(figsize=(11, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, squeeze=False)[:, 0]
    if bars:
        for axis, (title, colour, ways) in zip(
            rows[0].subplots(1, len(bars), squeeze=False)[0], bars, strict=True
        ):
            _draw_bars(axis, title, colour, ways)
    if scaling is not None:
        axes = rows[-1].subplots(1, len(_SCALING_LABELS), sharey=True)
        for axis, name in zip(axes, _SCALING_LABELS, strict=True):
            _draw_lines(axis, name, scaling[name])
        shape = scaling["model"]
        size = f"hidden {shape['hidden']}, {shape['layers']} layers"
        rows[-1].suptitle(
            f"Shared prefixes against padded batches ({size}; of the last, training computes "
            "only what the loss needs)",
            fontsize=10,
        )
        axes[0].set_ylabel("times as many samples/s")
        axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bars(
    parts: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """Collect title, colour and ways of each panel."""
    found = []
    training = parts.get("training")
    if training is not None:
        title = f"Training step\n{training['rows']} rows"
        found.append((title, _TRAINING_COLOUR, dict(training["ways"])))
    for kind, figures in parts.get("evaluation", {}).get("prompts", {}).items():
        title = f"Evaluation\n{figures['prompts']} {kind} prompts"
        found.append((title, _EVALUATION_COLOUR, dict(figures["ways"])))
    return found


def _draw_bars(axis: Any, title: str, colour: str, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw samples/s relative to the baseline, with the rounds' smallest and largest."""
    names = list(ways)
    ratios = [ways[name]["ratio"] for name in names]
    middle = [ratio["median"] for ratio in ratios]
    errors = [
        [ratio["median"] - ratio["min"] for ratio in ratios],
        [ratio["max"] - ratio["median"] for ratio in ratios],
    ]
    colours = [colour if name.startswith("ours") else _USUAL_COLOUR for name in names]
    axis.barh(names, middle, xerr=errors, color=colours, error_kw={"capsize": 3, "lw": 1})
    for at, ratio in enumerate(ratios):
        axis.annotate(
            f"{ratio['median']:.2f}x",
            (ratio["max"], at),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("times as many samples/s")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_lines(axis: Any, name: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw both ratios along one axis."""
    x = [point[name] for point in points]
    for kind, colour in (("training", _TRAINING_COLOUR), ("evaluation", _EVALUATION_COLOUR)):
        ratios = [point[kind]["ratio"] for point in points]
        axis.plot(x, [ratio["median"] for ratio in ratios], "o-", color=colour, label=kind)
        axis.fill_between(
            x,
            [ratio["min"] for ratio in ratios],
            [ratio["max"] for ratio in ratios],
            color=colour,
            alpha=0.15,
            lw=0,
        )
    axis.axhline(1, color=_USUAL_COLOUR, lw=1, ls="--")
    if name != "share":
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [str(value) for value in x])
        axis.minorticks_off()
    axis.set_xlabel(_SCALING_LABELS[name])
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
