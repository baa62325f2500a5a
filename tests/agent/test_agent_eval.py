"""Task success: what it counts, and that replanning earns its keep where plans are mended."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console
from stand_ins import ScriptedWriter, planner_with

from tinyagent_fast.agent.evaluate import (
    AgentEvalOptions,
    Task,
    TaskResult,
    agent_figures,
    evaluate_agent,
    run_tasks,
    tasks_of,
)
from tinyagent_fast.agent.loop import Pieces, RuleJoiner, execute, whole_plan
from tinyagent_fast.agent.models import (
    OWN_JOINER_TEXT,
    BatchedModel,
    ModelJoiner,
    StreamingModel,
    joiner_text_of,
)
from tinyagent_fast.agent.sandbox import (
    LOOKUPS,
    RECOVERABLE,
    Fault,
    choose_fault,
    malformed,
    sandbox_for,
)
from tinyagent_fast.agent.session import joiner_of_run
from tinyagent_fast.cli import main
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_entries
from tinyagent_fast.data.generation.outcomes import replan
from tinyagent_fast.data.schema import Entry, Example, entry_from_json
from tinyagent_fast.display import Display
from tinyagent_fast.inference.engine import Completion, Limits, Prompt
from tinyagent_fast.inference.planner import Planner
from tinyagent_fast.plans.grammar import (
    END_OF_PLAN,
    END_OF_RESPONSE,
    parse_joiner,
    parse_plan,
    render_plan,
)

CATALOGUE = load_catalogue()


def entries(count: int, seed: int = 0, **spec: Any) -> list[Entry]:
    settings = GenerationSpec(train_entries=count, **spec)
    made = generate_entries(CATALOGUE, settings, count, random.Random(seed), set())
    return [entry for key, value in made if isinstance(entry := entry_from_json(key, value), Entry)]


def plans(count: int, seed: int = 0, **spec: Any) -> list[Example]:
    return [entry.examples[0] for entry in entries(count, seed, **spec)]


class Oracle:
    """Writes labels first, and then what is left of them, as generated data teaches it."""

    def __init__(self, tasks: Sequence[Task], *, spoil: Callable[[str], str] = str) -> None:
        self.labels = {task.example.user: task.label for task in tasks}
        self.spoil = spoil

    async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
        user = next(u for u in self.labels if prompt.user.startswith(u))
        label = self.labels[user]
        if prompt.user == user:
            yield self.spoil(render_plan(label))
            return
        # What happened is in the prompt alone: run the label again, and let it fail alike.
        seen = dict(re.findall(r"\d+\. (\w+)\(.*\)\nObservation: (.*)", prompt.user))
        yield _from_observations(label, seen, prompt.user)


def _from_observations(label: Any, seen: Mapping[str, str], user: str) -> str:
    """Replan by running the label with whatever fault explains the observations."""
    for fault in _possible_faults(label):
        text = render_plan(label)
        for at in range(len(label.steps) - 1 if fault.kind == "malformed" else 1):
            if fault.kind == "malformed":
                lines = render_plan(label).split("\n")
                lines[at] = lines[at].removesuffix(")")
                text = "\n".join(lines)
            execution, changes = _run(label, text, fault)
            told = [c.observation for c in execution.calls] + [execution.problem or ""]
            if all(t in user for t in told):
                return render_plan(replan(label, execution, changes))
    raise AssertionError(f"nothing explains {seen}")


def _changes(tools: Mapping[str, Any]) -> dict[str, bool]:
    return {name: tool.changes for name, tool in tools.items()}


def _run(label: Any, text: str, fault: Any) -> tuple[Any, dict[str, bool]]:
    from concurrent.futures import ThreadPoolExecutor

    def run() -> tuple[Any, dict[str, bool]]:
        sandbox = sandbox_for(label, faults=[fault])
        return _run_in(sandbox, text), _changes(sandbox.tools)

    with ThreadPoolExecutor(1) as pool:  # a loop of its own, as one runs here already
        return pool.submit(run).result()


def _possible_faults(label: Any) -> list[Fault]:
    steps = label.steps[:-1]
    names = {s.arguments[0] for s in steps if s.tool in LOOKUPS}
    return [
        Fault(kind="malformed"),
        *(Fault(kind=kind, tool=s.tool) for kind in ("failing", "slow") for s in steps),
        *(Fault(kind=kind, name=name) for kind in ("renamed", "ambiguous") for name in names),
    ]


async def both(examples: Sequence[Example]) -> tuple[list[TaskResult], list[TaskResult]]:
    tasks, left_out = await tasks_of(examples)
    assert left_out == 0 and all(task.label_runs for task in tasks)
    oracle, joiner = Oracle(tasks), RuleJoiner()
    clean = await run_tasks(tasks, oracle, joiner, None)
    faulty = await run_tasks(tasks, oracle, joiner, None, faults_seed=1)
    return clean, faulty


def test_mended_plans_get_the_task_done_and_spoilt_ones_alone_do_not() -> None:
    clean, faulty = asyncio.run(both(plans(25)))
    assert all(result.done and result.plan_right and len(result.reached) == 1 for result in clean)
    assert not any(result.reached[0] for result in faulty)
    assert all(result.done for result in faulty)
    assert all(len(result.reached) == 2 for result in faulty)
    metrics = agent_figures(clean, faulty, RuleJoiner(), None, AgentEvalOptions(time_scale=0.0))
    assert metrics["plan_success"]["share"] == metrics["task_success"]["share"] == 1.0
    faults = metrics["with_faults"]
    assert (faults["without_replan"]["share"], faults["with_replan"]["share"]) == (0.0, 1.0)
    assert faults["with_replan"]["n"] == 25
    low, high = faults["with_replan"]["interval"]
    assert 0.8 < low < high == 1.0
    assert faults["by_replans"]["0"] == faults["without_replan"]
    assert faults["mcnemar_p"] < 1e-6
    assert metrics["cost_with_faults"]["plans"] == 2.0
    json.dumps(metrics)


def test_a_right_graph_with_a_wrong_argument_is_plan_success_and_no_task_success() -> None:
    def spoil(text: str) -> str:
        return text.replace("2024", "2031").replace("2025", "2031")

    async def run() -> list[TaskResult]:
        tasks, _ = await tasks_of(plans(60))
        return await run_tasks(tasks, Oracle(tasks, spoil=spoil), RuleJoiner(), None)

    results = asyncio.run(run())
    dated = [r for r in results if re.search("202[45]", r.task.example.output)]
    assert len(dated) > 5
    assert all(result.plan_right and not result.done for result in dated)
    assert all(result.done for result in results if result not in dated)


@given(st.integers(0, 5000))
def test_a_replan_of_any_failure_leads_to_the_label_s_state(seed: int) -> None:
    (example,) = plans(1, seed=seed)
    label, rng = parse_plan(example.output), random.Random(seed)
    # Of a note that several calls write to or read, their order decides what it holds.
    notes = [s.arguments[0] for s in label.steps if s.tool.endswith(("_note", "_note_content"))]
    assume(len(notes) == len(set(notes)))
    fault = choose_fault(label, rng, RECOVERABLE)
    text = malformed(example.output, rng) if fault.kind == "malformed" else example.output
    clean, sandbox = sandbox_for(label), sandbox_for(label, faults=[fault])
    _run_in(clean, example.output)
    execution = _run_in(sandbox, text)
    again = replan(label, execution, _changes(sandbox.tools))
    assert not _run_in(sandbox, render_plan(again)).failed
    assert sandbox.state().reaches(clean.state())


def _run_in(sandbox: Any, text: str) -> Any:
    from tinyagent_fast.agent.loop import AgentSettings

    sandbox_settings = AgentSettings(call_timeout_s=0.2)
    return asyncio.run(execute(whole_plan(text), sandbox.tools, sandbox_settings))


def test_with_the_grammar_every_plan_is_held_to_the_tools_of_its_prompt() -> None:
    asked: list[Prompt] = []

    class Noted(Oracle):
        async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
            asked.append(prompt)
            async for piece in super().plan(prompt, done):
                yield piece

    async def run() -> None:
        tasks, _ = await tasks_of(plans(4), grammar=True)
        await run_tasks(tasks, Noted(tasks), RuleJoiner(), None, faults_seed=1)
        for prompt in asked:
            task = next(t for t in tasks if prompt.user.startswith(t.prompt.user))
            assert prompt.grammar == task.prompt.grammar is not None
        assert len(asked) == 8  # the replans too
        assert all(t.prompt.grammar is None for t in (await tasks_of(plans(4)))[0])

    asyncio.run(run())


def test_labels_that_are_no_plans_are_counted() -> None:
    good, bad = plans(2)
    from dataclasses import replace

    tasks, left_out = asyncio.run(tasks_of([good, replace(bad, output="no plan")]))
    assert (len(tasks), left_out) == (1, 1)


# --- the model behind it


def planner(answers: Mapping[str, Sequence[str]] | Sequence[str]) -> tuple[Planner, ScriptedWriter]:
    writer = ScriptedWriter(answers)
    made = planner_with(writer)
    made.batch = 3
    return made, writer


def test_what_many_agents_ask_is_answered_in_batches_and_never_twice() -> None:
    scripted, writer = planner({str(n): [f"answer {n}"] for n in range(10)})
    calls: list[int] = []
    generate = writer.generate

    def counted(prompts: Sequence[Prompt], *more: Any) -> Any:
        calls.append(len(prompts))
        return generate(prompts, *more)

    writer.generate = counted  # type: ignore[method-assign]
    asked = [Prompt(system=None, user=str(n)) for n in range(10)]

    async def run() -> list[Any]:
        model = BatchedModel(scripted)
        first = await asyncio.gather(*(model.complete(p, END_OF_PLAN) for p in asked))
        again = await asyncio.gather(*(model.complete(p, END_OF_PLAN) for p in asked))
        assert first == again
        return first

    done = asyncio.run(run())
    assert [one.text for one in done] == [f"answer {n}" for n in range(10)]
    assert calls == [3, 3, 3, 1]


def test_an_error_of_the_model_reaches_every_agent() -> None:
    scripted, writer = planner(["x"])
    writer.error = ValueError("out of memory")

    async def run() -> list[Any]:
        model = BatchedModel(scripted)
        asked = [Prompt(system=None, user=str(n)) for n in range(5)]
        return await asyncio.gather(
            *(model.complete(p, END_OF_PLAN) for p in asked), return_exceptions=True
        )

    assert [str(error) for error in asyncio.run(run())] == ["out of memory"] * 5


def test_a_batch_that_nobody_waits_for_is_broken_off(caplog: pytest.LogCaptureFixture) -> None:
    scripted, writer = planner(["x"])
    written = 0

    def generate(_prompts: Any, _limits: Any, on_token: Any) -> Iterator[Any]:
        nonlocal written
        for _ in range(3000):
            written += 1
            time.sleep(0.01)
            on_token(0, "x")
        yield

    writer.generate = generate  # type: ignore[method-assign]

    async def run() -> None:
        model = BatchedModel(scripted)
        asked = [
            asyncio.create_task(model.complete(Prompt(system=None, user=str(n)), END_OF_PLAN))
            for n in range(3)
        ]
        await asyncio.wait(asked, timeout=0.1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run())
    gc.collect()
    assert written < 1000
    assert not caplog.records


def test_a_streamed_plan_comes_in_pieces_and_can_be_left() -> None:
    scripted, writer = planner(["1. a()\n", "2. b()\n", "3. join()"])

    async def whole() -> tuple[list[str], list[Completion]]:
        costs: list[Completion] = []
        stream = StreamingModel(scripted).plan(Prompt(system=None, user="q"), costs.append)
        return [piece async for piece in stream], costs

    pieces, costs = asyncio.run(whole())
    assert pieces == ["1. a()\n", "2. b()\n", "3. join()"]
    assert costs[0].new_tokens == 3

    async def left() -> None:
        stream = StreamingModel(scripted).plan(Prompt(system=None, user="q"), costs.append)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(left())
    assert writer.closed == 2
    assert len(costs) == 1
    assert scripted.complete([Prompt(system=None, user="q")], "x")[0].text.startswith("1. a()")


def test_the_joiner_is_asked_with_the_text_of_its_data() -> None:
    (entry,) = entries(1)
    join = entry.examples[1]
    text = joiner_text_of(join)
    assert text == OWN_JOINER_TEXT
    plan = parse_plan(entry.examples[0].output)
    execution = _run_in(sandbox_for(plan), entry.examples[0].output)
    assert text.prompt(entry.query, [execution]).user == join.user


@pytest.mark.parametrize(
    ("said", "action", "message"),
    [
        ("Thought: t\nAction: Finish(done)", "Finish", "done"),
        ("Thought: t\nAction: Replan", "Replan", ""),
        ("Action: Finish(Replanning is done)", "Replan", "Replanning is done"),
        ("no idea", "Finish", ""),
    ],
)
def test_the_model_s_verdict_is_read_as_the_app_reads_it(
    said: str, action: str, message: str
) -> None:
    scripted, writer = planner([said])
    joiner = ModelJoiner(StreamingModel(scripted).complete)
    execution = _run_in(sandbox_for(parse_plan("1. join()")), "1. join()")
    answer = asyncio.run(joiner.judge("q", [execution], last=False)).answer
    assert (answer.action, answer.message) == (action, message)
    assert writer.asked[0][0] is None
    assert END_OF_RESPONSE == "<END_OF_RESPONSE>"


# --- with the published texts


def test_the_loop_works_with_the_published_prompts(real_data: Path) -> None:
    from tinyagent_fast.data.cache import load_examples

    every = load_examples(real_data / "testing_data.json", on_bad_entry="error", points="all")
    joins = [example for example in every[:160] if example.kind == "join"]
    real = [example for example in every[:160] if example.kind == "plan"]
    text = joiner_text_of(joins[0])
    assert text.before.startswith("Follow these rules:") and text.before.endswith("###\n\n")
    assert {joiner_text_of(join) for join in joins} == {text}

    class Published(Oracle):
        async def plan(self, prompt: Prompt, done: Callable[[Completion], None]) -> Pieces:
            assert (prompt.system or "").startswith("Given a user query, create a plan")
            async for piece in super().plan(prompt, done):
                yield piece

    asked: list[Prompt] = []

    async def complete(prompt: Prompt, stop: str) -> Any:
        asked.append(prompt)
        said = _verdict(prompt.user.rpartition("\n\n")[2])
        return Completion(text=said, stop_reason="stop", new_tokens=9, prompt_tokens=9)

    async def run(chosen: Sequence[Task], seed: int | None) -> list[TaskResult]:
        joiner = ModelJoiner(complete, text)
        return await run_tasks(chosen, Published(chosen), joiner, None, faults_seed=seed)

    tasks, left_out = asyncio.run(tasks_of(real))
    assert left_out == 0
    results = asyncio.run(run(tasks, None))
    # Labels are right plans for themselves; some have calls that fail, such as wrong arities.
    assert all(result.done for result in results)
    sound = [task for task in tasks if task.label_runs]
    assert len(sound) / len(tasks) > 0.85
    tools = re.compile(r"^(\w+)\(.*\)\nObservation: ", re.M)
    mine = [prompt.user.removeprefix(text.before) for prompt in asked]
    for join in joins:
        own = next(user for user in mine if user.startswith(f"Question: {join.query}\n\n"))
        assert tools.findall(own) == tools.findall(join.user.removeprefix(text.before))
    faulty = asyncio.run(run(sound, 1))
    assert not any(result.reached[0] for result in faulty)
    assert sum(result.done for result in faulty) / len(faulty) > 0.9


# --- the command


def test_agent_eval_writes_figures_report_and_traces(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyagent_fast.config import Config, DataConfig
    from tinyagent_fast.data.cache import load_examples
    from tinyagent_fast.inference import planner as planners
    from tinyagent_fast.runs import create_run

    monkeypatch.chdir(tmp_path)
    test = tiny_data / "testing_data.json"
    data = DataConfig(train=tiny_data / "training_data.json", test=test, points="all")
    run = create_run(Config(name="r", data=data))
    examples = load_examples(test, on_bad_entry="error")

    class Labels(ScriptedWriter):
        def generate(self, prompts: Sequence[Prompt], limits: Limits, *more: Any) -> Any:
            if limits.stop == END_OF_RESPONSE:
                self.answers = {p.user: [_verdict(p.user)] for p in prompts}
            else:
                found = (next(e for e in examples if p.user.startswith(e.user)) for p in prompts)
                self.answers = {p.user: [e.output] for p, e in zip(prompts, found, strict=True)}
            return super().generate(prompts, limits, *more)

    monkeypatch.setattr(planners, "load", lambda *_, **__: planner_with(Labels([])))
    said = Console(quiet=True)
    figures = evaluate_agent(AgentEvalOptions(run="r", time_scale=0.0), Display(said))
    assert figures["joiner"] == "model"
    written = json.loads((run.path / "agent" / "metrics.json").read_text())
    assert written == figures
    assert written["task_success"] == {
        "share": 1.0,
        "interval": written["task_success"]["interval"],
        "n": 6,
        "count": 6,
    }
    lines = (run.path / "agent" / "outcomes.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert {"key", "fault", "done", "rounds", "cost"} <= json.loads(lines[0]).keys()
    report = (run.path / "agent" / "report.md").read_text()
    assert "| task success" in report and "With one fault" in report
    joins = written["joins"]
    of_file = load_examples(test, on_bad_entry="error", points="join")
    assert joins["action_accuracy"]["total"] == len(of_file)
    right = sum(
        parse_joiner(_verdict(e.user)).action == parse_joiner(e.output).action for e in of_file
    )
    assert joins["action_accuracy"]["count"] == right > 0
    assert set(joins["confusion"]) <= {"Finish", "Replan"}
    assert main(["report", "r"]) == 0
    page = (run.path / "report.html").read_text()
    assert "With one fault" in page and "join points" in page


def _verdict(user: str) -> str:
    wants = "try again" in user.lower().rpartition("question: ")[2]
    return "Thought: t\nAction: Replan" if wants else "Thought: t\nAction: Finish(done)"


def test_the_rule_judges_where_the_model_never_learned_to(tmp_path: Path) -> None:
    from tinyagent_fast.config import Config, DataConfig
    from tinyagent_fast.runs import create_run

    for points in ("plan", "all"):
        config = Config(name=points, runs=tmp_path, data=DataConfig(points=points))
        run = create_run(config)
        assert (joiner_of_run(run, "auto", None) is None) == (points == "plan")
        assert joiner_of_run(run, "rule", None) is None
        assert joiner_of_run(run, "model", None) is not None
    assert joiner_of_run(None, "auto", None) is None
