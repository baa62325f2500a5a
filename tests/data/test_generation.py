"""The generated dataset: reproducible, clean by every check of the project, and varied enough."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.data.generation import dataset
from tinyagent_fast.data.generation.catalogue import (
    Catalogue,
    CatalogueTool,
    SlotParameter,
    load_catalogue,
)
from tinyagent_fast.data.generation.dataset import (
    GenerationSpec,
    generate_dataset,
    generate_entries,
)
from tinyagent_fast.data.generation.queries import Mix, write_request
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.data.schema import Entry, Example, entry_from_json
from tinyagent_fast.data.splits import leak_report, normalise_query
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.reference import reference_scores
from tinyagent_fast.evaluation.scoring import score_pair
from tinyagent_fast.plans.doubts import doubts
from tinyagent_fast.plans.grammar import Plan, parse_joiner, parse_plan, reference_uses
from tinyagent_fast.plans.graph import plan_dag
from tinyagent_fast.plans.tools import JOIN, TINYAGENT, tools_by_name

SPEC = GenerationSpec(train_entries=600, test_entries=120)


@dataclass(frozen=True)
class Generated:
    """A generated dataset as the project's own reader gives it."""

    folder: Path
    train: list[Entry]
    test: list[Entry]

    @property
    def entries(self) -> list[Entry]:
        return self.train + self.test

    def plans(self) -> Iterator[Plan]:
        for entry in self.entries:
            yield parse_plan(entry.examples[0].output)


def generate(folder: Path, spec: GenerationSpec) -> Generated:
    files = generate_dataset(spec, folder)
    train, test = (list(read_entries(p, on_bad_entry="error")) for p in (files.train, files.test))
    return Generated(folder, train, test)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    return generate(tmp_path_factory.mktemp("short"), SPEC)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Generated:
    spec = GenerationSpec(train_entries=60, test_entries=30, prompt_style="full")
    return generate(tmp_path_factory.mktemp("full"), spec)


def content(folder: Path) -> list[bytes]:
    return [(folder / f"{name}_data.json").read_bytes() for name in ("training", "testing")]


def test_both_files_have_the_asked_number_of_entries_without_any_problem(
    short: Generated, full: Generated
) -> None:
    assert (len(short.train), len(short.test)) == (600, 120)
    assert (len(full.train), len(full.test)) == (60, 30)


