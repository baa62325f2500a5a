"""Tool catalogues: the built-in one is TinyAgent's, one of your own works, faults are explained."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tinyagent_fast.cli import main
from tinyagent_fast.data.generation import values
from tinyagent_fast.data.generation.catalogue import REQUIRED, Catalogue, load_catalogue
from tinyagent_fast.data.generation.dataset import (
    GenerationSpec,
    generate_dataset,
    generate_entries,
)
from tinyagent_fast.data.generation.prompts import full_planner_prompt
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.scoring import score_pair
from tinyagent_fast.plans.grammar import parse_plan, references
from tinyagent_fast.plans.tools import TINYAGENT_TOOLS, accepts

README = Path(__file__).parents[2] / "data" / "README.md"

OWN: dict[str, Any] = {
    "name": "garden",
    "values": {"plant": ["rose", "oak", "fern", "ivy", "lily"], "litres": [1, 2, 5, 10]},
    "tools": [
        {
            "name": "find_bed",
            "description": "Gives the bed in which a plant grows.",
            "parameters": [{"name": "plant", "type": "str", "value": "plant"}],
            "returns": "bed",
            "mention": "the bed of the {plant}",
            "phrases": ["find the bed of the {plant}"],
        },
        {
            "name": "find_tap",
            "parameters": [{"name": "bed", "type": "str", "from": "bed"}],
            "returns": "tap",
            "mention": "the tap next to {bed}",
            "phrases": ["which tap is next to {bed}"],
            "weight": 0,
        },
        {
            "name": "water",
            "description": ["Waters beds.", "litres is 1 unless I say otherwise."],
            "parameters": [
                {"name": "taps", "type": "list[str]", "from": ["tap"]},
                {"name": "litres", "type": "int", "value": "litres", "default": 1},
                {"name": "slowly", "type": "bool", "default": False},
                {"name": "remark", "type": "str", "default": None, "nullable": True},
            ],
            "phrases": ["open {taps}[ for {litres} litres]", "let {taps} run"],
        },
    ],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    """Return a function that writes a document as a catalogue file."""

    def write_document(document: object) -> Path:
        path = tmp_path / "catalogue.yaml"
        text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    return write_document


def own(**changes: object) -> dict[str, Any]:
    """Copy the garden with changes: `water__phrases=[...]`, `water__litres__type="str"`."""
    document: dict[str, Any] = json.loads(json.dumps(OWN))
    for path, value in changes.items():
        names = path.split("__")
        target = document
        for index, name in enumerate(names[:-1]):
            if index == 0 and name != "values":
                target = next(t for t in document["tools"] if t["name"] == name)
            elif index == 1:
                target = next(p for p in target["parameters"] if p["name"] == name)
            else:
                target = target[name]
        if value is None:
            target.pop(names[-1], None)
        else:
            target[names[-1]] = value
    return document


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_catalogue(path)
    problems = caught.value.why.split("\n       ")
    assert f"has {len(problems)} problem(s)" in caught.value.what
    return problems


def test_the_built_in_catalogue_has_tinyagents_tools_as_the_scorer_knows_them() -> None:
    ours = [tool for tool in load_catalogue().tools]
    assert [(t.name, [(p.name, p.type, p.nullable) for p in t.parameters]) for t in ours] == [
        (t.name, [(p.name, p.type, p.nullable) for p in t.parameters]) for t in TINYAGENT_TOOLS
    ]


def test_the_built_in_catalogue_describes_every_tool_and_asks_for_it_in_several_ways() -> None:
    for tool in load_catalogue().tools:
        assert tool.description, tool.name
        assert len(tool.phrases) >= 3, tool.name


def test_defaults_of_the_built_in_catalogue_are_right_arguments() -> None:
    for tool in load_catalogue().tools:
        for slot, parameter in zip(tool.parameters, tool.parameters, strict=True):
            if slot.default is not REQUIRED:
                assert accepts(parameter, slot.default), (tool.name, slot.name)


def test_a_catalogue_of_ones_own_gives_data_with_its_tools_values_and_chains(
    write: Callable[[object], Path], tmp_path: Path
) -> None:
    path = write(OWN)
    spec = GenerationSpec(train_entries=120, test_entries=30, catalogue=path)
    files = generate_dataset(spec, tmp_path / "out")
    tools = {tool.name: tool for tool in load_catalogue(path).tools}
    used: set[str] = set()
    chains = 0
    for file in (files.train, files.test):
        for entry in read_entries(file, on_bad_entry="error"):
            text = entry.examples[0].output
            score = score_pair(text, text, tools)
            assert (score.success, score.problems) == (True, ())
            called = [step.tool for step in parse_plan(text).steps]
            used.update(called)
            if "water" in called:
                chains += 1
                assert {"find_bed", "find_tap"} <= set(called)
                assert not {"find_bed", "find_tap"} - set(
                    (entry.examples[0].system or "").replace(",", "").split()
                )
    assert used == {*tools, "join"}
    assert chains > 30


def test_a_tool_of_weight_0_is_called_for_others_but_never_asked_for(
    write: Callable[[object], Path],
) -> None:
    catalogue = load_catalogue(write(OWN))
    for query in queries_of(catalogue, 100):
        assert "which tap" not in query.casefold()


def queries_of(catalogue: Catalogue, count: int) -> list[str]:
    made = generate_entries(catalogue, GenerationSpec(), count, random.Random(1), set())
    return [entry["input"] for _, entry in made]


def test_own_numbers_are_numbers_in_the_plan_and_words_in_the_query(
    write: Callable[[object], Path],
) -> None:
    catalogue = load_catalogue(write(OWN))
    made = generate_entries(catalogue, GenerationSpec(), 150, random.Random(2), set())
    seen = set()
    for _, entry in made:
        for step in entry["output"][0]["parsed_output"]:
            if step["tool_name"] == "water":
                litres = step["tool_args"][1]
                seen.add(litres)
                assert litres == 1 or f"for {litres} litres" in entry["input"]
    assert seen == {1, 2, 5, 10}


def test_a_full_prompt_shows_signature_and_description_of_every_tool(
    write: Callable[[object], Path],
) -> None:
    catalogue = load_catalogue(write(OWN))
    prompt = full_planner_prompt(catalogue, [], datetime(2024, 1, 1))
    for line in (
        "1. find_bed(plant: str) -> str\n - Gives the bed in which a plant grows.\n",
        "3. water(taps: list[str], litres: int, slowly: bool, remark: str) -> str\n"
        " - Waters beds.\n - litres is 1 unless I say otherwise.\n",
        "4. join() -> str\n",
    ):
        assert line in prompt


def test_all_problems_are_reported_at_once_each_with_its_place_and_a_hint(
    write: Callable[[object], Path],
) -> None:
    document = own(
        find_bed__plant__valu="plant",
        find_bed__mention="the bed of the {plan}",
        find_tap__bed__from="bad",
        water__taps__from="circle",
        water__phrases=["open {taps}", "run"],
        water__litres__default="one",
    )
    document["tool"] = []
    document["tools"].append(
        {
            "name": "turn",
            "parameters": [{"name": "again", "type": "str", "from": "circle"}],
            "returns": "circle",
            "mention": "turn {again}",
            "phrases": ["turn {again}"],
        }
    )
    problems = problems_of(write(document))
    expected = [
        ("the top level", "did you mean 'tools'"),
        ("find_bed.plant", "did you mean 'value'"),
        ("find_bed", "did you mean 'plant'"),
        ("find_bed", "{plant}"),
        ("find_tap.bed.from", "did you mean 'bed'"),
        ("water.taps.from", "circle"),
        ("water.litres.default", "'one'"),
        ("water", "{taps}"),
        ("turn.again.from", "circle"),
    ]
    for problem, (place, named) in zip(problems, expected, strict=True):
        assert problem.startswith(f"{place}: ")
        assert named in problem


FAULTS: list[tuple[dict[str, object], str]] = [
    ({"find_bed__nme": 1}, "find_bed: unknown key `nme`; did you mean 'name'?"),
    ({"find_bed__phrases": None}, "find_bed.phrases: must be a list of sentences"),
    ({"find_bed__phrases": []}, "find_bed.phrases: must be a list of sentences"),
    ({"find_bed__phrases": "find"}, "find_bed.phrases: must be a list of sentences"),
    ({"find_bed__phrases": [""]}, "find_bed.phrases: must be a list of sentences"),
    ({"find_bed__phrases": ["{plant}" + "(" * 3000]}, "has more than 2,000 characters"),
    ({"find_bed__phrases": ["{plant}" + "[" * 1900]}, "brackets within brackets without end"),
    ({"find_bed__phrases": ["[{plant}]"]}, "has nothing outside its optional parts"),
    ({"find_tap__mention": "(it|)", "find_tap__bed__default": "a"}, "phrase '(it|)' has nothing"),
    ({"find_bed__phrases": ["{plant:!said}"]}, "phrase '{plant:!said}' has nothing"),
    ({"values__plant": ["rose", " "]}, "values.plant: ' ' is blank"),
    ({"find_bed__phrases": ["{plant} [x"]}, "has unbalanced brackets"),
    ({"find_bed__phrases": ["{plant} ]x["]}, "has unbalanced brackets"),
    ({"find_bed__phrases": ["{plant} (a]|b)"]}, "has unbalanced brackets"),
    ({"find_bed__phrases": ["{plant} {"]}, "a brace that is no {slot}"),
    ({"find_bed__phrases": ["{plant:litteral}"]}, "no kind; did you mean 'literal'?"),
    ({"find_bed__phrases": ["{plant:number}"]}, "as 'number', which gives no str"),
    ({"find_tap__phrases": ["{bed:bad}"]}, "as 'bad', which is no kind; did you mean 'bed'?"),
    ({"find_bed__phrases": ["{plant} for <persn>"]}, "is no kind of value; did you mean 'person'?"),
    ({"find_bed__phrases": ["(a|{plant})"]}, "leaves out {plant}, which has no default"),
    ({"find_bed__phrases": ["{plant} (a|or {plant})"]}, "names {plant} twice"),
    ({"find_bed__plant__unsaid": "bed"}, "find_bed.plant.unsaid: must be a list of names"),
    ({"water__taps__several": 2}, "water.taps.several: must be a share from 0 to 1"),
    ({"find_bed__again": 5}, "find_bed.again: must be a text or a list of texts"),
    ({"find_bed__phrases": ["{plant} or {plant}"]}, "names {plant} twice"),
    ({"find_bed__phrases": ["{plant}[ or {plant}]"]}, "names {plant} twice"),
    ({"find_bed__phrases": ["x[ {plant}]"]}, "leaves out {plant}, which has no default"),
    ({"find_bed__mention": 5}, "find_bed.mention: must be one line of text, got 5"),
    ({"find_bed__returns": ["bed"]}, "find_bed.returns: must be one line of text"),
    ({"find_bed__description": {"a": 1}}, "find_bed.description: must be a text or a list"),
    ({"find_bed__parameters": "plant"}, "find_bed.parameters: must be a list"),
    ({"find_bed__parameters": ["plant"]}, "find_bed.parameters: each must be a mapping"),
    ({"find_bed__weight": -1}, "find_bed.weight: must be a number of 0 or more, got -1"),
    ({"find_bed__weight": float("nan")}, "find_bed.weight: must be a number of 0 or more"),
    ({"find_bed__weight": "2"}, "find_bed.weight: must be a number of 0 or more, got '2'"),
    ({"find_bed__name": "join"}, "join: a name is a word"),
    ({"find_bed__name": "find bed"}, "find bed: a name is a word"),
    ({"find_bed__name": "water"}, "water: defined twice"),
    ({"find_bed__plant__name": "a b"}, "find_bed.a b: a name is a word"),
    ({"find_bed__plant__type": "text"}, "type: must be one of str, int, bool, list[str]"),
    ({"find_bed__plant__type": "int"}, "'plant' gives texts, which are no int"),
    ({"find_bed__plant__value": "number"}, "'number' gives numbers, which are no str"),
    ({"water__slowly__value": "plant"}, "'plant' gives texts, which are no bool"),
    ({"find_bed__plant__value": "plants"}, "unknown kind 'plants'; did you mean 'plant'?"),
    ({"find_bed__plant__value": None}, "names {plant}, which has neither `value` nor `from`"),
    ({"find_bed__plant__follows": "x"}, "follows: only goes with `value: end` or `all_day`"),
    ({"find_bed__plant__value": "end"}, "follows: must name the parameter that holds the start"),
    ({"find_tap__bed__from": 3}, "find_tap.bed.from: must be a kind of result"),
    ({"find_tap__bed__as": ["See"]}, "find_tap.bed.as: must be a list of texts that contain {}"),
    ({"find_tap__bed__as": ["{} for $5"]}, "find_tap.bed.as: '{} for $5' would be read"),
    ({"water__taps__as": ["See {}"]}, "water.taps.as: only for parameters of type str"),
    ({"find_tap__phrases": ["{bed:literal}"]}, "wants a literal {bed}, which has no `value`"),
    ({"water__litres__default": None, "water__slowly__default": 1}, "slowly.default: must be of"),
    ({"water__litres__default": True}, "water.litres.default: must be of type int"),
    ({"water__remark__nullable": "yes"}, "water.remark.nullable: must be true or false"),
    ({"water__remark__default": "cost $5"}, "water.remark.default: 'cost $5' would be read"),
    ({"water__remark__default": "a" * 1999}, "takes more than 2,000 characters"),
    ({"water__litres__default": -(2**63)}, "is no number that a plan can have"),
    ({"values__litres": [1, 2**64]}, "values.litres: 18446744073709551616 is no number"),
    ({"values__plant": ["rose", "a" * 120_000]}, "takes more than 2,000 characters"),
    ({"values__plant": ["a <END_OF_PLAN>", "oak"]}, "'a <END_OF_PLAN>' has <END_OF_PLAN> in it"),
    ({"water__remark__default": "<END_OF_RESPONSE>"}, "remark.default: '<END_OF_RESPONSE>' has <"),
    ({"find_bed__weight": 1e308, "water__weight": 1e308}, "add up to no number"),
    ({"find_bed__weight": 10**400}, "find_bed.weight: must be a number of 0 or more, got 1000"),
    ({"values__plant": ["rose", "\ud83c"]}, r"values.plant[1]: '\ud83c' has half a character"),
    ({"find_bed__description": ["a", "b\udf89"]}, "description[1]: 'b\\udf89' has half a char"),
    ({"values__plant": []}, "values.plant: must be a list of words that is not empty"),
    ({"values__plant": "rose"}, "values.plant: must be a list of words that is not empty"),
    ({"values__plant": ["rose", True]}, "values.plant: True is no text; put it in quotes"),
    ({"values__plant": ["rose", 1.5]}, "values.plant: 1.5 is no text; put it in quotes"),
    ({"values__plant": ["rose", 4]}, "values.plant: holds texts and numbers"),
    ({"values__plant": ["a $1 rose"]}, "'a $1 rose' would be read as the result of a call"),
    ({"values__end": ["x"]}, "values.end: the name stands for what follows from the start"),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_a_fault_is_found_when_the_catalogue_is_loaded(
    write: Callable[[object], Path], changes: dict[str, object], message: str
) -> None:
    problems = problems_of(write(own(**changes)))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("- a list", "the top level must be a mapping with a list `tools`"),
        ("", "the top level must be a mapping with a list `tools`"),
        ("tools: []", "the top level must be a mapping with a list `tools` that is not empty"),
        ("tools: [5]", "tools[0]: must be a mapping with a `name`"),
        ("values: [a]\ntools: [{name: a, phrases: [b]}]", "values: must be a mapping"),
        ("tools: [{name: a, phrases: [b], weight: 0}]", "every tool has weight 0"),
        ("tools: {", "it is no valid YAML"),
        ("name: a\ntools: []\nname: b", "the key `name` is given twice, again in line 3"),
        ("name: 2024-99-99", "it is no valid YAML"),
    ],
)
def test_a_document_that_is_no_catalogue_is_refused(
    write: Callable[[object], Path], document: str, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_catalogue(write(document))
    assert message in caught.value.why


def test_the_longest_arguments_of_a_catalogue_are_written_and_read_again(
    write: Callable[[object], Path], tmp_path: Path
) -> None:
    numbers = [2**63 - 1, 1 - 2**63]
    document = own(values__plant=["a" * 1998, "b\\" * 600], values__litres=numbers)
    spec = GenerationSpec(train_entries=10, test_entries=2, catalogue=write(document))
    files = generate_dataset(spec, tmp_path / "out")
    assert len(list(read_entries(files.train, on_bad_entry="error"))) == 10


def test_a_plan_that_only_many_long_arguments_make_too_long_is_the_catalogues_fault(
    write: Callable[[object], Path], tmp_path: Path
) -> None:
    default = {"type": "str", "default": "a" * 1990}
    document = {
        "values": {"w": ["x", "y", "z"]},
        "tools": [
            {
                "name": "go",
                "parameters": [
                    {"name": "x", "type": "str", "value": "w"},
                    *({"name": f"p{number}", **default} for number in range(60)),
                ],
                "phrases": ["go {x}"],
            }
        ],
    }
    with pytest.raises(DataError, match="100,000"):
        generate_dataset(GenerationSpec(catalogue=write(document)), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.json"))


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
@pytest.mark.parametrize("escaped", [True, False])
def test_an_emoji_comes_through_however_json_writes_it(
    tmp_path: Path, escaped: bool, line_break: str
) -> None:
    path, words = tmp_path / "catalogue.json", ["🎉", "Füße", "x"]
    text = json.dumps(own(values__plant=words), ensure_ascii=escaped, indent=1)
    assert (r"\ud83c\udf89" in text) == escaped
    path.write_bytes(text.replace("\n", line_break).encode())
    assert load_catalogue(path).words["plant"] == tuple(words)
    spec = GenerationSpec(train_entries=20, test_entries=2, catalogue=path)
    files = generate_dataset(spec, tmp_path / "out")
    plans = [entry.examples[0].output for entry in read_entries(files.train, on_bad_entry="error")]
    assert any('"🎉"' in plan for plan in plans)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it cannot be read: there is no such file"):
        load_catalogue(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="it is no valid YAML"):
        load_catalogue(tmp_path / "binary.yaml")


def test_functions_in_place_of_a_catalogue_are_refused_with_the_way_to_make_one(
    tmp_path: Path,
) -> None:
    functions = tmp_path / "home.py"
    functions.write_text('def ring(person: str) -> str:\n    """Rings."""\n    return person\n')
    with pytest.raises(DataError, match="tools check") as caught:
        load_catalogue(functions)
    command = re.findall("`tinyagent-fast (.*?)`", caught.value.fix)[0]
    assert main(command.split()) == 0
    assert [tool.name for tool in load_catalogue(tmp_path / "home.yaml").tools] == ["ring"]


EVENT: dict[str, Any] = {
    "name": "plan",
    "parameters": [
        {"name": "start", "type": "str", "value": "start"},
        {"name": "end", "type": "str", "value": "end", "follows": "start"},
    ],
    "phrases": ["plan it {start}"],
}


def test_an_end_is_one_hour_after_its_start_unless_it_is_said(
    write: Callable[[object], Path],
) -> None:
    catalogue = load_catalogue(write({"tools": [EVENT]}))
    made = generate_entries(catalogue, GenerationSpec(), 60, random.Random(0), set())
    lengths = set()
    for _, entry in made:
        for step in entry["output"][0]["parsed_output"][:-1]:
            start, end = (datetime.fromisoformat(time) for time in step["tool_args"])
            lengths.add(seconds := (end - start).total_seconds())
            assert seconds == 3600 or " from " in entry["input"]
    assert len(lengths) > 2


@pytest.mark.parametrize(
    "start",
    [
        {"value": "number", "type": "int"},
        {"type": "list[str]"},
        {"default": ""},
        {"from": "time"},
        {"value": "place"},
    ],
)
def test_an_end_needs_a_start_that_is_always_a_time(
    write: Callable[[object], Path], start: dict[str, object]
) -> None:
    event = json.loads(json.dumps(EVENT))
    event["parameters"][0] |= start
    clock = {"name": "clock", "returns": "time", "mention": "now", "phrases": ["tell the time"]}
    assert any(
        problem.startswith("plan.end.follows: ")
        for problem in problems_of(write({"tools": [event, clock]}))
    )


def test_an_end_cannot_be_said(write: Callable[[object], Path]) -> None:
    event = {**EVENT, "phrases": ["plan it {start} to {end}"]}
    (problem,) = problems_of(write({"tools": [event]}))
    assert problem.endswith("names {end}, which follows from another parameter")


def chain(length: int, last: dict[str, object]) -> dict[str, Any]:
    """Make tools of which each needs the result of the next."""
    tools = [
        {
            "name": f"step_{at}",
            "parameters": [{"name": "x", "type": "str", **last}]
            if at == length - 1
            else [{"name": "x", "type": "str", "from": f"result {at + 1}"}],
            "returns": f"result {at}",
            "mention": f"the result {at} of {{x}}",
            "phrases": [f"do step {at} with {{x}}"],
        }
        for at in range(length)
    ]
    return {"tools": tools}


@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_chain_without_literals_is_followed_to_its_end(
    write: Callable[[object], Path], length: int
) -> None:
    catalogue = load_catalogue(write(chain(length, {"value": "file"})))
    made = generate_entries(catalogue, GenerationSpec(), 60, random.Random(0), set())
    tools = {tool.name: tool for tool in catalogue.tools}
    longest = 0
    for _, entry in made:
        text = entry["output"][0]["raw_output"]
        assert score_pair(text, text, tools).label_problems == ()
        for step in parse_plan(text).steps[:-1]:
            needs_other = step.tool != f"step_{length - 1}"
            assert bool(references(step.arguments)) == needs_other
        longest = max(longest, len(parse_plan(text).steps) - 1)
    assert longest >= length


def test_a_circle_that_a_literal_can_leave_is_left(write: Callable[[object], Path]) -> None:
    document = chain(3, {"from": "result 0"})
    document["tools"].append(
        {
            "name": "look",
            "parameters": [{"name": "x", "type": "str", "value": "file"}],
            "returns": "result 0",
            "mention": "the look of {x}",
            "phrases": ["look at {x}"],
        }
    )
    catalogue = load_catalogue(write(document))
    assert catalogue.chain_lengths == {"step_0": 3, "step_1": 2, "step_2": 1, "look": 0}
    assert len(queries_of(catalogue, 40)) == 40


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_circle_without_literals_is_refused(write: Callable[[object], Path], length: int) -> None:
    problems = problems_of(write(chain(length, {"from": "result 0"})))
    assert len(problems) == length
    assert all("need one another in a circle" in problem for problem in problems)


def test_a_chain_of_more_calls_than_a_plan_may_have_is_the_users_error(
    write: Callable[[object], Path],
) -> None:
    document = chain(9, {"value": "file"})
    for tool in document["tools"][1:]:
        tool["weight"] = 0
    with pytest.raises(DataError, match=r"no request with at most 8 call\(s\)") as caught:
        queries_of(load_catalogue(write(document)), 1)
    assert "`value` too" in caught.value.fix


def readme_example() -> str:
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return str(text)


def test_the_example_of_the_readme_works_and_gives_the_plan_shown_there(
    write: Callable[[object], Path], tmp_path: Path
) -> None:
    path = write(readme_example())
    spec = GenerationSpec(train_entries=300, test_entries=50, catalogue=path)
    files = generate_dataset(spec, tmp_path / "out")
    tools = {tool.name: tool for tool in load_catalogue(path).tools}
    plans = {}
    for entry in read_entries(files.train, on_bad_entry="error"):
        text = entry.examples[0].output
        assert score_pair(text, text, tools).problems == ()
        plans[entry.query] = text
    shown = re.search(
        r'"(Set the lamp [^"]*)" with\nthe plan\n\n((?:    .*\n)+)', README.read_text()
    )
    assert shown is not None
    plan = "\n".join(line.strip() for line in shown[2].splitlines())
    assert score_pair(plan, plan, tools).problems == ()
    same_shape = [p for p in plans.values() if score_pair(plan, p, tools).success_dag]
    assert same_shape


def test_the_readme_names_every_key_and_every_kind_of_value() -> None:
    section = README.read_text(encoding="utf-8").partition("## A catalogue of your own")[2]
    section = section.partition("\n## ")[0]
    table_words = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    keys = {"name", "values", "tools", "description", "parameters", "returns", "mention", "phrases"}
    keys |= {"weight", "type", "value", "from", "as", "follows", "default", "nullable"}
    keys |= {"again", "unsaid", "several", "lookup"}
    assert table_words == keys | set(values.BUILT_IN_VALUES) | {"end", "all_day"}


def literal_parameter(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from(
        [
            {"name": name, "type": "str", "value": "person"},
            {"name": name, "type": "list[str]", "value": "own"},
            {"name": name, "type": "int", "value": "number", "default": 3},
            {"name": name, "type": "str", "value": "start", "from": "r"},
            {"name": name, "type": "list[str]", "from": ["r", "s"]},
            {"name": name, "type": "str", "from": "s", "as": ["{}", "See {}"]},
        ]
    )


# Mostly right, so that many documents are; one field of some is then made wrong.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(["x", "y", "z"]),
    "type": st.sampled_from(["str", "int", "bool", "list[str]", "dict"]),
    "value": st.sampled_from(["start", "number", "own", "nothing", "end", "person", None, 5]),
    "from": st.sampled_from(["r", "s", "t", ["r", "s"], [], 5]),
    "as": st.sampled_from([["{}"], ["See {}"], "x"]),
    "follows": st.sampled_from(["x", "y"]),
    "default": st.sampled_from(["", 0, None, [], True, "$1"]),
    "nullable": st.sampled_from([True, False, 1]),
}
CHANGE = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: FIELDS[name].map(lambda value: {name: value})
)
PHRASES = [
    ["a {x} b {y}", "c {y}, {x}"],
    ["{y:literal} {x}"],
    ["a {x}[ b {y}]"],
    ["{x"],
    [" {x} {y}"],
]


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    tools = []
    for name in draw(st.sampled_from([["f"], ["f", "g"], ["f", "g", "h"]])):
        parameters = [draw(literal_parameter("x")), draw(literal_parameter("y"))]
        if draw(st.integers(0, 4)) == 0:
            parameters[0] = {**parameters[0], **draw(CHANGE)}
        tool: dict[str, Any] = {
            "name": name,
            "parameters": parameters,
            "phrases": draw(st.sampled_from(PHRASES[:1] * 8 + PHRASES)),
            "returns": draw(st.sampled_from("rs")),
            "weight": draw(st.sampled_from([1, 2.5, 0])),
        }
        if draw(st.booleans()):
            tool["mention"] = "the {x} of {y}"
        tools.append(tool)
    look = {"name": "look", "phrases": ["look"], "mention": "a look", "returns": "r"}
    seek = {"name": "seek", "phrases": ["seek"], "mention": "it", "returns": "s"}
    return {"values": {"own": ["one", "two"]}, "tools": [*tools, look, seek]}


@given(documents())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_catalogue_is_refused_with_reasons_or_gives_right_plans(
    write: Callable[[object], Path], document: dict[str, Any]
) -> None:
    try:
        catalogue = load_catalogue(write(document))
        made = list(generate_entries(catalogue, GenerationSpec(), 6, random.Random(0), set()))
    except DataError as error:
        assert error.why
        return
    event("generates")
    tools = {tool.name: tool for tool in catalogue.tools}
    for _, entry in made:
        text = entry["output"][0]["raw_output"]
        assert score_pair(text, text, tools).label_problems == ()
