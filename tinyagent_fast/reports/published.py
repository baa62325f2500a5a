"""Published results to stand beside a run's, and whether the two may be compared at all."""

from __future__ import annotations

from dataclasses import dataclass

from tinyagent_fast.reports.reading import Evaluation, RunContents, child

PUBLISHED_TEST_QUERIES = 1022
"""Entries of the published testing_data.json.

Source: squeeze-ai-lab/TinyAgent-dataset on the Hugging Face hub.
"""

_BLOG = "BAIR blog, TinyAgent: Function Calling at the Edge (2024)"
_RETRAINING = "github.com/SamvelMinasyan/TinyAgent"


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """Plan success that somebody published, in per cent; the test file is the published one."""

    model: str
    success_percent: float
    source: str


PUBLISHED_RESULTS = tuple(
    PublishedResult(model=model, success_percent=success_percent, source=source)
    for model, success_percent, source in (
        ("TinyLlama-1.1B-32K, zero-shot", 12.71, _BLOG),
        (
            "public re-training, capped",
            78.4,
            f"{_RETRAINING}, output capped near the label's length",
        ),
        ("TinyAgent-1.1B", 78.89, _BLOG),
        ("GPT-4-Turbo", 79.08, _BLOG),
        ("public re-training", 82.1, f"{_RETRAINING}, at most 264 new tokens"),
        ("TinyAgent-7B", 83.09, _BLOG),
        ("TinyAgent-7B with ToolRAG", 84.95, _BLOG),
    )
)
"""Results on the published test file, lowest first."""


def comparability(contents: RunContents, evaluation: Evaluation) -> str:
    """Say whether an evaluation may be held against the published results.

    Args:
        contents: The run.
        evaluation: The evaluation that gave the headline.

    Returns:
        A sentence that begins with the verdict.
    """
    own = child(contents.data, "test_file")
    tested = evaluation.made_with.get("test_sha256")
    n = evaluation.metrics.n
    if tested is not None and tested != own.get("sha256"):
        where, generated = "a test file that is not the run's own", False
    else:
        where = f"the test file {own.get('path', contents.config.data.test or 'of this run')}"
        generated = contents.config.data.test is None
    if generated:
        return (
            "Not comparable with the published results: this run was tested on generated data, "
            "and no figure on it says how the planner does on the published test file."
        )
    if contents.tools is not None:
        return (
            "Not comparable with the published results: this run plans with a catalogue of tools "
            "of its own."
        )
    if n != PUBLISHED_TEST_QUERIES:
        return (
            f"Not comparable with the published results: {n:,} queries of {where}, "
            f"not the {PUBLISHED_TEST_QUERIES:,} of the published one."
        )
    return (
        f"Comparable with the published results only if {where} is the published "
        f"testing_data.json; its {PUBLISHED_TEST_QUERIES:,} queries agree, its content is not "
        "known to this program."
    )
