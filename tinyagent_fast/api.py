"""Functions for Python programs; the commands of the same names call them too.

torch and transformers are imported when a function needs them, in the order that Unsloth asks for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tinyagent_fast.agent.loop import Outcome
from tinyagent_fast.agent.tools import RunnableTool, tools_of_module
from tinyagent_fast.config import Config, typed
from tinyagent_fast.display import Display
from tinyagent_fast.errors import ConfigError, wrong_type
from tinyagent_fast.evaluation.evaluate import EvalOptions, evaluate
from tinyagent_fast.evaluation.running import EvaluationResult
from tinyagent_fast.evaluation.scoring import Metrics, score_pair, summarise
from tinyagent_fast.export.settings import ExportSettings, check_settings
from tinyagent_fast.inference.planner import Planner
from tinyagent_fast.interrupts import run_async
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.runs import Run, find_run, holding


@typed
def train(
    config: Config, *, resume: Run | str | Path | None = None, console: Console | None = None
) -> Run:
    """Train an adapter as the config says.

    Args:
        config: All settings; its data files must be there (`tinyagent-fast data download`).
        resume: A run, or its name or folder, to go on with from its last checkpoint; its config
            must be the same.
        console: Where progress is printed; None takes the standard output.

    Returns:
        The run; its `adapter` folder holds the adapter with the highest plan success.

    Raises:
        UserError: Anything that a user can repair, before the first step wherever possible.
    """
    from tinyagent_fast.training.fit import train as fit

    found = resume if isinstance(resume, Run | None) else find_run(resume, config.runs)
    return fit(config, console, resume=found)


@typed
def evaluate_run(
    run: Run | str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    console: Console | None = None,
) -> dict[str, EvaluationResult]:
    """Write a plan for every test query and score it.

    Args:
        run: A run, or its name or folder; None takes what the settings name.
        options: Engine, files and settings; None takes the run's.
        console: Where progress is printed; None takes the standard output.

    Returns:
        What was measured, by name: `adapter`, `base`, `merged`, or the names of GGUF files.

    Raises:
        UserError: Anything that a user can repair.
    """
    from tinyagent_fast.models.libraries import quieten

    quieten()  # before the first import that reaches bitsandbytes
    options = options or EvalOptions()
    options = replace(options, run=str(_run_meant(run, options.run, options.runs).path))
    return evaluate(options, Display(console or Console(highlight=False)))


@typed
def export_run(
    run: Run | str | Path | None = None,
    settings: ExportSettings | None = None,
    *,
    console: Console | None = None,
) -> Path:
    """Make merged weights and GGUF files of a run, and prove them against its adapter.

    Args:
        run: A run, or its name or folder; None takes what the settings name.
        settings: Which files and which proofs; None takes the defaults.
        console: Where progress is printed; None takes the standard output.

    Returns:
        The folder with the files, export.json and report.md.

    Raises:
        GateError: A file does not do what the adapter does.
        UserError: Anything that a user can repair.
    """
    settings = settings or ExportSettings()
    check_settings(settings)
    found = _run_meant(run, settings.run, settings.runs)
    adapter = found.find_adapter(settings.adapter)
    config = found.config()
    display = Display(console or Console(highlight=False))
    display.say(f"run {found.path.name}, adapter {adapter}")
    if (unfinished := found.unfinished()) is not None:
        display.say(f"note: the training of run {found.path.name} is {unfinished}")
    if (changed := found.changed_catalogue()) is not None:
        display.say(f"note: {changed}")
    held = holding(settings.out or found.path, "export", "name another folder with --out")
    with held, display.working("export"):  # for whatever has no label of its own
        from tinyagent_fast.models.libraries import prepare_libraries

        # The reference is plain transformers, whatever backend has trained the adapter.
        prepare_libraries(replace(config.model, backend="transformers"))
        from tinyagent_fast.export.pipeline import run_export
        from tinyagent_fast.export.preparation import prepare_export
        from tinyagent_fast.export.publishing import publish

        export = prepare_export(found, config, settings, adapter, display)
        folder = run_export(export)
        if settings.push_to_hub is not None:
            repository, content = settings.push_to_hub, export.record.content
            publish(folder, content, repository, dry_run=settings.dry_run, say=display.say)
    return folder


def _run_meant(run: Run | str | Path | None, in_settings: str, runs: Path) -> Run:
    """Find the run that was named, beside the settings or in them."""
    if run is None:
        return find_run(in_settings, runs)
    found = run if isinstance(run, Run) else find_run(run, runs)
    if in_settings not in ("latest", run) and find_run(in_settings, runs) != found:
        raise ConfigError(
            f"run {found.path.name} with settings for run {in_settings}",
            "one call works on one run",
            "name it once",
        )
    return found


@typed
def score_pairs(
    pairs: Iterable[tuple[str, str]], tools: Mapping[str, Tool] | None = None
) -> Metrics:
    """Score predictions against labels; needs no torch.

    Args:
        pairs: Texts of (label, prediction).
        tools: The tools that plans may call, by name; None stands for TinyAgent's 16.

    Returns:
        Shares with their intervals, and how often each cause of failure occurs. A label that calls
        a tool outside `tools` cannot be scored: it is no success, and counts as a `bad_label`.

    Raises:
        ConfigError: Something else than two texts is given as a pair.
    """
    scores = []
    for pair in pairs:
        match pair:
            case (str(label), str(prediction)):
                scores.append(score_pair(label, prediction, tools))
            case _:
                wanted = "two texts, (label, prediction); a plan that is missing is the text ''"
                raise wrong_type(f"pair {len(scores)}", pair, wanted)
    return summarise(scores)


@typed
def load_tools(path: str | Path) -> dict[str, RunnableTool]:
    """Load a Python file whose public functions are tools, as `agent --tools` does.

    Returns:
        The tools by name, for `run_agent`; the `tool` of each is what plans know of it.

    Raises:
        DataError: The file cannot be loaded, or holds no function that can be a tool.
    """
    return tools_of_module(Path(path))


@typed
def run_agent(
    planner: Planner,
    request: str,
    tools: Mapping[str, RunnableTool] | str | Path | None = None,
    *,
    allow: bool | Callable[[str, Sequence[object]], bool] = False,
    system: str | None = None,
    max_replans: int = 2,
    call_timeout_s: float = 30.0,
) -> Outcome:
    """Plan a request, carry the plan out, judge what came of it, and plan again where that helps.

    Args:
        planner: Writes the plans, and judges where it was trained to.
        request: What should be done.
        tools: By name, as `load_tools` gives them, or a Python file; None takes the planner's
            tools in a sandbox, where nothing real is touched.
        allow: Whether calls of your tools that change something are done: all, none, or what a
            function says that is given the tool's name and the arguments, one call at a time.
        system: A system text for this request.
        max_replans: How often another plan is made at most.
        call_timeout_s: Longest time for one call; a tool may have its own.

    Returns:
        What came of it: `message` for the user, `failed`, and every call in `rounds`. It is also
        written into the run's `agent/traces.jsonl`.

    Raises:
        UserError: Anything that a user can repair; a call that fails is none.
    """
    from tinyagent_fast.agent.loop import allow_all, in_thread
    from tinyagent_fast.agent.session import AgentSpec, open_agent

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass  # as it should be
    else:
        raise ConfigError(
            "run_agent() in an event loop, such as a notebook's",
            "it runs one of its own",
            "call it in a thread: await asyncio.to_thread(run_agent, planner, request)",
        )
    planner.refuse_open_stream()
    file = None if tools is None or isinstance(tools, Mapping) else Path(tools)
    spec = AgentSpec(tools=file, max_replans=max_replans, call_timeout_s=call_timeout_s)
    spec.check()
    one_at_a_time = asyncio.Lock()

    async def allowed(tool: RunnableTool, arguments: Sequence[object]) -> bool:
        if isinstance(allow, bool):
            return allow
        async with one_at_a_time:  # others go on meanwhile
            answer = await in_thread(allow, tool.name, list(arguments))
        if not isinstance(answer, bool):
            raise wrong_type("what allow gives", answer, "True or False")
        return answer

    async def answer() -> Outcome:
        async with open_agent(planner, spec, tools if isinstance(tools, Mapping) else None) as one:
            return await one.answer(request, system, allow=allowed if one.real else allow_all)

    return run_async(answer())
