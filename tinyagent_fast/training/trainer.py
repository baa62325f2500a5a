"""TRL's SFTTrainer, fed with proved rows: completion-only loss, seeded order, no silent NaN."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyagent_fast.config import Config, TrainConfig
from tinyagent_fast.distributed import ALONE, Processes
from tinyagent_fast.errors import TrainingError, reading
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.models.older_readers import write_for_older_readers
from tinyagent_fast.shared_prefix.order import length_grouped
from tinyagent_fast.shared_prefix.training import (
    PackingCollator,
    computes_prefix_once,
    prefix_order,
    workers_of_a_step,
)
from tinyagent_fast.training.resume import keep_checkpoint

if TYPE_CHECKING:
    import torch
    from trl import SFTTrainer as _Trainer

    from tinyagent_fast.shared_prefix.packing import PackedStep
else:
    _Trainer = object  # `build_trainer` joins it in

_UNFINISHED = ".unfinished"
"""Folder in which a checkpoint is written before it gets its name."""
_OLDER = "remove that folder: --resume then takes the checkpoint before it"
_SENSELESS = 3.0
"""A base with a higher loss than so many times that of blind guessing is damaged."""
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def steps_between(steps: int, evaluations: int) -> int:
    """Spread so many evaluations over the steps of a run; the last one comes at its end."""
    return max(1, math.ceil(steps / evaluations))


def build_trainer(
    loaded: LoadedModel,
    rows: Any,
    config: Config,
    *,
    output_dir: Path,
    shared_prefix: bool = False,
    kept_tokens: float = math.inf,
    processes: Processes = ALONE,
    tracking: Mapping[str, Any] | None = None,
) -> Any:
    """Build the trainer; nothing of the rows is changed, cut or masked by it.

    Args:
        loaded: Model and tokenizer.
        rows: Dataset with input_ids, labels and length.
        config: The run's config, with the batch as a number.
        output_dir: Folder for resumable checkpoints.
        shared_prefix: Whether beginnings that rows share are computed once.
        kept_tokens: A micro-batch of more tokens, its prefix included, computes its layers again;
            where prefixes are shared, micro-batches are cut so that only one row alone has more.
        processes: They share the rows of each step.
        tracking: Arguments that say where figures go besides the run's folder; None for nowhere.

    Returns:
        A `trl.SFTTrainer` with the ways of `PlanTraining`.
    """
    if loaded.backend == "unsloth":
        import unsloth  # noqa: F401  # patches trl, so it must come first
    from trl import SFTTrainer  # here, because Unsloth replaces it

    class PlanTrainer(PlanTraining, SFTTrainer):  # type: ignore[misc]
        pass

    return PlanTrainer(
        loaded, rows, config, output_dir, shared_prefix, kept_tokens, processes, tracking
    )


class PlanTraining(_Trainer):  # type: ignore[misc]
    """What our trainer does in its own way: counted tokens, packed steps, whole checkpoints.

    `tokens_seen` are those of rows, padding apart, `tokens_padded` those of the same rows in padded
    batches, and `tokens_computed` those that went through the model, where shared prefixes count
    once. `steps` are its optimizer steps.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        rows: Any,
        config: Config,
        output_dir: Path,
        shared_prefix: bool,
        kept_tokens: float,
        processes: Processes,
        tracking: Mapping[str, Any] | None,
    ) -> None:
        """Build TRL's part, then what only it could tell."""
        from transformers import PrinterCallback, ProgressCallback

        self.loaded, self.rows, self.recipe = loaded, rows, config.train
        self.checkpoints, self.shared_prefix, self.processes = output_dir, shared_prefix, processes
        self.workers = workers_of_a_step(loaded, config)
        self.kept_of_each = kept_tokens / self.workers
        self.tokens_seen = self.tokens_padded = self.tokens_computed = 0
        self.micro_batch_rows = self.recipe.rows_per_batch
        adapter = [(p, p.data) for p in loaded.model.parameters() if p.requires_grad]
        super().__init__(
            model=loaded.model,
            args=_arguments(loaded, config, output_dir, tracking, shared_prefix),
            train_dataset=rows,
            processing_class=loaded.tokenizer.hf,
        )
        # trl rounds an adapter on a quantised base to bf16, which loses small steps of AdamW.
        for parameter, data in adapter:
            parameter.data = data
        # Only now is the number of packed rows known.
        self.steps = self.recipe.steps(len(self.train_dataset), processes.count)
        self.args.logging_steps = max(1, min(10, self.steps // 20))
        every = steps_between(self.steps, self.recipe.evaluations or 6)
        self.args.save_steps = self.recipe.save_every_steps or every
        if shared_prefix:
            self.data_collator = PackingCollator(
                partial(collate, pad_id=loaded.tokenizer.pad_id),
                math.ceil(self.recipe.rows_per_batch / self.workers),
                self.kept_of_each,
                computes_prefix_once(loaded),
            )
        for display in (PrinterCallback, ProgressCallback):
            self.remove_callback(display)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        import torch
        from torch.utils.data import RandomSampler

        recipe = self.recipe
        order = prefix_order(self.rows, recipe) if self.shared_prefix else None
        if order is not None:
            return order
        if recipe.batching in ("shuffled", "packed"):
            generator = torch.Generator().manual_seed(recipe.seed)
            return RandomSampler(self.train_dataset, generator=generator)
        # The trainer deals batches to the processes in turn, so a step's rows are neighbours.
        group = recipe.rows_per_batch * self.processes.count * recipe.accumulation
        return length_grouped(list(self.train_dataset["length"]), group, recipe.seed)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self.checkpoints / _UNFINISHED)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        from transformers.trainer_utils import rotate_checkpoints

        unfinished = self.checkpoints / _UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        if self.processes.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        self.processes.wait()
        super()._save_checkpoint(model, trial)
        self.processes.wait()
        if self.processes.is_main_process:
            write_for_older_readers(unfinished / name)
            (unfinished / name / "README.md").unlink(missing_ok=True)  # peft's empty template
            keep_checkpoint(unfinished / name, self.checkpoints / name)
            rotate_checkpoints(str(self.checkpoints), self.args.save_total_limit)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with reading(f"checkpoint {checkpoint}", _OLDER):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # torch refuses files that would run code.
        with reading(f"checkpoint {checkpoint}", _OLDER):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(f"scaler.pt in {checkpoint}", _OLDER):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"checkpoint {checkpoint}", _OLDER):
            super()._load_rng_state(checkpoint)

    def token_counts(self) -> dict[str, int]:
        """Give all three counts by name."""
        names = ("tokens_seen", "tokens_padded", "tokens_computed")
        return {name: getattr(self, name) for name in names}

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count tokens, add the gradients of a batch, and refuse a loss that is not finite."""
        self.tokens_seen += int(row_tokens(inputs).sum())
        self.tokens_padded += padded_tokens(inputs, self.recipe.rows_per_batch)
        packed, trained = inputs.get("packed"), self.loaded.model
        if packed is None:
            self.tokens_computed += inputs["input_ids"].numel()
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            self.tokens_computed += packed.computed_tokens
            trained.train()
            loss = self.packed_gradients(packed, *args, **kwargs)
            parameters = (p for p in trained.parameters() if p.requires_grad)
            self.processes.sum_tensors([p.grad for p in parameters if p.grad is not None])
            # The trainer reports the mean of the processes' losses.
            loss = loss * self.processes.count
        refuse_non_finite("loss", loss, self.state.global_step + 1, self.processes)
        return loss

    def packed_gradients(
        self, packed: PackedStep, num_items_in_batch: Any = None, *, backward: Any = None
    ) -> torch.Tensor:
        """Compute the loss of a step's rows, add its gradients, and give it."""
        from tinyagent_fast.shared_prefix.step import step_gradients

        return step_gradients(
            self.loaded.model,
            packed.each(lambda tensor: tensor.to(self.args.device, non_blocking=True)),
            num_items_in_batch,
            kept_tokens=self.kept_of_each,
            backward=backward or self.accelerator.backward,
            autocast=self.accelerator.autocast,
            workers=self.workers,
        )


