"""How well a model judges observations: its verdicts beside those of the data's join points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.plans.grammar import parse_joiner

_NO_ACTION = "none"


@dataclass(frozen=True, kw_only=True)
class JoinMetrics:
    """Verdicts counted."""

    verdicts: Counter[tuple[str, str]]
    """By the label's action and the model's: Finish, Replan, or none."""
    messages: Proportion
    """Equal messages, where both say Finish; case, white space and a final full stop apart."""

    @property
    def action_accuracy(self) -> Proportion:
        """Share of equal actions.

        Source: `evaluate_join` of SqueezeAILab/TinyAgent, src/utils/plan_utils.py.
        """
        right = sum(n for (label, said), n in self.verdicts.items() if label == said)
        return Proportion(right, self.verdicts.total())

    def to_json(self) -> dict[str, Any]:
        """Give plain values; the confusion table is by label, then by what the model said."""
        table: dict[str, dict[str, int]] = {}
        for (label, said), count in sorted(self.verdicts.items()):
            table.setdefault(label, {})[said] = count
        return {
            "action_accuracy": self.action_accuracy.to_json(),
            "message_match": self.messages.to_json(),
            "confusion": table,
        }


def score_joins(pairs: Iterable[tuple[str, str]]) -> JoinMetrics:
    """Score joiners' answers.

    Args:
        pairs: The label's text and the model's; a model's text without an action counts as wrong.
    """
    verdicts: Counter[tuple[str, str]] = Counter()
    same = both = 0
    for label, said in pairs:
        wanted, got = parse_joiner(label), parse_joiner(said)
        actions = wanted.action or _NO_ACTION, got.action or _NO_ACTION
        verdicts[actions] += 1
        if actions == ("Finish", "Finish"):
            both += 1
            same += _plain(wanted.message) == _plain(got.message)
    return JoinMetrics(verdicts=verdicts, messages=Proportion(same, both))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!")
