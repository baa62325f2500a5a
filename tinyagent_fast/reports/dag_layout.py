"""Where the calls of a plan are drawn: in columns, each to the right of all it depends on.

Pure geometry. An edge that passes over a column gets a slot of its own there, so that no edge
runs through a box and no two boxes overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Edge = tuple[int, int]
Point = tuple[float, float]

BOX_WIDTH = 190.0
BOX_HEIGHT = 46.0
COLUMN_GAP = 34.0
ROW_GAP = 14.0
MARGIN = 4.0
_SLOT_HEIGHT = 14.0
_SWEEPS = 4


@dataclass(frozen=True, kw_only=True)
class Box:
    """A call's place: upper left corner and size."""

    x: float
    y: float
    width: float = BOX_WIDTH
    height: float = BOX_HEIGHT


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Boxes by node, and for every edge the points it goes through, from side to side."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    routes: Mapping[Edge, tuple[Point, ...]]


@dataclass(frozen=True)
class _Slot:
    """A place in a column: a node's, or that of an edge on its way."""

    node: int
    edge: Edge | None = None

    @property
    def height(self) -> float:
        return BOX_HEIGHT if self.edge is None else _SLOT_HEIGHT


def layered_layout(size: int, edges: Iterable[Edge]) -> Layout:
    """Place the nodes of a graph.

    Args:
        size: Number of nodes.
        edges: Pairs (from, to) of nodes with from < to, as references only lead back.

    Returns:
        The places.

    Raises:
        ValueError: An edge does not lead to a later node.
    """
    known = sorted(set(edges))
    if any(not 0 <= start < end < size for start, end in known):
        raise ValueError(f"every edge must lead from a node to a later one of {size} nodes")
    layer = [0] * size
    for start, end in sorted(known, key=lambda edge: edge[1]):
        layer[end] = max(layer[end], layer[start] + 1)
    columns: list[list[_Slot]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for node in range(size):
        columns[layer[node]].append(_Slot(node))
    for start, end in known:
        for column in range(layer[start] + 1, layer[end]):
            columns[column].append(_Slot(start, (start, end)))
    _untangle(columns, known)
    return _placed(columns, known, layer)


def _untangle(columns: list[list[_Slot]], edges: Sequence[Edge]) -> None:
    """Order every column by the mean place of its neighbours, to and fro a few times."""
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        order = range(1, len(columns)) if forward else range(len(columns) - 2, -1, -1)
        for at in order:
            near = columns[at - 1 if forward else at + 1]
            place = {slot: index for index, slot in enumerate(near)}
            wish = {
                slot: _mean(
                    (place[other] for other in _neighbours(slot, near, edges, forward)), index
                )
                for index, slot in enumerate(columns[at])
            }
            columns[at].sort(key=lambda slot: wish[slot])


def _neighbours(
    slot: _Slot, near: Iterable[_Slot], edges: Sequence[Edge], forward: bool
) -> list[_Slot]:
    """Find what a slot is joined to in the next column to the left (forward) or to the right."""
    mine = [slot.edge] if slot.edge else [e for e in edges if e[forward] == slot.node]
    return [
        other
        for other in near
        if any(
            other.edge == edge or (other.edge is None and other.node == edge[not forward])
            for edge in mine
        )
    ]


def _mean(values: Iterable[int], otherwise: float) -> float:
    found = list(values)
    return sum(found) / len(found) if found else otherwise


def _placed(columns: list[list[_Slot]], edges: Sequence[Edge], layer: Sequence[int]) -> Layout:
    heights = [sum(s.height for s in column) + ROW_GAP * (len(column) - 1) for column in columns]
    tallest = max(heights, default=0.0)
    boxes: dict[int, Box] = {}
    passing: dict[Edge, list[Point]] = {edge: [] for edge in edges}
    for at, column in enumerate(columns):
        x = MARGIN + at * (BOX_WIDTH + COLUMN_GAP)
        y = MARGIN + (tallest - heights[at]) / 2
        for slot in column:
            if slot.edge is None:
                boxes[slot.node] = Box(x=x, y=y)
            else:
                middle = y + slot.height / 2
                passing[slot.edge] += [(x, middle), (x + BOX_WIDTH, middle)]
            y += slot.height + ROW_GAP
    ends = _ends(boxes, edges)
    return Layout(
        width=2 * MARGIN + len(columns) * (BOX_WIDTH + COLUMN_GAP) - COLUMN_GAP * bool(columns),
        height=2 * MARGIN + tallest,
        boxes=tuple(boxes[node] for node in range(len(layer))),
        routes={e: (ends[e][0], *passing[e], ends[e][1]) for e in edges},
    )


def _ends(boxes: Mapping[int, Box], edges: Sequence[Edge]) -> dict[Edge, tuple[Point, Point]]:
    """Spread the edges that enter or leave a box over its side."""
    leaving: dict[Edge, Point] = {}
    entering: dict[Edge, Point] = {}
    for node, box in boxes.items():
        out = sorted((e for e in edges if e[0] == node), key=lambda e: boxes[e[1]].y)
        into = sorted((e for e in edges if e[1] == node), key=lambda e: boxes[e[0]].y)
        for side, those, x in ((leaving, out, box.x + box.width), (entering, into, box.x)):
            for index, edge in enumerate(those, start=1):
                side[edge] = (x, box.y + box.height * index / (len(those) + 1))
    return {edge: (leaving[edge], entering[edge]) for edge in edges}
