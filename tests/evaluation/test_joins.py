"""Verdicts: the published action accuracy, what is confused with what, equal messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.evaluation.joins import score_joins

FINISH, REPLAN = "Thought: t\nAction: Finish({})", "Thought: t\nAction: Replan"


def test_verdicts_are_counted_by_label_and_answer() -> None:
    metrics = score_joins(
        [
            (FINISH.format("Task completed!"), FINISH.format("task  completed")),
            (FINISH.format("555-1"), FINISH.format("555-2")),
            (FINISH.format("x"), REPLAN),
            (REPLAN, REPLAN),
            (REPLAN, "I am not sure"),
            (REPLAN, FINISH.format("Replanning is done")),  # the app takes it for a replan
        ]
    )
    assert metrics.to_json()["confusion"] == {
        "Finish": {"Finish": 2, "Replan": 1},
        "Replan": {"Replan": 2, "none": 1},
    }
    assert (metrics.action_accuracy.count, metrics.action_accuracy.total) == (4, 6)
    assert (metrics.messages.count, metrics.messages.total) == (1, 2)
    low, high = metrics.action_accuracy.interval
    assert low < 4 / 6 < high


@given(st.lists(st.text(max_size=30), max_size=6))
def test_any_text_is_scored_and_equal_texts_agree(texts: list[str]) -> None:
    metrics = score_joins((text, text) for text in texts)
    assert metrics.action_accuracy.count == len(texts)
    assert metrics.messages.count == metrics.messages.total
