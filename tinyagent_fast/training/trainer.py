"""TRL's SFTTrainer, fed with proved rows: completion-only loss, seeded order, no silent NaN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyagent_fast.config import TrainConfig
from tinyagent_fast.distributed import Processes
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.models.loading import LoadedModel

if TYPE_CHECKING:
    import torch

    from tinyagent_fast.training.tracking import Tracking

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def optimizer_steps(rows: int, train: TrainConfig, processes: int = 1) -> int:
    """Count the optimizer steps of a run.

    Args:
        rows: Training rows, or packed rows.
        train: Batch, accumulation, epochs and max_steps.
        processes: How many take a batch each.

    Returns:
        Optimizer steps, as the trainer counts them.
    """
    if train.max_steps is not None:
        return train.max_steps
    micro_batches = math.ceil(rows / (train.rows_per_batch * processes))
    return math.ceil(train.epochs * max(1, math.ceil(micro_batches / train.accumulation)))


def steps_between(steps: int, evaluations: int) -> int:
    """Spread evaluations over a run.

    Args:
        steps: Optimizer steps of the run.
        evaluations: How many; the last one comes at the end.

    Returns:
        Optimizer steps from one to the next.
    """
    return max(1, math.ceil(steps / evaluations))


def build_trainer(
    loaded: LoadedModel,
    dataset: Any,
    train: TrainConfig,
    *,
    max_length_tokens: int,
    output_dir: Path,
    save_every_steps: int | None = None,
    evaluations: int = 0,
    processes: Processes = Processes(),  # noqa: B008 - frozen, and the ordinary case
    tracking: Tracking | None = None,
) -> Any:
    """Wire the trainer; nothing of the rows is changed, cut or masked by it.

    Args:
        loaded: Model and tokenizer.
        dataset: Rows with input_ids, labels and length.
        train: The optimisation.
        max_length_tokens: Length of packed rows; other rows are within it already.
        output_dir: Folder for resumable checkpoints.
        save_every_steps: How often one is saved; none saves with every evaluation.
        evaluations: How many evaluations there will be.
        processes: They share the rows of each step.
        tracking: Where figures go besides the run's folder; none for nowhere.

    Returns:
        A `trl.SFTTrainer`.
    """
    if loaded.backend == "unsloth":
        import unsloth  # noqa: F401  # patches trl, so it must come first
    from transformers import PrinterCallback, ProgressCallback

    adapter = [(p, p.data) for p in loaded.model.parameters() if p.requires_grad]
    trainer = _trainer_class()(
        model=loaded.model,
        args=_arguments(loaded, train, max_length_tokens, output_dir, tracking),
        train_dataset=dataset,
        processing_class=loaded.tokenizer.hf,
    )
    # trl rounds an adapter on a quantised base to bf16, which loses small steps of AdamW.
    for parameter, data in adapter:
        parameter.data = data
    # Only now is the number of packed rows known.
    steps = optimizer_steps(len(trainer.train_dataset), train, processes.count)
    trainer.args.warmup_steps = math.ceil(steps * train.warmup)
    trainer.args.logging_steps = max(1, min(10, steps // 20))
    trainer.args.save_steps = save_every_steps or steps_between(steps, evaluations or 6)
    trainer.group_by_length = train.batching in ("length-grouped", "prefix-grouped")
    trainer.processes = processes
    for display in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(display)
    return trainer


def _arguments(
    loaded: LoadedModel,
    train: TrainConfig,
    max_length_tokens: int,
    output_dir: Path,
    tracking: Tracking | None,
) -> Any:
    """Translate our settings; what depends on the number of rows is set later."""
    from trl import SFTConfig

    packed = train.batching == "packed"
    cuda = loaded.device == "cuda"
    return SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=train.rows_per_batch,
        gradient_accumulation_steps=train.accumulation,
        num_train_epochs=train.epochs,
        max_steps=train.max_steps if train.max_steps is not None else -1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_8bit" if train.optimizer == "adamw_8bit" else "adamw_torch",
        seed=train.seed,
        data_seed=train.seed,
        use_cpu=not cuda,
        bf16=cuda and loaded.compute_dtype == "bfloat16",
        fp16=cuda and loaded.compute_dtype == "float16",
        dataloader_pin_memory=cuda,
        gradient_checkpointing=False,  # models.py has set it up already
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=2,
        max_length=max_length_tokens if packed or loaded.backend == "unsloth" else None,
        packing=packed,
        padding_free=False,
        disable_tqdm=True,
        dataset_num_proc=None,
        ddp_find_unused_parameters=False,  # every step uses the whole adapter
        **(tracking.arguments() if tracking else {"report_to": "none"}),
    )


def _trainer_class() -> Any:
    """Subclass SFTTrainer as it is now: Unsloth replaces it when it is imported."""
    from torch.utils.data import RandomSampler
    from trl import SFTTrainer

    class PlanTrainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer with a seeded order of rows, token counts and a guard on the loss."""

        group_by_length = False
        layer_checkpointing = False
        processes = Processes()
        order: Any = None
        tokens_seen = 0
        """Tokens of rows, padding apart."""
        tokens_padded = 0
        """Tokens of the same rows in padded batches."""
        tokens_computed = 0
        """Tokens that went through the model: the padded ones, or with shared prefixes once."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            if self.order is not None:
                return self.order
            if not self.group_by_length:
                return RandomSampler(self.train_dataset, generator=_generator(self.args.seed))
            # The trainer deals batches to the processes in turn, so a step's rows are neighbours.
            batch = self.args.per_device_train_batch_size * self.processes.count
            group = batch * self.args.gradient_accumulation_steps
            return LengthGroupedOrder(list(self.train_dataset["length"]), group, self.args.seed)

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            self.tokens_seen += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            padded, packed = inputs["input_ids"].numel(), inputs.get("packed")
            self.tokens_padded += padded
            self.tokens_computed += padded if packed is None else packed.computed_tokens
            loss = super().training_step(model, inputs, *args, **kwargs)
            refuse_non_finite("loss", loss, self.state.global_step + 1, self.processes)
            return loss

        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            packed = inputs.get("packed")
            if packed is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            from tinyagent_fast.shared_prefix.forward import shared_prefix_loss

            return shared_prefix_loss(
                model,
                packed.to(self.args.device),
                num_items_in_batch,
                checkpointing=self.layer_checkpointing,
            )

    return PlanTrainer


def refuse_non_finite(
    name: str,
    value: torch.Tensor,
    step: int,
    processes: Processes = Processes(),  # noqa: B008 - frozen, and the ordinary case
) -> None:
    """Stop before an optimizer step that would spoil the adapter, all processes together.

    Args:
        name: `loss` or `gradient norm`.
        value: A scalar tensor.
        step: The optimizer step that was about to be made.
        processes: Each has a value of its own.

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


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


