"""The rules an export must keep, as comparisons of plain values; `proof` gathers the values.

Each gate has its figures and the rule they were held against, so that export.json says not only
that a file passed, but by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.evaluation.comparison import PairedComparison
from tinyagent_fast.plans.grammar import canonical_plan

MAX_LOSS_DIFFERENCE = {"F32": 1e-4, "F16": 2e-3, "BF16": 1e-2}
"""Allowed relative difference of the loss, by the merged weights' coarsest type."""
LEAST_TIE = 1e-4
"""Two tokens whose log-probabilities are nearer than this are a near-tie to any arithmetic."""
MOST_TIE = {"F32": 0.05, "F16": 0.3, "BF16": 1.0}
"""Two tokens that are further apart are none, however far apart two models are."""
MAX_LOGIT_DIFFERENCE = 1e-3
"""For the f32 file with an f32 KV cache: a wrong epsilon already gives 0.03.

Source: measured on small models with planted mistakes (permutation, RoPE base, scaling, epsilon).
"""
MAX_KL = 1e-3
"""Mean Kullback-Leibler divergence of the f16 file, in nats; a healthy one has 1e-7 to 1e-5."""
MIN_TOP1 = 0.95
"""Share of positions at which the f16 file's most probable token is the merged model's."""
SUCCESS_OF = "success of "
"""Begins the name of the gate on a file's success."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One rule, its figures and whether they keep it."""

    name: str
    passed: bool
    rule: str
    figures: Mapping[str, Any]

    def sentence(self) -> str:
        """Say the outcome in one line."""
        figures = ", ".join(
            f"{_WORDS.get(key, key)} {_short(key, value)}" for key, value in self.figures.items()
        )
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {figures} (rule: {self.rule})"


_WORDS = {
    "max_abs": "largest difference",
    "mean_abs": "mean difference",
    "top1": "same most probable token",
    "mean_kl": "mean KL",
    "worst error by allowed": "largest error in parts of the allowed one",
    "interval": "95 % interval",
}
_SHARES = ("top1", "success of f16", "success")


def _short(name: str, value: object) -> str:
    if isinstance(value, list | tuple):
        word = {"interval": " to ", "loss": " and "}.get(name, ", ")
        return word.join(_short(name, item) for item in value)
    if isinstance(value, float) and name in _SHARES:
        return f"{100 * value:.1f} %"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def different_plans(first: Sequence[str], second: Sequence[str]) -> list[int]:
    """Give the indices of plans that call other tools or give other arguments."""
    pairs = enumerate(zip(first, second, strict=True))
    return [at for at, (one, other) in pairs if canonical_plan(one) != canonical_plan(other)]


def same_answers(
    name: str,
    dtype: str,
    losses: tuple[float, float],
    plans: int,
    gaps: Sequence[float],
    noise: float,
) -> Gate:
    """Hold two models' losses and greedy plans against one another.

    Where plans part, the two tokens must be a near-tie, which may fall either way: nearer than
    twice the noise, once for each of them. How many plans part at one says nothing.

    Args:
        name: Of the gate.
        dtype: `F32`, `F16` or `BF16`: how the second one's weights were rounded.
        losses: Nats a supervised token, of the first and the second.
        plans: Plans that were compared.
        gaps: For each plan that differs, how far apart the second model sees the two tokens at
            which the plans part, in log-probability.
        noise: Largest difference between the two models' log-probabilities.
    """
    difference = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-9)
    allowed, tie = MAX_LOSS_DIFFERENCE[dtype], min(max(2 * noise, LEAST_TIE), MOST_TIE[dtype])
    figures: dict[str, Any] = {
        "loss": [round(loss, 6) for loss in losses],
        "relative difference": difference,
        "same plans": f"{plans - len(gaps)} of {plans}",
    }
    if gaps:
        figures |= {"gaps": [round(gap, 6) for gap in gaps], "noise": float(noise)}
    return Gate(
        name=name,
        passed=difference <= allowed and all(gap <= tie for gap in gaps),
        rule=f"loss within {allowed:g} relative; greedy plans equal, or apart where two tokens are "
        f"within {tie:.3g} nats",
        figures=figures,
    )


