"""The published metric: agreement with recorded scores, and each of its peculiarities."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.evaluation.reference import (
    reference_scores,
)

LABEL = """\
1. get_email_address("Sid")
2. get_email_address("Lutfi")
3. create_calendar_event("M", "2030-01-02 10:00:00", "2030-01-02 11:00:00", "", \
["$1", "$2"], "", None)
4. join()"""
STARTS_AT_4 = (
    LABEL.replace("4.", "7.")
    .replace("3.", "6.")
    .replace("2.", "5.")
    .replace("1.", "4.")
    .replace("$1", "$4")
    .replace("$2", "$5")
)
EVENT = 'create_calendar_event("M", "a", "b", "", '


def change(old: str, new: str) -> str:
    assert old in LABEL
    return LABEL.replace(old, new, 1)


@pytest.mark.parametrize(
    ("prediction", "success"),
    [
        (LABEL, 1),
        (
            change('"Sid"', '"Lutfi"').replace(
                '2. get_email_address("Lutfi")', '2. get_email_address("Sid")'
            ),
            1,
        ),
        ("\n" + LABEL, 1),
        (change('"M", "2030-01-02 10:00:00"', '"N", "x"'), 1),
        (change("4. join", "Thought: done\n4. join"), 1),
        (LABEL + "<END_OF_PLAN>\n###\nQuestion: x\n5. send_sms([])", 1),
        (LABEL.replace("\n4. join()", ""), 0),
        (change('"$1"', '"${1}"'), 0),
        (change('"$1", "$2"', '"$1, $2"'), 0),
        (change('["$1", "$2"]', "[$1, $2]"), 0),
        (change("get_email_address", "find_email"), 0),
        (change('"", None', '"$2", None'), 0),
        (change('"Sid"', '"Si\nd"'), 0),
        (change('["$1", "$2"]', '[["$1", "$2"]]'), 0),
        (change('"M"', 'title="M"'), 0),
        ("", 0),
    ],
)
def test_the_known_verdicts_on_one_label(prediction: str, success: int) -> None:
    scores = reference_scores(LABEL, prediction)
    assert scores.success == success
    assert reference_scores(LABEL, prediction).success == success
    assert scores.label_error is None
    if '"Si\n' not in prediction:
        assert scores.prediction_error is None


@pytest.mark.parametrize(
    ("prediction", "error"),
    [
        (STARTS_AT_4, "IndexError"),
        (change('2. get_email_address("Lutfi")', '1. get_email_address("$2")'), "ValueError"),
        (change('"$1"', '"$3"'), "ValueError"),
        (change('"Sid"', '"$2"').replace('"Lutfi"', '"$1"'), "RecursionError"),
        (change('"$1"', '"$0"'), "KeyError"),
        (change('"$1"', '"$9"'), "IndexError"),
        (change('"$1"', '"$' + "9" * 5000 + '"'), "ValueError"),
    ],
)
def test_a_prediction_on_which_the_original_fails_is_no_success(
    prediction: str, error: str
) -> None:
    scores = reference_scores(LABEL, prediction)
    assert (scores.success, scores.prediction_error) == (0, error)
    assert scores.tool_recall > 0


@pytest.mark.parametrize(
    ("label", "prediction", "success"),
    [
        # One dependency list for two equal tools is compared as written, not as a set.
        (
            '1. open_note("a", "")\n2. get_email_address("$1")\n3. get_email_address("x")\n'
            '4. send_sms(["$2", "$3"], "")\n5. join()',
            '1. open_note("a", "")\n2. get_email_address("$1")\n3. get_email_address("x")\n'
            '4. send_sms(["$3", "$2"], "")\n5. join()',
            0,
        ),
        # Different tools are sorted, so their order does not matter.
        (
            '1. open_note("a")\n2. get_email_address("x")\n3. send_sms(["$1", "$2"])\n4. join()',
            '1. open_note("a")\n2. get_email_address("x")\n3. send_sms(["$2", "$1"])\n4. join()',
            1,
        ),
        # References mean positions, so numbers beside the positions do not matter...
        (
            '1. open_note("a", "")\n2. send_sms([], "$1")\n3. join()',
            '5. open_note("a", "")\n7. send_sms([], "$1")\n9. join()',
            1,
        ),
        # ... and may lead forward.
        (
            '1. open_note("a", "")\n2. send_sms([], "$1")\n3. join()',
            '1. send_sms([], "$2")\n2. open_note("a", "")\n3. join()',
            1,
        ),
        # A lone list stands for its items: one level deeper than elsewhere counts.
        (
            '1. open_note("a", "")\n2. send_sms("$1")\n3. join()',
            '1. open_note("a", "")\n2. send_sms([["$1"]])\n3. join()',
            1,
        ),
        # Tuples and dicts inside do not count, a whole text that is no literal does.
        (
            '1. open_note("a", "")\n2. send_sms("$1")\n3. join()',
            '1. open_note("a", "")\n2. send_sms(("$1",), 1)\n3. join()',
            0,
        ),
        (
            '1. open_note("a", "")\n2. send_sms("$1")\n3. join()',
            '1. open_note("a", "")\n2. send_sms({"to": "$1"})\n3. join()',
            0,
        ),
        (
            '1. open_note("a", "")\n2. send_sms("$1")\n3. join()',
            '1. open_note("a", "")\n2. send_sms(to=[[$1]])\n3. join()',
            1,
        ),
        # A reference spelled with an escape is one; so is one in other digits.
        (
            '1. open_note("a", "")\n2. send_sms("$1")\n3. join()',
            '1. open_note("a", "")\n2. send_sms("\\x241")\n3. join()',
            1,
        ),
        (
            '1. open_note("a", "")\n2. send_sms("$1")\n3. join()',
            '\u0661. open_note("a", "")\n2. send_sms("$\u0661")\n3. join()',
            1,
        ),
        # A repeated number replaces the step in its place; steps after join do not count.
        (
            '1. open_note("a", "")\n2. join()',
            "1. send_sms()\n1. open_note()\n2. join()\n3. send_sms()",
            1,
        ),
        # A step within a thought counts unless a step follows the thought.
        ("1. open_note()\n2. join()", "Thought: 1. open_note()\nso\n2. join()", 1),
        ("1. open_note()\n2. join()", "Thought: 1. open_note()\n \n2. join()", 0),
        # One line holds one step.
        ("1. open_note()\n2. join()", "1. open_note() 2. join()", 0),
        # An unknown tool ends both plans early; without any step left they are equal.
        ("1. look()\n2. join()", "1. open_note()\n2. look()", 0),
        ("1. look()\n2. join()", "", 1),
    ],
)
def test_peculiarities_of_the_original_are_kept(label: str, prediction: str, success: int) -> None:
    assert reference_scores(label, prediction).success == success


def test_tool_recall_is_the_share_of_distinct_tools_join_included() -> None:
    assert reference_scores(LABEL, LABEL).tool_recall == 1
    assert reference_scores(LABEL, '1. get_email_address("a")').tool_recall == pytest.approx(1 / 3)
    assert reference_scores(LABEL, "1. join()").tool_recall == pytest.approx(1 / 3)
    assert reference_scores(LABEL, "1. look()\n2. join()").tool_recall == 0
    assert reference_scores("", LABEL).tool_recall == 0


def test_a_label_at_fault_is_told_apart() -> None:
    assert reference_scores(change('"$1"', '"$9"'), LABEL).label_error == "IndexError"
    assert reference_scores("", "").label_error == "ZeroDivisionError"


def test_tools_of_a_dataset_of_its_own_are_known_when_given() -> None:
    plan = '1. look("a")\n2. open_note("$1")\n3. join()'
    other = "1. open_note()\n2. look()\n3. join()"
    known = {"look", "open_note"}
    assert reference_scores(plan, plan.replace('"a"', '"b"'), known).success == 1
    assert reference_scores(plan, other, known).success == 0
    assert reference_scores(plan, "1. look()", known).tool_recall == pytest.approx(1 / 3)
    assert reference_scores(plan, "1. look()").tool_recall == 0


def test_odd_escapes_count_the_same_when_warnings_are_errors() -> None:
    plan = '1. open_note("a")\n2. send_sms("\\d", "$1", "$1")\n3. join()'
    wanted = '1. open_note("a")\n2. send_sms("$1", "$1")\n3. join()'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reference_scores(wanted, plan).success == 1


@given(
    st.lists(st.sampled_from(['1. open_note("$2")', "Thought: ", "\n", "$1", "é", ")", "2. join("]))
)
def test_no_text_makes_the_metric_raise(parts: list[str]) -> None:
    text = "".join(parts)
    assert reference_scores(text, text).success in (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "\n" * 50_000,
        "1" * 50_000,
        "1. f(" * 10_000,
        "Thought: " * 10_000,
        "Thought: 1. f()\n\n" * 5_000,
    ],
)
def test_degenerate_output_is_read_in_linear_time(text: str) -> None:
    start = time.process_time()
    assert reference_scores(LABEL, text).success == 0
    assert time.process_time() - start < 2


def test_repeated_dependencies_do_not_multiply_the_work() -> None:
    lines = [f'{n}. open_note("${n - 1}", "${n - 1}")' for n in range(2, 200)]
    plan = "\n".join(['1. open_note("a", "")', *lines, "200. join()"])
    assert reference_scores(plan, plan).success == 1


OWN_VECTORS = Path(__file__).with_name("own_metric_vectors.json")
"""Pairs made from generated plans by planting mistakes, scored by the published metric's code."""


@pytest.mark.parametrize("source", ["own", "real"])
def test_scores_are_those_of_the_original_code(source: str) -> None:
    path, folder = OWN_VECTORS, os.environ.get("TINYAGENT_FAST_REAL_DATA")
    if source == "real":
        if not folder:
            pytest.skip("set TINYAGENT_FAST_REAL_DATA to the folder with metric_vectors.json")
        path = Path(folder) / "metric_vectors.json"
    vectors = json.loads(path.read_text(encoding="utf-8"))
    assert len(vectors) >= 600
    assert {vector["success"] for vector in vectors} == {0.0, 1.0}
    wrong = []
    for vector in vectors:
        scores = reference_scores(vector["label"], vector["prediction"])
        if (scores.success, scores.tool_recall) != (vector["success"], vector["tool_recall"]):
            wrong.append(vector)
        # $0 alone is no exception there: the node it makes is just never matched.
        elif scores.prediction_error != vector["reference_error"]:
            assert (scores.prediction_error, vector["reference_error"]) == ("KeyError", None)
    assert wrong == []