def test_equal_specs_give_equal_bytes_in_another_process_with_other_hashes(
    short: Generated, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset\n"
        "generate_dataset(GenerationSpec(train_entries=600, test_entries=120), Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert content(tmp_path) == content(short.folder)


def test_another_seed_gives_other_data(short: Generated, tmp_path: Path) -> None:
    other = generate(tmp_path, replace(SPEC, seed=1))
    assert not {e.key for e in short.entries} & {e.key for e in other.entries}
    shared = {e.query for e in short.entries} & {e.query for e in other.entries}
    assert len(shared) < 0.05 * len(other.entries)


def test_more_entries_leave_the_test_file_as_it_is(short: Generated, tmp_path: Path) -> None:
    generate_dataset(replace(SPEC, train_entries=5), tmp_path)
    assert content(tmp_path)[1] == content(short.folder)[1]


def test_no_query_occurs_twice_be_it_in_one_file_or_in_both(short: Generated) -> None:
    queries = [normalise_query(entry.query) for entry in short.entries]
    assert len(set(queries)) == len(queries)
    report = leak_report(
        {"train": [e.query for e in short.train], "test": [e.query for e in short.test]}
    )
    assert report.between[0].normalised == 0


def small_catalogue(*words: str, phrases: tuple[str, ...] = ("ring {who}",)) -> Catalogue:
    who = SlotParameter(name="who", type="str", value="own")
    tool = CatalogueTool(name="ring", parameters=(who,), returns="", phrases=phrases)
    return Catalogue("small", (tool,), {"own": words})


def some_entries(
    catalogue: Catalogue, count: int, taken: set[str] | None = None, **spec: object
) -> list[Entry]:
    made = generate_entries(
        catalogue,
        replace(GenerationSpec(), **spec),  # type: ignore[arg-type]
        count,
        random.Random(0),
        set() if taken is None else taken,
    )
    entries = [entry_from_json(key, raw) for key, raw in made]
    good = [entry for entry in entries if isinstance(entry, Entry)]
    assert len(good) == len(entries), entries
    return good


def test_queries_that_differ_in_punctuation_only_count_as_the_same() -> None:
    catalogue = small_catalogue("Ann", phrases=("ring {who}", "ring, {who}", "ring: {who}"))
    with pytest.raises(DataError, match="99 queries asked for") as error:
        some_entries(catalogue, 99, single_calls=True)
    (found,) = re.findall(r"(\d+) different", error.value.what)
    queries = [e.query for e in some_entries(catalogue, int(found), single_calls=True)]
    assert len(set(map(normalise_query, queries))) == int(found)


def test_queries_that_are_taken_do_not_come_again_in_any_spelling() -> None:
    catalogue = small_catalogue("Ann", "Bob")
    taken = {"ring ann", "please ring ann", "can you ring ann", "i need you to ring ann"}
    before = set(taken)
    for entry in some_entries(catalogue, 9, taken, single_calls=True):
        assert normalise_query(entry.query) not in before
        assert normalise_query(entry.query) in taken


def test_every_plan_is_right_by_the_strict_grammar_and_by_the_published_metric(
    short: Generated, full: Generated
) -> None:
    for entry in (*short.entries, *full.entries):
        text = entry.examples[0].output
        plan = parse_plan(text)
        assert [step.number for step in plan.steps] == list(range(1, len(plan.steps) + 1))
        assert plan.steps[-1].tool == JOIN
        assert reference_scores(text, text).success == 1.0
        score = score_pair(text, text)
        assert (score.success, score.success_dag, score.problems) == (True, True, ())
        assert score.label_problems == ()
        plan_dag(plan)  # raises for a reference that does not point back


def test_no_argument_is_of_another_kind_than_its_parameter_takes(short: Generated) -> None:
    tools = tools_by_name(load_catalogue().tools)
    for entry, plan in zip(short.entries, short.plans(), strict=True):
        assert doubts(plan, tools) == [], entry.query


def test_references_point_back_only(short: Generated) -> None:
    for plan in short.plans():
        for step in plan.steps:
            assert all(1 <= number < step.number for number, _ in reference_uses(step.arguments))


def test_a_list_names_nobody_twice_and_both_are_two(short: Generated) -> None:
    both = 0
    for entry, plan in zip(short.entries, short.plans(), strict=True):
        lists = [a for step in plan.steps for a in step.arguments if isinstance(a, tuple | list)]
        assert all(len(set(named)) == len(named) for named in lists), entry.query
        if "both of them" in entry.query:
            both += 1
            assert 2 in map(len, lists), entry.query
    assert both


def test_no_call_of_a_plan_is_made_twice(short: Generated) -> None:
    for plan in short.plans():
        calls = [(step.tool, repr(step.arguments)) for step in plan.steps]
        assert len(set(calls)) == len(calls)


def test_literal_arguments_are_named_in_the_query(short: Generated) -> None:
    names = {"get_email_address", "get_phone_number", "open_and_get_file_path"}
    found = 0
    for entry, plan in zip(short.entries, short.plans(), strict=True):
        for step in plan.steps:
            if step.tool in names:
                assert str(step.arguments[0]) in entry.query
                found += 1
    assert found > 200


def test_what_a_request_quotes_or_addresses_is_in_its_plan(short: Generated) -> None:
    found = 0
    for entry in short.entries:
        plan = entry.examples[0].output
        # Whose email is answered is said with the email, which is the selected one.
        query = re.sub(r'from "[^"]*"', "", entry.query)
        for text in (*re.findall(r'"([^"]*)"', query), *re.findall(r"[\w.]+@[\w.]+\w", query)):
            assert text in plan, entry.query
            found += 1
    assert found > 700


def test_days_count_from_the_moment_that_the_prompt_tells(short: Generated) -> None:
    found = 0
    for entry, plan in zip(short.entries, short.plans(), strict=True):
        moment = (entry.examples[0].system or "").removeprefix("It is ").partition(". ")[0]
        now = datetime.strptime(moment, "%A %Y-%m-%d %H:%M")
        for step in plan.steps:
            if step.tool != "create_reminder":
                continue
            due = datetime.fromisoformat(str(step.arguments[1]))
            assert due >= now.replace(hour=0, minute=0)
            assert step.arguments[5] == (len(str(step.arguments[1])) == 10)
            if len(plan.steps) == 2 and re.search(r"(?<!after )tomorrow\b(?!')", entry.query):
                assert (due.date() - now.date()).days == 1, entry.query
                found += 1
    assert found > 0


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_no_comma_stands_before_punctuation_however_clauses_end(seed: int) -> None:
    phrases = ("ring {who}, today,", "ring {who}", "what is {who}, then,")
    request = write_request(
        small_catalogue("Ann", "Bo", phrases=phrases), Mix(), random.Random(seed)
    )
    assert not re.search(r",\s*([,.?!]|$)", request.query), request.query


def test_requests_are_worded_in_many_ways(short: Generated) -> None:
    queries = [entry.query for entry in short.entries]

    def share(pattern: str) -> float:
        return sum(re.search(pattern, query) is not None for query in queries) / len(queries)

    assert len({query.split()[0].lower() for query in queries}) > 30
    assert 0.5 < share(r'"') < 0.95
    assert 0.2 < share(r"[.?!] [A-Z]") < 0.7
    assert 0.03 < share(r"(?i)^(please|can you|could you|pls|i'd like|i need)") < 0.25
    assert share(r"\b(him|her|them|it|the note|the link)\b") > 0.05
    assert share(r"(?i)\b(tomorrow|next|this|today|in \d+ (days|minutes))\b") > 0.2
    assert 0.02 < share(r"^[a-z]") < 0.2
    assert 0.02 < share(r"[^.?!]$") < 0.3


def test_the_mix_of_plans_is_like_the_published_one(short: Generated) -> None:
    plans = list(short.plans())
    several = sum(len(plan.steps) > 2 for plan in plans) / len(plans)
    assert 0.70 <= several <= 0.90
    assert max(len(plan.steps) for plan in plans) <= 9
    assert 3.2 <= sum(len(plan.steps) - 1 for plan in plans) / len(plans) <= 4.2
    kinds: Counter[str] = Counter()
    for plan in plans:
        for step in plan.steps:
            kinds[step.tool] += 1
            for argument in step.arguments:
                if isinstance(argument, list):
                    wholes = [whole for _, whole in reference_uses(argument)]
                    kinds["list"] += 1
                    kinds["fan-in"] += len(wholes) > 1
                    kinds["literal list"] += bool(argument) and not wholes
                elif isinstance(argument, str):
                    uses = reference_uses([argument])
                    kinds["whole reference"] += any(whole for _, whole in uses)
                    kinds["reference in a text"] += any(not whole for _, whole in uses)
    assert all(kinds[tool] > 5 for tool in TINYAGENT), kinds
    for kind in ("list", "fan-in", "literal list", "whole reference", "reference in a text"):
        assert kinds[kind] > 10, (kind, kinds)


def test_a_link_is_put_into_a_text_of_its_own(short: Generated) -> None:
    messages = [
        str(step.arguments[1])
        for plan in short.plans()
        for step in plan.steps
        if step.tool == "send_sms"
    ]
    assert any(message.startswith("Here it is: $") for message in messages)


def observations(example: Example) -> list[str]:
    lines = example.user.splitlines()
    return [line for line in lines if line.startswith("Observation: ")]


def test_a_joiner_replans_exactly_what_can_be_mended(short: Generated) -> None:
    actions: Counter[str] = Counter()
    for entry in short.entries:
        point = entry.examples[1]
        assert point.kind == "join"
        answer = parse_joiner(point.output)
        failures = [seen for seen in observations(point) if seen.startswith("Observation: Error")]
        mendable = any("try again" in failure.lower() for failure in failures)
        assert answer.action == ("Replan" if mendable else "Finish")
        assert answer.thought
        assert bool(answer.message) != mendable
        if failures and not mendable:
            assert answer.message in failures[0]
        kinds = [example.kind for example in entry.examples]
        assert kinds == ["plan", "join", *["replan", "join"] * mendable]
        actions["fails" if failures else "works"] += 1
    assert 0.10 < actions["fails"] / len(short.entries) < 0.20


def test_after_a_replan_everything_is_done(short: Generated) -> None:
    replans = [entry.examples for entry in short.entries if len(entry.examples) == 4]
    assert len(replans) > 10
    for plan, _, replan, join in replans:
        assert replan.system == plan.system
        assert replan.user.startswith(f"{plan.user}\nPrevious Plan:\n")
        assert replan.user.endswith("Current Plan:\n\n")
        plan_dag(parse_plan(replan.output))
        assert parse_joiner(join.output).action == "Finish"
        again = len(parse_plan(replan.output).steps) - 1
        assert not any("Error" in seen for seen in observations(join)[-again:])


def test_a_join_point_shows_each_call_of_the_plan_with_its_observation(short: Generated) -> None:
    for entry in short.entries:
        plan, point = parse_plan(entry.examples[0].output), entry.examples[1]
        if "the plan was stopped" in point.user:
            continue
        tools = re.findall(r"^(\w+)\(.*\)\nObservation: ", point.user, flags=re.M)
        assert tools == [step.tool for step in plan.steps[:-1]]


def test_the_stored_form_of_a_joiners_answer_is_what_its_text_says(short: Generated) -> None:
    raw = json.loads((short.folder / "testing_data.json").read_text(encoding="utf-8"))
    for entry in raw.values():
        join = entry["output"][1]
        answer = parse_joiner(join["raw_output"])
        stored = join["parsed_output"]
        assert (answer.thought, answer.action, answer.message) == (
            stored["thought"],
            stored["action"],
            stored["message"],
        )


@pytest.mark.parametrize(("share", "action"), [(0.0, "Finish"), (1.0, "Replan")])
def test_the_failure_share_is_kept(share: float, action: str) -> None:
    for entry in some_entries(load_catalogue(), 30, failure_share=share):
        answer = parse_joiner(entry.examples[1].output)
        failed = "Observation: Error" in entry.examples[1].user
        assert answer.action == action or (failed and action == "Replan")
        assert failed == (action == "Replan")


def test_single_calls_need_no_other_calls_result() -> None:
    for entry in some_entries(load_catalogue(), 200, single_calls=True):
        plan = parse_plan(entry.examples[0].output)
        assert len(plan.steps) == 2
        assert not reference_uses(plan.steps[0].arguments)


def test_a_short_prompt_tells_the_time_and_names_the_needed_tools(
    short: Generated,
) -> None:
    for entry, plan in zip(short.entries, short.plans(), strict=True):
        example = entry.examples[0]
        assert example.system is not None
        moment, _, listed = example.system.partition(". Plan with: ")
        datetime.strptime(moment, "It is %A %Y-%m-%d %H:%M")
        named = listed.split(", ")
        needed = {step.tool for step in plan.steps} - {JOIN}
        assert needed <= set(named) <= set(TINYAGENT)
        assert named == [tool for tool in TINYAGENT if tool in named]
        assert example.user == f"Question: {entry.query}"


def test_full_prompts_share_all_that_stands_before_the_date(full: Generated) -> None:
    prompts = [entry.examples[0].system or "" for entry in full.entries]
    before = {prompt.partition(" - Now it is ")[0] for prompt in prompts}
    assert len(before) == 1
    (shared,) = before
    assert len(shared) > 0.4 * max(map(len, prompts))
    for name in (*TINYAGENT, JOIN):
        assert f"{name}(" in shared
    assert len({prompt.partition(" - Now it is ")[2] for prompt in prompts}) == len(prompts)


def examples_in(prompt: str) -> list[tuple[str, str]]:
    solved = prompt.partition("Examples:\n\n")[2].split("<END_OF_PLAN>\n###\n")
    pairs = [text.strip().split("\n", 1) for text in solved if text.strip()]
    return [(question.removeprefix("Question: "), plan) for question, plan in pairs]


def test_the_examples_of_a_full_prompt_are_right_and_give_no_answer_away(full: Generated) -> None:
    held_out = {normalise_query(entry.query) for entry in full.test}
    for entries, forbidden in ((full.train, held_out), (full.test, set())):
        for entry in entries:
            examples = examples_in(entry.examples[0].system or "")
            assert len(examples) == 5
            for question, plan in examples:
                assert reference_scores(plan, plan).success == 1.0
                assert normalise_query(question) not in forbidden | {normalise_query(entry.query)}


def test_a_full_prompt_that_can_have_no_examples_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataset, "_MAX_REPEATS", 200)  # enough for so few requests
    catalogue = small_catalogue("Ann")
    with pytest.raises(DataError) as error:
        some_entries(catalogue, 99)
    assert "different ones found" in error.value.what
    taken: set[str] = set()
    some_entries(catalogue, int(re.findall(r"(\d+) different", error.value.what)[0]), taken)
    taken.discard("ring ann")
    with pytest.raises(DataError, match="5 examples asked for in each full prompt"):
        some_entries(catalogue, 1, taken, prompt_style="full")


