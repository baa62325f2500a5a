"""Which system text a request is planned with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinyagent_fast.chat.prompts import NearestQuery, describe_tools, load_prompts
from tinyagent_fast.config import Config, dump_config
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.runs import Run


@pytest.fixture
def run_of(
    tmp_path: Path, config_in: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Return a maker of run folders that have trained nothing."""
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))

    def make(test_file: str | None = None, **changes: object) -> Run:
        config = replace(config_in(tmp_path), **changes)
        run = Run(tmp_path / "runs" / "one")
        run.path.mkdir(parents=True, exist_ok=True)
        run.config_path.write_text(dump_config(config), encoding="utf-8")
        if test_file is not None:
            record = {"test_file": {"path": test_file}, "base": "b"}
            (run.path / "data.json").write_text(json.dumps(record), encoding="utf-8")
        return run

    return make


def first_of(folder: Path) -> tuple[str, str]:
    """Give the query and the system text of a test file's first entry."""
    import ast

    entries = json.loads((folder / "testing_data.json").read_text(encoding="utf-8"))
    entry = next(iter(entries.values()))
    return entry["input"], ast.literal_eval(entry["output"][0]["raw_input"])[0]["content"]


def example(query: str, system: str) -> Example:
    return Example(
        key=query, entry_key=query, kind="plan", query=query, system=system, user=query, output=""
    )


def test_the_first_test_query_gives_its_system_text_and_the_form_of_questions(
    run_of: Callable[..., Run], tiny_data: Path
) -> None:
    source = load_prompts("first", run_of())
    chosen = source.choose("do it")
    assert chosen.system == first_of(tiny_data)[1]
    assert chosen.user == "Question: do it"
    assert str(tiny_data / "testing_data.json") in source.source


def test_the_most_similar_test_query_gives_its_system_text(
    run_of: Callable[..., Run], tiny_data: Path
) -> None:
    query, system = first_of(tiny_data)
    chosen = load_prompts("nearest", run_of()).choose(f"please {query}")
    assert chosen.system == system
    assert query in chosen.source or repr(query) in chosen.source


def test_words_that_few_queries_have_count_more() -> None:
    found = NearestQuery(
        [example("send the note", "a"), example("send the zebra", "b"), example("send the", "c")]
    )
    assert found.find("send the very old zebra").system == "b"
    assert found.find("Send THE note!").system == "a"


def test_a_request_like_no_query_still_gets_a_system_text() -> None:
    assert NearestQuery([example("a b", "first"), example("c d", "second")]).find("?").system


def test_a_file_is_taken_as_it_is(run_of: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("my tools\n", encoding="utf-8")
    chosen = load_prompts(str(tmp_path / "system.txt"), run_of()).choose("do it")
    assert (chosen.system, chosen.user) == ("my tools\n", "Question: do it")


def test_a_text_given_with_a_request_is_for_that_request_alone(run_of: Callable[..., Run]) -> None:
    source = load_prompts("first", run_of())
    assert source.choose("a", "other").system == "other"
    assert source.choose("a").system == source.system


def test_a_file_that_is_no_text_is_refused_with_what_else_there_is(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="nearest"):
            load_prompts(str(path), None)


def test_without_a_run_there_is_no_system_text_and_that_is_said() -> None:
    source = load_prompts("first", None)
    assert source.choose("do it").system is None
    assert source.choose("do it").user == "Question: do it"
    assert "--system FILE" in source.source
    with pytest.raises(ConfigError, match="no run's test file is known"):
        load_prompts("nearest", None)


def test_a_test_file_that_is_gone_is_named_and_none_is_generated(
    run_of: Callable[..., Run],
) -> None:
    source = load_prompts("first", run_of("data/gone.json"))
    assert source.system is None
    assert "data/gone.json" in source.source


def test_a_run_finds_its_test_file_from_any_folder(
    run_of: Callable[..., Run], tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("data/test.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.json").write_bytes((tiny_data / "testing_data.json").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_prompts("first", run).system == first_of(tiny_data)[1]


def test_the_tools_that_a_system_text_names_are_listed() -> None:
    assert describe_tools("Plan with: open_note, send_sms", None) == "2 tools (open_note, send_sms)"
    assert describe_tools("Use f(x)", {"f": Tool("f", ())}) == "1 tool (f)"
    assert describe_tools(None, None) == "no tool of the catalogue"
    many = {f"tool_{n}": Tool(f"tool_{n}", ()) for n in range(9)}
    assert describe_tools(" ".join(many), many).endswith("tool_5, ...)")