def _arguments(
    loaded: LoadedModel,
    config: Config,
    output_dir: Path,
    tracking: Mapping[str, Any] | None,
    shared_prefix: bool,
) -> Any:
    """Translate our settings; with shared prefixes a step's micro-batches come as one batch."""
    from trl import SFTConfig

    train = config.train
    packed = train.batching == "packed"
    cuda = loaded.device == "cuda"
    bf16, fp16 = loaded.compute_dtype == "bfloat16", cuda and loaded.compute_dtype == "float16"
    # What a former run of this process, or Unsloth, has left there would decide otherwise.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "fp16" if fp16 else "no"
    arguments = SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=train.rows_per_batch
        * (train.accumulation if shared_prefix else 1),
        gradient_accumulation_steps=1 if shared_prefix else train.accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps if train.max_steps is not None else -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        warmup_steps=train.warmup,  # below 1 it is a share
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=optimizer_name(train, cuda=cuda),
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=not cuda,
        bf16=bf16,
        fp16=fp16,
        dataloader_pin_memory=cuda,
        gradient_checkpointing=False,  # loading has set it up already
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=2,
        max_length=config.model.max_length_tokens
        if packed or loaded.backend == "unsloth"
        else None,
        packing=packed,
        padding_free=False,
        disable_tqdm=True,
        dataset_num_proc=None,
        ddp_find_unused_parameters=False,  # every step uses the whole adapter
        **(tracking or {"report_to": "none"}),
    )
    if arguments.n_gpu > 1:
        # Several cards in one process would multiply rows and loss: torchrun gives each its own.
        arguments._n_gpu = 1
    return arguments


