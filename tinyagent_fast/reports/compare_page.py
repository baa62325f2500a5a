"""Two planners compared as one HTML file: figures, tables of flips, and the flipped plans drawn."""

from __future__ import annotations

from collections.abc import Iterable

from tinyagent_fast.reports.breakdown import GALLERY_CASES
from tinyagent_fast.reports.cases import case_card, legend
from tinyagent_fast.reports.flips import Flip, FlipCount, FlippedPlans
from tinyagent_fast.reports.html import Section, page, section_of
from tinyagent_fast.reports.markup import element, text
from tinyagent_fast.reports.tables import FactTable


def compare_page(compared: FlippedPlans) -> str:
    """Write the comparison.

    Args:
        compared: Two planners and what flipped.

    Returns:
        The HTML file's text.
    """
    a, b, paired = compared.a.name, compared.b.name, compared.paired
    planners = FactTable(
        title="Plan success",
        head=("", "planner", "success"),
        rows=(("A", a, paired.success_a), ("B", b, paired.success_b)),
    )
    sections = [
        section_of(planners),
        section_of(count_table("Flips by number of calls", "calls", compared.by_calls)),
        section_of(count_table("Flips by tool", "tool", compared.by_tool)),
        *_drawn(compared),
        _every_flip(compared),
    ]
    return page(
        f"{a} and {b}",
        element("h1", text(f"{b} (B) against {a} (A)")),
        element("p", text(f"{100 * paired.difference + 0.0:+.1f} points"), class_="big"),
        *(element("p", text(line)) for line in compared.lines()[2:]),
        *(one.markup() for one in sections),
    )


def count_table(title: str, group: str, counts: Iterable[FlipCount]) -> FactTable:
    """Lay out counts of flips.

    Args:
        title: Heading.
        group: What the groups are.
        counts: The counts.

    Returns:
        The table.
    """
    return FactTable(
        title=title,
        note="Queries in the groups that have a flip; a query counts under each of its tools.",
        head=(group, "queries", "right in A only", "right in B only"),
        rows=tuple((c.group, str(c.queries), str(c.only_a), str(c.only_b)) for c in counts),
    )


def _every_flip(compared: FlippedPlans) -> Section:
    rows = ((f"{f.winner} only", f.query, str(f.calls), f.cause) for f in compared.flips)
    head = ("right in", "query", "calls", "why the other fails")
    return section_of(FactTable(title="All flipped queries", head=head, rows=tuple(rows)))


def _drawn(compared: FlippedPlans) -> list[Section]:
    chosen = chosen_flips(compared.flips)
    if not chosen:
        return []
    cards = (
        case_card(
            query=flip.query,
            tag=f"right in {flip.winner} only: {flip.cause}",
            label=flip.label,
            prediction=flip.wrong,
            tools=compared.tools,
            names=("label", f"plan of {'B' if flip.winner == 'A' else 'A'}"),
        )
        for flip in chosen
    )
    told = f"{len(chosen)} of {len(compared.flips)} flipped queries, with the plan that is wrong."
    return [Section("Flipped plans", (element("p", text(told)), legend(), *cards))]


def chosen_flips(flips: Iterable[Flip], most: int = GALLERY_CASES) -> list[Flip]:
    """Choose flips of both directions, half of each where both have enough.

    Args:
        flips: All flips.
        most: How many at most.

    Returns:
        First those that A alone gets right, then B's, each in their order.
    """
    known = list(flips)
    of_a, of_b = ([f for f in known if f.winner == side] for side in ("A", "B"))
    for_a = max(most // 2, most - len(of_b))
    shown_a = of_a[:for_a]
    return [*shown_a, *of_b[: most - len(shown_a)]]