def test_raw_input_is_the_repr_of_a_message_list_as_in_the_published_files(
    short: Generated,
) -> None:
    text = (short.folder / "training_data.json").read_text(encoding="utf-8")
    for key, entry in json.loads(text).items():
        assert len(key) == 32
        assert int(key, 16)
        plan, join, *_ = entry["output"]
        assert [m["role"] for m in ast.literal_eval(plan["raw_input"])] == ["system", "user"]
        assert [m["role"] for m in ast.literal_eval(join["raw_input"])] == ["user"]
        assert (plan["index"], join["index"]) == (0, 1)
        assert plan["raw_output"].endswith(". join()")
        assert plan["parsed_output"][-1] == {"tool_name": JOIN, "tool_args": []}
    assert text.startswith('{\n    "')


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_entries": 0},
        {"test_entries": -1},
        {"failure_share": 1.5},
        {"failure_share": -0.1},
        {"failure_share": float("nan")},
    ],
)
def test_a_spec_that_makes_no_dataset_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        GenerationSpec(**wrong)  # type: ignore[arg-type]


def test_every_entry_is_counted_when_it_is_written(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    spec = GenerationSpec(train_entries=4, test_entries=2)
    generate_dataset(spec, tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_catalogue_that_is_too_small_leaves_the_folder_as_it_was(
    tmp_path: Path, there_before: bool
) -> None:
    catalogue = tmp_path / "small.yaml"
    catalogue.write_text("tools: [{name: beep, phrases: [beep]}]")
    out = tmp_path / "out"
    if there_before:
        generate_dataset(GenerationSpec(train_entries=3, test_entries=1), out)
    before = content(out) if there_before else []
    with pytest.raises(DataError, match="different ones found") as error:
        generate_dataset(GenerationSpec(train_entries=99, test_entries=0, catalogue=catalogue), out)
    assert "too few phrases and values" in error.value.why
    assert "fewer entries" in error.value.fix
    assert (content(out) if there_before else []) == before
    assert len(list(out.iterdir())) == len(before)


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="generated files in"):
        generate_dataset(GenerationSpec(train_entries=1, test_entries=0), tmp_path / "file")


WORDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("'\"\\\n()[]{}#,.:=")),
    min_size=1,
    max_size=3,
)


@given(WORDS)
@settings(max_examples=60, deadline=None)
def test_any_words_of_a_user_give_entries_that_read_and_score_right(words: list[str]) -> None:
    words = [f"{number}{word.replace('$', '')}" for number, word in enumerate(words)]
    tools = {"ring": small_catalogue("x").tools[0]}
    for entry in some_entries(small_catalogue(*words), 3):
        text = entry.examples[0].output
        assert reference_scores(text, text, tools).success == 1.0
        assert score_pair(text, text, tools).label_problems == ()
        asked = [step.arguments[0] for step in parse_plan(text).steps[:-1]]
        assert set(asked) <= set(words)