def optimizer_name(train: TrainConfig, *, cuda: bool) -> str:
    """Name the optimizer as transformers does; on a GPU torch's own runs in one kernel."""
    fused = train.optimizer == "adamw_torch" and cuda
    return "adamw_torch_fused" if fused else train.optimizer


def row_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """Count the tokens of each row of a collated batch, padding apart."""
    mask = batch.get("attention_mask")
    counts: torch.Tensor = (batch["input_ids"] >= 0 if mask is None else mask).sum(1)
    return counts


def padded_tokens(batch: Mapping[str, Any], micro_batch_rows: int) -> int:
    """Count what padded micro-batches of a collated batch's rows compute."""
    counts = row_tokens(batch).tolist()
    parts = (counts[at : at + micro_batch_rows] for at in range(0, len(counts), micro_batch_rows))
    return sum(max(part) * len(part) for part in parts)


def refuse_non_finite(
    name: str, value: torch.Tensor, step: int, processes: Processes = ALONE
) -> None:
    """Stop before an optimizer step that would spoil the adapter, all processes together.

    Raises:
        TrainingError: The value is not finite.
    """
    import torch

    finite = bool(torch.isfinite(value).all())
    if processes.any(not finite):
        found = "not finite in another process" if finite else str(float(value))
        raise TrainingError(
            f"the {name} is {found} before optimizer step {step}",
            "one such step would turn every adapter weight into NaN; none was made",
            "look at the rows with `tinyagent-fast preview`, and start a new run with a lower "
            "--train.learning-rate; --resume goes on from the last checkpoint as the run is set",
        )


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right: what every batch of the trainer must be equal to.

    Returns:
        input_ids, labels and attention_mask, each of shape B x T.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(column: str, fill: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row[column]) for row in rows], True, fill)

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", -100),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
    }


