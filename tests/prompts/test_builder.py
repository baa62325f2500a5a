"""Which system text a request is planned with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinyagent_fast.config import Config, dump_config
from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.inference.engine import Prompt
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.builder import ChosenText, NearestQuery, PromptBuilder, prompt_builder
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
    source = prompt_builder("first", run_of())
    built = source.build("do it")
    assert built.prompt.system == first_of(tiny_data)[1]
    assert built.prompt.user == "Question: do it"
    assert str(tiny_data / "testing_data.json") in built.source


def test_the_most_similar_test_query_gives_its_system_text(
    run_of: Callable[..., Run], tiny_data: Path
) -> None:
    query, system = first_of(tiny_data)
    built = prompt_builder("nearest", run_of()).build(f"please {query}")
    assert built.prompt.system == system
    assert query in built.source or repr(query) in built.source


def test_words_that_few_queries_have_count_more() -> None:
    found = NearestQuery(
        [example("send the note", "a"), example("send the zebra", "b"), example("send the", "c")]
    )
    assert found("send the very old zebra").text == "b"
    assert found("Send THE note!").text == "a"


def test_a_request_like_no_query_still_gets_a_system_text() -> None:
    assert NearestQuery([example("a b", "first"), example("c d", "second")])("?").text


def test_a_file_is_taken_as_it_is(run_of: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("my tools\n", encoding="utf-8-sig")  # as some editors do
    prompt = prompt_builder(str(tmp_path / "system.txt"), run_of()).build("do it").prompt
    assert prompt == Prompt(system="my tools\n", user="Question: do it")


def test_a_text_given_with_a_request_is_for_that_request_alone(run_of: Callable[..., Run]) -> None:
    source = prompt_builder("first", run_of())
    assert source.build("a", "other").prompt.system == "other"
    assert source.build("a").prompt.system == source.system.text


def test_a_file_that_is_no_text_is_refused_with_what_else_there_is(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match="nearest"):
            prompt_builder(str(path), None)


def test_without_a_run_there_is_no_system_text_and_that_is_said() -> None:
    source = prompt_builder("first", None)
    assert source.build("do it").prompt == Prompt(system=None, user="Question: do it")
    assert "--system FILE" in source.system.source
    with pytest.raises(ConfigError, match="no test file is known"):
        prompt_builder("nearest", None)


def test_a_test_file_that_is_gone_is_named_and_none_is_generated(
    run_of: Callable[..., Run],
) -> None:
    source = prompt_builder("first", run_of("data/gone.json"))
    assert source.system.text is None
    assert "data/gone.json" in source.system.source


def test_a_run_finds_its_test_file_from_any_folder(
    run_of: Callable[..., Run], tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("data/test.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.json").write_bytes((tiny_data / "testing_data.json").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prompt_builder("first", run).system.text == first_of(tiny_data)[1]


def with_text(text: str | None, tools: dict[str, Tool] | None = None) -> PromptBuilder:
    return PromptBuilder(system=ChosenText(text, "a test"), tools=tools)


def test_the_tools_that_every_request_may_use_are_listed() -> None:
    said = with_text("Plan with: open_note, send_sms").describe_tools()
    assert said == "2 tools (open_note, send_sms)"
    assert with_text("Use f(x)", {"f": Tool("f", ())}).describe_tools() == "1 tool (f)"
    assert with_text("nothing").describe_tools() == "no tool of the catalogue"
    assert with_text(None).describe_tools() is None
    many = {f"tool_{n}": Tool(f"tool_{n}", ()) for n in range(9)}
    described = with_text(" ".join(many), many).describe_tools()
    assert described is not None
    assert described.endswith("tool_5, ...)")


def test_a_prompt_that_was_built_is_read_back_into_its_parts(
    run_of: Callable[..., Run], tiny_data: Path
) -> None:
    builder = prompt_builder("first", run_of())
    parts = builder.read(builder.build("do it").prompt)
    assert (parts.system, parts.request) == (first_of(tiny_data)[1], "do it")
    assert parts.tools
    assert all(name in (parts.system or "") for name in parts.tools)
    assert builder.read(Prompt(system=None, user="another form")).request == "another form"


def test_a_retriever_chooses_system_text_and_tools_for_each_request() -> None:
    builder = PromptBuilder(
        system=ChosenText(None, "chosen by request"),
        retrieve=lambda request: ChosenText(f"Use {request}_it()", f"for {request}"),
        tools={"a_it": Tool("a_it", ()), "b_it": Tool("b_it", ())},
    )
    built = builder.build("b")
    assert (built.prompt.system, built.source) == ("Use b_it()", "for b")
    assert builder.read(built.prompt).tools == ("b_it",)
    assert builder.describe_tools() is None
