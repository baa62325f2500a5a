"""Evaluate a run on its test file: one way for its adapter, its GGUF files and its merged folder.

All are evaluated alike, and GGUF files are compared in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tinyagent_fast.config import Backend, Config, GrammarUse, check_config, check_threads
from tinyagent_fast.display import Display, size_text
from tinyagent_fast.distributed import init_processes, launch_environment
from tinyagent_fast.errors import ConfigError
from tinyagent_fast.evaluation.comparison import compare_plans
from tinyagent_fast.evaluation.predictions import PredictionFile
from tinyagent_fast.evaluation.report import Cell, FactTable, headline
from tinyagent_fast.evaluation.running import (
    EvaluationResult,
    EvaluationTask,
    evaluate_examples,
)
from tinyagent_fast.evaluation.scoring import ScoredPlan, score_all
from tinyagent_fast.evaluation.statistics import Proportion
from tinyagent_fast.export.record import ExportRecord
from tinyagent_fast.inference.engine import EngineName
from tinyagent_fast.runs import (
    ADAPTER_WEIGHTS,
    Run,
    find_run,
    holding,
    read_json,
    sha256_of,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from tinyagent_fast.data.schema import Example
    from tinyagent_fast.inference.engine import Engine
    from tinyagent_fast.prompts.tokens import PromptTokenizer

_SLOTS = 8
_SPARE_TOKENS = 64
"""For prompts that a file encodes with more tokens than the run's tokenizer does."""
_ADAPTER = "adapter"
_MERGED = "the adapter is merged into what it runs"


