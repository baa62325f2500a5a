"""One run from config to adapter: data, rows, model, checks, steps, best adapter, picture."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from tinyagent_fast.config import Config, check_config
from tinyagent_fast.distributed import init_processes
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.evaluation.report import headline
from tinyagent_fast.evaluation.running import EvaluationResult, evaluate_examples
from tinyagent_fast.inference.torch_engine import TorchEngine, generating
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.models.threads import fastest_threads
from tinyagent_fast.prompts.builder import encode_prompts
from tinyagent_fast.runs import Run, refuse_taken_name, write_json
from tinyagent_fast.shared_prefix.training import (
    PackingCollator,
    SharedPrefixDecision,
    check_same_loss,
    decide_shared_prefix,
    prefix_order,
)
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
from tinyagent_fast.training.plots import plot_training
from tinyagent_fast.training.preflight import PreflightReport, preflight
from tinyagent_fast.training.resume import (
    forget_after,
    last_checkpoint,
    refuse_changed_config,
    training_is_over,
)
from tinyagent_fast.training.session import Session, prepare_session
from tinyagent_fast.training.tracking import Tracking, check_tracker
from tinyagent_fast.training.trainer import (
    build_trainer,
    collate,
    optimizer_steps,
    steps_between,
    validation_loss,
)


def train(config: Config, console: Console, *, resume: Run | None = None) -> Run:
    """Train an adapter as the config says.

    Args:
        config: The resolved config.
        console: Where progress is printed, by the first process.
        resume: A run to go on with, from its last checkpoint.

    Returns:
        The run; its `adapter/` is the best one by plan success.

    Raises:
        UserError: Anything that a user can repair, before the first step wherever possible.
    """
    check_config(config)
    check_tracker(config.track)
    processes = init_processes()
    if not processes.is_main_process:
        console = Console(file=StringIO(), quiet=True)
    checkpoint = None
    if resume is None:
        refuse_taken_name(config)
    else:
        refuse_changed_config(resume, config)
        checkpoint = last_checkpoint(resume)
    started = time.perf_counter()
    session = prepare_session(config, TrainingDisplay(console), resume)
    timings_s = session.display.timings_s
    prepared = time.perf_counter()
    _fit(session, checkpoint)
    timings_s["steps and validation"] = round(time.perf_counter() - prepared, 2)
    session.display.say(f"trained in {timings_s['steps and validation']:.0f} s")
    _finish(session)
    timings_s["all"] = round(time.perf_counter() - started, 2)
    if processes.is_main_process:
        write_json(session.run.path / "timings.json", timings_s)
    return session.run


def _fit(session: Session, checkpoint: Path | None) -> None:
    config, loaded, display, run = session.config, session.loaded, session.display, session.run
    processes, dataset = session.processes, session.rows.train.dataset()
    tracking = Tracking(tracker=config.track, run=run)
    trainer = build_trainer(
        loaded,
        dataset,
        config.train,
        max_length_tokens=config.model.max_length_tokens,
        output_dir=run.checkpoints,
        save_every_steps=config.train.save_every_steps,
        evaluations=config.train.evaluations,
        processes=processes,
        tracking=tracking,
    )
    shared_prefix = _share_prefixes(session, trainer, dataset, resumed=checkpoint is not None)
    if loaded.device == "cpu":
        _choose_threads(session, dataset)
    prompts = encode_prompts(loaded.tokenizer, session.examples.validation)
    report = preflight(
        trainer, loaded, dataset, prompts, config.eval.batch, estimator=session.estimator
    )
    _say_checked(session, report)
    if shared_prefix.on:
        difference = check_same_loss(trainer, loaded, dataset)
        display.say(f"checked: shared prefixes give the loss of whole rows within {difference:.0e}")
    if config.eval.before_and_after and checkpoint is None:
        before = _test(session, "before")
        display.say(f"before training: {headline(before.metrics)} test queries")
    steps = optimizer_steps(len(trainer.train_dataset), config.train, processes.count)
    history = History(
        run, lambda: trainer.tokens_seen, display.step, lambda: _token_counts(trainer), processes
    )
    interrupt = StopOnInterrupt(display.say, processes)
    callbacks = [StepGuard(), history, interrupt]
    if config.train.evaluations and session.rows.validation is not None:
        every = steps_between(steps, config.train.evaluations)
        success = _plan_success(session, trainer, history, every, tracking)
        callbacks.append(success)
        if checkpoint is None:
            success.evaluate(0)
    for callback in callbacks:
        trainer.add_callback(callback)
    if checkpoint is not None:
        if processes.on_main_process(lambda: training_is_over(run, checkpoint, steps)):
            _load_adapter_weights(loaded, checkpoint)
            display.say(f"{checkpoint.name} is the last one: no step is left to make")
            return
        dropped = processes.on_main_process(lambda: forget_after(run, checkpoint))
        display.say(f"going on from {checkpoint.name}: {dropped} later records of history dropped")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.interrupted:
        if not processes.is_main_process:
            raise SystemExit(TrainingError.exit_code)  # the first one says it
        raise TrainingError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps} by Ctrl-C",
            "a checkpoint was saved",
            f"go on with: tinyagent-fast train --resume {run.path.name}",
        )


def _share_prefixes(
    session: Session, trainer: Any, dataset: Any, *, resumed: bool
) -> SharedPrefixDecision:
    """Decide whether shared prefixes are computed once; a resumed run goes on as it began."""
    config, loaded = session.config, session.loaded
    path = session.run.path / "shared_prefix.json"
    decision = decide_shared_prefix(loaded, config.train, dataset, path if resumed else None)
    if session.processes.is_main_process:
        write_json(path, asdict(decision))
    session.display.say(f"shared prefixes {decision.sentence()}")
    if decision.on:
        trainer.layer_checkpointing = loaded.model.get_base_model().is_gradient_checkpointing
        trainer.data_collator = PackingCollator(trainer.data_collator)
        trainer.order = prefix_order(dataset, config.train)
    return decision


def _token_counts(trainer: Any) -> dict[str, int]:
    return {
        "tokens_padded": trainer.tokens_padded,
        "tokens_computed": trainer.tokens_computed,
    }


def _say_checked(session: Session, report: PreflightReport) -> None:
    session.display.say(
        f"checked: {report.checked_rows} rows through the trainer's collator equal ours; longest "
        f"batch of {report.longest_batch_tokens} tokens in {report.longest_batch_s:.2f} s"
        + report.memory_text
    )
    if session.estimator is not None and session.processes.is_main_process:
        measured = {
            "longest_batch_gib": report.longest_batch_gib,
            "longest_batch_predicted_gib": report.predicted_gib,
            "peak_gib": report.peak_gib,
        }
        write_json(session.run.path / "memory.json", {**session.estimator.to_json(), **measured})


def _choose_threads(session: Session, dataset: Any) -> None:
    """Take the number of threads that is faster now; other programs come and go."""
    import torch

    processes = session.processes
    if session.config.train.threads is not None:
        torch.set_num_threads(session.config.train.threads)
        return
    if processes.count > 1:  # timed together they would slow each other down
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes.local_count))
        return
    count = min(session.config.train.rows_per_batch, len(dataset))
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
    session: Session, trainer: Any, history: History, every_steps: int, tracking: Tracking
) -> PlanSuccess:
    config, loaded, run = session.config, session.loaded, session.run
    assert session.rows.validation is not None, "the caller has checked that there are such rows"
    rows = list(session.rows.validation.dataset())
    settings = replace(config.eval, parity_prompts=0)

    def measure(step: int) -> Evaluation:
        started = time.perf_counter()
        with generating(loaded):
            loss = validation_loss(
                trainer, rows, loaded.tokenizer.pad_id, config.train.rows_per_batch, lambda: None
            )
        result = evaluate_examples(
            TorchEngine(loaded, lookup_tokens=config.eval.lookup_tokens),
            session.examples.validation,
            settings,
            run.path / "samples" / f"step-{step:06d}",
            made_with={"step": step, "started": time.time()},
            tools=session.tools,
            title=f"Validation sample at step {step}",
            processes=session.processes,
        )
        if loaded.device == "cpu":
            _choose_threads(session, session.rows.train.dataset())
        seconds = time.perf_counter() - started
        history.pause(seconds)
        new = Evaluation(
            step=step,
            success=result.metrics.success.share,
            success_dag=result.metrics.success_dag.share,
            loss=loss,
            samples=result.metrics.n,
            seconds=seconds,
        )
        tracking.evaluation(trainer, new)
        return new

    def save(folder: Path, best: Best) -> None:
        save_adapter(loaded.model, loaded.tokenizer.hf, folder, {"best.json": asdict(best)})

    return PlanSuccess(
        run,
        measure,
        save,
        session.display.evaluation,
        every_steps=every_steps,
        patience=config.train.early_stopping,
        processes=session.processes,
    )


def _test(session: Session, name: str) -> EvaluationResult:
    """Measure the test entries with the model as it stands."""
    with session.display.bar(f"test queries, {name} training", "plans") as update:
        return evaluate_examples(
            TorchEngine(session.loaded, lookup_tokens=session.config.eval.lookup_tokens),
            session.examples.test,
            session.config.eval,
            session.run.path / "test" / name,
            made_with={"when": name, "started": time.time()},
            tools=session.tools,
            title=f"Test queries {name} training",
            on_progress=update,
            say=session.display.say,
            processes=session.processes,
        )


def _finish(session: Session) -> None:
    """Put the best adapter where evaluation and export look for it, and say what came out."""
    run, loaded, display = session.run, session.loaded, session.display
    if session.processes.on_main_process(lambda: _keep_best(session)):
        _load_adapter_weights(loaded, run.adapter)
    if session.config.eval.before_and_after:
        after = _test(session, "after")
        display.say(f"after training: {headline(after.metrics)} test queries")
    display.say(f"run folder: {run.path}; next: make eval RUN={run.path.name}")


def _keep_best(session: Session) -> bool:
    """Copy the best adapter and draw the curves; say whether there is a best one."""
    run, loaded, display = session.run, session.loaded, session.display
    best = read_best(run)
    if best is None:
        save_adapter(loaded.model, loaded.tokenizer.hf, run.adapter, {})
        display.say("no evaluation was made: the last adapter is kept")
    else:
        shutil.rmtree(run.adapter, ignore_errors=True)
        shutil.copytree(run.best, run.adapter)
        display.say(f"best adapter: step {best.step}, {best.reason}")
    plot_training(run)
    return best is not None


def _load_adapter_weights(loaded: LoadedModel, folder: Path) -> None:
    """Put saved adapter weights back into the model at hand."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(loaded.model, load_file(str(folder / "adapter_model.safetensors")))