def same_ids(
    name: str,
    triples: Sequence[tuple[str, Sequence[object], Sequence[object]]],
    bos_id: int | None,
    *,
    begins_turns: bool = False,
) -> Gate:
    """Hold ids against one another; each text comes with those of the run and of the file.

    BOS must stand first in every sequence, and nowhere else unless a chat template begins turns
    with it (`begins_turns`), but never twice at the beginning. None as its id asks for no BOS.
    """
    different = [text for text, ours, theirs in triples if list(ours) != list(theirs)]
    figures: dict[str, Any] = {"texts": len(triples), "different": len(different)}
    rule, bos_wrong = "equal ids", 0
    if bos_id is not None:
        bos_wrong = sum(
            ids[0] != bos_id or bos_id in ids[1 : 2 if begins_turns else None]
            for _, _, ids in triples
            if len(ids)
        )
        figures["not exactly one BOS"] = bos_wrong
        rule = "equal ids, exactly one BOS" + " at the beginning" * begins_turns
    if different:
        figures["first different"] = repr(different[0])
    return Gate(name=name, passed=not different and not bos_wrong, rule=rule, figures=figures)


def same_texts(name: str, pairs: Sequence[tuple[str, str]]) -> Gate:
    """Hold what texts must be against what they are, character by character."""
    gate = same_ids(name, [(wanted, wanted, got) for wanted, got in pairs], None)
    return replace(gate, rule="equal texts")


@dataclass(frozen=True)
class DistributionDifference:
    """How far two models' next-token distributions are apart."""

    positions: int
    max_abs: float
    mean_abs: float
    top1: float
    mean_kl: float


def distribution_difference(
    expected_PV: NDArray[np.float32], got_PV: NDArray[np.float32]
) -> DistributionDifference:
    """Compare log-probabilities over the whole vocabulary.

    Log-probabilities are logits up to one constant a position, so differences mean the same.
    """
    ours, theirs = expected_PV.astype(np.float64), got_PV.astype(np.float64)
    if not np.isfinite(theirs).all() or theirs.shape != ours.shape:
        return DistributionDifference(len(ours), float("inf"), float("inf"), 0.0, float("inf"))
    apart = np.abs(theirs - ours)
    # Rounding on the way left sums beside 1, which would make the divergence negative.
    p_PV, q_PV = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (ours, theirs))
    kl_P = (np.exp(p_PV) * (p_PV - q_PV)).sum(axis=1)
    top1 = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    return DistributionDifference(
        len(ours), float(apart.max()), float(apart.mean()), top1, float(kl_P.mean())
    )


def same_logits(found: DistributionDifference, noise: float = 0.0) -> Gate:
    """Require equal logits of the f32 file, but for the `noise` of llama.cpp's own arithmetic."""
    allowed = MAX_LOGIT_DIFFERENCE + noise
    return Gate(
        name="f32 GGUF = merged model, every logit",
        passed=found.max_abs <= allowed,
        rule=f"largest difference of a log-probability at most {allowed:g}",
        figures=vars(found),
    )


def near_logits(found: DistributionDifference) -> Gate:
    """Require the f16 file's distributions to be as near as half precision lets them be."""
    return Gate(
        name="f16 GGUF, distributions",
        passed=found.mean_kl <= MAX_KL and found.top1 >= MIN_TOP1,
        rule=f"mean KL at most {MAX_KL:g} nats, top-1 equal at {100 * MIN_TOP1:.0f} % or more",
        figures=vars(found),
    )


def no_great_loss(file: str, paired: PairedComparison, max_loss_points: float) -> Gate:
    """Refuse a file, such as `q4_k_m`, that surely loses more success than allowed beside f16.

    In doubt it passes, and the figures say how large the doubt is.
    """
    low, high = (100 * bound for bound in paired.interval_95)
    note = {} if paired.success_a.count else {"note": "f16 solves none, so nothing could be lost"}
    return Gate(
        name=SUCCESS_OF + file,
        passed=high >= -max_loss_points,
        rule=f"not surely more than {max_loss_points:g} points below f16",
        figures={
            "prompts": paired.n,
            "success of f16": round(paired.success_a.share, 4),
            "success": round(paired.success_b.share, 4),
            "difference in points": round(100 * paired.difference, 2),
            "interval": [round(low, 2), round(high, 2)],
            "McNemar p": round(paired.mcnemar_p, 4),
            **note,
        },
    )
