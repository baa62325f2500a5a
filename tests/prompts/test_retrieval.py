"""Tools are retrieved by the request, and prompts are rewritten to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from tinyagent_fast.cli import main
from tinyagent_fast.config import Config, dump_config
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.data.schema import Example, called_tools
from tinyagent_fast.errors import DataError
from tinyagent_fast.prompts.builder import prompt_builder
from tinyagent_fast.prompts.retrieval import (
    RETRIEVER,
    ToolRetriever,
    load_retriever,
    train_retriever,
)
from tinyagent_fast.prompts.system_text import parse, render
from tinyagent_fast.runs import Run
from tinyagent_fast.training.inputs import load_run_examples, retriever_of_run


def plans(file: Path) -> list[Example]:
    return [entry.examples[0] for entry in read_entries(file, on_bad_entry="error")]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Example], list[Example]]:
    """Return training and test plans with prompts of the published build."""
    folder = tmp_path_factory.mktemp("full")
    spec = GenerationSpec(train_entries=300, test_entries=60, prompt_style="full", max_calls=4)
    files = generate_dataset(spec, folder)
    return plans(files.train), plans(files.test)


@pytest.fixture(scope="module")
def trained(
    generated: tuple[list[Example], list[Example]],
) -> tuple[ToolRetriever, list[tuple[str, ...]]]:
    return train_retriever(generated[0], recall=0.98)


def test_unseen_queries_get_their_tools_and_few_others(
    generated: tuple[list[Example], list[Example]],
    trained: tuple[ToolRetriever, list[tuple[str, ...]]],
) -> None:
    figures = trained[0].rewrite(generated[1]).figures()
    assert figures.whole >= 0.95
    assert figures.called <= figures.retrieved <= figures.called + 4
    assert trained[0].figures.whole >= 0.98
    assert "60 queries" in figures.sentence()


def test_a_higher_recall_retrieves_more(generated: tuple[list[Example], list[Example]]) -> None:
    # Half of the labels are those of other queries, so the threshold is not at its cap.
    mixed = [
        replace(a, output=b.output) if at % 2 else a
        for at, (a, b) in enumerate(zip(generated[0], generated[0][::-1], strict=True))
    ]
    low, high = (train_retriever(mixed, recall=recall)[0].figures for recall in (0.6, 0.95))
    assert low.whole >= 0.6
    assert high.whole >= 0.95
    assert low.retrieved < high.retrieved


def test_a_retriever_is_the_same_after_saving_and_loading(
    generated: tuple[list[Example], list[Example]],
    trained: tuple[ToolRetriever, list[tuple[str, ...]]],
    tmp_path: Path,
) -> None:
    retriever = trained[0]
    retriever.save(tmp_path)
    again = load_retriever(tmp_path)
    assert again is not None
    queries = [example.query for example in generated[1]]
    assert again.retrieve_all(queries) == retriever.retrieve_all(queries)
    assert again.facts() == retriever.facts()
    for query in queries[:5]:
        tools = retriever.retrieve(query)
        assert again.system_text(query, tools) == retriever.system_text(query, tools)


def test_a_damaged_retriever_is_the_users_error(tmp_path: Path) -> None:
    assert load_retriever(tmp_path) is None
    (tmp_path / RETRIEVER).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="damaged"):
        load_retriever(tmp_path)


@pytest.mark.parametrize("left_bytes", [0, 100])
def test_cut_weights_of_a_retriever_are_the_users_error(
    left_bytes: int, trained: tuple[ToolRetriever, list[tuple[str, ...]]], tmp_path: Path
) -> None:
    _, weights = trained[0].save(tmp_path)
    weights.write_bytes(weights.read_bytes()[:left_bytes])
    with pytest.raises(DataError, match="damaged"):
        load_retriever(tmp_path)


def test_the_key_of_a_retriever_is_kept_by_its_files_and_follows_its_content(
    trained: tuple[ToolRetriever, list[tuple[str, ...]]], tmp_path: Path
) -> None:
    retriever = trained[0]
    retriever.save(tmp_path)
    again = load_retriever(tmp_path)
    assert again is not None and again.key() == retriever.key()
    assert replace(retriever, threshold=retriever.threshold / 2).key() != retriever.key()


def test_a_rewritten_prompt_lists_the_tools_and_solves_other_requests_with_them(
    generated: tuple[list[Example], list[Example]],
    trained: tuple[ToolRetriever, list[tuple[str, ...]]],
) -> None:
    retriever, retrieved = trained
    for example, tools in zip(generated[0][:40], retrieved, strict=False):
        listed = {*tools, *called_tools(example.output)}
        before = parse(example.system or "")
        after = parse(retriever.rewritten(example, listed).system or "")
        assert set(after.tools) == listed
        assert after.guidelines == before.guidelines  # the date is the example's own
        assert all(listed.issuperset(solved.tools) for solved in after.examples)
        assert not any(f"Question: {example.query}\n" in solved.text for solved in after.examples)
        assert len(after.examples) <= len(before.examples)
        assert all(s.text.endswith("join()<END_OF_PLAN>\n###\n") for s in after.examples)
    assert any(
        parse(retriever.rewritten(e, retriever.tools).system or "").examples
        for e in generated[0][:3]
    )


def test_what_is_no_plan_or_lists_no_tools_stays_as_it_is(
    generated: tuple[list[Example], list[Example]],
    trained: tuple[ToolRetriever, list[tuple[str, ...]]],
) -> None:
    example = generated[0][0]
    for other in (replace(example, kind="join"), replace(example, system="Be brief.")):
        assert trained[0].rewritten(other, trained[0].tools[:1]) == other


def test_one_plan_is_too_few(generated: tuple[list[Example], list[Example]]) -> None:
    with pytest.raises(DataError, match="1 plans"):
        train_retriever(generated[0][:1], recall=0.98)


def test_a_request_is_planned_with_todays_prompt_and_its_tools(
    trained: tuple[ToolRetriever, list[tuple[str, ...]]],
) -> None:
    builder = prompt_builder("auto", None, None, trained[0])
    request = 'Open the file "Plan.pdf" for me.'
    built = builder.build(request)
    parts = parse(built.prompt.system or "")
    assert set(parts.tools) == set(trained[0].retrieve(request))
    assert "open_and_get_file_path" in parts.tools
    assert "open_and_get_file_path" in built.source
    assert f"{datetime.now():%Y-%m-%d}" in (built.prompt.system or "")


@pytest.fixture
def config(
    config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Config:
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    made = config_in(tmp_path)
    return replace(made, data=replace(made.data, prompts="retrieved", points="all"))


def test_training_rows_list_their_plans_tools_and_held_out_ones_what_is_retrieved(
    config: Config,
) -> None:
    plain = load_run_examples(replace(config, data=replace(config.data, prompts="as-is")))
    found = load_run_examples(config)
    assert plain.retriever is None
    assert found.retriever is not None
    assert found.summary["retriever"] == found.retriever.facts()
    assert len(found.train) == len(plain.train)
    for before, after in zip(plain.train, found.train, strict=True):
        assert replace(after, system=before.system) == before
        if before.kind == "plan":
            assert set(parse(after.system or "").tools) >= set(called_tools(after.output))
        else:
            assert after == before
    for example in (*found.validation, *found.test):
        tools = found.retriever.retrieve(example.query)
        assert set(parse(example.system or "").tools) == set(tools)
    assert list(found.train[2:4]) == [found.train[2], found.train[3]]


def test_short_prompts_name_the_time_and_the_tools_of_prompts_of_any_length(
    config: Config, tiny_data: Path
) -> None:
    plain = load_run_examples(replace(config, data=replace(config.data, prompts="as-is")))
    short = load_run_examples(replace(config, data=replace(config.data, prompts="short")))
    assert short.retriever is not None
    for before, after in zip(plain.train, short.train, strict=True):
        if before.kind == "plan":
            moment, _, named = (after.system or "").partition(". Plan with: ")
            assert moment.removeprefix("It is ") in (before.system or "")
            assert set(named.split(", ")) >= set(called_tools(after.output))
            assert after.user == before.user
    chat = short.retriever.system_text("Text Anna", ["send_sms"])
    assert render(chat).endswith(". Plan with: send_sms")


def test_a_run_gets_a_retriever_once_from_its_training_file(
    config: Config, tmp_path: Path, tiny_data: Path
) -> None:
    run = Run(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    run.config_path.write_text(dump_config(config), encoding="utf-8")
    made = retriever_of_run(run)
    assert made is not None
    assert (run.path / RETRIEVER).exists()
    record = {"train_file": {"path": "gone.json"}, "test_file": None, "base": "b"}
    (run.path / "data.json").write_text(json.dumps(record), encoding="utf-8")
    again = retriever_of_run(run)
    assert again is not None
    assert again.facts() == made.facts()
    (run.path / RETRIEVER).unlink()
    assert retriever_of_run(run) is None


def test_the_command_says_how_well_tools_are_found(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Config
) -> None:
    train, test = (str(tiny_data / f"{name}_data.json") for name in ("training", "testing"))
    assert main(["data", "retrieval", train, "--test", test, "--out", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert "of 40 queries" in said
    assert "of 6 queries" in said
    assert load_retriever(tmp_path / "r") is not None
    assert main(["data", "retrieval", train, "--recall", "1.5"]) == 2


def test_real_queries_get_their_tools(real_data: Path) -> None:
    train, test = (plans(real_data / f"{name}_data.json") for name in ("training", "testing"))
    retriever, _ = train_retriever(train, recall=0.98)
    figures = retriever.rewrite(test).figures()
    assert (figures.queries, round(figures.called, 2)) == (212, 4.60)
    assert figures.whole >= 0.97
    assert figures.retrieved <= 9.5
    for before, example in zip(test, retriever.rewrite(test), strict=True):
        parts = parse(example.system or "")
        assert set(parts.tools) == set(retriever.retrieve(example.query))
        assert parts.examples
        (date,) = re.findall(r"Today's date is .*\n", before.system or "")
        assert date in (example.system or "")
