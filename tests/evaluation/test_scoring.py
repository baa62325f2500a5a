"""Scores of pairs and of sets of predictions: why a prediction fails, and what is counted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.scoring import (
    FAILURE_CODES,
    PROBLEMS,
    Metrics,
    Prediction,
    refuse_unknown_tools,
    score_all,
    score_pair,
    summarise,
    why_hopeless,
)
from tinyagent_fast.plans.tools import Parameter, Tool, tools_by_name

LABEL = """\
1. get_email_address("Ann")
2. get_phone_number("Bob")
3. reply_to_email(["$1"], "hello", [])
4. send_sms(["$2"], "hi")
5. join()"""


def change(old: str, new: str) -> str:
    assert old in LABEL
    return LABEL.replace(old, new, 1)


def test_a_right_plan_is_a_success_without_problems() -> None:
    score = score_pair(LABEL, change('"hello"', '"other words"'))
    assert (score.success, score.success_dag, score.tool_recall) == (True, True, 1.0)
    assert (score.failure, score.problems, score.label_problems) == (None, (), ())
    assert (score.label_steps, score.bad_label) == (4, False)


@pytest.mark.parametrize(
    ("prediction", "failure", "problems"),
    [
        ("", "empty", ("unparsable", "no_join")),
        (LABEL.replace("\n5. join()", ""), "no_join", ("no_join",)),
        (LABEL[:-12], "no_join", ("no_join",)),
        (
            "Certainly!\n" + change("get_phone_number", "get_email_address"),
            "unparsable",
            ("unparsable",),
        ),
        (change("5. join()", "4. join()"), "unparsable", ("unparsable",)),
        (change('["$1"], ', "cc=[], "), "bad_arguments", ("unparsable", "bad_arguments")),
        (change("send_sms", "send_letter"), "unknown_tool", ("unknown_tool",)),
        (change('"$1"', '"$9"'), "bad_reference", ("bad_reference",)),
        (change('"Ann"', '"$1"'), "bad_reference", ("bad_reference",)),
        (
            change("4. send_sms", "4. append_note_content"),
            "missing_tool",
            ("wrong_arity", "wrong_argument_type"),
        ),
        (change('4. send_sms(["$2"], "hi")\n', ""), "missing_tool", ()),
        (change("5. join()", '5. open_note("x", "")\n6. join()'), "extra_tool", ()),
        (change("$1", "$2"), "wrong_edges", ()),
        (change("$2", "b@c.de"), "wrong_edges", ()),
        (change("$1", "${1}"), "reference_quirk", ()),
        (change('"hello"', '"$1"'), "reference_quirk", ()),
        (
            change('["$1"], "hello", []', '["$1"], "hello", "$0"'),
            "bad_reference",
            ("bad_reference",),
        ),
    ],
)
def test_a_failure_has_one_reason_and_every_problem_is_listed(
    prediction: str, failure: str, problems: tuple[str, ...]
) -> None:
    score = score_pair(LABEL, prediction)
    assert (score.success, score.failure, score.problems) == (False, failure, problems)
    assert score.success_dag is (failure == "reference_quirk")


def test_problems_are_found_independently_and_on_successes_too() -> None:
    score = score_pair(
        LABEL, change('"hello", []', '"hello", "a file"').replace('"Bob"', '"Bob", 1')
    )
    assert score.success
    assert score.problems == ("wrong_arity", "wrong_argument_type")
    several = score_pair(LABEL, 'so\n1. fly("a")\n2. get_phone_number(7, 8)')
    assert several.failure == "no_join"
    assert set(several.problems) == {
        "unparsable",
        "no_join",
        "unknown_tool",
        "wrong_arity",
        "wrong_argument_type",
    }


def test_a_plan_cut_off_by_the_length_limit_is_told_apart() -> None:
    score = score_pair(LABEL, LABEL[:-12], truncated=True)
    assert (score.failure, score.problems) == ("truncated", ("no_join", "truncated"))
    assert score_pair(LABEL, LABEL, truncated=True).failure is None


@pytest.mark.parametrize(
    ("label", "problems"),
    [
        (change('"$1"', '"$9"'), ("bad_reference",)),
        ("not a plan", ("unparsable", "no_join")),
        (change("5. join()", ""), ("no_join",)),
        # The published metric takes an amount of money for a step that is not there.
        (change('"hello"', '"pay $500"'), ()),
    ],
)
def test_a_label_at_fault_is_named_as_the_reason(label: str, problems: tuple[str, ...]) -> None:
    score = score_pair(label, LABEL)
    assert (score.failure, score.bad_label, score.label_problems) == ("bad_label", True, problems)
    assert score.problems == ()


def test_slips_in_a_label_that_can_be_scored_are_listed_only() -> None:
    score = score_pair(change('"Bob"', '"Bob", 1'), LABEL)
    assert (score.success, score.bad_label, score.label_problems) == (True, False, ("wrong_arity",))


def test_tools_of_a_dataset_of_its_own_replace_the_known_ones() -> None:
    tools = tools_by_name([Tool(name="look_up", parameters=(Parameter("key", "int"),))])
    plan = "1. look_up(7)\n2. join()"
    own = score_pair(plan, plan, tools)
    assert (own.success, own.problems, own.tool_recall) == (True, (), 1.0)
    assert score_pair(plan, "1. join()", tools).failure == "missing_tool"
    assert score_pair(plan, plan).label_problems == ("unknown_tool",)
    assert score_pair(plan, plan, None) == score_pair(plan, plan)


@given(
    st.lists(
        st.sampled_from(
            ['open_note("a", "")', 'find_lamp("$1")', "find_lamp(not a literal)", "look()"]
        ),
        min_size=1,
        max_size=4,
    ),
    st.text(),
)
def test_garbage_never_succeeds_whatever_tools_the_label_calls(
    calls: list[str], garbage: str
) -> None:
    label = "\n".join(f"{at}. {call}" for at, call in enumerate([*calls, "join()"], 1))
    for prediction in (garbage, "", "1. garbage()", f"{garbage}\n1. join()"):
        score = score_pair(label, prediction)
        assert (score.success, score.failure is None) == (False, False)


@pytest.mark.parametrize("call", ['find_lamp("a")', "find_lamp(not a literal)"])
@pytest.mark.parametrize("before", [[], ['open_note("a", "")']])
def test_a_label_that_calls_an_unknown_tool_is_bad_and_its_copy_no_success(
    call: str, before: list[str]
) -> None:
    label = "\n".join(f"{at}. {one}" for at, one in enumerate([*before, call, "join()"], 1))
    score = score_pair(label, label)
    assert (score.success, score.failure, score.bad_label) == (False, "bad_label", True)
    assert why_hopeless(label) is not None
    with pytest.raises(DataError, match="find_lamp"):
        refuse_unknown_tools("labels", [LABEL, label], None, "name them")
    refuse_unknown_tools("labels", [LABEL], None, "name them")


def test_a_call_in_a_thought_of_a_label_is_told_from_an_unknown_tool() -> None:
    label = "Thought: as step 1. find_lamp(x) says\nThought: so\n" + LABEL
    assert score_pair(label, label).failure == "bad_label"  # the published metric reads a step
    with pytest.raises(DataError, match="find_lamp") as caught:
        refuse_unknown_tools("labels", [LABEL, label], None, "name the catalogue")
    assert "thought" in str(caught.value)
    assert "catalogue" not in caught.value.fix


def row(prediction: str, stop_reason: str = "stop", label: str = LABEL) -> Prediction:
    return Prediction.from_json(
        {
            "key": "k",
            "query": "q",
            "label": label,
            "prediction": prediction,
            "stop_reason": stop_reason,
            "new_tokens": 9,
        }
    )


def metrics_of(rows: Sequence[Prediction]) -> Metrics:
    return summarise([plan.score for plan in score_all(rows)])


def test_a_set_of_predictions_is_summed_up() -> None:
    short = "1. join()"
    metrics = metrics_of(
        [
            row(LABEL),
            row(change("$1", "${1}")),
            row(LABEL[:-12], "length"),
            row(short, label=short),
            row(LABEL, label="not a plan"),
            row(change('"hello", []', '"hello", 3')),
        ]
    )
    assert metrics.n == 6
    assert (metrics.success.count, metrics.success.total) == (3, 6)
    assert metrics.success_dag.count == 4
    assert metrics.failures == {"reference_quirk": 1, "truncated": 1, "bad_label": 1}
    assert metrics.truncated.count == metrics.no_join.count == 1
    assert metrics.wrong_argument_type.count == 1
    assert metrics.unparsable.count == metrics.unknown_tool.count == metrics.wrong_arity.count == 0
    assert metrics.bad_labels.count == 1
    assert metrics.label_problems == {"unparsable": 1, "no_join": 1}
    by_steps = {steps: share.count for steps, share in metrics.success_by_steps.items()}
    assert by_steps == {0: 1, 4: 2}
    assert sum(share.total for share in metrics.success_by_steps.values()) == metrics.n
    assert metrics.tool_recall.mean == pytest.approx((1 + 1 + 3 / 5 + 1 + 0 + 1) / 6)


def test_metrics_are_written_as_plain_json_even_without_predictions() -> None:
    for rows in ([], [row(LABEL), row("")]):
        figures = json.loads(json.dumps(metrics_of(rows).to_json(), allow_nan=False))
        assert figures["n"] == len(rows)
        assert set(figures["success"]) == {"count", "total", "share", "interval_95"}
        assert set(figures) >= {"tool_recall", "failures", "success_by_steps", "label_problems"}
    assert figures["success_by_steps"]["4"]["count"] == 1


def test_a_prediction_is_written_and_read_back() -> None:
    one = Prediction(
        key="k",
        query="q",
        label="l",
        prediction="p",
        stop_reason="eos",
        new_tokens=3,
        seconds=0.5,
    )
    assert Prediction.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert row(LABEL).seconds is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("key", 3), ("label", None), ("stop_reason", "end"), ("new_tokens", -1), ("seconds", "1")],
)
def test_a_bad_row_is_refused_with_the_field_at_fault(name: str, value: object) -> None:
    with pytest.raises(DataError, match=name):
        Prediction.from_json({**row(LABEL).to_json(), name: value})


PARTS = ["1. open_note(", '"$1"', "2. join()", "\n", "3. fly(", ")", "[", "$9", "Thought: ", "é"]


@given(st.lists(st.sampled_from(PARTS)), st.lists(st.sampled_from(PARTS)), st.booleans())
def test_any_two_texts_have_a_score_with_known_codes(
    label: list[str], prediction: list[str], truncated: bool
) -> None:
    score = score_pair("".join(label), "".join(prediction), truncated=truncated)
    assert (score.failure is None) == score.success
    assert score.failure is None or score.failure in FAILURE_CODES
    assert set(score.problems) | set(score.label_problems) <= set(PROBLEMS)
    assert summarise([score]).success.count == score.success


def test_scoring_is_fast_enough_to_be_free() -> None:
    # Aim: 1,000 pairs a second. The bound leaves room for a slow and busy machine.
    pairs = [(LABEL, change("Ann", f"A{n}").replace("hello", f"h{n}")) for n in range(200)]
    start = time.process_time()
    for label, prediction in pairs:
        score_pair(label, prediction)
    assert len(pairs) / (time.process_time() - start) > 250


def test_real_labels_can_be_scored_against_themselves() -> None:
    folder = os.environ.get("TINYAGENT_FAST_REAL_DATA")
    if not folder:
        pytest.skip("set TINYAGENT_FAST_REAL_DATA to the folder with testing_data.json")
    entries = json.loads((Path(folder) / "testing_data.json").read_text(encoding="utf-8"))
    labels = [entry["output"][0]["raw_output"] for entry in entries.values()]
    metrics = metrics_of([row(label, label=label) for label in labels])
    assert metrics.success.count + metrics.bad_labels.count >= metrics.n > 0
    assert metrics.bad_labels.share < 0.02


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ('1. open_note("a", "")\n2. join()', None),
        ('1. open_note("$5", "")\n2. join()', "bad_reference"),
        ('1. open_note("$1", "")\n2. join()', "bad_reference"),
        ("1. open_note(x)\n2. join()", "unparsable, bad_arguments"),
        ("hello", "unparsable, no_join"),
        ('1. open_note("a", "")\n2. join()<END_OF_PLAN>', None),
        ('1. open_note("a", "")\r\n2. join()<END_OF_PLAN>\r\n', None),
    ],
)
def test_a_label_that_its_own_copy_does_not_match_is_named(label: str, reason: str | None) -> None:
    assert why_hopeless(label) == reason


@pytest.mark.parametrize(
    "label",
    [
        '1. open_note("a <END_OF_PLAN> b", "")\n2. join()',
        '1. open_note("ä", "")\r\n2. open_note("<END_OF_PLAN>", "")\r\n3. join()<END_OF_PLAN>',
    ],
)
def test_a_label_that_is_cut_at_a_stop_string_can_never_succeed(label: str) -> None:
    assert score_pair(label, label).success
    assert "<END_OF_PLAN>" in str(why_hopeless(label))
