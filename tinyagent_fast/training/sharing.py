"""Let the trainer compute shared prefixes once: the stream in every batch, the order, the count.

Rows, labels and the loss's normalisation stay the trainer's; only the way from a micro-batch to
its loss is `shared_prefix`'s, which gives the same loss and gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.config import TrainConfig
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.training.trainer import LengthGroupedOrder

_SAMPLED_BATCHES = 32


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """Whether shared prefixes are computed once, and what that saves."""

    on: bool
    reason: str
    """Why it is off; empty if it is on."""
    computed_share: float = 1.0
    """Tokens computed, as a share of what padded batches would compute; measured on a sample."""

    def sentence(self) -> str:
        """Say it for the header.

        Returns:
            One line.
        """
        if not self.on:
            return f"off: {self.reason}"
        return (
            f"on: computes {100 * self.computed_share:.0f} % of a padded batch's tokens, "
            "the head and the last layer only where loss is"
        )


def decide_sharing(
    loaded: LoadedModel, train: TrainConfig, rows: Any, remembered: Path | None
) -> Sharing:
    """Decide whether shared prefixes are computed once.

    Args:
        loaded: Model and backend.
        train: Asks for it or not; `auto` takes it wherever it is exact.
        rows: Dataset with input_ids and labels.
        remembered: sharing.json of the run that is resumed, so that it goes on in the same order.

    Returns:
        The decision.

    Raises:
        TrainingError: It was asked for and cannot be had.
    """
    if remembered is not None and remembered.exists():
        return Sharing(**json.loads(remembered.read_text(encoding="utf-8")))
    reason = _why_not(loaded, train)
    if reason is not None:
        if train.shared_prefix == "on":
            raise TrainingError(
                "train.shared-prefix on",
                f"it cannot be used here: {reason}",
                "leave it at auto, or change what stands against it",
            )
        return Sharing(on=False, reason=reason)
    return Sharing(on=True, reason="", computed_share=_computed_share(rows, train))


def _why_not(loaded: LoadedModel, train: TrainConfig) -> str | None:
    import os

    from tinyagent_fast.shared_prefix.forward import supported

    if train.shared_prefix == "off":
        return "asked for by train.shared-prefix"
    if train.batching == "packed":
        return "rows are packed (train.batching)"
    if loaded.backend == "unsloth":
        return "unsloth's kernels compute whole rows (model.backend transformers has it)"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "several processes average gradients in the model's own forward"
    return supported(loaded.model)


def _computed_share(rows: Any, train: TrainConfig) -> float:
    """Pack some micro-batches of the first epoch and compare their tokens with padded ones."""
    from tinyagent_fast.shared_prefix.layout import pack

    order = list(row_order(rows, train))
    batch = train.rows_per_batch
    starts = range(0, len(order), batch)
    chosen = list(starts)[:: max(1, len(starts) // _SAMPLED_BATCHES)]
    streams = [pack([rows[i] for i in order[start : start + batch]]) for start in chosen]
    plain = sum(stream.plain_tokens for stream in streams)
    return round(sum(stream.computed_tokens for stream in streams) / plain, 4)


def row_order(rows: Any, train: TrainConfig) -> Any:
    """Make the order in which rows meet when prefixes are shared.

    Args:
        rows: Dataset with input_ids and length.
        train: Batching, batch and seed.

    Returns:
        A sampler; `set_epoch` chooses the epoch.
    """
    from tinyagent_fast.shared_prefix.order import PrefixGroupedOrder

    if train.batching != "prefix-grouped":
        # For counting only: plain shuffling shares as much as any order that ignores beginnings.
        return LengthGroupedOrder(list(rows["length"]), train.rows_per_batch, train.seed)
    return PrefixGroupedOrder((row["input_ids"] for row in rows), train.rows_per_batch, train.seed)


def share_prefixes(
    trainer: Any, sharing: Sharing, loaded: LoadedModel, rows: Any, train: TrainConfig
) -> None:
    """Let a trainer compute shared prefixes once, if that was decided.

    Args:
        trainer: From `build_trainer`, not yet started.
        sharing: The decision.
        loaded: The trainer's model.
        rows: The dataset that went into the trainer.
        train: Batching, batch and seed.
    """
    if not sharing.on:
        return
    base = loaded.model.get_base_model()
    trainer.layer_checkpointing = bool(base.is_gradient_checkpointing)
    trainer.data_collator = _WithStream(trainer.data_collator)
    if train.batching == "prefix-grouped":
        trainer.order = row_order(rows, train)


def check_same_loss(trainer: Any, loaded: LoadedModel, rows: Any) -> float:
    """Compare loss and gradients with those of the trainer's own way, on the two shortest rows.

    Args:
        trainer: With shared prefixes.
        loaded: Its model.
        rows: The dataset that went into it.

    Returns:
        The larger one of the relative differences of loss and gradient norm.

    Raises:
        TrainingError: They differ by more than the precision explains.
    """
    lengths = list(rows["length"])
    shortest = sorted(range(len(lengths)), key=lambda i: lengths[i])[:2]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in shortest])
    stream = batch.pop("stream")
    plain = _loss_and_gradient(trainer, loaded, batch)
    shared = _loss_and_gradient(trainer, loaded, {**batch, "stream": stream})
    difference = max(abs(a - b) / max(abs(a), 1e-6) for a, b in zip(plain, shared, strict=True))
    allowed = 1e-3 if loaded.compute_dtype == "float32" else 0.1
    if difference > allowed:
        raise TrainingError(
            f"shared prefixes give loss {shared[0]:.6f} and gradient norm {shared[1]:.6f}, whole "
            f"rows {plain[0]:.6f} and {plain[1]:.6f}",
            "the installed transformers or peft computes in another way than this was written for",
            "--train.shared-prefix off, or install the versions of the requirements file",
        )
    return difference


def _loss_and_gradient(trainer: Any, loaded: LoadedModel, batch: dict[str, Any]) -> list[float]:
    import torch

    inputs = trainer._prepare_inputs(batch)
    supervised = (inputs["labels"][:, 1:] != -100).sum()
    loaded.model.eval()  # dropout is drawn once for tokens that rows share, so it must be off
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss = trainer.compute_loss(loaded.model, inputs, num_items_in_batch=supervised)
    torch.autograd.backward(loss)
    gradients = [p.grad.float().norm() for p in loaded.model.parameters() if p.grad is not None]
    loaded.model.zero_grad(set_to_none=True)
    loaded.model.train()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    return [float(loss.detach()), float(torch.stack(gradients).norm())]


@dataclass(frozen=True)
class _WithStream:
    """The trainer's own collator, and beside its batch the packed stream of the same rows."""

    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        from tinyagent_fast.shared_prefix.layout import pack

        return {**self.collator(rows), "stream": pack(rows)}