@dataclass(frozen=True, kw_only=True)
class EvalChanges:
    """Settings to use instead of those of the run's config; None leaves the run's."""

    batch: Annotated[int | None, tyro.conf.arg(aliases=["--batch"])] = None
    """Prompts generated together; llama.cpp takes 8 at most where this is not given."""
    max_new_tokens: Annotated[int | None, tyro.conf.arg(aliases=["--max-new-tokens"])] = None
    """Tokens after which a plan counts as truncated."""
    parity_prompts: Annotated[int | None, tyro.conf.arg(aliases=["--parity-prompts"])] = None
    """Prompts generated at batch 1 and at batch N before the sweep; 0 skips the comparison."""
    lookup_tokens: Annotated[int | None, tyro.conf.arg(aliases=["--lookup-tokens"])] = None
    """Guesses from the prompt that a decoding step checks at once; plans stay the same."""
    limit: Annotated[int | Literal["all"] | None, tyro.conf.arg(aliases=["--limit"])] = None
    """Evaluate only the first so many entries; `all` also where the run's config has a limit."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedRun:
    """Which run is evaluated, on which queries with which prompts."""

    run: str = "latest"
    """Run to evaluate: its name, its folder, or `latest`."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    test: Path | None = None
    """Another test file in the published schema."""
    prompts: Literal["as-is", "retrieved"] | None = None
    """System prompts as the test file has them, or with the tools that the run's retriever finds,
    in the form in which the run was trained; None takes what the run was trained with."""
    grammar: GrammarUse = "off"
    """`on` lets the model write nothing but plans of the tools that each prompt lists, as chat
    and agent do; the headline metric is without."""
    threads: int | None = None
    """CPU threads; None leaves it to torch, and gives llama.cpp one per core."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions(EvaluatedRun):
    """What to evaluate and how; what is not given comes from the run's config."""

    engine: Literal["auto", EngineName, "transformers"] = "auto"
    """`torch` runs the adapter on its base (`transformers`: with that backend), `gguf` the exported
    files in llama.cpp, `vllm` the merged folder on CUDA; `auto` takes what `--model` is, and the
    adapter without it."""
    model: Path | None = None
    """A .gguf file, or for vllm a merged folder; without it those that the run has exported."""
    adapter: str | None = None
    """`best` for the run's adapter, which is the default, `none` for the bare base model, or a
    folder."""
    eval: EvalChanges = field(default_factory=EvalChanges)
    backend: Backend | None = None
    """Another backend than the run's."""
    out: Path | None = None
    """Folder for predictions and report; by default `eval/` in the run's folder, and
    `eval-grammar/` with `--grammar on`. With `--engine gguf` each file gets a folder
    `eval-gguf-NAME/` in it, and in the run's by default."""
    fresh: bool = False
    """Generate everything anew, even where equal predictions are there."""


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every model is given to do."""

    run: Run
    config: Config
    options: EvalOptions
    task: EvaluationTask
    """With the test file and how its prompts were made as what it was made with."""
    display: Display

    @property
    def suffix(self) -> str:
        """End names of folders with this: figures with a grammar never replace those without."""
        return "-grammar" if self.options.grammar == "on" else ""


def _check_options(options: EvalOptions) -> EvalOptions:
    """Name the engine that is meant; refuse what it would have to ignore. Needs no torch."""
    engine: EngineName
    if options.engine == "transformers":
        if options.backend not in (None, "transformers"):
            raise ConfigError(
                f"--engine transformers with --backend {options.backend}",
                "they name two backends",
                "leave one of them out",
            )
        engine, options = "torch", replace(options, backend="transformers")
    elif options.engine != "auto":
        engine = options.engine
    elif options.model is None:
        engine = "torch"
    elif options.model.suffix == ".gguf":
        engine = "gguf"
    else:
        raise ConfigError(
            f"--model {options.model}",
            "it is no .gguf file, so the engine is not known",
            "name a .gguf file, or add --engine vllm for a merged folder",
        )
    given = {
        "model": options.model,
        "adapter": options.adapter,
        "backend": options.backend,
        "threads": options.threads,
        **{f"eval.{k.replace('_', '-')}": value for k, value in asdict(options.eval).items()},
    }
    for name, reason in ENGINES[engine].not_honoured.items():
        if given[name] is not None:
            raise ConfigError(f"--{name} with --engine {engine}", reason, f"leave --{name} out")
    if engine == "gguf" and options.model is not None and options.model.suffix != ".gguf":
        raise ConfigError(
            f"--model {options.model}", "llama.cpp runs GGUF files", "name a .gguf file"
        )
    for flag, path in (("model", options.model), ("test", options.test)):
        if path is not None and not path.exists():
            raise ConfigError(
                f"--{flag} {path}", "there is no such file or folder", "check the path"
            )
    check_threads(options.threads)
    count = launch_environment().count
    if engine != "torch" and count > 1:
        raise ConfigError(
            f"--engine {engine} in {count} processes",
            "it answers several queries at once in a single process",
            "start it without torchrun",
        )
    return replace(options, engine=engine)


def evaluate(options: EvalOptions, display: Display) -> dict[str, EvaluationResult]:
    """Evaluate a run, and write predictions, metrics and reports.

    Returns:
        What was measured by name: `adapter`, `base`, `merged`, or the names of GGUF files.

    Raises:
        ConfigError: There is no such run or model, or the engine cannot honour an option.
        ModelError: A model cannot be loaded, or a prompt does not fit.
        DataError: The test file is faulty.
    """
    options = _check_options(options)
    processes = init_processes()  # takes this process's GPU before any library looks for one
    run = find_run(options.run, options.runs)
    config = eval_config(run, options)
    with ExitStack() as held:
        if processes.is_main_process:
            fix = "name another folder with --out"
            held.enter_context(holding(options.out or run.path, "eval", fix))
        # What is not there is told before anything takes long.
        ENGINES[options.engine].find(run, options)
        held.enter_context(display.working("eval"))  # for whatever has no label of its own
        return _evaluate(run, config, options, display)


def _evaluate(
    run: Run, config: Config, options: EvalOptions, display: Display
) -> dict[str, EvaluationResult]:
    """Evaluate a run whose folder for results this process holds."""
    from tinyagent_fast.models.libraries import prepare_libraries

    backend = config.model.backend if options.engine == "torch" else "transformers"
    prepare_libraries(replace(config.model, backend=backend))
    from tinyagent_fast.data.generation.catalogue import plan_tools
    from tinyagent_fast.prompts.retrieval import RewrittenExamples

    examples, about_test = test_queries(run, config, display)
    if options.grammar == "on":
        about_test["grammar"] = "on"
    task = EvaluationTask(
        examples=examples,
        settings=config.eval,
        made_with=about_test,
        tools=plan_tools(config.data.catalogue),
        grammar=options.grammar == "on",
        note=f"Prompts rewritten: {examples.figures().sentence()}."
        if isinstance(examples, RewrittenExamples)
        else "",
    )
    job = _Job(run=run, config=config, options=options, task=task, display=display)
    display.say(f"run {run.path.name}: {len(examples)} test queries")
    return ENGINES[options.engine].measure(job)


def test_queries(
    run: Run, config: Config, display: Display
) -> tuple[Sequence[Example], dict[str, object]]:
    """Read the test queries of a run's config, with prompts as the config wants them.

    Returns:
        The plans, and what predictions for them depend on: the file, and the retriever if there is
        one.

    Raises:
        ConfigError: Retrieved prompts are wanted, and there is no retriever that writes them; or
            the run's catalogue is gone.
        DataError: There is no test file, it is faulty, or its labels call tools that the run's
            catalogue does not know.
    """
    from tinyagent_fast.training.inputs import (
        load_test_examples,
        refuse_unscorable,
        retriever_of_run,
    )

    if (unfinished := run.unfinished()) is not None:
        display.say(f"note: the training of run {run.path.name} is {unfinished}")
    if (changed := run.changed_catalogue()) is not None:
        display.say(f"note: {changed}")
    processes = init_processes()
    examples, test_sha256 = processes.main_process_first(lambda: load_test_examples(config))
    refuse_unscorable(config, examples)
    about_test: dict[str, object] = {"test_sha256": test_sha256}
    if config.data.prompts != "as-is":
        retriever = processes.main_process_first(lambda: retriever_of_run(run, display.working))
        if retriever is None or retriever.system is None:
            raise ConfigError(
                "--prompts retrieved",
                "the run has no tool retriever, and its training file is not here"
                if retriever is None
                else "the system prompts of the run's training file have no tool list",
                "evaluate with --prompts as-is",
            )
        with display.working("retrieving tools"):
            examples = retriever.rewrite(examples)
        display.say(f"prompts rewritten: {examples.figures().sentence()}")
        about_test["retriever"] = retriever.facts()
    return examples, about_test


def eval_config(run: Run, options: EvalOptions) -> Config:
    """Take the run's config with what the options change."""
    config = run.config()
    given = {name: value for name, value in asdict(options.eval).items() if value is not None}
    changes: dict[str, Any] = {n: None if value == "all" else value for n, value in given.items()}
    data, model = config.data, config.model
    if options.test is not None:
        data = replace(data, test=options.test)
    elif (test := run.test_file()) is not None and test.exists():
        data = replace(data, test=test)  # also one that was generated
    if options.backend is not None:
        model = replace(model, backend=options.backend)
    if options.prompts == "as-is" or (options.prompts and data.prompts == "as-is"):
        data = replace(data, prompts=options.prompts)
    # What training mixes matters to no test query.
    data = replace(data, with_generated=False, own_passes=1)
    config = replace(config, data=data, model=model, eval=replace(config.eval, **changes))
    check_config(config)
    return config