class LengthGroupedOrder:
    """Rows of similar length together, in an order that depends on seed and epoch alone."""

    def __init__(self, lengths: Sequence[int], group_rows: int, seed: int) -> None:
        """Keep what the order is made from.

        Args:
            lengths: Tokens of each row.
            group_rows: Rows of one optimizer step, which are taken together.
            seed: With the epoch it decides the order, also when training is resumed.
        """
        self.lengths = list(lengths)
        self.group_rows = group_rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next.

        Args:
            epoch: Counted from 0.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield every row's index once, in groups of similar length, the groups shuffled."""
        import torch

        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        shuffled: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        # Stable, so that rows of equal length come in another order in every epoch.
        shuffled.sort(key=lambda index: self.lengths[index] // 8)
        starts = range(0, len(shuffled), self.group_rows)
        groups = [shuffled[start : start + self.group_rows] for start in starts]
        for index in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[index]


def collate(rows: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad rows on the right: what every batch of the trainer must be equal to.

    Args:
        rows: With input_ids and labels.
        pad_id: The id that fills up; its labels are ignored.

    Returns:
        input_ids, labels and attention_mask, each of shape B x T.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(column: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*r[column], *[fill] * (longest - len(r[column]))] for r in rows])

    mask = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def validation_loss(
    trainer: Any, rows: Sequence[dict[str, Any]], pad_id: int, batch: int, each: Callable[[], None]
) -> float:
    """Measure the mean loss of a supervised token over rows, which processes share.

    Args:
        trainer: Holds the model and puts batches on its device.
        rows: With input_ids and labels.
        pad_id: The id that fills up.
        batch: Rows at a time.
        each: Called after each batch.

    Returns:
        Loss in nats per supervised token.
    """
    total = tokens = 0.0
    processes: Processes = trainer.processes
    for start in processes.shard(range(0, len(rows), batch)):
        inputs = trainer._prepare_inputs(collate(rows[start : start + batch], pad_id))
        supervised = int((inputs["labels"][:, 1:] != -100).sum())
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            total += float(trainer.model(**inputs, use_cache=False).loss) * supervised
        tokens += supervised
        each()
    total, tokens = processes.all_reduce_sum(total, tokens)
    return total / tokens
