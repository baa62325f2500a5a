"""One run from config to adapter: data, rows, model, checks, steps, best adapter, picture."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tinyagent_fast.config import Config, check_config
from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.evaluation.report import headline
from tinyagent_fast.evaluation.running import EvaluationResult, evaluate_examples, prompt_ids
from tinyagent_fast.generation.decoding import generating
from tinyagent_fast.plans.tools import Tool
from tinyagent_fast.prompts.loading import load_tokenizer, resolve_tokenizer_folder
from tinyagent_fast.prompts.templates import template_hash
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.runs import Run, create_run, write_json
from tinyagent_fast.training.bases import resolve_base
from tinyagent_fast.training.callbacks import (
    Best,
    Evaluation,
    History,
    PlanSuccess,
    StepGuard,
    StopOnInterrupt,
    read_best,
    save_adapter,
)
from tinyagent_fast.training.display import TrainingDisplay
from tinyagent_fast.training.inputs import (
    RunExamples,
    RunRows,
    encode_run_rows,
    load_run_examples,
)
from tinyagent_fast.training.models import LoadedModel, load_for_training
from tinyagent_fast.training.plots import plot_training
from tinyagent_fast.training.preflight import preflight
from tinyagent_fast.training.resume import (
    forget_after,
    last_checkpoint,
    refuse_changed_config,
    remember_or_compare,
    trainable_parameters,
    training_is_over,
)
from tinyagent_fast.training.threads import fastest_threads
from tinyagent_fast.training.trainer import (
    build_trainer,
    collate,
    optimizer_steps,
    steps_between,
    validation_loss,
)


@dataclass(frozen=True, kw_only=True)
class _Session:
    """Everything that stands before the first step."""

    run: Run
    config: Config
    base: str
    examples: RunExamples
    rows: RunRows
    loaded: LoadedModel
    tools: Mapping[str, Tool] | None
    display: TrainingDisplay


def train(config: Config, console: Console, *, resume: Run | None = None) -> Run:
    """Train an adapter as the config says.

    Args:
        config: The resolved config.
        console: Where progress is printed.
        resume: A run to go on with, from its last checkpoint.

    Returns:
        The run; its `adapter/` is the best one by plan success.

    Raises:
        UserError: Anything that a user can repair, before the first step wherever possible.
    """
    check_config(config)
    quieten()
    checkpoint = None
    if resume is not None:
        refuse_changed_config(resume, config)
        checkpoint = last_checkpoint(resume)
    started = time.perf_counter()
    session = _prepare(config, TrainingDisplay(console), resume)
    timings_s = session.display.timings_s
    prepared = time.perf_counter()
    _fit(session, checkpoint)
    timings_s["steps and validation"] = round(time.perf_counter() - prepared, 2)
    session.display.say(f"trained in {timings_s['steps and validation']:.0f} s")
    _finish(session)
    timings_s["all"] = round(time.perf_counter() - started, 2)
    write_json(session.run.path / "timings.json", timings_s)
    return session.run


def quieten() -> None:
    """Hold back other libraries' chatter; what matters is said by the display."""
    warnings.filterwarnings("ignore", message=".*kernels-community.*")
    for name in ("transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def scoring_tools(config: Config) -> Mapping[str, Tool] | None:
    """Give the tools that plans of a config may call.

    Args:
        config: Names a catalogue, or none.

    Returns:
        The catalogue's tools by name; none stands for TinyAgent's own.
    """
    if config.data.catalogue is None:
        return None
    return {t.name: t.plan_tool() for t in load_catalogue(config.data.catalogue).tools}


def _prepare(config: Config, display: TrainingDisplay, resume: Run | None) -> _Session:
    with display.bar("reading data"):
        examples = load_run_examples(config)
    with display.bar("base model", "steps") as update:
        base = resolve_base(
            config,
            examples.train,
            [example.query for example in examples.test],
            lambda progress: update(progress.step, progress.steps),
        )
    folder = resolve_tokenizer_folder(base, config.model.revision)
    tokenizer = PromptTokenizer(load_tokenizer(folder), config.model.prompt_format)
    with display.bar("encoding rows", "rows") as update:
        rows = encode_run_rows(
            config, examples, tokenizer, lambda done: update(done, len(examples.train))
        )
    for name, row_file in (("train", rows.train), ("validation", rows.validation)):
        if row_file is not None and row_file.statistics.dropped:
            dropped = row_file.statistics.dropped
            display.say(
                f"dropped {len(dropped)} over-long {name} rows, the longest of "
                f"{max(tokens for _, tokens in dropped)} tokens"
            )
    loaded = load_for_training(config, base)
    run = resume or create_run(config)
    session = _Session(
        run=run,
        config=config,
        base=base,
        examples=examples,
        rows=rows,
        loaded=loaded,
        tools=scoring_tools(config),
        display=display,
    )
    remember_or_compare(
        run,
        _data_record(session),
        trainable_parameters(loaded.model),
        resumed=resume is not None,
    )
    _header(session)
    return session


def _data_record(session: _Session) -> dict[str, Any]:
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
    }