def _measure(
    job: _Job, name: str, engine: Engine, folder: Path, task: EvaluationTask
) -> EvaluationResult:
    """Evaluate one model, and close it."""
    processes, display = init_processes(), job.display
    if job.options.fresh and processes.is_main_process:
        PredictionFile(folder).forget()
    title = f"{task.title}, with the grammar" if task.grammar else task.title
    task = replace(task, title=title, made_with={**task.made_with, **job.task.made_with})
    with closing(engine), display.bar(name, "plans") as update:
        result = evaluate_examples(
            engine, task, folder, processes=processes, on_progress=update, say=display.say
        )
    if processes.is_main_process:
        if job.options.engine != "gguf":  # several files, which are compared in one table
            report = (folder / "report.md").read_text(encoding="utf-8")
            display.say(report.split("\n## The first")[0])
        display.say(f"{name}: {headline(result.metrics)}")
        display.say(f"written: {folder}/metrics.json, predictions.jsonl, report.md")
    return result


def _adapter(job: _Job) -> dict[str, EvaluationResult]:
    """Evaluate the run's adapter, another one, or the bare base, in torch."""
    from tinyagent_fast.inference.torch_engine import TorchEngine
    from tinyagent_fast.models.loading import load_for_generation

    run, config, options = job.run, job.config, job.options
    adapter = _adapter_meant(run, options)
    base = run.base_of(config)
    with job.display.working("loading the model"):
        loaded = load_for_generation(config, base, adapter)
    for note in loaded.notes:
        job.display.say(f"note: {note}")
    if loaded.fused:
        job.display.say(f"kernels: {loaded.fused}")
    name = _ADAPTER if adapter else "base"
    made_with = {
        "base": base,
        "adapter_sha256": sha256_of(adapter / ADAPTER_WEIGHTS) if adapter else None,
        "prompt_format": config.model.prompt_format,
        "weights": config.model.weights,
    }
    engine = TorchEngine(loaded, lookup_tokens=config.eval.lookup_tokens, threads=options.threads)
    folder = options.out or run.path / (("eval" if adapter else "eval-base") + job.suffix)
    task = replace(job.task, title=f"Run {run.path.name}", made_with=made_with)
    return {name: _measure(job, name, engine, folder, task)}


def _adapter_meant(run: Run, options: EvalOptions) -> Path | None:
    """Find the adapter; None stands for the bare base."""
    wanted = "best" if options.adapter is None else options.adapter
    return None if wanted == "none" else run.find_adapter(wanted)


