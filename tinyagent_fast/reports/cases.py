"""One failing case as HTML: the query, the cause, and both plans as graphs side by side."""

from __future__ import annotations

from collections.abc import Mapping

from tinyagent_fast.evaluation.report import explain_failure
from tinyagent_fast.plans.drawing import draw_plan, mark_differences
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.reports.markup import Markup, element, text

LEGEND = (
    "Boxes are calls, an arrow leads from a call to one that uses its result; join() is not drawn. "
)


def legend() -> Markup:
    """Explain the marks of the drawings.

    Returns:
        A paragraph.
    """
    return element(
        "p",
        text(LEGEND),
        element("span", text("\u2212\u00a0dashed: in the label only. "), class_="sign missing"),
        element("span", text("+\u00a0bold: in the prediction only."), class_="sign extra"),
        class_="dim",
    )


def case_card(
    *,
    query: str,
    tag: str,
    label: str,
    prediction: str,
    tools: Mapping[str, Tool] | None,
    names: tuple[str, str] = ("label", "prediction"),
) -> Markup:
    """Write one case.

    Args:
        query: What the user asked.
        tag: Short name of the cause.
        label: The plan that was wanted.
        prediction: The planner's output.
        tools: Tools by name; none stands for TinyAgent's own.
        names: What the two plans are called.

    Returns:
        An `article`.
    """
    pair = mark_differences(draw_plan(label, tools), draw_plan(prediction, tools))
    drawings = (
        element(
            "figure",
            element("figcaption", text(name)),
            element("div", Markup(plan.to_svg(name)), class_="scroll"),
        )
        for name, plan in zip(names, pair, strict=True)
    )
    texts = (
        element("div", element("p", text(name), class_="dim"), element("pre", text(plan)))
        for name, plan in zip(names, (label, prediction), strict=True)
    )
    return element(
        "article",
        element("p", text(query), class_="query", dir="auto"),
        element(
            "p",
            element("span", text(tag), class_="tag"),
            text(explain_failure(label, prediction, tools)),
        ),
        element("div", *drawings, class_="pair"),
        element("details", element("summary", text("plans as text")), *texts),
        class_="case",
    )
