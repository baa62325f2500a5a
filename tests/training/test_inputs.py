"""From the files of a config to its examples: what is held out is not trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyagent_fast.config import Config, DataConfig, EvalConfig, Leaks
from tinyagent_fast.data.splits import mixture_text, normalise_query
from tinyagent_fast.display import Update
from tinyagent_fast.errors import DataError
from tinyagent_fast.presets import preset_config
from tinyagent_fast.training.inputs import (
    RunExamples,
    data_files,
    load_run_examples,
    refuse_unscorable,
)

PLANTED = 3


def respell(query: str) -> str:
    return f"  {query.upper().replace(' ', '  ')}!?"


@pytest.fixture
def files(tiny_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a training file, the first entries of which ask what the test file asks."""
    train: dict[str, Any] = json.loads((tiny_data / "training_data.json").read_text("utf-8"))
    test: dict[str, Any] = json.loads((tiny_data / "testing_data.json").read_text("utf-8"))
    queries = [entry["input"] for entry in test.values()]
    for entry, query in zip(train.values(), queries[-PLANTED:], strict=False):
        entry["input"] = respell(query)
    paths = tmp_path / "train.json", tmp_path / "test.json"
    for path, entries in zip(paths, (train, test), strict=True):
        path.write_text(json.dumps(entries), encoding="utf-8")
    return paths


def load(files: tuple[Path, Path], leaks: Leaks, **data: Any) -> RunExamples:
    settings = DataConfig(
        train=files[0], test=files[1], leaks=leaks, **{"validation_entries": 5, "seed": 4, **data}
    )
    return load_run_examples(Config(data=settings, eval=EvalConfig(limit=2)))


def test_what_takes_long_is_a_stage_with_a_name_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stages: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def stage(label: str, _unit: str) -> Iterator[Update]:
        told = stages.setdefault(label, [])
        yield lambda done, total: told.append((done, total))

    data = DataConfig(generated_entries=30, validation_entries=5, prompts="retrieved")
    load_run_examples(Config(data=data), stage)
    assert list(stages) == ["generating entries", "reading data", "training the tool retriever"]
    assert stages["generating entries"][-1] == (230, 230)
    stages.clear()
    load_run_examples(Config(data=data), stage)
    assert "generating entries" not in stages, "they are there"


def queries(examples: Any) -> set[str]:
    return {normalise_query(example.query) for example in examples}


def kept(examples: RunExamples) -> set[str]:
    return {example.key for example in examples.train}


def leaked(examples: Any, files: tuple[Path, Path]) -> int:
    test = json.loads(files[1].read_text("utf-8"))
    held_out = {normalise_query(entry["input"]) for entry in test.values()}
    return sum(normalise_query(example.query) in held_out for example in examples)


def test_rows_with_a_query_of_the_test_file_are_left_out_and_counted(
    files: tuple[Path, Path],
) -> None:
    kept, dropped = load(files, "keep"), load(files, "drop")
    there = leaked(kept.train, files)
    assert 0 < there <= PLANTED  # Some may be in the validation split.
    assert kept.left_out_as_leaks == 0
    assert leaked(dropped.train, files) == 0
    assert dropped.left_out_as_leaks == len(kept.train) - len(dropped.train) == there
    assert dropped.summary["examples"]["left_out_as_leaks"] == there
    assert list(dropped.validation) == list(kept.validation)
    assert [e for e in kept.train if e in list(dropped.train)] == list(dropped.train)


def test_leaks_are_found_in_the_whole_test_file_whatever_part_is_evaluated(
    files: tuple[Path, Path],
) -> None:
    examples = load(files, "drop")
    assert len(examples.test) == 2  # The planted queries are the last ones of the file.
    assert examples.left_out_as_leaks > 0


def test_a_limit_is_filled_with_entries_that_do_not_leak(files: tuple[Path, Path]) -> None:
    examples = load(files, "drop", limit_entries=30)
    assert len(examples.train) == 30
    assert leaked(examples.train, files) == 0


def test_leaks_can_stop_the_run(files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="a query of the test file"):
        load(files, "error")


def test_every_point_of_a_leaking_entry_is_left_out(files: tuple[Path, Path]) -> None:
    plans, everything = load(files, "drop"), load(files, "drop", points="all")
    assert leaked(everything.train, files) == 0
    points = [
        e.kind for e in load(files, "keep", points="all").train if e.key not in kept(everything)
    ]
    assert everything.left_out_as_leaks == len(points)
    assert points.count("plan") == plans.left_out_as_leaks


def test_a_training_file_of_test_queries_only_is_refused(files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="queries of its own"):
        load((files[1], files[1]), "drop", validation_entries=1)


