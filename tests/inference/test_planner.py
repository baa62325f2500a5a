"""Opening a planner by what a user names, and asking it, one plan at a time."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stand_ins import ScriptedWriter, planner_with, wait_until

from tinyagent_fast.config import Config, dump_config
from tinyagent_fast.errors import ConfigError, ModelError
from tinyagent_fast.inference.engine import Limits, Prompt
from tinyagent_fast.inference.planner import Planner, find_source, load, model_in_torch
from tinyagent_fast.prompts.builder import ChosenText, PromptBuilder
from tinyagent_fast.runs import Run

PLAN = ['1. open_note("a", "")\n', '2. open_note("$1", "")\n', "3. join()"]


@pytest.fixture
def run(
    tmp_path: Path,
    config_in: Callable[..., Config],
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Return a run with the files that a choice is made by, and no weights in them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYAGENT_FAST_CACHE", str(tmp_path / "cache"))
    made = Run(tmp_path / "runs" / "one")
    for folder in (made.adapter, made.best, made.path / "export" / "merged"):
        folder.mkdir(parents=True)
    made.config_path.write_text(dump_config(config_in(tmp_path)), encoding="utf-8")
    (made.path / "data.json").write_text(json.dumps({"base": str(tiny_base)}), encoding="utf-8")
    for folder in (made.adapter, made.best):
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(b"")
    merged = {"dtype": "float32"}
    (made.path / "export" / "merged" / "config.json").write_text(json.dumps(merged))
    (tmp_path / "runs" / "latest").symlink_to("one")
    for file in (tmp_path / "x.gguf", made.path / "export" / "gguf" / "x.gguf"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return made


def test_without_a_name_it_is_the_adapter_of_the_latest_run(run: Run) -> None:
    source = find_source()
    assert (source.kind, source.path, source.run) == ("adapter", run.adapter, run)


def test_a_run_that_was_broken_off_is_tried_with_its_best_adapter(run: Run) -> None:
    (run.adapter / "adapter_model.safetensors").unlink()
    assert find_source(run="one").path == run.best
    (run.best / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="--resume one"):
        find_source()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one", "adapter"),
        ("latest", "adapter"),
        ("runs/one", "adapter"),
        ("runs/latest", "adapter"),
        ("runs/one/best", "adapter"),
        ("runs/one/export/merged", "folder"),
        ("runs/one/export/gguf/x.gguf", "gguf"),
    ],
)
def test_a_model_within_a_run_comes_with_that_run(run: Run, name: str, kind: str) -> None:
    source = find_source(name)
    assert (source.kind, source.run) == (kind, run)


def test_a_model_outside_any_run_takes_the_run_that_is_named(run: Run, tmp_path: Path) -> None:
    model = tmp_path / "x.gguf"
    assert find_source(model).run is None
    assert find_source(model, run="one").run == run


def test_an_adapter_outside_any_run_needs_one_for_its_base(run: Run, tmp_path: Path) -> None:
    run.adapter.rename(tmp_path / "mine")
    with pytest.raises(ConfigError, match="--run"):
        find_source(tmp_path / "mine")
    assert find_source(tmp_path / "mine", run="one").run == run


def test_the_prompts_of_another_run_are_not_taken_in_silence(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "two"
    other.mkdir()
    (other / "config.yaml").write_text(run.config_path.read_text(), encoding="utf-8")
    with pytest.raises(ConfigError, match="lies in run one"):
        find_source(run.adapter, run="two")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"run": "absent"}, "there: one"),
        ({"source": "nothing"}, "config.json"),
        ({"source": "absent.gguf"}, "there is no such file"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"threads": -1}, "--threads -1"),
        ({"engine": "vllm"}, "an adapter, which runs with the engine torch"),
        ({"engine": "torch", "source": "x.gguf"}, "a GGUF file, which runs with the engine gguf"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Run, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(**arguments)


def test_an_adapter_is_loaded_on_its_runs_base_by_plain_transformers(
    run: Run, tiny_base: Path
) -> None:
    config = run.config()
    model = model_in_torch(find_source(), config)
    assert (model.base, model.backend) == (str(tiny_base), "transformers")
    assert model.prompt_format == config.model.prompt_format


def test_a_merged_folder_tells_its_precision_and_its_export_the_prompt_format(run: Run) -> None:
    source = find_source(run.path / "export" / "merged")
    assert model_in_torch(source, run.config()).prompt_format == "alpaca"
    (run.path / "export" / "export.json").write_text('{"prompt_format": "flat"}', encoding="utf-8")
    model = model_in_torch(source, run.config())
    assert (model.weights, model.prompt_format) == ("fp32", "flat")


def test_a_merged_folder_from_elsewhere_is_asked_with_its_own_template(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}', encoding="utf-8")
    source = find_source(tmp_path)
    assert model_in_torch(source, Config()).prompt_format == "alpaca"
    (tmp_path / "chat_template.jinja").write_text("", encoding="utf-8")
    model = model_in_torch(source, Config())
    assert (model.weights, model.prompt_format) == ("bf16", "chat")


def test_a_merged_folder_with_a_damaged_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json"):
        model_in_torch(find_source(tmp_path), Config())


def test_an_adapter_answers_with_a_plan_stream_and_says_what_it_is(
    run: Run, config_in: Callable[..., Config], tmp_path: Path, tiny_base: Path
) -> None:
    from tinyagent_fast.models.loading import load_for_training

    load_for_training(config_in(tmp_path), str(tiny_base)).model.save_pretrained(str(run.adapter))
    with load(threads=1, system="first") as planner:
        stream = planner.stream("open the note")
        pieces = list(stream)
        again = planner.plan("open the note")
        both = planner.plan_batch(["open the note", "call Ada"])
    assert stream.result is not None
    assert "".join(pieces) == stream.text == stream.result.text == again.text
    assert [planned.request for planned in both] == ["open the note", "call Ada"]
    assert both[0].text == again.text
    assert stream.result.completion.new_tokens == 6  # the config's limit
    assert stream.result.completion.stop_reason == "length"
    assert "--max-new-tokens" in stream.result.cost()
    assert planner.facts["model"] == "runs/one/adapter"
    assert planner.facts["engine"] == "transformers on cpu, float32"
    assert "first test query" in planner.facts["system text"]
    assert "tool" in planner.facts["it names"]


def test_an_adapter_finds_its_base_and_system_texts_from_any_folder(
    run: Run,
    config_in: Callable[..., Config],
    tmp_path: Path,
    tiny_base: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tinyagent_fast.models.loading import load_for_training

    load_for_training(config_in(tmp_path), str(tiny_base)).model.save_pretrained(str(run.adapter))
    shutil.copytree(tiny_base, tmp_path / "runs" / "bases" / "nano")
    shutil.copyfile(tiny_data / "testing_data.json", tmp_path / "test.json")
    record = {"base": "runs/bases/nano", "test_file": {"path": "test.json"}}
    (run.path / "data.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with load(run.path, threads=1, system="first") as planner:
        assert planner.plan("open the note").completion.new_tokens == 6
        assert planner.prompts.system.text


def test_a_gguf_answers_too(tiny_gguf: dict[str, Path]) -> None:
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    with load(tiny_gguf["f16"], threads=1, max_new_tokens=5, batch=2) as planner:
        stream = planner.stream("open the note", system="tools")
        assert "".join(stream) == stream.text
        assert len(planner.plan_batch(["a", "b", "c"])) == 3
    assert stream.result is not None
    assert stream.result.completion.new_tokens == 5
    assert "llama.cpp" in planner.facts["engine"]


def test_a_planned_request_has_steps_a_graph_and_every_problem() -> None:
    planned = planner_with(ScriptedWriter(PLAN)).plan("go")
    assert planned.built.prompt == Prompt(system="tools", user="Q: go")
    assert planned.plan is not None
    assert [step.tool for step in planned.plan.steps] == ["open_note", "open_note", "join"]
    assert planned.problems == ()
    value = json.loads(json.dumps(planned.to_json()))
    assert (value["plan"], value["system_text"]) == ("".join(PLAN), "a test")
    assert value["view"]["edges"] == [[0, 1]]
    bad = planner_with(ScriptedWriter(["1. fly()"])).plan("go")
    assert bad.plan is None
    assert any("fly" in problem for problem in bad.problems)


def test_plans_and_other_texts_end_at_their_own_stop_strings_and_the_limit() -> None:
    class Asked(ScriptedWriter):
        def generate(self, prompts: Any, limits: Limits, *how: Any) -> Any:
            self.limits = limits
            return super().generate(prompts, limits, *how)

    writer = Asked(PLAN)
    planner = Planner(writer, PromptBuilder(system=ChosenText(None, "a test")), max_new_tokens=7)
    planner.plan("go")
    assert writer.limits == Limits(stop="<END_OF_PLAN>", max_new_tokens=7)
    planner.complete([Prompt(system=None, user="u")], "<END_OF_RESPONSE>")
    assert writer.limits == Limits(stop="<END_OF_RESPONSE>", max_new_tokens=7)


def test_a_stream_tells_its_plan_at_every_moment() -> None:
    stream = planner_with(ScriptedWriter(PLAN)).stream("go")
    seen = []
    for _ in stream:
        seen.append((len(stream.drawing.steps), stream.result))
    assert seen == [(1, None), (2, None), (2, None)]
    assert stream.drawing.joined
    assert not stream.drawing.all_problems
    assert stream.result is not None


def test_two_plans_are_never_written_at_once() -> None:
    writer = ScriptedWriter({"Q: a": PLAN, "Q: b": PLAN})
    planner = planner_with(writer)
    first = iter(planner.stream("a"))
    next(first)
    second = threading.Thread(target=lambda: list(planner.stream("b")))
    second.start()
    second.join(timeout=0.2)
    assert second.is_alive()
    assert writer.asked == [("tools", "Q: a")]
    first.close()
    second.join(timeout=10)
    assert writer.asked == [("tools", "Q: a"), ("tools", "Q: b")]


def test_a_request_in_the_middle_of_a_stream_is_refused_instead_of_waiting_for_ever() -> None:
    planner = planner_with(ScriptedWriter(PLAN))
    stream = iter(planner.stream("a"))
    next(stream)
    with pytest.raises(ModelError, match="close it"):
        planner.plan("b")
    stream.close()
    assert planner.plan("b").plan is not None


def test_a_failure_of_the_engine_reaches_whoever_reads_the_stream() -> None:
    writer = ScriptedWriter(PLAN)
    writer.error = ModelError("a long prompt", "no room", "shorten it")
    planner = planner_with(writer)
    stream = planner.stream("a")
    with pytest.raises(ModelError, match="shorten it"):
        list(stream)
    assert stream.result is None
    writer.error = None
    assert planner.plan("a").plan is not None


def test_closing_a_planner_ends_a_plan_in_another_thread() -> None:
    writer = ScriptedWriter(PLAN)
    writer.gate = threading.Semaphore(1)
    planner = planner_with(writer)
    stream = planner.stream("a")
    thread = threading.Thread(target=lambda: list(stream))
    thread.start()
    wait_until(lambda: stream.text == PLAN[0], "the first piece")
    closing = threading.Thread(target=planner.close)
    closing.start()
    wait_until(lambda: planner.closed, "closing to begin")
    writer.gate.release(2)
    thread.join(timeout=10)
    closing.join(timeout=10)
    assert not thread.is_alive()
    assert stream.result is None
    assert writer.closed == 1


@pytest.mark.parametrize(
    ("request_", "system", "said"),
    [
        ("a \ud83d b", None, "half a character stands at 2"),
        ("a \udcff b", None, "Unicode"),
        ("a", "\ud83d", "system text"),
        (None, None, "None is not a text"),
    ],
)
def test_what_no_model_can_read_is_refused_before_it_is_asked(
    request_: Any, system: str | None, said: str
) -> None:
    writer = ScriptedWriter(PLAN)
    planner = planner_with(writer)
    for ask in (planner.plan, planner.stream, lambda *asked: planner.plan_batch(asked[:1], system)):
        with pytest.raises(ConfigError, match=said):
            ask(request_, system)
    with pytest.raises(ConfigError, match="not a list of texts"):
        planner.plan_batch("Call")
    assert writer.asked == []


def test_a_closed_planner_says_so_however_it_is_asked() -> None:
    writer = ScriptedWriter(PLAN)
    planner = planner_with(writer)
    planner.close()
    planner.close()
    for ask in (
        planner.plan,
        lambda it: planner.plan_batch([it]),
        lambda it: [*planner.stream(it)],
    ):
        with pytest.raises(ModelError, match="it has been closed"):
            ask("go")
    assert writer.asked == []


def test_a_damaged_adapter_is_no_bug(
    run: Run, config_in: Callable[..., Config], tmp_path: Path, tiny_base: Path
) -> None:
    from tinyagent_fast.models.loading import load_for_training
    from tinyagent_fast.training.best import load_adapter_weights

    trained = load_for_training(config_in(tmp_path), str(tiny_base)).model
    trained.save_pretrained(str(run.adapter))
    whole = (run.adapter / "adapter_model.safetensors").read_bytes()
    for content in (b"junk", whole[:-8]):
        (run.adapter / "adapter_model.safetensors").write_bytes(content)
        for read in (lambda: load(threads=1), lambda: load_adapter_weights(trained, run.adapter)):
            with pytest.raises(ModelError, match="adapter"):
                read()


def test_a_plan_whose_model_is_closed_meanwhile_says_that_and_not_what_the_engine_misses() -> None:
    planner = planner_with(ScriptedWriter(PLAN))

    class Gone(ScriptedWriter):
        def generate(self, *_: Any, **__: Any) -> Any:
            planner.closed = True
            raise ModelError("the server", "it gave no answer", "run it again")

    planner.engine = Gone(PLAN)
    with pytest.raises(ModelError, match="it has been closed"):
        planner.plan("go")
