"""Which prompts are decoded over which shared prefix: the tree of their common beginnings, cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class PromptGroup:
    """Prompts that are decoded over the same prefix."""

    indices: tuple[int, ...]
    """Which prompts, the longest first."""
    prefix_tokens: int


@dataclass(frozen=True)
class _Span:
    """Neighbours in sorted order and the cheapest way found to group them."""

    start: int
    end: int
    tokens: int
    shortest_tokens: int
    cost_tokens: float
    groups: tuple[tuple[int, int, int], ...]


def group_prompts(
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    batch_cost_tokens: float,
    least_tokens: int = 64,
) -> list[PromptGroup]:
    """Choose groups that share long prefixes and still fill their batches.

    Sorted prompts form a tree by their common prefixes; from its leaves up, two neighbouring groups
    become one where that costs fewer tokens.

    Args:
        prompts: Token ids of each.
        batch: Prompts decoded together; a group's last batch may be smaller.
        batch_cost_tokens: What decoding one more batch costs, in tokens of prompt.
        least_tokens: Shorter prefixes are not worth a group.

    Returns:
        Groups that hold every prompt once, the one with the longest prompt first. A prefix leaves
        one token or more of each of its prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: list(prompts[index]))
    rows = [prompts[index] for index in order]
    starting: dict[int, _Span] = {}
    ending: dict[int, _Span] = {}
    for at, row in enumerate(rows):
        cost = len(row) + batch_cost_tokens
        starting[at] = ending[at] = _Span(at, at, len(row), len(row), cost, ((at, at, 0),))
    shared = [common_tokens(one, other) for one, other in pairwise(rows)]
    for at in sorted(range(len(shared)), key=lambda at: -shared[at]):
        left, right = ending.pop(at), starting.pop(at + 1)
        span = _joined(left, right, shared[at], batch, batch_cost_tokens, least_tokens)
        starting[span.start] = ending[span.end] = span
    groups = []
    for start, end, prefix_tokens in starting[0].groups if rows else ():
        indices = sorted(order[start : end + 1], key=lambda index: -len(prompts[index]))
        groups.append(PromptGroup(tuple(indices), prefix_tokens))
    return sorted(groups, key=lambda group: -len(prompts[group.indices[0]]))


def _joined(
    left: _Span, right: _Span, shared: int, batch: int, batch_cost_tokens: float, least_tokens: int
) -> _Span:
    tokens = left.tokens + right.tokens
    shortest = min(left.shortest_tokens, right.shortest_tokens)
    prefix = min(shared, shortest - 1)
    prefix = prefix if prefix >= least_tokens else 0
    count = right.end - left.start + 1
    together = tokens - (count - 1) * prefix + batch_cost_tokens * -(-count // batch)
    groups = left.groups + right.groups
    if together <= left.cost_tokens + right.cost_tokens:
        groups = ((left.start, right.end, prefix),)
    cost = min(together, left.cost_tokens + right.cost_tokens)
    return _Span(left.start, right.end, tokens, shortest, cost, groups)


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