def rehearse(trainer: Any, loaded: LoadedModel, rows: Sequence[int]) -> Mapping[str, Any]:
    """Run forward and backward on a batch of the trainer as a step would, and leave no trace of it.

    Args:
        trainer: From `build_trainer`.
        loaded: Its model, which is in training mode from now on.
        rows: Places of the rows in the trainer's dataset.

    Returns:
        The batch.

    Raises:
        TrainingError: The loss is not finite, or no model's that can be trained.
    """
    import torch

    if loaded.backend == "unsloth":
        from unsloth import FastLanguageModel

        # Its trainer leaves the model in inference mode, without gradient checkpointing.
        FastLanguageModel.for_training(loaded.model)
    loaded.model.train()
    metrics, total = trainer._metrics["train"], trainer._total_train_tokens
    before = {name: list(values) for name, values in metrics.items()}
    devices = [torch.cuda.current_device()] if loaded.device == "cuda" else []
    with torch.random.fork_rng(devices), _unsloth_does_not_compile():
        inputs: Mapping[str, Any] = trainer._prepare_inputs(
            trainer.data_collator([trainer.train_dataset[at] for at in rows])
        )
        if "packed" in inputs:
            loss = trainer.packed_gradients(inputs["packed"])
        else:
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                loss = trainer.compute_loss(loaded.model, inputs)
            trainer.accelerator.backward(loss)
        ids = trainer.train_dataset[rows[0]]["input_ids"]
        _refuse_senseless_loss(loaded, float(loss.detach()), ids)
    loaded.model.zero_grad(set_to_none=True)
    metrics.clear()
    metrics.update(before)
    trainer._total_train_tokens = total
    return inputs


def _refuse_senseless_loss(loaded: LoadedModel, loss: float, ids: Sequence[int]) -> None:
    """Stop before the first step where a base gives no loss of a language model, and say why.

    A fresh adapter changes nothing, so neither the rows nor the learning rate are the cause.
    """
    blind = math.log(loaded.model.config.vocab_size)
    if loss <= _SENSELESS * blind:  # not if it is NaN
        return
    sizes = {
        name: float(parameter.detach().abs().max())
        for name, parameter in loaded.model.named_parameters()
        if parameter.is_floating_point() and parameter.numel()
    }
    name = max(sizes, key=lambda key: math.inf if math.isnan(sizes[key]) else sizes[key])
    part = _first_non_finite(loaded, ids)
    raise TrainingError(
        f"the loss is {loss:g} before optimizer step 1; guessing blindly gives {blind:.1f}",
        "a fresh adapter changes nothing, so the base computes it: "
        + (f"the first value that is not finite comes out of {part}; " if part else "")
        + f"its largest weight is {sizes[name]:g}, in {name}",
        "download or convert the base again, with the tokenizer that belongs to it; where only its "
        "precision is too small, add --model.weights bf16 or fp32",
    )


def _first_non_finite(loaded: LoadedModel, ids: Sequence[int]) -> str | None:
    """Find the module of a model that first gives a value that is not finite for some tokens."""
    import torch

    found: list[str] = []

    def looking(name: str) -> Any:
        def look(_module: Any, _inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(values, torch.Tensor) and not values.isfinite().all():
                found.append(name)

        return look

    modules = [
        (name, one) for name, one in loaded.model.named_modules() if not list(one.children())
    ]
    hooks = [one.register_forward_hook(looking(name)) for name, one in modules]
    try:
        with torch.no_grad(), loaded.autocast():
            ids_1T = torch.tensor([list(ids)], device=loaded.device)
            loaded.model(input_ids=ids_1T, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


@contextmanager
def _unsloth_does_not_compile() -> Iterator[None]:
    """Keep Unsloth from compiling its blocks, because training compiles them once more."""
    before = os.environ.get("UNSLOTH_BLOCK_COMPILE")
    os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["UNSLOTH_BLOCK_COMPILE"]
        else:
            os.environ["UNSLOTH_BLOCK_COMPILE"] = before


def validation_loss(trainer: Any, rows: Sequence[dict[str, Any]], pad_id: int) -> float:
    """Measure the mean loss of a supervised token, in nats, over rows, which processes share."""
    total = tokens = 0.0
    processes: Processes = trainer.processes
    batch = trainer.micro_batch_rows
    for start in processes.shard(range(0, len(rows), batch)):
        inputs = trainer._prepare_inputs(collate(rows[start : start + batch], pad_id))
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            total += float(trainer.model(**inputs, use_cache=False).loss) * supervised
        tokens += supervised
    total, tokens = processes.all_reduce_sum(total, tokens)
    return total / tokens
