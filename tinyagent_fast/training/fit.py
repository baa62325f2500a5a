"""One run from config to adapter: data, rows, model, checks, steps, best adapter, picture."""

from __future__ import annotations

import hashlib
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tinyagent_fast.config import Config, CpuCompute, EvalConfig, Weights, check_config
from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.data.splits import mixture_text
from tinyagent_fast.display import Display
from tinyagent_fast.distributed import Processes, init_processes
from tinyagent_fast.errors import (
    ConfigError,
    DataError,
    ModelError,
    Stopped,
    TrainingError,
    count_of,
    is_full_disk,
)
from tinyagent_fast.evaluation.report import headline
from tinyagent_fast.evaluation.running import (
    EvaluationResult,
    EvaluationTask,
    evaluate_examples,
)
from tinyagent_fast.export.companions import ADAPTER_CARD, adapter_card
from tinyagent_fast.inference.torch_engine import TorchEngine, generating
from tinyagent_fast.interrupts import NAMES, Terminated, exit_code
from tinyagent_fast.models.bases import resolve_base
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.libraries import prepare_libraries
from tinyagent_fast.models.loading import LoadedModel, load_for_training, save_model
from tinyagent_fast.models.nano import PretrainSpec
from tinyagent_fast.models.threads import usable_cores
from tinyagent_fast.prompts.builder import encode_prompts
from tinyagent_fast.prompts.loading import load_tokenizer, resolve_tokenizer_folder
from tinyagent_fast.prompts.templates import template_hash
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.reports.charts import plot_training
from tinyagent_fast.runs import (
    Run,
    create_run,
    holding,
    point_latest,
    read_json,
    refuse_taken_name,
    whole_folder,
    write_json,
)
from tinyagent_fast.shared_prefix.packing import mean_shared_tokens, pack_step
from tinyagent_fast.shared_prefix.training import (
    SharedPrefixDecision,
    check_same_loss,
    decide_shared_prefix,
    why_not_shared,
    workers_of_a_step,
)
from tinyagent_fast.training.best import (
    Best,
    Evaluation,
    load_adapter_weights,
    read_best,
)
from tinyagent_fast.training.compute import choose_compute
from tinyagent_fast.training.inputs import (
    RunExamples,
    RunRows,
    encode_run_rows,
    load_run_examples,
    refuse_unscorable,
    retriever_of_run,
)
from tinyagent_fast.training.memory import (
    ERROR_SHARE,
    MemoryEstimator,
    RowLengths,
    preset_batch,
    rows_that_share,
    usable_gib,
    with_batch,
)
from tinyagent_fast.training.preflight import preflight
from tinyagent_fast.training.resume import (
    checkpoints,
    forget_after,
    last_checkpoint,
    refuse_changed_config,
    remember_or_compare,
    trainable_parameters,
    training_is_over,
)
from tinyagent_fast.training.tracking import check_tracker, track_evaluation, tracking_arguments
from tinyagent_fast.training.trainer import (
    build_trainer,
    collate,
    steps_between,
    validation_loss,
)

if TYPE_CHECKING:
    from tinyagent_fast.training.callbacks import History, PlanSuccess


_SAMPLED_ROWS = 256
_MARGIN_TOKENS = 16
_TIMES_EVERY_S = 5.0
_MANY_PASSES = 4.0
"""Until then rows seen again teach about as much as new ones (Muennighoff et al., Scaling
Data-Constrained Language Models, 2023), and recipes for LoRA take one to three."""
_FIRST_SAMPLE = 16
"""Validation queries before the first step: enough to see that an untrained model plans nothing."""


