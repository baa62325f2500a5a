"""Everything of a run that stands before its first step: data, rows, model, run folder, header."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tinyagent_fast.config import Config
from tinyagent_fast.data.generation.catalogue import plan_tools
from tinyagent_fast.distributed import Processes, init_processes
from tinyagent_fast.errors import ModelError
from tinyagent_fast.models.bases import resolve_base
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.loading import LoadedModel, load_for_training
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.rows import RowStatistics
from tinyagent_fast.prompts.templates import template_hash
from tinyagent_fast.prompts.tokenizers import load_tokenizer, resolve_tokenizer_folder
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import Run, create_run
from tinyagent_fast.training.display import TrainingDisplay
from tinyagent_fast.training.inputs import (
    RunExamples,
    RunRows,
    encode_run_rows,
    load_run_examples,
)
from tinyagent_fast.training.memory import (
    ERROR_SHARE,
    MemoryEstimator,
    RowLengths,
    preset_batch,
    usable_gib,
    with_batch,
)
from tinyagent_fast.training.resume import remember_or_compare, trainable_parameters
from tinyagent_fast.training.trainer import optimizer_steps


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that stands before the first step."""

    run: Run
    config: Config
    base: str
    examples: RunExamples
    rows: RunRows
    loaded: LoadedModel
    tools: Mapping[str, Tool] | None
    display: TrainingDisplay
    estimator: MemoryEstimator | None = None
    """What its memory is predicted from; none without CUDA."""
    processes: Processes = field(default_factory=Processes)
    """Those that train together; the first one writes."""


def prepare_session(config: Config, display: TrainingDisplay, resume: Run | None) -> Session:
    """Do all that comes before the trainer: read, build the base, encode, load, make the folder.

    Args:
        config: The checked config.
        display: Where progress is shown.
        resume: A run to go on with, or none for a new one.

    Returns:
        The session.

    Raises:
        UserError: Data, base or backend cannot be used as asked.
    """
    processes = init_processes()
    with display.bar("reading data"):
        examples = processes.main_process_first(lambda: load_run_examples(config))
    with display.bar("base model", "steps") as update:
        base = processes.on_main_process(
            lambda: resolve_base(
                config,
                examples.train,
                [example.query for example in examples.test],
                lambda progress: update(progress.step, progress.steps),
            )
        )
    folder = resolve_tokenizer_folder(base, config.model.revision)
    tokenizer = PromptTokenizer(load_tokenizer(folder), config.model.prompt_format)
    rows = _encoded(config, examples, tokenizer, display, processes)
    loaded = load_for_training(config, base)
    config, estimator = _sized(config, loaded, rows.train.statistics, display, processes)
    run = resume or processes.on_main_process(lambda: create_run(config))
    session = Session(
        run=run,
        config=config,
        base=base,
        examples=examples,
        rows=rows,
        loaded=loaded,
        tools=plan_tools(config.data.catalogue),
        display=display,
        estimator=estimator,
        processes=processes,
    )
    processes.on_main_process(
        lambda: remember_or_compare(
            run,
            _data_record(session),
            trainable_parameters(loaded.model),
            resumed=resume is not None,
        )
    )
    _header(session)
    return session


def _encoded(
    config: Config,
    examples: RunExamples,
    tokenizer: PromptTokenizer,
    display: TrainingDisplay,
    processes: Processes,
) -> RunRows:
    """Encode the rows, the first process before the others, and say what was left out."""
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
    return rows


def _sized(
    config: Config,
    loaded: LoadedModel,
    rows: RowStatistics,
    display: TrainingDisplay,
    processes: Processes,
) -> tuple[Config, MemoryEstimator | None]:
    """Turn `batch: auto` into a number before anything uses it, and predict the run's memory."""
    automatic = config.train.batch == "auto"
    usable = usable_gib()
    if usable is not None:
        usable = processes.all_reduce_min(usable)  # all must take the same batch
    if usable is None:
        if automatic:
            config = with_batch(config, preset_batch(config))
            display.say(
                f"batch auto: no CUDA device, so the {config.train.batch} rows of preset "
                f"{config.preset} are taken"
            )
        return config, None
    try:
        shape = ModelShape.from_config(loaded.model.config.to_dict())
    except ModelError as error:
        if automatic:
            raise
        display.say(f"memory cannot be predicted: {error.what}")
        return config, None
    estimator = MemoryEstimator(
        config=config,
        shape=shape,
        lengths=RowLengths(
            rows=rows.rows,
            mean_tokens=rows.mean_tokens,
            longest_tokens=rows.longest_tokens,
            supervised_tokens=rows.supervised_tokens / max(1, rows.rows),
        ),
        backend=loaded.backend,
        usable_gib=usable,
    )
    if automatic:
        found = estimator.largest_batch(config.model.gradient_checkpointing)
        config = with_batch(config, found.batch)
        display.say(
            f"batch auto: {found.batch} x {found.accumulation} rows"
            + ("" if found.fits else ", although even one row may not fit by the prediction")
        )
    return config, replace(estimator, config=config)