def _merged_folder(job: _Job) -> dict[str, EvaluationResult]:
    """Evaluate the folder that was named, or that of the run's export, in vLLM."""
    from tinyagent_fast.inference.vllm import VllmEngine

    run, config = job.run, job.config
    folder = _folder_meant(run, job.options)
    room_tokens = config.model.max_length_tokens + config.eval.max_new_tokens
    task = replace(
        job.task,
        title=f"Run {run.path.name}, vLLM",
        made_with={"merged_sha256": sha256_of(folder)},
        settings=replace(config.eval, parity_prompts=0),
    )
    engine = VllmEngine(folder, _tokenizer(job), context_tokens=room_tokens)
    out = job.options.out or run.path / f"eval-vllm{job.suffix}"
    return {"merged": _measure(job, "merged", engine, out, task)}


def _folder_meant(run: Run, options: EvalOptions) -> Path:
    """Find the merged folder: the one that was named, or that of the run's export."""
    export = run.path / "export"
    recorded = [a.path for a in ExportRecord(export).artefacts if a.kind == "merged"]
    folder = options.model or export / (recorded[0] if recorded else "merged")
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"merged folder {folder}",
            "it holds no config.json, and vLLM runs merged folders",
            f"tinyagent-fast export --run {run.named} --to merged, or name one with --model",
        )
    return folder


def _gguf_files(job: _Job) -> dict[str, EvaluationResult]:
    """Evaluate the file that was named, or all that the run has exported, in llama.cpp."""
    from tinyagent_fast.inference.llama_cpp import LlamaCppEngine, LlamaCppSettings, LlamaServer
    from tinyagent_fast.prompts.builder import encode_prompts

    config, options = job.config, job.options
    paths = _files_meant(job.run, options)
    if options.model is None:
        _say_what_speaks_against_the_export(job)
    tokenizer = _tokenizer(job)
    longest_tokens = max(map(len, encode_prompts(tokenizer, job.task.examples)), default=0)
    slots = options.eval.batch or min(_SLOTS, config.eval.batch)
    results = {}
    for path in paths:
        settings = LlamaCppSettings(
            model=path,
            slots=slots,
            context_tokens_per_slot=longest_tokens + config.eval.max_new_tokens + _SPARE_TOKENS,
            threads=options.threads,
        )
        engine = LlamaCppEngine(LlamaServer(settings), tokenizer)
        folder = (options.out or job.run.path) / f"eval-gguf-{path.stem}{job.suffix}"
        task = replace(
            job.task, title=path.name, made_with={}, settings=replace(config.eval, batch=slots)
        )
        results[path.name] = _measure(job, path.name, engine, folder, task)
    _compare_files(job, {path.name: path for path in paths}, results)
    return results


def _tokenizer(job: _Job) -> PromptTokenizer:
    from tinyagent_fast.prompts.loading import load_tokenizer, resolve_tokenizer_folder
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    model = job.config.model
    folder = resolve_tokenizer_folder(job.run.base_of(job.config), model.revision)
    return PromptTokenizer(load_tokenizer(folder), model.prompt_format)


def _files_meant(run: Run, options: EvalOptions) -> list[Path]:
    """Find the GGUF files: the one that was named, or all that the run has exported."""
    if options.model is not None:
        return [options.model]
    record = ExportRecord(run.path / "export")
    listed = [record.folder / made.path for made in record.artefacts if made.kind == "gguf"]
    paths = listed or sorted((record.folder / "gguf").glob("*.gguf"))
    if not paths:
        raise ConfigError(
            f"run {run.path.name}",
            f"it has no GGUF file in {record.folder}",
            f"make export RUN={run.named}, or name a file with --model",
        )
    return paths


def _say_what_speaks_against_the_export(job: _Job) -> None:
    record, say = ExportRecord(job.run.path / "export"), job.display.say
    listed = [made for made in record.artefacts if made.kind == "gguf"]
    if listed and record.content["passed"] is False:
        say(f"note: the export did not pass its own gates; see {record.path}")
    for artefact in listed:
        path = record.folder / artefact.path
        if not path.exists() or sha256_of(path) != artefact.sha256:
            say(f"note: {path.name} is not the file that {record.path} tells of")


