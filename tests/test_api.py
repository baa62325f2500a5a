"""The Python API: what `import tinyagent_fast` gives, and that it costs nothing to import."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

import tinyagent_fast
from tinyagent_fast import (
    Config,
    DataConfig,
    EvalOptions,
    ExportSettings,
    ModelConfig,
    Run,
    UserError,
    dump_config,
    evaluate_run,
    export_run,
    find_run,
    load,
    load_config,
    load_tools,
    preset_config,
    run_agent,
    score_pairs,
    train,
)
from tinyagent_fast.agent.tools import RunnableTool
from tinyagent_fast.inference.engine import Completion, Engine, Limits, OnToken, Prompt
from tinyagent_fast.inference.planner import Planner
from tinyagent_fast.plans.drawing import draw_plan
from tinyagent_fast.prompts.builder import ChosenText, PromptBuilder
from tinyagent_fast.runs import create_run

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "trl", "peft", "numpy")


def test_every_name_is_there_and_only_these_are_offered() -> None:
    for name in tinyagent_fast.__all__:
        assert getattr(tinyagent_fast, name) is not None, name
    assert dir(tinyagent_fast) == sorted(tinyagent_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        tinyagent_fast.trian  # noqa: B018


def test_what_type_checkers_see_is_what_is_imported() -> None:
    tree = ast.parse(Path(str(tinyagent_fast.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*seen, "__version__"} == set(tinyagent_fast.__all__)
    for name, module in seen.items():
        assert getattr(tinyagent_fast, name) is getattr(sys.modules[module], name)


def test_the_import_loads_nothing_and_names_load_nothing_heavy() -> None:
    code = (
        "import json, sys; before = set(sys.modules); import tinyagent_fast; "
        "ours = sorted(m for m in set(sys.modules) - before if m.startswith('tinyagent_fast.')); "
        "[getattr(tinyagent_fast, name) for name in tinyagent_fast.__all__]; "
        f"print(json.dumps([ours, sorted(set(sys.modules) & set({HEAVY!r}))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        ["tinyagent_fast.privacy", "tinyagent_fast.version"],
        [],
    ]


def test_a_config_is_made_from_a_preset_and_from_a_file(tmp_path: Path) -> None:
    assert preset_config("smoke").model.base == "random"
    path = tmp_path / "mine.yaml"
    path.write_text("preset: l4\ndata: {points: all}\n")
    config = load_config(path)
    assert (config.preset, config.train.batch) == ("l4", preset_config("l4").train.batch)
    assert config.data.points == "all"
    path.write_text("data: {points: all}\n")
    assert load_config(path) == Config(data=DataConfig(points="all"))
    with pytest.raises(UserError, match="did you mean"):
        preset_config("smok")


def test_pairs_are_scored() -> None:
    plan = '1. get_email_address("Ann")\n2. join()'
    metrics = score_pairs([(plan, plan), (plan, "")])
    assert (metrics.n, metrics.success.share) == (2, 0.5)
    assert metrics.failures == {"empty": 1}


def test_an_unknown_engine_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'gguf'"):
        evaluate_run("one", EvalOptions(engine="ggfu"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'gguf'"):
        load("one", engine="ggfu")  # type: ignore[arg-type]


VALUES = {
    "config": Config(),
    "name": "one",
    "pairs": [],
    "path": "mine.yaml",
    "planner": Planner(cast("Engine", None), PromptBuilder(system=ChosenText(None, "none"))),
    "request": "Call Ann",
    "text": "1. join()",
}
"""What stands for the parameters that a function must be given."""
FUNCTIONS = {
    name: value
    for name in tinyagent_fast.__all__
    if inspect.isfunction(value := getattr(tinyagent_fast, name))
}


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(f, p) for f, call in FUNCTIONS.items() for p in inspect.signature(call).parameters],
)
def test_a_value_of_a_wrong_type_is_answered_whatever_it_is_for(name: str, parameter: str) -> None:
    function = FUNCTIONS[name]
    needed = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty
    ]
    given = {p: VALUES[p] for p in needed if p != parameter}
    with pytest.raises(
        UserError, match=rf"{name}\(\)\n.*{parameter}: <object .* is not .*\n.*give "
    ):
        function(**given, **{parameter: object()})


@pytest.mark.parametrize(
    ("call", "given", "wanted"),
    [
        (lambda: train("smoke"), "'smoke'", r".*preset_config\('smoke'\)"),  # type: ignore[arg-type]
        (lambda: score_pairs(None), "None", "a list of pairs of texts"),  # type: ignore[arg-type]
        (lambda: score_pairs("ab"), "'ab'", "a list of pairs of texts"),  # type: ignore[arg-type]
        (lambda: score_pairs([("a", None)]), r"\('a', None\)", ".*two texts"),  # type: ignore[list-item]
        (lambda: score_pairs(["ab"]), "'ab'", ".*two texts"),  # type: ignore[list-item]
        (lambda: draw_plan(None), "None", "a text"),  # type: ignore[arg-type]
        (lambda: load("one", threads="2"), "'2'", "a whole number"),  # type: ignore[arg-type]
        (lambda: load("one", batch=True), "True", "a whole number"),
        (lambda: find_run(find_run), "<function .*", "a text.* or a path"),  # type: ignore[arg-type]
        (lambda: Run("one"), "'one'", ".*find_run"),  # type: ignore[arg-type]
        (lambda: evaluate_run("one", EvalOptions), "<class .*", r".*EvalOptions\(\)"),  # type: ignore[arg-type]
        (lambda: export_run("one", "q8_0"), "'q8_0'", r".*ExportSettings\(\)"),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_a_wrong_type_is_answered_with_what_is_wanted(
    call: Callable[[], object], given: str, wanted: str
) -> None:
    with pytest.raises(UserError, match=rf"{given} is not {wanted}|{given}\n.*type.*\n.*{wanted}"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: find_run(""),
        lambda: load(""),
        lambda: load("one", system=""),
        lambda: train(replace(preset_config("smoke"), model=ModelConfig(base=""))),
        lambda: evaluate_run("one", EvalOptions(adapter="")),
        lambda: export_run("one", ExportSettings(adapter="")),
        lambda: export_run("one", ExportSettings(name="")),
        lambda: export_run("one", ExportSettings(out="")),  # type: ignore[arg-type]
    ],
)
def test_an_empty_text_names_nothing(
    call: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = create_run(replace(preset_config("smoke"), name="one"))
    # What the empty name would stand for as a path.
    Path("config.yaml").write_text(dump_config(run.config()))
    Path("adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=r"''|empty"):
        call()


def test_a_run_is_named_once_and_by_its_name_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (create_run(replace(preset_config("smoke"), name=name)) for name in ("one", "two"))
    assert find_run("one", "runs").path == one.path.resolve()
    for call in (
        lambda: evaluate_run("one", EvalOptions(run="two")),
        lambda: export_run(one, ExportSettings(run="two")),
    ):
        with pytest.raises(UserError, match="settings for run two"):
            call()
    # Each gets as far as what is not there: the adapter, the same config.
    for call in (
        lambda: evaluate_run(options=EvalOptions(run="two", runs=str(tmp_path / "runs"))),  # type: ignore[arg-type]
        lambda: export_run(two, ExportSettings(run="two", out="x")),  # type: ignore[arg-type]
        lambda: load("two", runs="runs"),
        lambda: train(replace(two.config(), preset="other"), resume="two"),
    ):
        with pytest.raises(UserError, match="two"):
            call()


def test_settings_of_a_wrong_type_make_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = preset_config("smoke")
    with pytest.raises(UserError, match=r"train\.epochs: 'two' is not a number"):
        train(replace(config, train=replace(config.train, epochs="two")))  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


LAMPS = "def dim(lamp: str, percent: int) -> str:\n    return f'{lamp} at {percent}'\n"


class OnePlan:
    """An engine that always writes the same plan."""

    def generate(
        self, prompts: Sequence[Prompt], limits: Limits, on_token: OnToken | None = None
    ) -> Iterator[tuple[int, Completion]]:
        text = '1. dim("hall", 30)\n2. join()'
        for index, _ in enumerate(prompts):
            if on_token is not None:
                on_token(index, text)
            yield index, Completion(text=text, stop_reason="stop", new_tokens=9, prompt_tokens=9)

    def close(self) -> None:
        pass


@pytest.fixture
def lamps(tmp_path: Path) -> dict[str, RunnableTool]:
    (tmp_path / "lamps.py").write_text(LAMPS)
    return load_tools(str(tmp_path / "lamps.py"))


@pytest.fixture
def lamp_planner(lamps: dict[str, RunnableTool]) -> Planner:
    tools = {name: one.tool for name, one in lamps.items()}
    prompts = PromptBuilder(system=ChosenText(None, "none"), tools=tools)
    return Planner(cast("Engine", OnePlan()), prompts)


@pytest.mark.parametrize(
    ("allow", "status"),
    [
        (False, "refused"),
        (True, "done"),
        (lambda name, arguments: (name, arguments) == ("dim", ["hall", 30]), "done"),
        (lambda _name, arguments: arguments[1] > 50, "refused"),
    ],
)
def test_an_agent_changes_with_own_tools_what_it_is_allowed_to(
    allow: Any, status: str, lamp_planner: Planner, lamps: dict[str, RunnableTool], tmp_path: Path
) -> None:
    for tools in (lamps, tmp_path / "lamps.py", str(tmp_path / "lamps.py")):
        outcome = run_agent(lamp_planner, "Dim the hall", tools, allow=allow)
        assert [call.status for call in outcome.rounds[-1].execution.calls] == [status]
        assert outcome.failed == (status == "refused")


def test_an_answer_that_is_no_bool_allows_nothing_and_what_asking_raises_reaches_the_caller(
    lamp_planner: Planner, lamps: dict[str, RunnableTool]
) -> None:
    def broken(_name: str, _arguments: Sequence[object]) -> bool:
        raise KeyError("mine")

    with pytest.raises(UserError, match="what allow gives 'n'"):
        run_agent(lamp_planner, "Dim", lamps, allow=lambda *_: "n")  # type: ignore[arg-type,return-value]
    with pytest.raises(KeyError, match="mine"):
        run_agent(lamp_planner, "Dim", lamps, allow=broken)


def test_ctrl_c_does_not_wait_for_the_one_who_is_asked(
    lamp_planner: Planner, lamps: dict[str, RunnableTool]
) -> None:
    answered = threading.Event()

    def ask(_name: str, _arguments: Sequence[object]) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        answered.wait(20)
        return True

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_agent(lamp_planner, "Dim", lamps, allow=ask)
    assert time.monotonic() - began < 15
    answered.set()


def test_an_agent_in_the_middle_of_a_stream_is_refused(lamp_planner: Planner) -> None:
    for _ in lamp_planner.plan_each(["Dim the hall"]):
        with pytest.raises(UserError, match="stream is open"):
            run_agent(lamp_planner, "Dim the hall")


def test_an_agent_without_tools_works_in_a_sandbox_and_is_asked_for_nothing(
    lamp_planner: Planner,
) -> None:
    outcome = run_agent(lamp_planner, "Dim the hall")
    assert [call.status for call in outcome.rounds[-1].execution.calls] == ["done"]


def test_an_agent_in_an_event_loop_is_refused_with_the_way_that_works(
    lamp_planner: Planner,
) -> None:
    async def in_a_notebook() -> bool:
        with pytest.raises(UserError, match="event loop"):
            run_agent(lamp_planner, "Dim the hall")
        return (await asyncio.to_thread(run_agent, lamp_planner, "Dim the hall")).failed

    assert not asyncio.run(in_a_notebook())