@pytest.mark.parametrize("leaks", ["drop", "keep"])
def test_no_validation_query_is_trained_on(files: tuple[Path, Path], leaks: Leaks) -> None:
    raw = json.loads(files[0].read_text("utf-8"))
    for at, entry in enumerate(list(raw.values())):  # Each entry twice, spelt in two ways.
        raw[f"again{at}"] = {**entry, "input": respell(entry["input"])}
    files[0].write_text(json.dumps(raw), encoding="utf-8")
    examples = load(files, leaks, validation_entries=10)
    assert len(examples.validation) == 10
    assert not queries(examples.train) & queries(examples.validation)


def test_generated_data_has_no_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = preset_config("cpu")
    data = replace(config.data, generated_entries=150, validation_entries=10, leaks="error")
    examples = load_run_examples(replace(config, data=data))
    assert (len(examples.train), examples.left_out_as_leaks) == (140, 0)
    assert all(pair.normalised == 0 for pair in examples.leaks.between)


def test_own_rows_stand_several_times_among_generated_ones(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mixing = {"with_generated": True, "generated_entries": 60, "prompts": "short"}
    alone = load(files, "drop", prompts="short")
    mixed = load(files, "drop", own_passes=3, **mixing)
    rows = Counter(normalise_query(e.query) for e in mixed.train)
    own = queries(alone.train)
    assert {query for query, count in rows.items() if count == 3} == own
    assert len(rows) - len(own) == sum(count == 1 for count in rows.values()) > 50
    about = mixed.summary["generated"]
    assert (about["own_rows"], about["own_passes"]) == (len(alone.train), 3)
    assert about["rows"] + 3 * about["own_rows"] == len(mixed.train)
    assert f"{about['rows']} generated" in mixture_text(about) and about["path"] in mixture_text(
        about
    )
    assert mixed.summary["examples"]["train"] == len(mixed.train)
    assert queries(mixed.validation) == queries(alone.validation)
    assert not set(rows) & (queries(mixed.validation) | queries(mixed.test))
    # A row that the retriever was trained on would always have its tools found.
    once = load(files, "drop", **mixing)
    assert mixed.retriever is not None and once.retriever is not None
    assert mixed.retriever.figures == once.retriever.figures
    assert [e.system for e in mixed.train[: len(once.train)]] == [e.system for e in once.train]


def test_generated_rows_whose_query_is_measured_are_left_out(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # The file's own rows are the generated ones, so all validation queries would come back.
    data = {"seed": 4, "generated_entries": 60, "validation_entries": 10}
    generated = data_files(Config(data=DataConfig(**data))).train
    mixed = load((generated, files[1]), "drop", prompts="short", with_generated=True, **data)
    assert len(mixed.train) == 50 + 50
    assert mixed.summary["generated"]["left_out"] == 10
    assert not queries(mixed.train) & queries(mixed.validation)


@pytest.mark.parametrize(("ratio", "wanted"), [(None, 1.0), (0.0, 0.0), (0.3, 0.3), (9.0, 1.0)])
def test_joins_are_mixed_in_as_asked_and_replans_are_all_kept(
    ratio: float | None, wanted: float, files: tuple[Path, Path]
) -> None:
    def kinds(**data: Any) -> Counter[str]:
        return Counter(e.kind for e in load(files, "drop", points="all", **data).train)

    every, mixed = kinds(), kinds(joins_per_plan=ratio)
    assert every["replan"] > 0 and every["join"] == every["plan"] + every["replan"]
    assert (mixed["plan"], mixed["replan"]) == (every["plan"], every["replan"])
    least = every["join"] if wanted == 1.0 else round(wanted * every["plan"])
    assert mixed["join"] == least


@pytest.mark.parametrize("which", ["test", "validation"])
def test_measured_labels_with_tools_outside_the_catalogue_are_refused(
    files: tuple[Path, Path], which: str
) -> None:
    config = Config(
        data=DataConfig(train=files[0], test=files[1], validation_entries=5),
        eval=EvalConfig(limit=2),
    )
    examples = load_run_examples(config)
    test, validation = list(examples.test), list(examples.validation)
    refuse_unscorable(config, test, validation)
    spoilt = [replace(e, output='1. find_lamp("a")\n2. join()') for e in validation]
    refuse_unscorable(config, test, [*spoilt, *validation])  # they count as failures
    wrong = (test, spoilt) if which == "validation" else ([*test, spoilt[0]], validation)
    with pytest.raises(DataError, match="find_lamp") as refused:
        refuse_unscorable(config, *wrong)
    assert "--data.catalogue FILE" in refused.value.fix


def test_a_training_asks_for_the_catalogue_before_it_makes_a_base(
    files: tuple[Path, Path], tiny_config: Any, quiet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.training import fit

    def resolve(*_: Any) -> None:
        raise AssertionError("a base was made")

    monkeypatch.setattr(fit, "resolve_base", resolve)
    text = files[1].read_text(encoding="utf-8")
    files[1].write_text(re.sub(r"(create|compose|get|open|send)_", r"home_\1_", text), "utf-8")
    config = tiny_config(data={"train": files[0], "test": files[1]})
    with pytest.raises(DataError, match="test labels call home_"):
        fit.train(config, quiet)
    assert not list(config.runs.glob("*/config.yaml"))
