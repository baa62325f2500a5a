"""The figures of `data check`: counts, lengths, shared beginnings, leaks, problems."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyagent_fast.cli import main
from tinyagent_fast.data import report
from tinyagent_fast.data.report import DataCheck, Measure, summarise_lengths
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import DataError
from tinyagent_fast.evaluation.scoring import why_hopeless


def make_entry(query: str, system: str, *calls: str, join: bool = False) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": query}]
    names = [*calls, "join"]
    output: list[dict[str, Any]] = [
        {
            "type": "plan",
            "raw_input": repr(messages),
            "raw_output": "\n".join(f"{at}. {name}()" for at, name in enumerate(names, start=1)),
            "parsed_output": [{"tool_name": name, "tool_args": []} for name in names],
            "id": "p",
            "index": 0,
        }
    ]
    if join:
        output.append({**output[0], "type": "join", "raw_input": "u v", "raw_output": "x"})
        output[-1]["parsed_output"] = {}
    return {"input": query, "output": output}


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({f"k{at}": entry for at, entry in enumerate(entries)}))
    return path


def plain(example: Example) -> tuple[str, str]:
    return f"{example.system}\n\n{example.user}", example.output


WORDS = Measure(render=plain)


def check_file(path: Path, measure: Measure = WORDS, **arguments: Any) -> DataCheck:
    return report.check_file(path, measure, **arguments)


def tokens(limit: int | None = None) -> Measure:
    return Measure(render=plain, encode=characters, max_length_tokens=limit)


def characters(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


def test_points_steps_and_tools_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.json",
        make_entry("q", "s", "open_note", "open_note", join=True),
        make_entry("r", "s", "send_sms"),
    )
    check = check_file(path)
    assert check.point_counts == {"plan": 2, "join": 1}
    assert check.steps_per_plan == {1: 1, 2: 1}
    assert check.tool_counts == {"open_note": 2, "send_sms": 1}


def test_lengths_are_tokens_when_a_tokenizer_is_given(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.json", make_entry("abc", "sys", "t"), make_entry("abcde", "sys", "t")
    )
    check = check_file(path, tokens(23))
    lengths = check.lengths["plan"]
    output = len("1. t()\n2. join()")
    assert check.unit == "tokens"
    assert (lengths.parts["user"].minimum, lengths.parts["user"].maximum) == (3, 5)
    assert lengths.parts["system"].mean == len("sys\n\n")
    assert lengths.parts["output"].mean == output
    assert lengths.parts["total"].maximum == len("sys\n\nabcde") + output
    assert lengths.supervised_share == pytest.approx(2 * output / (2 * output + 8 + 10))
    assert lengths.over_long_rows == 2
    assert lengths.shared_prefix == len("sys\n\nabc")


def test_over_long_rows_are_those_beyond_the_limit(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.json", make_entry("abc", "sys", "t"), make_entry("abcde", "sys", "t")
    )
    check = check_file(path, tokens(8 + 16))
    assert check.lengths["plan"].over_long_rows == 1


def test_without_a_tokenizer_words_are_counted_and_labelled(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", make_entry("call Ann!", "do it", "t"))
    check = check_file(path, Measure(render=plain, max_length_tokens=1))
    assert check.unit == "words"
    assert check.lengths["plan"].parts["user"].maximum == 3
    assert check.lengths["plan"].over_long_rows is None
    text = check.render_text()
    assert "words per plan row" in text
    assert "unknown, no tokenizer" in text


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=90))
def test_the_shared_beginning_is_the_longest_one(
    tmp_path_factory: pytest.TempPathFactory, systems: list[str]
) -> None:
    path = tmp_path_factory.mktemp("prefix") / "d.json"
    write(path, *(make_entry("q", system, "t") for system in systems))
    check = check_file(path, tokens())
    prompts = [f"{system}\n\nq" for system in systems]
    shared = 0
    while shared < min(map(len, prompts)) and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    assert check.lengths["plan"].shared_prefix == shared
    assert check.lengths["plan"].parts["total"].rows == len(systems)


def test_the_prompt_is_what_the_caller_renders(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", make_entry("abc", "sys", "t"))
    measure = Measure(encode=characters, render=lambda example: ("<" + example.user, "!!"))
    check = check_file(path, measure)
    parts = check.lengths["plan"].parts
    assert (parts["system"].mean, parts["user"].mean, parts["output"].mean) == (1, 3, 2)


def test_rows_are_encoded_in_small_batches(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", *(make_entry(f"q{at}", "s", "t") for at in range(300)))
    sizes: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return characters(texts)

    check = check_file(path, Measure(render=plain, encode=encode))
    assert check.lengths["plan"].parts["total"].rows == 300
    assert max(sizes) <= 3 * 64


def test_leaks_into_other_files_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", make_entry("Call Ann", "s", "t"), make_entry("b", "s", "t"))
    other = write(tmp_path / "o.json", make_entry("call ann!", "s", "t"), {"input": "x"})
    check = check_file(path, others={"test": other})
    (pair,) = check.leaks.between
    assert (pair.first, pair.second, pair.exact, pair.normalised) == ("this file", "test", 0, 1)
    text = check.render_text()
    assert "this file and test share: 0 / 1" in text
    assert "training leaves out these 1 entries if test is its test file" in text
    assert "test: 1 unusable entries were not compared" in text


def test_problems_are_listed_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", make_entry("q", "s", "t"), *({} for _ in range(15)))
    check = check_file(path)
    text = check.render_text()
    assert "entries: 1 usable, 15 not" in text
    assert "problems: 30 in 15 entries" in text
    assert "k1 input: is missing" in text
    assert "and 10 more" in text


def test_the_json_form_has_every_figure(tmp_path: Path) -> None:
    path = write(tmp_path / "d.json", make_entry("q", "s", "t"))
    decoded = json.loads(json.dumps(asdict(check_file(path, tokens()))))
    assert decoded["read"]["entries"] == 1
    assert decoded["lengths"]["plan"]["parts"]["total"]["rows"] == 1
    assert decoded["steps_per_plan"] == {"1": 1}


def test_a_file_without_a_usable_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        check_file(write(tmp_path / "d.json", {}))


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=200))
def test_a_summary_agrees_with_the_lengths(lengths: list[int]) -> None:
    summary = summarise_lengths(lengths)
    assert (summary.minimum, summary.maximum) == (min(lengths), max(lengths))
    assert (summary.rows, summary.mean) == (len(lengths), sum(lengths) / len(lengths))
    for share, value in ((0.5, summary.p50), (0.9, summary.p90), (0.99, summary.p99)):
        assert sum(length <= value for length in lengths) >= share * len(lengths)
        assert sum(length < value for length in lengths) < share * len(lengths)


def test_labels_that_can_never_succeed_are_counted_with_the_reason(tmp_path: Path) -> None:
    right, wrong = '1. open_note("a", "")\n2. join()', '1. open_note("$7", "")\n2. join()'
    entries = [make_entry("q", "s", "open_note") for _ in range(5)]
    for at, entry in enumerate(entries):
        text = right if at == 0 else wrong
        arguments = ["a", ""] if at == 0 else ["$7", ""]
        entry["output"][0] |= {
            "raw_output": text,
            "parsed_output": [
                {"tool_name": "open_note", "tool_args": arguments},
                {"tool_name": "join", "tool_args": []},
            ],
        }
    check = check_file(write(tmp_path / "d.json", *entries), judge=why_hopeless)
    assert check.hopeless_labels == {"bad_reference": (4, "k1/0")}
    assert "labels that can never succeed: 4, the first in k1/0: bad_reference" in (
        check.render_text()
    )


def test_labels_that_call_tools_outside_the_catalogue_are_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = make_entry("q", "s", "open_note"), make_entry("r", "s", "open_note", "dim_lamp")
    path = write(tmp_path / "d.json", right, wrong)
    assert main(["data", "check", str(path)]) == 1
    text = capsys.readouterr().out
    assert "problems: none" not in text
    assert "problems: 1 labels call tools outside the catalogue: dim_lamp" in text
    assert "--data.catalogue FILE" in text
    known = check_file(path, known_tools={"open_note", "dim_lamp"})
    assert (known.problem_count, known.plans_with_unknown_tools) == (0, 0)
    assert known.render_text().endswith("problems: none")