def _compare_files(
    job: _Job, paths: Mapping[str, Path], results: Mapping[str, EvaluationResult]
) -> None:
    """Write the table that compares GGUF files with the adapter, or with the f16 file."""
    measured = {name: result.plans for name, result in results.items()}
    adapter = _adapter_plans(job)
    reference = next((name for name in measured if Path(name).stem.endswith("f16")), None)
    if adapter is not None:
        reference, measured = _ADAPTER, {_ADAPTER: adapter, **measured}
    rows: list[tuple[Cell, ...]] = []
    records = []
    for name, plans in measured.items():
        size = path.stat().st_size if (path := paths.get(name)) else None
        success = Proportion(sum(plan.score.success for plan in plans), len(plans))
        seconds = sum(plan.prediction.seconds or 0.0 for plan in plans)
        compared, told = None, ("reference" if name == reference else "", "", "")
        if reference is not None and name != reference:
            compared = compare_plans(measured[reference], plans)
            same = f"{compared.identical_texts} of {compared.n}"
            told = (compared.points(), f"{compared.mcnemar_p:.3g}", same)
        shown = "" if size is None else size_text(size)
        rows.append((name, shown, success, *told, f"{seconds:.1f} s"))
        record = {"name": name, "size_bytes": size, "success": success.to_json()}
        compared_json = compared.to_json() if compared else None
        records.append({**record, "seconds": seconds, "comparison": compared_json})
    against = f"points against {reference or '(none)'}"
    table = FactTable(
        title=f"GGUF files of {job.run.path.name}" + ", with the grammar" * job.task.grammar,
        head=("engine", "size", "success", against, "McNemar p", "same plans", "generation"),
        rows=tuple(rows),
    ).to_markdown()
    folder = job.options.out or job.run.path
    name = f"eval-gguf{job.suffix}"
    write_text(folder / f"{name}.md", table)
    facts = {**job.task.made_with, "queries": len(job.task.examples), "reference": reference}
    write_json(folder / f"{name}.json", {**facts, "rows": records})
    job.display.say(table)
    job.display.say(f"written: {folder}/{name}.md, {name}.json")


def _adapter_plans(job: _Job) -> Sequence[ScoredPlan] | None:
    """Take the adapter's predictions as the reference if they are there for the same task."""
    folder = job.run.evaluation
    file, say = PredictionFile(folder.with_name(folder.name + job.suffix)), job.display.say
    more = " ARGS='--grammar on'" if job.suffix else ""
    remedy = f"`make eval RUN={job.run.named}{more}` adds the adapter to the table"
    if not file.path.exists() or not file.made_with_path.exists():
        say(f"note: {remedy}")
        return None
    made_with = read_json(file.made_with_path)
    weights = job.run.adapter / ADAPTER_WEIGHTS
    wanted = {
        "retriever": None,
        "grammar": None,
        **job.task.made_with,
        "max_new_tokens": job.config.eval.max_new_tokens,
        "adapter_sha256": sha256_of(weights) if weights.exists() else None,
    }
    by_key = {row.key: row for row in file.read()}
    other = [name for name, value in wanted.items() if made_with.get(name) != value]
    if missing := [e.key for e in job.task.examples if e.key not in by_key]:
        other.append(f"{len(missing)} queries missing")
    if other:
        say(f"note: {file.path} is for something else ({', '.join(other)}); {remedy}")
        return None
    return score_all((by_key[example.key] for example in job.task.examples), job.task.tools)


@dataclass(frozen=True, kw_only=True)
class EvaluatedEngine:
    """What an engine evaluates."""

    find: Callable[[Run, EvalOptions], object]
    """Says at once when what is meant is not there."""
    measure: Callable[[_Job], dict[str, EvaluationResult]]
    not_honoured: Mapping[str, str]
    """Flags that it cannot honour, each with the reason; it honours all others."""


ENGINES: Mapping[str, EvaluatedEngine] = {
    "torch": EvaluatedEngine(
        find=_adapter_meant,
        measure=_adapter,
        not_honoured={
            "model": "torch evaluates the run's adapter on its base; --adapter names another",
        },
    ),
    "gguf": EvaluatedEngine(
        find=_files_meant,
        measure=_gguf_files,
        not_honoured={
            "adapter": _MERGED,
            "backend": _MERGED,
            "eval.lookup-tokens": "llama.cpp's server makes no guesses from the prompt",
        },
    ),
    "vllm": EvaluatedEngine(
        find=_folder_meant,
        measure=_merged_folder,
        not_honoured={
            "adapter": _MERGED,
            "backend": _MERGED,
            "threads": "vLLM runs on the GPU",
            "eval.batch": "vLLM decides how many prompts it decodes together",
            "eval.parity-prompts": "vLLM decides how many prompts it decodes together",
            "eval.lookup-tokens": "vLLM makes no guesses from the prompt unless it is set up to",
        },
    ),
}