def _data_record(session: Session) -> dict[str, Any]:
    tokenizer = session.loaded.tokenizer
    chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
    vocabulary = tokenizer.hf.backend_tokenizer.to_str().encode()
    return {
        **session.examples.summary,
        "base": session.base,
        "template_sha256": template_hash(tokenizer.prompt_format, chat),
        "tokenizer_sha256": hashlib.sha256(vocabulary).hexdigest(),
        "rows": {
            "train": asdict(session.rows.train.statistics),
            "validation": asdict(session.rows.validation.statistics)
            if session.rows.validation
            else None,
        },
        **({"processes": session.processes.count} if session.processes.count > 1 else {}),
    }


def _memory_fact(estimator: MemoryEstimator | None) -> dict[str, str]:
    if estimator is None:
        return {}
    predicted, usable = estimator.estimate(), estimator.usable_gib
    verdict = "" if predicted.fits(usable) else "; it may not fit (tinyagent-fast memory says more)"
    return {
        "memory": f"predicted {predicted.total_gib:.1f} GiB +-{100 * ERROR_SHARE:.0f} % for the "
        f"longest micro-batch, {usable:.1f} GiB usable{verdict}"
    }


def _processes_fact(session: Session) -> dict[str, str]:
    train, count = session.config.train, session.processes.count
    if count == 1:
        return {}
    batch = train.rows_per_batch
    text = f"{count}: {batch * train.accumulation * count} rows of all processes per step"
    again = -session.rows.train.statistics.rows % (batch * count)
    if again and train.batching != "packed":
        text += f"; the last batches of an epoch take {again} of its first rows again"
    return {"processes": text}


def _header(session: Session) -> None:
    config, loaded, rows = session.config, session.loaded, session.rows.train.statistics
    train = config.train
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    count = session.processes.count
    steps = optimizer_steps(rows.rows, train, count)
    leaks = [
        f"{pair.normalised} queries in {pair.first} and {pair.second}"
        for pair in session.examples.leaks.between
        if pair.normalised
    ]
    if session.examples.left_out_as_leaks:
        left_out = session.examples.left_out_as_leaks
        leaks.append(f"{left_out:,} training rows left out, as their query is in the test file")
    files = session.examples.files
    facts = {
        "run": str(session.run.path),
        "preset": config.preset,
        "data": f"{files.train}{' (generated)' if files.generated else ''}",
        "rows": f"{rows.rows:,} to train on, mean {rows.mean_tokens:.0f} tokens, longest "
        f"{rows.longest_tokens}, {100 * rows.supervised_share:.1f} % of tokens supervised",
        "held out": f"{len(session.examples.validation)} validation queries during training, "
        f"{len(session.examples.test)} test queries",
        "leaks": "; ".join(leaks) or "no query in two splits",
        "base": f"{session.base} ({config.model.weights})",
        "backend": f"{loaded.backend} on {loaded.device}, compute {loaded.compute_dtype}",
        "adapter": f"LoRA r {config.lora.rank}, alpha {config.lora.alpha}, {config.lora.targets}, "
        f"{trainable:,} parameters",
        "steps": f"{steps if train.batching != 'packed' else 'packed rows:'} "
        f"of {train.batch} x {train.accumulation} rows, {train.batching}",
        **_processes_fact(session),
        **_memory_fact(session.estimator),
        "rate": f"{train.learning_rate:g}, {train.schedule}, {train.optimizer}",
    }
    session.display.header("tinyagent-fast train", facts)
    for note in loaded.notes:
        session.display.say(f"note: {note}")