def train(config: Config, console: Console | None = None, *, resume: Run | None = None) -> Run:
    """Train an adapter as a config says; its arguments are those of `api.train`.

    Started by a launcher in several processes, they train together and each returns the run.

    Raises:
        UserError: Anything that a user can repair, before the first step wherever possible.
        Stopped: Ctrl-C or SIGTERM; the run can be resumed.
        KeyboardInterrupt: One of them came before there was a run.
    """
    check_config(config)
    check_tracker(config.track)
    processes = init_processes()
    if not processes.is_main_process:
        console = Console(quiet=True)
    display = Display(console or Console(highlight=False))
    started = time.perf_counter()
    with ExitStack() as held:

        def hold(run: Run) -> Run:
            if processes.is_main_process:
                held.enter_context(holding(run.path, "train", "train under another --name"))
                held.enter_context(_keeping_times(run, display, started))
            return run

        if resume is None:
            processes.on_main_process(lambda: refuse_taken_name(config))
        else:
            refuse_changed_config(resume, config)
            processes.on_main_process(lambda: point_latest(hold(resume)))
            config = resume.located(config)
        for line in _planned(config):
            display.say(line)
        with display.working("train"):  # for whatever has no label of its own
            return _train(config, display, resume, hold)


def _planned(config: Config) -> list[str]:
    """Say what is known before anything takes long; the header has what comes out of it."""
    data, train, base = config.data, config.train, config.model.base
    generated = f"{data.generated_entries:,} generated entries"
    if data.catalogue is not None:
        generated += f" with the tools of {data.catalogue}"
    source = generated
    if data.train is not None:
        source = f"{data.train}" + (f", among {generated}" if data.with_generated else "")
    once = f", built once for these tools by {PretrainSpec().steps} steps of its own"
    many = count_of(train.epochs, "epoch") + " in steps"
    why = ""
    if train.max_steps is not None:
        many = count_of(train.max_steps, "step")
        why = ", by --train.max-steps and not --train.epochs"
    rows = "as many rows as fit"
    if train.batch != "auto":
        rows = f"{train.batch} x {train.accumulation} rows"
    return [
        f"data: {source}; base: {base} ({config.model.weights}){once if base == 'nano' else ''}",
        f"training: {many} of {rows}, {train.batching}{why}",
    ]


def _train(config: Config, display: Display, resume: Run | None, hold: Callable[[Run], Run]) -> Run:
    """Train a new run, or go on with one that this process holds."""
    run, steps, is_over = resume, "steps and validation", False

    def begin(new: Run) -> Run:
        nonlocal run
        run = hold(new)
        return run

    try:
        checkpoint = None if resume is None else last_checkpoint(resume, display.say)
        # Quantisation-aware training goes by transformers, which Unsloth would patch.
        plain, model = config.train.qat != "off", config.model
        with display.working("loading libraries"):
            prepare_libraries(replace(model, backend="transformers") if plain else model)
        prepared = _prepare(config, display, resume, begin)
        run = prepared.run
        with display.timed(steps):
            _fit(prepared, checkpoint, resumed=resume is not None)
        is_over = True
        display.say(f"trained in {display.timings_s[steps]:.0f} s")
        _finish(prepared)
    except KeyboardInterrupt as stop:
        if run is None:
            raise
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        saved = next((path.name for path in checkpoints(run)), None)
        why = "there is no checkpoint yet, so it begins with the first step"
        if saved is not None:
            rest = "no step is left to make" if is_over else "steps behind it are made again"
            why = f"{saved} is the last one that was saved; {rest}"
        raise _stopped(run, f"stopped by {NAMES[number]}", why, number) from stop
    except Exception as error:
        if run is None or not is_full_disk(error):
            raise
        fix = f"free some space, then: tinyagent-fast train --resume {run.named}"
        raise TrainingError(f"run {run.path}", "the disk is full", fix) from error
    return run


@contextmanager
def _keeping_times(run: Run, display: Display, started: float) -> Iterator[None]:
    """Add the seconds of a session to those of the ones before it, as they pass: a kill loses few.

    No training fails for want of them, such as where the file is damaged or the disk is full.
    """
    path, over = run.path / "timings.json", threading.Event()
    before_s: dict[str, float] = {}
    if path.is_file():
        with suppress(ConfigError):
            recorded = read_json(path).items()
            before_s = {
                k: v for k, v in recorded if isinstance(v, int | float) and 0 <= v < math.inf
            }

    def write() -> None:
        now_s = {**display.timings_s, "all": time.perf_counter() - started}
        names = sorted({**before_s, **now_s}, key="all".__eq__)
        with suppress(OSError):
            write_json(path, {n: round(before_s.get(n, 0) + now_s.get(n, 0), 2) for n in names})

    def keep() -> None:
        while not over.wait(_TIMES_EVERY_S):
            write()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        write()


