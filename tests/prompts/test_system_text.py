"""System texts are taken apart into tools, guidelines and examples, and come back as they were."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.cli import main
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.data.generation.prompts import full_planner_prompt, short_planner_prompt
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.plans.tools import TINYAGENT
from tinyagent_fast.prompts.system_text import SystemText, parse, render, united

NAMES = ("find_city", "book_room", "send_card", "pay_bill", "search")


def composed(tools: list[str], examples: list[str], *, count: bool = True) -> str:
    """Write a text of the published build about other things."""
    number = f" {len(tools) + 1}" if count else ""
    lines = [f"Use 1 of these{number} actions:"]
    for at, tool in enumerate(tools, start=1):
        lines += [f"{at}. {tool}(name: str, days: list[str]) -> str", f" - What {tool} does.", ""]
    lines += [f"{len(tools) + 1}. join():", " - Last.", "", "Rules:", " - Be brief."]
    if "book_room" in tools or "find_city" in tools:
        lines.append(" - Before book_room comes find_city.")
    lines += [" - Now it is Monday 2024-01-01 10:00", "", "", "Examples:", ""]
    for at, tool in enumerate(examples):
        lines += [f"Question: do {at}", f'1. {tool}("x", [])', "2. join()<END_OF_PLAN>", "###"]
    return "\n".join(lines) + "\n"


TOOL_LISTS = st.lists(st.sampled_from(NAMES), min_size=1, unique=True)
TEXTS = st.builds(
    lambda tools, examples, count, tail: composed(tools, examples, count=count) + tail,
    TOOL_LISTS,
    st.lists(st.sampled_from(NAMES), max_size=4),
    st.booleans(),
    st.text(max_size=20),
)


@given(st.one_of(TEXTS, st.text(), st.from_regex(r"(\d\. \w+\((a: b)?\)( ->.*|:)\n*)+")))
def test_any_text_comes_back_byte_for_byte(text: str) -> None:
    assert render(parse(text)) == text


@given(TOOL_LISTS, st.lists(st.sampled_from(NAMES), max_size=4))
def test_parts_say_what_the_text_says(tools: list[str], examples: list[str]) -> None:
    parts = parse(composed(tools, examples))
    assert parts.tools == tuple(tools)
    assert [example.tools for example in parts.examples] == [(name,) for name in examples]
    assert len(parts.preamble) == 2


@given(TOOL_LISTS, st.lists(st.sampled_from(NAMES), max_size=4), st.data())
def test_a_restricted_text_is_the_one_that_was_composed_with_these_tools(
    tools: list[str], examples: list[str], data: st.DataObject
) -> None:
    kept = [t for t in tools if data.draw(st.booleans())] or tools[:1]
    restricted = parse(composed(tools, examples)).restricted(kept)
    expected = parse(composed(kept, []))
    assert render(replace(restricted, examples=())) == render(expected)
    assert [e.tools[0] for e in restricted.examples] == [e for e in examples if e in kept]


def test_examples_are_written_in_the_form_of_those_that_were_there() -> None:
    text = composed(["find_city"], ["find_city"])
    again = parse(text).with_examples([("do 0", '1. find_city("x", [])\n2. join()')])
    assert render(again) == text


def test_a_text_gets_another_date() -> None:
    dated = parse(composed(["find_city"], [])).dated("Tuesday 2026-02-03 04:05")
    assert "Now it is Tuesday 2026-02-03 04:05\n" in render(dated)


def test_a_text_takes_the_lines_of_another_that_belong_to_no_tool() -> None:
    whole = parse(composed(list(NAMES), []))
    later = composed(["search"], []).replace("Monday 2024-01-01", "Friday 2025-01-03")
    expected = later.replace("Be brief", "Be kind")
    assert render(whole.with_own_lines(parse(expected)).restricted(["search"])) == expected
    more = parse(expected.replace("Rules:\n", "Rules:\n - One more.\n"))
    assert render(whole.with_own_lines(more).restricted(["search"])) == later


def test_a_text_of_another_build_is_one_part() -> None:
    for text in ("", "You are helpful.", "Answer: yes, no", "1. Be kind.\n2. Be brief.\n"):
        assert parse(text) == SystemText(preamble=(text,))


def test_texts_with_few_tools_each_are_united_to_one_that_gives_each_again() -> None:
    lists = (["find_city", "send_card"], ["pay_bill", "book_room"], ["search", "send_card"])
    texts = [composed(tools, []) for tools in lists]
    whole = united(list(map(parse, texts)), NAMES)
    assert whole.tools == NAMES
    assert [render(whole.restricted(tools)) for tools in lists[:1]] == texts[:1]
    assert render(whole.restricted(["book_room", "pay_bill"])) == composed(
        ["book_room", "pay_bill"], []
    )


def test_parts_survive_json() -> None:
    parts = parse(composed(["find_city"], ["find_city"]))
    assert SystemText.from_json(json.loads(json.dumps(asdict(parts)))) == parts


@pytest.mark.parametrize("style", ["short", "full"])
def test_generated_prompts_are_taken_apart(tmp_path: Path, style: str) -> None:
    spec = GenerationSpec(train_entries=20, test_entries=5, prompt_style=style)  # type: ignore[arg-type]
    file = generate_dataset(spec, tmp_path).train
    for entry in read_entries(file, on_bad_entry="error"):
        text = entry.examples[0].system or ""
        parts = parse(text)
        assert render(parts) == text
        assert parts.tools
        assert bool(parts.examples) == (style == "full")


def test_generated_prompts_of_fewer_tools_are_what_the_generator_writes() -> None:
    catalogue, few = load_catalogue(), ("send_sms", "get_phone_number")
    some = replace(catalogue, tools=tuple(t for t in catalogue.tools if t.name in few))
    now, later = datetime(2024, 2, 3, 4, 5), datetime(2026, 7, 8, 9, 10)
    whole, short = (full_planner_prompt(c, [], now) for c in (catalogue, some))
    assert render(parse(whole).restricted(few)) == short
    both = ["get_phone_number", "send_sms"]
    line = parse(short_planner_prompt([*both, "open_note"], now))
    assert render(line.restricted(few)) == short_planner_prompt(both, now)
    assert render(line.dated(f"{later:%A %Y-%m-%d %H:%M}").restricted(few)) == (
        short_planner_prompt(both, later)
    )
    for own in (short_planner_prompt(both, later), full_planner_prompt(some, [], later)):
        dated = line.with_own_lines(parse(own)).restricted(few)
        assert render(dated) == short_planner_prompt(both, later)


def test_roundtrip_counts_prompts_and_lists(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "roundtrip", str(tiny_data / "training_data.json")]) == 0
    said = capsys.readouterr().out
    assert "40 of 40 system prompts" in said
    assert "40 of 40 have a tool list" in said


def test_roundtrip_fails_where_a_prompt_differs(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyagent_fast.prompts.system_text.render", lambda _: "other")
    assert main(["data", "roundtrip", str(tiny_data / "testing_data.json")]) == 1


def test_real_prompts_are_rebuilt_from_one_text_by_their_tools_alone(real_data: Path) -> None:
    texts: dict[str, list[str]] = {}
    for name in ("training_data", "testing_data"):
        entries = read_entries(real_data / f"{name}.json", on_bad_entry="error")
        texts[name] = [entry.examples[0].system or "" for entry in entries]
    both = [*texts["training_data"], *texts["testing_data"]]
    parts = list(map(parse, both))
    assert [render(one) for one in parts] == both
    assert all(one.tools and one.examples for one in parts)
    few = parts[len(texts["training_data"]) :]
    whole = united(few)
    assert whole.tools == tuple(TINYAGENT)
    for one, text in zip(few, texts["testing_data"], strict=True):
        again = whole.with_own_lines(one).restricted(one.tools)
        assert again.tools == one.tools
        assert render(replace(again, examples=one.examples)) == text
