"""The trainer: its batches are our rows, its loss is per token, and nothing spoils the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyagent_fast.config import Config, ModelConfig, TrainConfig
from tinyagent_fast.errors import TrainingError, is_out_of_memory
from tinyagent_fast.inference.torch_engine import TorchEngine, generating
from tinyagent_fast.models import threads
from tinyagent_fast.models.loading import LoadedModel, load_for_training
from tinyagent_fast.models.published import TINYLLAMA_32K
from tinyagent_fast.runs import Run
from tinyagent_fast.shared_prefix.order import length_grouped
from tinyagent_fast.training.callbacks import DivergenceGuard, StepGuard
from tinyagent_fast.training.memory import (
    GIB,
    RESERVE_GIB,
    MemoryEstimator,
    RowLengths,
    usable_gib,
)
from tinyagent_fast.training.preflight import PreflightReport, check_collator, preflight
from tinyagent_fast.training.trainer import (
    build_trainer,
    collate,
    refuse_non_finite,
    rehearse,
    steps_between,
    validation_loss,
)

MakeConfig = Callable[..., Config]
MakeRows = Callable[..., Any]


Built = tuple[Any, LoadedModel, Any]


def build_in(
    folder: Path,
    config_in: MakeConfig,
    tiny_rows: MakeRows,
    rows: int,
    lora: dict[str, Any],
    train: dict[str, Any],
) -> Built:
    train = {"save_every_steps": 1000, **train}
    config = config_in(folder, train=train, lora=lora, model={"max_length_tokens": 4096})
    loaded = load_for_training(config, config.model.base)
    dataset = tiny_rows(loaded.tokenizer, rows)
    trainer = build_trainer(
        loaded,
        dataset,
        config,
        output_dir=folder / "checkpoints",
    )
    return trainer, loaded, dataset


@pytest.fixture
def build(config_in: MakeConfig, tiny_rows: MakeRows, tmp_path: Path) -> Callable[..., Built]:
    """Return a maker of trainers over fresh adapters, with their models and rows."""

    def make(rows: int = 8, lora: dict[str, Any] | None = None, **train: Any) -> Built:
        return build_in(tmp_path, config_in, tiny_rows, rows, lora or {}, train)

    return make


@pytest.fixture(scope="module", params=["shuffled", "packed"])
def idle(
    request: pytest.FixtureRequest,
    config_in: MakeConfig,
    tiny_rows: MakeRows,
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    """Return a trainer that no test starts, so that all can share it."""
    folder = tmp_path_factory.mktemp("idle")
    train = {"batching": request.param, "batch": 3, "accumulation": 2}
    return build_in(folder, config_in, tiny_rows, 12, {"dropout": 0.5}, train)


only_shuffled = pytest.mark.parametrize("idle", ["shuffled"], indirect=True)
only_packed = pytest.mark.parametrize("idle", ["packed"], indirect=True)


def adapter_of(loaded: LoadedModel) -> dict[str, Any]:
    return {n: p.detach().clone() for n, p in loaded.model.named_parameters() if p.requires_grad}


def assert_close(one: dict[str, Any], other: dict[str, Any], *, tolerance: float) -> None:
    import torch

    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance)


def losses_of(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_only_the_adapter_is_trainable(build: Callable[..., Built]) -> None:
    _, loaded, _ = build()
    trainable = [n for n, p in loaded.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)


def test_of_several_cards_in_one_process_one_is_used(
    build: Callable[..., Built], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainingArguments

    usual = TrainingArguments.__post_init__

    def on_two_cards(arguments: TrainingArguments) -> None:
        usual(arguments)
        arguments._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_two_cards)
    trainer, _, dataset = build(rows=8, batch=2, max_steps=4)
    assert trainer.args.train_batch_size == 2
    trainer.train()
    assert len(losses_of(trainer)) == 4
    assert trainer.tokens_seen == sum(len(row["input_ids"]) for row in dataset)


def train_two_steps(
    build: Callable[..., Built], batch: int, accumulation: int, *, per_token: bool = True
) -> tuple[list[float], dict[str, Any]]:
    trainer, loaded, rows = build(batch=batch, accumulation=accumulation, max_steps=2)
    supervised = [sum(label != -100 for label in row["labels"]) for row in rows]
    assert len(set(supervised)) > 4
    if not per_token:
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return losses_of(trainer), adapter_of(loaded)


def test_accumulating_four_batches_of_one_equals_one_batch_of_four(
    build: Callable[..., Built],
) -> None:
    losses, adapter = train_two_steps(build, batch=1, accumulation=4)
    assert len(losses) == 2
    other_losses, other_adapter = train_two_steps(build, batch=4, accumulation=1)
    assert other_losses == pytest.approx(losses, rel=1e-5)
    # Adam divides by the gradient's size, so rounding shows where a gradient is almost zero.
    assert_close(other_adapter, adapter, tolerance=3e-5)


def test_a_mean_of_means_would_give_another_loss_on_these_rows(
    build: Callable[..., Built],
) -> None:
    """Shows that the comparison above can fail."""
    losses, _ = train_two_steps(build, batch=1, accumulation=4)
    others, _ = train_two_steps(build, batch=1, accumulation=4, per_token=False)
    assert abs(others[0] - losses[0]) > 1e-3


def test_the_logged_loss_is_the_mean_over_all_supervised_tokens_of_the_step(
    build: Callable[..., Built],
) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    trainer, loaded, rows = build(rows=4, batch=2, accumulation=2, max_steps=1)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits_TV = loaded.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            labels_T = torch.tensor(row["labels"])[1:]
            total += float(cross_entropy(logits_TV[:-1], labels_T, reduction="sum"))
            tokens += int((labels_T != -100).sum())
    trainer.train()
    assert losses_of(trainer) == pytest.approx([total / tokens], rel=1e-5)


@pytest.mark.parametrize("batching", ["shuffled", "length-grouped"])
def test_every_row_is_seen_once_an_epoch_in_another_order_each_time(
    batching: str, build: Callable[..., Built]
) -> None:
    trainer, _, rows = build(batching=batching, max_steps=None, epochs=3.0, batch=2)
    seen: list[tuple[int, ...]] = []
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
        return original(model, inputs, *arguments, **keywords)

    trainer.compute_loss = compute_loss
    trainer.train()
    epochs = [seen[start : start + 8] for start in (0, 8, 16)]
    expected = sorted(tuple(row["input_ids"]) for row in rows)
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("rows", "train"),
    [
        (8, {"batch": 2, "accumulation": 2, "epochs": 2.0}),
        (7, {"batch": 2, "accumulation": 3, "epochs": 1.5}),
        (3, {"batch": 4, "accumulation": 2, "epochs": 3.0}),
        (8, {"max_steps": 5}),
    ],
)
def test_the_steps_said_beforehand_are_the_steps_the_trainer_makes(
    rows: int, train: dict[str, Any], build: Callable[..., Built]
) -> None:
    trainer, _, dataset = build(rows=rows, **{"max_steps": None, **train})
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    wanted = TrainConfig(**{"batch": 2, "accumulation": 1, **train})
    assert values[-1] == wanted.steps(len(dataset))


@given(steps=st.integers(1, 5000), evaluations=st.integers(1, 50))
def test_evaluations_spread_over_the_run_and_are_never_more_than_asked(
    steps: int, evaluations: int
) -> None:
    every = steps_between(steps, evaluations)
    made = {step for step in range(1, steps + 1) if step % every == 0 or step == steps}
    assert every >= 1
    assert len(made) <= evaluations


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_rises_to_its_peak_and_follows_the_schedule(
    schedule: str, build: Callable[..., Built]
) -> None:
    import torch

    trainer, loaded, _ = build(max_steps=10, schedule=schedule, warmup=0.2, learning_rate=1e-3)
    optimizer = torch.optim.SGD([p for p in loaded.model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = trainer.create_scheduler(10, optimizer)
    rates = []
    for _ in range(10):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    if schedule == "constant":
        assert rates[3:] == pytest.approx([1e-3] * 7)
    else:
        assert rates[2:] == sorted(rates[2:], reverse=True)
        assert rates[-1] < 2e-4


def test_packed_rows_give_the_loss_and_the_adapter_of_the_same_rows_unpacked(
    build: Callable[..., Built],
) -> None:
    packed, packed_model, rows = build(batching="packed", batch=1, max_steps=2)
    assert len(packed.train_dataset) == 1
    plain, plain_model, _ = build(batching="shuffled", batch=8, max_steps=2)
    packed.train()
    plain.train()
    assert losses_of(packed) == pytest.approx(losses_of(plain), rel=1e-4)
    assert_close(adapter_of(packed_model), adapter_of(plain_model), tolerance=1e-5)
    assert packed.tokens_seen == plain.tokens_seen == 2 * sum(rows["length"])


def test_steps_warm_up_and_saving_follow_the_packed_rows(build: Callable[..., Built]) -> None:
    trainer, _, rows = build(rows=24, batching="packed", batch=1, max_steps=None, epochs=20.0)
    packed = len(trainer.train_dataset)
    assert packed < len(rows) / 4
    values = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    assert values[-1] == 20 * packed
    assert trainer.args.logging_steps <= max(1, values[-1] // 20)


def test_the_trainers_batches_are_accepted_when_they_are_our_rows(idle: Built) -> None:
    trainer, loaded, rows = idle
    assert check_collator(trainer, rows, loaded.tokenizer.pad_id) >= 3


def spoil_labels(batch: Any) -> None:
    batch["labels"][:, :3] = batch["input_ids"][:, :3]


def spoil_last_label(batch: Any) -> None:
    last = (batch["labels"] != -100).long().cumsum(-1).argmax(-1)
    batch["labels"][range(len(last)), last] = -100


def spoil_ids(batch: Any) -> None:
    batch["input_ids"][0, 0] = 9


def spoil_mask(batch: Any) -> None:
    batch["attention_mask"][:, 0] = 0


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_labels, "labels"),
        (spoil_last_label, "labels"),
        (spoil_ids, "input_ids"),
        (spoil_mask, "attention_mask"),
        (lambda batch: batch.pop("labels"), "labels"),
    ],
    ids=["prompt supervised", "EOS masked", "other id", "BOS not attended", "no labels"],
)
@only_shuffled
def test_a_collator_that_changes_a_batch_is_refused(
    spoil: Callable[[Any], None], named: str, idle: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, loaded, rows = idle
    original = trainer.data_collator

    def collator(features: list[Any]) -> Any:
        batch = original(features)
        spoil(batch)
        return batch

    monkeypatch.setattr(trainer, "data_collator", collator)
    with pytest.raises(TrainingError, match=f"differs from the rows in {named}"):
        check_collator(trainer, rows, loaded.tokenizer.pad_id)


@only_packed
def test_a_packed_batch_with_another_mask_is_refused(
    idle: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, loaded, rows = idle
    original = trainer.data_collator

    def collator(features: list[Any]) -> Any:
        batch = original(features)
        batch["labels"][0, 1] = 5
        return batch

    monkeypatch.setattr(trainer, "data_collator", collator)
    with pytest.raises(TrainingError, match="packed rows"):
        check_collator(trainer, rows, loaded.tokenizer.pad_id)


def test_a_trainer_that_cuts_the_longest_row_is_refused(idle: Built) -> None:
    from datasets import Dataset

    trainer, loaded, rows = idle
    longer = [dict(row) for row in rows]
    at = max(range(12), key=lambda i: longer[i]["length"])
    for name in ("input_ids", "labels"):
        longer[at][name] = [*longer[at][name], 7]
    longer[at]["length"] += 1
    with pytest.raises(TrainingError, match="differs from the rows"):
        check_collator(trainer, Dataset.from_list(longer), loaded.tokenizer.pad_id)


def test_a_trainer_that_drops_a_row_is_refused(idle: Built, tiny_rows: MakeRows) -> None:
    trainer, loaded, _ = idle
    with pytest.raises(TrainingError, match="in the number of"):
        check_collator(trainer, tiny_rows(loaded.tokenizer, 13), loaded.tokenizer.pad_id)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(
    bad: float, build: Callable[..., Built]
) -> None:
    trainer, loaded, _ = build(max_steps=4)
    original = trainer.compute_loss
    after_first: dict[str, Any] = {}

    def compute_loss(*arguments: Any, **keywords: Any) -> Any:
        loss = original(*arguments, **keywords)
        if trainer.state.global_step == 1:
            after_first.update(adapter_of(loaded))
            return loss * bad
        return loss

    trainer.compute_loss = compute_loss
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) before optimizer step 2"):
        trainer.train()
    assert trainer.state.global_step == 1
    assert_close(adapter_of(loaded), after_first, tolerance=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_step(
    bad: float, build: Callable[..., Built]
) -> None:
    trainer, loaded, _ = build(max_steps=4)
    trainer.add_callback(StepGuard())
    after_first: dict[str, Any] = {}
    parameter = next(p for n, p in loaded.model.named_parameters() if "lora_B" in n)

    def hook(gradient: Any) -> Any:
        if trainer.state.global_step == 1:
            after_first.update(adapter_of(loaded))
            gradient = gradient.clone()
            gradient[0, 0] = bad
        return gradient

    parameter.register_hook(hook)
    with pytest.raises(TrainingError, match="gradient norm is nan before optimizer step 2"):
        trainer.train()
    assert_close(adapter_of(loaded), after_first, tolerance=0.0)


def guard_step(guard: StepGuard, gradient: float, *, fp16: bool) -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([gradient, 1.0])
    model = SimpleNamespace(parameters=lambda: [parameter])
    state = SimpleNamespace(global_step=0)
    guard.on_pre_optimizer_step(SimpleNamespace(fp16=fp16), state, None, model=model)


def test_fp16_overflows_are_left_to_the_loss_scaler_until_it_cannot_help() -> None:
    guard = StepGuard()
    for _ in range(16):
        guard_step(guard, math.inf, fp16=True)
    with pytest.raises(TrainingError, match="gradient norm"):
        guard_step(guard, math.inf, fp16=True)


def test_a_good_step_between_fp16_overflows_starts_the_count_anew() -> None:
    guard = StepGuard()
    for _ in range(5):
        for _ in range(10):
            guard_step(guard, math.inf, fp16=True)
        guard_step(guard, 1.0, fp16=True)


def test_without_a_loss_scaler_the_first_overflow_stops() -> None:
    with pytest.raises(TrainingError, match="gradient norm"):
        guard_step(StepGuard(), math.inf, fp16=False)


def logged(guard: DivergenceGuard, *losses: float) -> None:
    args = SimpleNamespace(learning_rate=0.5, max_grad_norm=1.0)
    for step, loss in enumerate(losses, start=1):
        state = SimpleNamespace(global_step=step)
        guard.on_log(args, state, None, logs={"loss": loss, "grad_norm": 9.0})


def test_a_run_that_diverges_is_stopped_and_told_of_its_learning_rate(tmp_path: Path) -> None:
    logged(DivergenceGuard(run=Run(tmp_path)), 2.0, 1.0, 4.5, 1.0, 4.5, 3.9, 4.5, 0.5)
    with pytest.raises(TrainingError, match="diverged") as refused:
        logged(DivergenceGuard(run=Run(tmp_path)), 2.0, 1.0, 4.5, 4.1)
    assert "lower --train.learning-rate than 0.5" in refused.value.fix


def test_a_resumed_run_is_compared_with_its_own_beginning(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.append_history({"event": "step", "step": 1, "loss": 1.0})
    with pytest.raises(TrainingError, match=r"from 1\.00 to 6\.00"):
        logged(DivergenceGuard(run=run), 5.0, 6.0)


def test_a_finite_value_is_not_refused() -> None:
    import torch

    refuse_non_finite("loss", torch.tensor(1e30), 1)


@only_shuffled
def test_preflight_measures_the_longest_batch_and_leaves_no_trace(idle: Built) -> None:
    import torch

    trainer, loaded, rows = idle
    before = adapter_of(loaded)
    state = torch.get_rng_state()
    prompts = [row["input_ids"][:20] for row in rows]
    report = preflight(trainer, loaded, rows, prompts, 4)
    assert report.longest_batch_tokens == 3 * max(rows["length"])
    assert report.checked_rows >= 3
    assert report.peak_gib is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in loaded.model.parameters())
    assert loaded.model.training
    assert_close(adapter_of(loaded), before, tolerance=0.0)


def test_preflight_without_validation_prompts_skips_the_generation(idle: Built) -> None:
    trainer, loaded, rows = idle
    assert preflight(trainer, loaded, rows, [], 4).checked_rows >= 3


@only_shuffled
@pytest.mark.parametrize("where", ["training", "generation"])
def test_memory_that_runs_out_is_found_before_the_first_step_and_the_fix_names_flags(
    where: str, idle: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    trainer, loaded, rows = idle

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    if where == "training":
        monkeypatch.setattr(trainer, "compute_loss", run_out)
    else:
        monkeypatch.setattr(TorchEngine, "complete_tokens", run_out)
    with pytest.raises(TrainingError) as caught:
        preflight(trainer, loaded, rows, [[1, 5, 6]], 16)
    text = str(caught.value)
    assert "Tried to allocate 2 GiB." in text
    assert "before the first step" in text
    assert "--train.batch 1 --train.accumulation 6 --eval.batch 8" in text
    assert "--model.gradient-checkpointing unsloth" in text


def test_a_lack_of_memory_is_recognised_through_other_errors() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    def wrapped(inner: RuntimeError) -> BaseException:
        try:
            try:
                raise inner
            except RuntimeError as error:
                raise ValueError("cannot train") from error
        except ValueError as error:
            return error

    assert is_out_of_memory(wrapped(OutOfMemoryError("no")))
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried"))
    assert not is_out_of_memory(wrapped(RuntimeError("other")))


def estimator_of(usable_gib: float, **changes: Any) -> MemoryEstimator:
    """Predict for rows of 4,608 tokens of a 1.1B model, 3 x 2 as the trainer here."""
    model = {"gradient_checkpointing": "false", "weights": "bf16", **changes}
    return MemoryEstimator(
        config=Config(
            model=ModelConfig(**model),
            train=TrainConfig(batch=3, accumulation=2, shared_prefix="off"),
        ),
        shape=TINYLLAMA_32K,
        lengths=RowLengths(rows=9, mean_tokens=3490, longest_tokens=4608, supervised_tokens=88),
        backend="unsloth",
        usable_gib=usable_gib,
    )


@only_shuffled
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (
            estimator_of(20.0),
            (
                "predicted 19.0 GiB for rows of 4608 tokens, 20.0 usable; batch 3",
                "the largest batch predicted to fit is 2",
                "--train.batch 2 --train.accumulation 3 --eval.batch 8, or "
                "--model.gradient-checkpointing unsloth (predicted 6.",
            ),
        ),
        (
            estimator_of(100.0),  # where the prediction was wrong
            ("it is too low here", "--train.batch 1 --train.accumulation 6 --eval.batch 8"),
        ),
        (
            estimator_of(3.0, gradient_checkpointing="unsloth"),
            ("predicted to fit is none", "--train.batch 1", "or --model.weights nf4"),
        ),
        (
            estimator_of(1.0, gradient_checkpointing="true", weights="nf4"),
            ("--model.max-length-tokens 2304 --data.over-long drop",),
        ),
    ],
)
def test_memory_that_runs_out_is_told_with_what_was_predicted(
    estimator: MemoryEstimator,
    expected: tuple[str, ...],
    idle: Built,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    trainer, loaded, rows = idle

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "compute_loss", run_out)
    with pytest.raises(TrainingError) as caught:
        preflight(trainer, loaded, rows, [[1, 5, 6]], 16, estimator=estimator)
    for text in expected:
        assert text in str(caught.value)


def test_the_measured_memory_is_told_beside_the_predicted() -> None:
    report = PreflightReport(
        checked_rows=3,
        longest_batch_tokens=9216,
        longest_batch_s=1.5,
        peak_gib=6.0,
        longest_batch_gib=5.0,
        longest_batch_predicted_gib=5.6,
    )
    told = "; peak 6.00 GiB, for the longest batch 5.00 GiB, predicted 5.60 GiB (+12 %)"
    assert report.sentence().endswith(told)
    without = replace(report, longest_batch_predicted_gib=None).sentence()
    assert without.endswith(told.partition(", predicted")[0])
    assert "GiB" not in replace(report, peak_gib=None).sentence()


def test_the_memory_of_the_gpu_is_what_is_free_or_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil
    import torch

    all_gib = psutil.virtual_memory().total / GIB
    assert 0 < usable_gib() < all_gib  # main memory, without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * GIB)
    for free_gib, expected in ((10, 12.0), (20, 22.0 - RESERVE_GIB)):
        free = free_gib * GIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 22 * GIB))
        assert usable_gib() == expected


def test_a_loss_that_is_not_finite_from_the_start_is_found_by_preflight(
    build: Callable[..., Built],
) -> None:
    import torch

    trainer, loaded, rows = build()
    with torch.no_grad():
        next(p for n, p in loaded.model.named_parameters() if "lora_B" in n).fill_(math.nan)
    with pytest.raises(TrainingError, match="loss is nan before optimizer step 1"):
        preflight(trainer, loaded, rows, [], 4)


@pytest.mark.parametrize(("factor", "said"), [(1e40, "comes out of"), (1e4, "largest weight")])
def test_a_base_whose_weights_explode_is_named_before_the_first_step(
    factor: float, said: str, build: Callable[..., Built]
) -> None:
    import torch

    trainer, loaded, rows = build()
    victim = "layers.1.mlp.down_proj.base_layer.weight"
    with torch.no_grad():
        next(p for n, p in loaded.model.named_parameters() if n.endswith(victim)).mul_(factor)
        loaded.model.get_output_embeddings().weight.mul_(10)
    with pytest.raises(TrainingError, match="before optimizer step 1") as refused:
        preflight(trainer, loaded, rows, [], 4)
    assert said in refused.value.why
    assert victim in refused.value.why
    assert "learning-rate" not in refused.value.fix


@only_shuffled
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_the_validation_loss_is_a_mean_over_tokens_whatever_the_batch(
    batch: int, idle: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, loaded, rows = idle
    monkeypatch.setattr(trainer, "micro_batch_rows", batch)
    total, tokens = 0.0, 0
    pad_id = loaded.tokenizer.pad_id
    with generating(loaded):
        for row in rows:
            inputs = collate([row], pad_id)
            count = int((inputs["labels"] != -100).sum())
            total += float(loaded.model(**inputs).loss) * count
            tokens += count
        loss = validation_loss(trainer, list(rows), pad_id)
    assert loss == pytest.approx(total / tokens, rel=1e-5)


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_a_rehearsal_leaves_no_trace(
    shared_prefix: bool, config_in: MakeConfig, tiny_rows: MakeRows, tmp_path: Path
) -> None:
    import torch

    config = config_in(tmp_path, lora={"dropout": 0.5})
    loaded = load_for_training(config, config.model.base)
    rows = tiny_rows(loaded.tokenizer, 8)
    trainer = build_trainer(
        loaded, rows, config, output_dir=tmp_path / "checkpoints", shared_prefix=shared_prefix
    )
    trainer._metrics["train"]["mean_token_accuracy"].append(0.25)
    before, state = adapter_of(loaded), torch.get_rng_state()
    batch = rehearse(trainer, loaded, [0, 3])
    padded = 2 * max(rows["length"][0], rows["length"][3])
    assert batch["input_ids"].numel() == padded
    assert ("packed" in batch) is shared_prefix
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert dict(trainer._metrics["train"]) == {"mean_token_accuracy": [0.25]}
    assert set(trainer.token_counts().values()) == {0}
    assert_close(adapter_of(loaded), before, tolerance=0.0)


@pytest.mark.parametrize(
    ("one_s", "all_s", "expected", "most_steps"),
    [(1.0, 0.5, 4, 12), (0.5, 1.0, 1, 12), (1.0, 0.95, 1, 12), (9.0, 3.0, 4, 1)],
    ids=["all are faster", "one is faster", "no clear win", "a long step is timed once"],
)
def test_the_faster_number_of_threads_is_taken(
    one_s: float,
    all_s: float,
    expected: int,
    most_steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    clock, steps = [0.0], [0]
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(4), raising=False)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: clock[0])

    def step() -> None:
        steps[0] += 1
        clock[0] += one_s if torch.get_num_threads() == 1 else all_s

    before = torch.get_num_threads()
    try:
        threads.take_faster_threads(step)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
    assert steps[0] == most_steps


def test_collating_pads_on_the_right_and_masks_what_was_added() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4], "labels": [4]},
    ]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


LENGTHS = st.lists(st.integers(1, 400), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, group=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_length_grouping_yields_every_index_once(
    lengths: list[int], group: int, seed: int, epoch: int
) -> None:
    order = length_grouped(lengths, group, seed)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert len(order) == len(lengths)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, group=st.integers(1, 9), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_the_order_depends_on_seed_and_epoch_alone(
    lengths: list[int], group: int, seed: int, epoch: int
) -> None:
    one, other = (length_grouped(lengths, group, seed) for _ in range(2))
    list(one)
    one.set_epoch(epoch)
    other.set_epoch(epoch)
    assert list(one) == list(other) == list(one)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=24, max_size=60), seed=st.integers(0, 99))
def test_epochs_and_seeds_differ_in_their_order(lengths: list[int], seed: int) -> None:
    orders = set()
    for chosen_seed, epoch in ((seed, 0), (seed, 1), (seed + 1, 0)):
        order = length_grouped(lengths, 2, chosen_seed)
        order.set_epoch(epoch)
        orders.add(tuple(order))
    assert len(orders) == 3


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=8, max_size=60), group=st.integers(2, 6))
def test_rows_of_a_group_are_neighbours_in_length(lengths: list[int], group: int) -> None:
    """No row outside a group has a length strictly between those inside, but for 8 tokens."""
    whole = lengths[: len(lengths) // group * group]
    order = list(length_grouped(whole, group, 3))
    groups = [
        sorted(whole[i] // 8 for i in order[s : s + group]) for s in range(0, len(order), group)
    ]
    groups.sort(key=lambda lengths_of_group: (lengths_of_group[0], lengths_of_group[-1]))
    assert all(a[-1] <= b[0] for a, b in pairwise(groups))