def _stopped(run: Run, what: str, why: str, number: int) -> Stopped:
    return Stopped(
        what,
        why,
        f"go on with: tinyagent-fast train --resume {run.named}",
        exit_code=exit_code(number),
    )


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """Everything that stands before the trainer is built."""

    run: Run
    config: Config
    """As asked, with `batch: auto` resolved."""
    base: str
    examples: RunExamples
    rows: RunRows
    loaded: LoadedModel
    estimator: MemoryEstimator | None
    """None where the base's sizes are not known."""
    display: Display
    processes: Processes

    def evaluate(
        self,
        examples: Any,
        settings: EvalConfig,
        folder: Path,
        title: str,
        made_with: dict[str, Any],
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> EvaluationResult:
        """Generate and score plans with the model as it stands.

        A plan is given up that is clearly longer than every label: an untrained model writes on.
        """
        encode = self.loaded.tokenizer.encode_text
        longest = max((len(encode(example.output)) for example in examples), default=0)
        most = min(settings.max_new_tokens, longest + longest // 4 + _MARGIN_TOKENS)
        settings = replace(settings, max_new_tokens=most)
        task = EvaluationTask(
            examples=examples,
            settings=settings,
            made_with={**made_with, "started": time.time()},
            tools=plan_tools(self.config.data.catalogue),
            title=title,
        )
        engine = TorchEngine(self.loaded, lookup_tokens=self.config.eval.lookup_tokens)
        return evaluate_examples(
            engine, task, folder, processes=self.processes, on_progress=on_progress, say=say
        )

    def measure_test_queries(self, when: str) -> None:
        """Measure the test queries `before` or `after` training, if wanted, and say what came out.

        Batches are compared afterwards only: an untrained model writes on and on, so in the long
        run its near-ties change every text.
        """
        settings, most = self.config.eval, None
        if not (settings.before_and_after and self.examples.test):
            return
        if when == "before":
            settings, most = replace(settings, parity_prompts=0), settings.before_limit
        with self.display.bar(f"test queries, {when} training", "plans") as update:
            result = self.evaluate(
                self.examples.test[:most],
                settings,
                self.run.path / "test" / when,
                f"Test queries {when} training",
                {"when": when},
                update,
                self.display.say,
            )
        self.display.say(f"{when} training: {headline(result.metrics)} test queries")


def _prepare(
    config: Config, display: Display, resume: Run | None, hold: Callable[[Run], Run]
) -> _Prepared:
    """Read data, build the base, encode rows, load the model and make the run's folder."""
    processes = init_processes()
    examples, base, rows = _read(config, display, resume)
    with display.working("loading the base model"):
        loaded = load_for_training(config, base)
    _refuse_rows_past_the_context(loaded, rows)
    if loaded.device == "cpu":
        with display.working("timing precision and threads"):
            loaded = _with_compute(config, loaded, rows, display, resume)
    with display.working("estimating memory"):
        estimator = _memory_estimator(config, loaded, rows, display)
    if config.train.batch == "auto":
        config = _with_automatic_batch(config, estimator, display)
        estimator = estimator and replace(
            estimator, config=with_batch(estimator.config, config.train.rows_per_batch)
        )
    if estimator is not None and loaded.device == "cpu":
        _refuse_too_large(estimator)
    prepared = _Prepared(
        run=resume or processes.on_main_process(lambda: hold(create_run(config))),
        config=config,
        base=base,
        examples=examples,
        rows=rows,
        loaded=loaded,
        estimator=estimator,
        display=display,
        processes=processes,
    )
    processes.on_main_process(lambda: _record(prepared, resumed=resume is not None))
    display.header("tinyagent-fast train", _header(prepared))
    for note in loaded.notes:
        display.say(f"note: {note}")
    _say_whether_exportable(prepared)
    return prepared


def _read(config: Config, display: Display, resume: Run | None) -> tuple[RunExamples, str, RunRows]:
    """Read the examples, find or build the base, and encode the rows for it."""
    processes = init_processes()
    mixed_in = None if resume is None else resume.mixed_in_file()
    examples = processes.main_process_first(
        lambda: load_run_examples(config, display.bar, mixed_in)
    )
    refuse_unscorable(config, examples.test, examples.validation)
    queries = [example.query for example in examples.test]
    base = processes.on_main_process(
        lambda: resolve_base(config, examples.train, queries, display.bar, display.say)
    )
    with display.working("loading the tokenizer"):
        folder = resolve_tokenizer_folder(base, config.model.revision)
        tokenizer = PromptTokenizer(load_tokenizer(folder), config.model.prompt_format)
    with display.bar("encoding rows", "rows") as update:
        rows = processes.main_process_first(
            lambda: encode_run_rows(
                config, examples, tokenizer, lambda done: update(done, len(examples.train))
            )
        )
    for name, row_file in (("train", rows.train), ("validation", rows.validation)):
        if row_file is not None and row_file.statistics.dropped:
            dropped = row_file.statistics.dropped
            display.say(
                f"dropped {len(dropped)} over-long {name} rows, the longest of "
                f"{max(tokens for _, tokens in dropped)} tokens"
            )
    return examples, base, rows


def _record(prepared: _Prepared, *, resumed: bool) -> None:
    """Write what the run was made with, or refuse to go on with anything else."""
    run, loaded, retriever = prepared.run, prepared.loaded, prepared.examples.retriever
    if loaded.device == "cpu":
        write_json(run.path / "compute.json", {"dtype": loaded.compute_dtype})
    trainable = trainable_parameters(loaded.model)
    remember_or_compare(run, _data_record(prepared), trainable, resumed=resumed)
    if retriever is not None:
        retriever.save(run.path)


def _say_whether_exportable(prepared: _Prepared) -> None:
    if find_spec("gguf") is None:  # an export needs it, training does not
        return
    from tinyagent_fast.export.conversion import export_obstacle

    revision, tokenizer = prepared.config.model.revision, prepared.loaded.tokenizer
    obstacle = export_obstacle(prepared.base, revision, tokenizer)
    prepared.display.say(
        "export: the trained model can become GGUF files"
        if obstacle is None
        else f"warning: the trained model cannot become a GGUF file. {obstacle}"
    )


def _with_compute(
    config: Config, loaded: LoadedModel, rows: RunRows, display: Display, resume: Run | None
) -> LoadedModel:
    """Choose precision and threads on the CPU; a resumed run keeps its precision."""
    processes = init_processes()
    if processes.count > 1:  # timed together they would slow each other down
        config = replace(
            config,
            train=replace(
                config.train,
                threads=config.train.threads or max(1, usable_cores() // processes.local_count),
            ),
            model=replace(
                config.model,
                cpu_compute="fp32" if config.model.cpu_compute == "auto" else "bf16",
            ),
        )
    record = resume.path / "compute.json" if resume else None
    if record is not None and record.exists():
        known = read_json(record, "dtype")["dtype"]
        compute: CpuCompute = "bf16" if known == "bfloat16" else "fp32"
        config = replace(config, model=replace(config.model, cpu_compute=compute))
    if config.train.batch == "auto":
        config = with_batch(config, preset_batch(config))
    shared = why_not_shared(loaded, config.train) is None

    def step(loaded: LoadedModel, batch: Sequence[dict[str, Any]]) -> Any:
        if shared:
            workers = workers_of_a_step(loaded, config)
            packed = pack_step(batch, math.ceil(len(batch) / workers))
            return step_gradients(loaded.model, packed, autocast=loaded.autocast, workers=workers)
        with loaded.autocast():
            inputs = collate(batch, loaded.tokenizer.pad_id)
            loss = loaded.model(**inputs, use_cache=False).loss
        loss.backward()
        return loss

    from tinyagent_fast.shared_prefix.step import step_gradients

    return choose_compute(loaded, config, rows.train.dataset(), step, display.say)


def _refuse_rows_past_the_context(loaded: LoadedModel, rows: RunRows) -> None:
    """Stop where a row has positions that the base was not made for.

    Raises:
        DataError: Unsloth's own forward would cut such a row, and transformers goes on past it.
    """
    context = getattr(loaded.model.config, "max_position_embeddings", sys.maxsize)
    files = [file for file in (rows.train, rows.validation) if file is not None]
    longest = max(file.statistics.longest_tokens for file in files)
    if longest > context:
        raise DataError(
            f"a row of {longest} tokens",
            f"the base has a context of {context} tokens",
            f"take a base with a longer context, or leave such rows out: "
            f"--model.max-length-tokens {context} --data.over-long drop",
        )


def _memory_estimator(
    config: Config, loaded: LoadedModel, rows: RunRows, display: Display
) -> MemoryEstimator | None:
    """Gather what the run's memory is estimated from."""
    usable = init_processes().all_reduce_min(usable_gib())  # all must take the same batch
    if loaded.device == "cpu" and config.model.weights != "nf4":
        held: Weights = "bf16" if loaded.compute_dtype == "bfloat16" else "fp32"
        config = replace(config, model=replace(config.model, weights=held))
    try:
        shape = ModelShape.from_config(loaded.model.config.to_dict())
    except ModelError as error:
        if config.train.batch == "auto":
            raise
        display.say(f"memory cannot be predicted: {error.what}")
        return None
    statistics = rows.train.statistics
    return MemoryEstimator(
        config=config,
        shape=shape,
        lengths=RowLengths(
            rows=statistics.rows,
            mean_tokens=statistics.mean_tokens,
            longest_tokens=statistics.longest_tokens,
            supervised_tokens=statistics.supervised_tokens / max(1, statistics.rows),
            shared_tokens=_shared_tokens(config, rows),
        ),
        backend=loaded.backend,
        usable_gib=usable,
    )


def _refuse_too_large(estimator: MemoryEstimator) -> None:
    """Stop before the kernel ends the program, which it does without a word.

    Raises:
        TrainingError: More memory is predicted than is free.
    """
    predicted, usable = estimator.estimate(), estimator.usable_gib
    if predicted.fits(usable, error_share=0.0):
        return
    flags = [
        f"--train.batch {found.batch} --train.accumulation {found.accumulation}"
        + (" --model.gradient-checkpointing true" if found.checkpointing == "true" else "")
        for found in map(estimator.largest_batch, estimator.checkpointings)
        if found.fits
    ]
    raise TrainingError(
        f"a micro-batch of {estimator.config.train.batch} rows of {estimator.row_tokens} tokens "
        f"needs about {predicted.total_gib:.1f} GiB, and {usable:.1f} GiB are free",
        "the system would end the program in the middle of training",
        ", or ".join([*flags, "end other programs"])
        if flags
        else "no batch fits: end other programs, or leave long rows out with "
        "--model.max-length-tokens and --data.over-long drop",
    )


def _shared_tokens(config: Config, rows: RunRows) -> float:
    """Count on a sample what stands once in a step, or micro-batch, instead of once a row."""
    dataset = rows.train.dataset()
    step = max(1, len(dataset) // _SAMPLED_ROWS)
    sample = [dataset[at] for at in range(0, len(dataset), step)]
    return mean_shared_tokens(sample, rows_that_share(config))


def _kept_tokens(prepared: _Prepared, shared: SharedPrefixDecision) -> float:
    """Find the most tokens of a micro-batch that keeps its layers, and say it."""
    config, estimator = prepared.config, prepared.estimator
    if config.model.gradient_checkpointing != "auto":
        return math.inf
    if not shared.on:
        raise TrainingError(
            "model.gradient-checkpointing auto",
            f"it decides for each packed sequence, and shared prefixes are off: {shared.reason}",
            "add --model.gradient-checkpointing unsloth, or false where memory is enough",
        )
    if estimator is None:
        return math.inf
    batch = config.train.rows_per_batch
    found, longest = estimator.kept_tokens(batch), estimator.computed_tokens(1)
    again = " no row is that long" if found >= longest else f" the longest row has {longest:,}"
    prepared.display.say(
        f"checkpointing auto: micro-batches have at most {found:,} tokens; only a longer row alone "
        f"computes its layers again, and{again}"
    )
    return found


def _with_automatic_batch(
    config: Config, estimator: MemoryEstimator | None, display: Display
) -> Config:
    """Turn `batch: auto` into a number before anything uses it."""
    assert estimator is not None, "a base of unknown size was refused"
    found = estimator.largest_batch(config.model.gradient_checkpointing)
    display.say(
        f"batch auto: {found.batch} x {found.accumulation} rows"
        + ("" if found.fits else ", although even one row may not fit by the prediction")
    )
    return with_batch(config, found.batch)


def _data_record(prepared: _Prepared) -> dict[str, Any]:
    """Gather what a resumed run must have unchanged."""
    tokenizer, rows = prepared.loaded.tokenizer, prepared.rows
    vocabulary = tokenizer.hf.backend_tokenizer.to_str().encode()
    vocabulary += f"{tokenizer.bos_id} {tokenizer.eos_id}".encode()
    return {
        **prepared.examples.summary,
        "base": prepared.base,
        "template_sha256": template_hash(tokenizer.prompt_format, tokenizer.chat),
        "tokenizer_sha256": hashlib.sha256(vocabulary).hexdigest(),
        "rows": {
            "train": asdict(rows.train.statistics),
            "validation": asdict(rows.validation.statistics) if rows.validation else None,
        },
        **({"processes": prepared.processes.count} if prepared.processes.count > 1 else {}),
    }


def _header(prepared: _Prepared) -> dict[str, str]:
    """Say what this run is, by the name of each line; what `_planned` says stands there alone."""
    import torch

    config, loaded, rows = prepared.config, prepared.loaded, prepared.rows.train.statistics
    train, count, files = config.train, prepared.processes.count, prepared.examples.files
    cards = torch.cuda.device_count() if loaded.device == "cuda" else 0
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    leaks = [
        f"{pair.normalised} {pair.first}/{pair.second}"
        for pair in prepared.examples.leaks.between
        if pair.normalised
    ]
    if prepared.examples.left_out_as_leaks:
        leaks.append(f"{prepared.examples.left_out_as_leaks} training rows left out for them")
    lines = {"run": str(prepared.run.path)}
    if files.generated:
        lines["data"] = str(files.train)
    if (mixed := prepared.examples.summary.get("generated")) is not None:
        lines["data"] = mixture_text(mixed)
    lines |= {
        "rows": f"{rows.rows:,} to train on, mean {rows.mean_tokens:.0f} tokens, longest "
        f"{rows.longest_tokens}, {100 * rows.supervised_share:.1f} % of tokens supervised",
        "held out": f"{prepared.examples.summary['examples']['validation']} entries, of which "
        f"{len(prepared.examples.validation)} are planned during training; "
        + (
            f"{_of(len(prepared.examples.test), prepared.examples.test_in_file)} test queries"
            if files.test is not None
            else "no test file: nothing is measured on one (--data.test FILE names one)"
        ),
        "leaks": ", ".join(leaks) or "no query in two splits",
        **({"base": prepared.base} if prepared.base != config.model.base else {}),
        "backend": f"{loaded.backend} on {loaded.device}, compute {loaded.compute_dtype}"
        + (f", {loaded.fused}" if loaded.fused else "")
        + (f"; one of {cards} GPUs, torchrun takes all" if cards > 1 == count else ""),
        "adapter": f"LoRA r {config.lora.rank}, alpha {config.lora.alpha}, {config.lora.targets}, "
        f"{trainable:,} parameters",
    }
    if count > 1:
        batch = train.rows_per_batch * count
        lines["processes"] = f"{count}: {batch * train.accumulation} rows of all processes per step"
        again = -rows.rows % batch
        if again and train.batching != "packed":
            lines["processes"] += (
                f"; the last batches of an epoch take {again} of its first rows again"
            )
    if prepared.estimator is not None:
        predicted, usable = prepared.estimator.estimate(), prepared.estimator.usable_gib
        fits = predicted.fits(usable)
        lines["memory"] = (
            f"predicted {predicted.total_gib:.1f} GiB +-{100 * ERROR_SHARE:.0f} % for the "
            f"longest micro-batch, {usable:.1f} GiB usable"
            + ("" if fits else "; it may not fit (tinyagent-fast memory says more)")
        )
    if (retriever := prepared.examples.retriever) is not None:
        lines["prompts"] = (
            f"rewritten: {retriever.figures.sentence()}, by cross-validation of "
            f"{retriever.scored_by()}"
        )
    lines["rate"] = f"{train.learning_rate:g}, {train.schedule}, {train.optimizer}"
    return lines


def _of(some: int, all_there: int) -> str:
    return f"{some}" if some == all_there else f"{some} of {all_there}"


def _fit(prepared: _Prepared, checkpoint: Path | None, *, resumed: bool) -> None:
    """Check everything on real batches, then make the steps."""
    from tinyagent_fast.training.callbacks import (
        DivergenceGuard,
        History,
        StepGuard,
        StepProgress,
        StopOnInterrupt,
    )

    display, run, processes = prepared.display, prepared.run, prepared.processes
    trainer = _checked_trainer(prepared, resumed=resumed)
    if resumed:
        dropped = processes.on_main_process(lambda: forget_after(run, checkpoint))
        start = checkpoint.name if checkpoint else "the first step, as there is no checkpoint yet"
        display.say(f"going on from {start}: {dropped} later records of history dropped")
    if checkpoint is None:
        prepared.measure_test_queries("before")
    history = History(run=run, tokens=trainer.token_counts, say=display.say, processes=processes)
    interrupt = StopOnInterrupt(say=display.say, processes=processes)
    callbacks = [StepGuard(), history, DivergenceGuard(run=run), interrupt]
    if prepared.config.train.evaluations and prepared.rows.validation is not None:
        success = _plan_success(prepared, trainer, history)
        callbacks.append(success)
        if checkpoint is None:
            success.evaluate(0)
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None and processes.on_main_process(
        lambda: training_is_over(run, checkpoint, trainer.steps)
    ):
        load_adapter_weights(prepared.loaded.model, checkpoint)
        display.say(f"{checkpoint.name} is the last one: no step is left to make")
        return
    with display.working("training", "steps") as update:
        trainer.add_callback(StepProgress(update))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if number := interrupt.stopped_by:
        if not processes.is_main_process:
            raise SystemExit(exit_code(number))  # the main process says it
        at = f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}"
        raise _stopped(run, f"{at} by {NAMES[number]}", "a checkpoint was saved", number)


def _checked_trainer(prepared: _Prepared, *, resumed: bool) -> Any:
    """Build the trainer, and see that its longest batch fits and its loss is right."""
    config, loaded, display, run = prepared.config, prepared.loaded, prepared.display, prepared.run
    processes, rows = prepared.processes, prepared.rows.train.dataset()
    decision_path = run.path / "shared_prefix.json"
    shared = decide_shared_prefix(loaded, config.train, rows, decision_path if resumed else None)
    if processes.is_main_process:
        write_json(decision_path, asdict(shared))
    display.say(f"shared prefixes {shared.sentence()}")
    kept_tokens = _kept_tokens(prepared, shared)
    with display.working("building the trainer"):
        trainer = build_trainer(
            loaded,
            rows,
            config,
            output_dir=run.checkpoints,
            shared_prefix=shared.on,
            kept_tokens=kept_tokens,
            processes=processes,
            tracking=tracking_arguments(config.track, run),
        )
    display.say(_passes(config, trainer.steps, len(trainer.train_dataset), processes.count))
    prompts = encode_prompts(loaded.tokenizer, prepared.examples.validation)
    with display.working("checking the longest batch"):
        report = preflight(trainer, loaded, rows, prompts, config.eval.batch, prepared.estimator)
    display.say(report.sentence())
    if prepared.estimator is not None and processes.is_main_process:
        predicted = prepared.estimator.estimate()
        record = {
            "predicted": {**asdict(predicted), "total_gib": predicted.total_gib},
            "usable_gib": prepared.estimator.usable_gib,
            "batch": config.train.batch,
            **asdict(report),
        }
        write_json(run.path / "memory.json", record)
    if shared.on:
        with display.working("comparing shared prefixes with whole rows"):
            difference = check_same_loss(trainer, loaded, rows)
        display.say(f"checked: shared prefixes give the loss of whole rows within {difference:.0e}")
    return trainer


def _passes(config: Config, steps: int, rows: int, processes: int) -> str:
    """Say how often the steps pass over the rows, or packed rows, and warn where that is often."""
    train = config.train
    passes = train.passes(rows, processes)
    shown = float(f"{passes:.3g}")
    said = f"{count_of(steps, 'step')} {'is' if steps == 1 else 'are'} {shown:,g} "
    said += f"{'pass' if shown == 1 else 'passes'} over {count_of(rows, 'row')}"
    own = config.data.own_passes
    if own > 1:
        said += f", in which each own row is seen {float(f'{passes * own:.3g}'):,g} times"
    if passes * own <= _MANY_PASSES:
        return said
    fewer = f"--train.epochs {_MANY_PASSES:g}"
    if passes <= _MANY_PASSES:
        fewer = f"--data.own-passes {max(1, int(_MANY_PASSES / passes))}"
    elif train.max_steps is not None:
        fewer = f"--train.max-steps {max(1, int(steps / passes * _MANY_PASSES))}"
    return (
        f"warning: {said}; after {_MANY_PASSES:g} an adapter mostly learns them by heart; "
        f"fix: {fewer}, or more rows"
    )


def _plan_success(prepared: _Prepared, trainer: Any, history: History) -> PlanSuccess:
    """Make the callback that measures plan success and keeps the best adapter."""
    from tinyagent_fast.training.callbacks import PlanSuccess

    config, loaded, run = prepared.config, prepared.loaded, prepared.run
    assert prepared.rows.validation is not None, "the caller has checked that there are such rows"
    rows = list(prepared.rows.validation.dataset())

    def measure(step: int) -> Evaluation:
        started = time.perf_counter()
        with prepared.display.working(f"validation at step {step}", "plans") as update:
            with generating(loaded):
                loss = validation_loss(trainer, rows, loaded.tokenizer.pad_id)
            examples = prepared.examples.validation
            metrics = prepared.evaluate(
                examples[:_FIRST_SAMPLE] if step == 0 else examples,
                replace(config.eval, parity_prompts=0),
                run.path / "samples" / f"step-{step:06d}",
                f"Validation sample at step {step}",
                {"step": step},
                update,
            ).metrics
        seconds = time.perf_counter() - started
        history.pause(seconds)
        new = Evaluation(
            step=step,
            success=metrics.success.share,
            success_dag=metrics.success_dag.share,
            loss=loss,
            samples=metrics.n,
            seconds=seconds,
        )
        track_evaluation(trainer, new)
        return new

    def save(folder: Path, best: Best) -> None:
        card = adapter_card(run, run.recorded_config(), best)
        notes = {"best.json": asdict(best), ADAPTER_CARD: card}
        save_model(loaded.model, loaded.tokenizer.hf, folder, notes)

    return PlanSuccess(
        run=run,
        measure=measure,
        save=save,
        say=prepared.display.say,
        every_steps=steps_between(trainer.steps, config.train.evaluations),
        patience=config.train.early_stopping,
        processes=prepared.processes,
    )


def _finish(prepared: _Prepared) -> None:
    """Put the best adapter where evaluation and export look for it, and say what came out."""
    run = prepared.run
    with prepared.display.working("keeping the best adapter and drawing its curves"):
        if prepared.processes.on_main_process(lambda: _keep_best(prepared)):
            load_adapter_weights(prepared.loaded.model, run.adapter)
    prepared.measure_test_queries("after")
    stage = prepared.display.bar
    prepared.processes.on_main_process(lambda: retriever_of_run(run, stage) is not None)
    test = "" if prepared.examples.files.test else " ARGS='--test FILE'"
    prepared.display.say(f"run folder: {run.path}; next: make eval RUN={run.named}{test}")


def _keep_best(prepared: _Prepared) -> bool:
    """Copy the best adapter and draw the curves; say whether there is a best one."""
    run, loaded, display = prepared.run, prepared.loaded, prepared.display
    best = read_best(run)
    if best is None:
        notes = {ADAPTER_CARD: adapter_card(run, run.recorded_config(), None)}
        save_model(loaded.model, loaded.tokenizer.hf, run.adapter, notes)
        display.say("no evaluation was made: the last adapter is kept")
    else:
        with whole_folder(run.adapter) as part:
            shutil.copytree(run.best, part, dirs_exist_ok=True)
        display.say(f"best adapter: step {best.step}, {best.reason}")
    plot_training(run)
    return best is not None
