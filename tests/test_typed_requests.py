"""Sixty requests written by hand, as people type them, with the plans that they should get."""

from __future__ import annotations

import json
from pathlib import Path

from tinyagent_fast.chat.requests import read_requests
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.data.splits import normalise_query
from tinyagent_fast.plans.drawing import draw_plan
from tinyagent_fast.plans.grammar import parse_plan, reference_uses, render_plan
from tinyagent_fast.plans.tools import TINYAGENT

REQUESTS = read_requests(Path(__file__).with_name("requests.json"))
LABELS = [(entry.request, parse_plan(entry.label or "")) for entry in REQUESTS]

# Which results an argument may be: by parameter, or by tool and parameter.
GIVEN_BY = {
    "recipients": {"get_email_address"},
    "cc": {"get_email_address"},
    "invitees": {"get_email_address"},
    "meeting_invitees": {"get_email_address"},
    "attachments": {"open_and_get_file_path"},
    "pdf_path": {"open_and_get_file_path"},
    "send_sms recipients": {"get_phone_number"},
}
TEXTS = {
    *("summarize_pdf", "maps_open_location", "maps_show_directions", "open_note"),
    *("get_zoom_meeting_link", "get_phone_number", "get_email_address"),
}
LOOK_UPS = {"get_phone_number", "get_email_address", "get_zoom_meeting_link"}


def test_there_are_sixty_different_ones_for_every_tool_and_of_one_to_six_calls() -> None:
    assert len({normalise_query(request) for request, _ in LABELS}) == 60
    assert {step.tool for _, plan in LABELS for step in plan.steps} == {*TINYAGENT, "join"}
    assert {len(plan.steps) - 1 for _, plan in LABELS} == set(range(1, 7))


def test_every_plan_is_right_and_written_as_labels_are() -> None:
    for entry, (request, plan) in zip(REQUESTS, LABELS, strict=True):
        assert render_plan(plan) == entry.label
        assert draw_plan(entry.label or "").all_problems == (), request


def test_results_are_used_where_they_belong_and_no_look_up_is_for_nothing() -> None:
    for request, plan in LABELS:
        tools = {step.number: step.tool for step in plan.steps}
        used = set()
        for step in plan.steps[:-1]:
            for parameter, value in zip(
                TINYAGENT[step.tool].parameters, step.arguments, strict=True
            ):
                wanted = GIVEN_BY.get(
                    f"{step.tool} {parameter.name}", GIVEN_BY.get(parameter.name, TEXTS)
                )
                found = {number for number, _ in reference_uses([value])}
                assert {tools[number] for number in found} <= wanted, (request, step)
                used |= found
        for step in plan.steps[:-1]:
            if step.tool in LOOK_UPS and len(plan.steps) > 2:
                assert step.number in used, (request, step)
        looked_up = [(s.tool, s.arguments) for s in plan.steps if s.tool in LOOK_UPS]
        assert len(looked_up) == len({(tool, str(given)) for tool, given in looked_up})


def test_no_generated_query_is_one_of_them(tmp_path: Path) -> None:
    """They measure; nothing is trained on them."""
    generate_dataset(GenerationSpec(train_entries=1500, test_entries=100, seed=3), tmp_path)
    generated = {
        normalise_query(entry["input"])
        for name in ("training_data.json", "testing_data.json")
        for entry in json.loads((tmp_path / name).read_text(encoding="utf-8")).values()
    }
    assert len(generated) > 1000
    assert generated.isdisjoint(normalise_query(request) for request, _ in LABELS)