def _header(session: _Session) -> None:
    config, loaded, rows = session.config, session.loaded, session.rows.train.statistics
    train = config.train
    trainable = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    steps = optimizer_steps(rows.rows, train)
    leaks = [pair for pair in session.examples.leaks.between if pair.normalised]
    files = session.examples.files
    facts = {
        "run": str(session.run.path),
        "preset": config.preset,
        "data": f"{files.train}{' (generated)' if files.generated else ''}",
        "rows": f"{rows.rows:,} to train on, mean {rows.mean_tokens:.0f} tokens, longest "
        f"{rows.longest_tokens}, {100 * rows.supervised_share:.1f} % of tokens supervised",
        "held out": f"{len(session.examples.validation)} validation queries during training, "
        f"{len(session.examples.test)} test queries",
        "leaks": ", ".join(f"{p.normalised} {p.first}/{p.second}" for p in leaks)
        or "no query in two splits",
        "base": f"{session.base} ({config.model.weights})",
        "backend": f"{loaded.backend} on {loaded.device}, compute {loaded.compute_dtype}",
        "adapter": f"LoRA r {config.lora.rank}, alpha {config.lora.alpha}, {config.lora.targets}, "
        f"{trainable:,} parameters",
        "steps": f"{steps if train.batching != 'packed' else 'packed rows:'} "
        f"of {train.batch} x {train.accumulation} rows, {train.batching}",
        "rate": f"{train.learning_rate:g}, {train.schedule}, {train.optimizer}",
    }
    session.display.header("tinyagent-fast train", facts)
    for note in loaded.notes:
        session.display.say(f"note: {note}")


def _fit(session: _Session, checkpoint: Path | None) -> None:
    config, loaded, display, run = session.config, session.loaded, session.display, session.run
    dataset = session.rows.train.dataset()
    trainer = build_trainer(
        loaded,
        dataset,
        config.train,
        max_length_tokens=config.model.max_length_tokens,
        output_dir=run.checkpoints,
        save_every_steps=config.train.save_every_steps,
        evaluations=config.train.evaluations,
    )
    if loaded.device == "cpu":
        _choose_threads(session, dataset)
    prompts = prompt_ids(loaded, session.examples.validation)
    report = preflight(trainer, loaded, dataset, prompts, config.eval.batch)
    display.say(
        f"checked: {report.checked_rows} rows through the trainer's collator equal ours; longest "
        f"batch of {report.longest_batch_tokens} tokens in {report.longest_batch_s:.2f} s"
        + (f"; peak {report.peak_gib:.2f} GiB" if report.peak_gib else "")
    )
    if config.eval.before_and_after and checkpoint is None:
        before = _test(session, "before")
        display.say(f"before training: {headline(before.metrics)} test queries")
    steps = optimizer_steps(len(trainer.train_dataset), config.train)
    history = History(run, lambda: trainer.tokens_seen, display.step)
    interrupt = StopOnInterrupt(display.say)
    callbacks = [StepGuard(), history, interrupt]
    if config.train.evaluations and session.rows.validation is not None:
        every = steps_between(steps, config.train.evaluations)
        success = _plan_success(session, trainer, history, every)
        callbacks.append(success)
        if checkpoint is None:
            success.evaluate(0)
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None:
        if training_is_over(run, checkpoint, steps):
            _load_adapter_weights(loaded, checkpoint)
            display.say(f"{checkpoint.name} is the last one: no step is left to make")
            return
        dropped = forget_after(run, checkpoint)
        display.say(f"going on from {checkpoint.name}: {dropped} later records of history dropped")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.interrupted:
        raise TrainingError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} by Ctrl-C",
            "a checkpoint was saved",
            f"go on with: tinyagent-fast train --resume {run.path.name}",
        )


def _choose_threads(session: _Session, dataset: Any) -> None:
    """Take the number of threads that is faster now; other programs come and go."""
    import torch

    if session.config.train.threads is not None:
        torch.set_num_threads(session.config.train.threads)
        return
    count = min(session.config.train.batch, len(dataset))
    batch = collate([dataset[i] for i in range(count)], session.loaded.tokenizer.pad_id)

    def step() -> None:
        session.loaded.model(**batch).loss.backward()
        session.loaded.model.zero_grad(set_to_none=True)

    state, was_training = torch.get_rng_state(), session.loaded.model.training
    before = torch.get_num_threads()
    session.loaded.model.train()
    threads = fastest_threads(step)
    session.loaded.model.train(was_training)
    torch.set_rng_state(state)
    if threads != before:
        session.display.say(f"CPU threads: {threads} (timed; --train.threads sets another number)")


def _plan_success(
    session: _Session, trainer: Any, history: History, every_steps: int
) -> PlanSuccess:
    config, loaded, run = session.config, session.loaded, session.run
    assert session.rows.validation is not None, "the caller has checked that there are such rows"
    rows = list(session.rows.validation.dataset())
    settings = replace(config.eval, parity_prompts=0)

    def measure(step: int) -> Evaluation:
        started = time.perf_counter()
        with generating(loaded.model, loaded.backend):
            loss = validation_loss(
                trainer, rows, loaded.tokenizer.pad_id, config.train.batch, lambda: None
            )
        result = evaluate_examples(
            loaded,
            session.examples.validation,
            settings,
            run.path / "samples" / f"step-{step:06d}",
            made_with={"step": step, "started": time.time()},
            tools=session.tools,
            title=f"Validation sample at step {step}",
        )
        if loaded.device == "cpu":
            _choose_threads(session, session.rows.train.dataset())
        seconds = time.perf_counter() - started
        history.pause(seconds)
        return Evaluation(
            step=step,
            success=result.metrics.success.share,
            success_dag=result.metrics.success_dag.share,
            loss=loss,
            samples=result.metrics.n,
            seconds=seconds,
        )

    def save(folder: Path, best: Best) -> None:
        save_adapter(loaded.model, loaded.tokenizer.hf, folder, {"best.json": asdict(best)})

    return PlanSuccess(
        run,
        measure,
        save,
        session.display.evaluation,
        every_steps=every_steps,
        patience=config.train.early_stopping,
    )


def _test(session: _Session, name: str) -> EvaluationResult:
    """Measure the test entries with the model as it stands."""
    with session.display.bar(f"test queries, {name} training", "plans") as update:
        return evaluate_examples(
            session.loaded,
            session.examples.test,
            session.config.eval,
            session.run.path / "test" / name,
            made_with={"when": name, "started": time.time()},
            tools=session.tools,
            title=f"Test queries {name} training",
            on_progress=update,
            say=session.display.say,
        )


def _finish(session: _Session) -> None:
    """Put the best adapter where evaluation and export look for it, and say what came out."""
    run, loaded, display = session.run, session.loaded, session.display
    best = read_best(run)
    if best is None:
        save_adapter(loaded.model, loaded.tokenizer.hf, run.adapter, {})
        display.say("no evaluation was made: the last adapter is kept")
    else:
        shutil.rmtree(run.adapter, ignore_errors=True)
        shutil.copytree(run.best, run.adapter)
        display.say(f"best adapter: step {best.step}, {best.reason}")
        _load_adapter_weights(loaded, run.adapter)
    plot_training(run)
    if session.config.eval.before_and_after:
        after = _test(session, "after")
        display.say(f"after training: {headline(after.metrics)} test queries")
    display.say(f"run folder: {run.path}; next: make eval RUN={run.path.name}")


def _load_adapter_weights(loaded: LoadedModel, folder: Path) -> None:
    """Put saved adapter weights back into the model at hand."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(loaded.model, load_file(str(folder / "adapter_model.safetensors")))
