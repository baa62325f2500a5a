"""What a trainer needs to compute shared prefixes once: decision, order, batch and a check.

Rows, labels and the loss's normalisation stay the trainer's; only the way from a micro-batch to
its loss is `forward`'s, which gives the same loss and gradients.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyagent_fast.config import Config, TrainConfig
from tinyagent_fast.errors import TrainingError
from tinyagent_fast.runs import read_json
from tinyagent_fast.shared_prefix.order import EpochOrder, prefix_grouped

if TYPE_CHECKING:
    from tinyagent_fast.models.loading import LoadedModel

_SAMPLED_BATCHES = 32
_SHARDING = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
"""Ways to spread a model over processes, and the variables by which accelerate asks for them."""
_ALLOWED_DIFFERENCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative differences that the rounding of a compute type explains, with a margin: of two rows, a
gradient norm in bf16 differs by up to about 1e-2, one in fp32 by about 1e-6."""
_LAUNCHED_IN_TIME = 100
"""Multiprocessors; an L4 has 58, an A100 108. On an H200, with 132, a pass through a prefix of
1,900 tokens takes 0.03 s to compute and several times as long to launch."""
_COMPARED_FROM = 0.1
"""Smaller losses and gradient norms count as this one: of rows that a base knows by heart they are
what is left of margins between logits, and rounding changes them by tenths."""


@dataclass(frozen=True, kw_only=True)
class SharedPrefixDecision:
    """Whether shared prefixes are computed once, and what that saves."""

    on: bool
    reason: str
    """Why it is off; empty if it is on."""
    computed_share: float = 1.0
    """Tokens computed, as a share of what padded batches would compute; measured on a sample."""

    def sentence(self) -> str:
        """Say it for the header."""
        if not self.on:
            return f"off: {self.reason}"
        return (
            f"on: computes {100 * self.computed_share:.0f} % of a padded batch's tokens, "
            "the head and the last layer only where loss is"
        )


def decide_shared_prefix(
    loaded: LoadedModel, train: TrainConfig, rows: Any, remembered: Path | None
) -> SharedPrefixDecision:
    """Decide whether shared prefixes are computed once.

    Args:
        loaded: Model and backend.
        train: Asks for it or not; `auto` takes it wherever it is exact.
        rows: Dataset with input_ids, labels and length.
        remembered: The decision's file of the run that is resumed, so that it goes on in the same
            order.

    Raises:
        TrainingError: It was asked for and cannot be had.
    """
    if remembered is not None and remembered.exists():
        record = read_json(remembered, "on", "reason", "computed_share")
        return SharedPrefixDecision(
            on=record["on"], reason=record["reason"], computed_share=record["computed_share"]
        )
    reason = why_not_shared(loaded, train)
    if reason is not None:
        if train.shared_prefix == "on":
            raise TrainingError(
                "train.shared-prefix on",
                f"it cannot be used here: {reason}",
                "leave it at auto, or change what stands against it",
            )
        return SharedPrefixDecision(on=False, reason=reason)
    share = _computed_share(rows, train, prefix_once=computes_prefix_once(loaded))
    return SharedPrefixDecision(on=True, reason="", computed_share=share)


def why_not_shared(loaded: LoadedModel, train: TrainConfig) -> str | None:
    """Say why shared prefixes cannot be computed once; None if they can."""
    from tinyagent_fast.shared_prefix.forward import unsupported

    if train.shared_prefix == "off":
        return "asked for by train.shared-prefix"
    if train.batching == "packed":
        return "rows are packed (train.batching)"
    for name, variable in _SHARDING.items():
        if os.environ.get(variable, "false") == "true":
            return f"{name} gathers the weights of a layer in that layer's own forward pass"
    return unsupported(loaded.model, "training")


def computes_prefix_once(loaded: LoadedModel) -> bool:
    """Say whether the micro-batches of a step share one pass through their prefix.

    Otherwise each computes it with its own rows: where layers are computed again, and on large
    cards, which compute it in less time than it takes to launch another pass.
    """
    import torch

    from tinyagent_fast.shared_prefix.forward import computes_again

    if computes_again(loaded.model):
        return False
    if loaded.device != "cuda":
        return True
    return torch.cuda.get_device_properties(0).multi_processor_count <= _LAUNCHED_IN_TIME


def workers_of_a_step(loaded: LoadedModel, config: Config) -> int:
    """Say how many micro-batches are computed at once: on a CPU, as torch has threads.

    Each is a part of what is otherwise one micro-batch, so no more memory is needed.
    """
    import torch

    from tinyagent_fast.shared_prefix.forward import computes_again

    in_order = config.lora.dropout > 0 or config.train.qat != "off"
    if loaded.device != "cpu" or loaded.backend != "transformers" or in_order:
        return 1
    if computes_again(loaded.model):  # every part would compute the prefix
        return 1
    return min(torch.get_num_threads(), config.train.rows_per_batch)


def _computed_share(rows: Any, train: TrainConfig, *, prefix_once: bool) -> float:
    """Pack some steps of the first epoch and compare their tokens with padded ones."""
    import torch

    from tinyagent_fast.shared_prefix.packing import pack_step

    lengths = list(rows["length"])
    grouped = prefix_order(rows, train)
    if grouped is not None:
        order = list(grouped)
    elif train.batching == "length-grouped":
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    else:
        generator = torch.Generator().manual_seed(train.seed)
        order = torch.randperm(len(lengths), generator=generator).tolist()
    batch = train.rows_per_batch
    step_rows = batch * train.accumulation
    starts = range(0, len(order), step_rows)
    chosen = list(starts)[:: max(1, len(starts) * train.accumulation // _SAMPLED_BATCHES)]
    computed = plain = 0
    for start in chosen:
        picked = order[start : start + step_rows]
        packed = pack_step([rows[i] for i in picked], batch, prefix_once=prefix_once)
        computed += packed.computed_tokens
        for at in range(0, len(picked), batch):
            part = [lengths[i] for i in picked[at : at + batch]]
            plain += max(part) * len(part)
    return round(computed / plain, 4)


def prefix_order(rows: Any, train: TrainConfig) -> EpochOrder | None:
    """Make the order in which rows meet where prefixes are shared.

    Returns:
        A sampler, whose `set_epoch` chooses the epoch; None if another batching was asked for.
    """
    if train.batching != "prefix-grouped":
        return None
    return prefix_grouped((row["input_ids"] for row in rows), train.rows_per_batch, train.seed)


@dataclass(frozen=True)
class PackingCollator:
    """A padded batch, and beside it as `packed` the same rows as a packed step."""

    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]
    """Pads rows to a batch."""
    most_rows: int
    """Rows of a micro-batch."""
    most_tokens: float = math.inf
    """Tokens of a micro-batch with its prefix."""
    prefix_once: bool = True
    """Whether the micro-batches of a step share one prefix."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows both ways."""
        import numpy as np

        from tinyagent_fast.shared_prefix.packing import pack_step

        names = ("input_ids", "labels")
        arrays = [{name: np.asarray(row[name]) for name in names} for row in rows]
        packed = pack_step(
            arrays, self.most_rows, most_tokens=self.most_tokens, prefix_once=self.prefix_once
        )
        return {**self.collate(arrays), "packed": packed}


def check_same_loss(trainer: Any, loaded: LoadedModel, rows: Any) -> float:
    """Compare loss and gradients with those of the trainer's own way, on the three shortest rows.

    They are cut into two micro-batches, so that they share within one and between both.

    Returns:
        The larger one of the relative differences of loss and gradient norm, of small ones relative
        to 0.1.

    Raises:
        TrainingError: They differ by more than the precision explains.
    """
    lengths = list(rows["length"])
    shortest = sorted(range(len(lengths)), key=lambda i: lengths[i])[:3]
    collator = replace(trainer.data_collator, most_rows=2, most_tokens=math.inf)
    batch = collator([trainer.train_dataset[i] for i in shortest])
    packed = batch.pop("packed")
    plain, dtype = _loss_and_gradient(trainer, loaded, batch)
    shared, _ = _loss_and_gradient(trainer, loaded, {**batch, "packed": packed})
    differences = [
        abs(a - b) / max(abs(a), _COMPARED_FROM) for a, b in zip(plain, shared, strict=True)
    ]
    if not all(difference <= _ALLOWED_DIFFERENCES[dtype] for difference in differences):
        raise TrainingError(
            f"shared prefixes give loss {shared[0]:.6f} and gradient norm {shared[1]:.6f}, whole "
            f"rows {plain[0]:.6f} and {plain[1]:.6f}, which {dtype} does not explain",
            "the installed transformers or peft computes in another way than this was written for",
            "--train.shared-prefix off, or install the versions of the requirements file",
        )
    return max(differences)


def _loss_and_gradient(
    trainer: Any, loaded: LoadedModel, batch: dict[str, Any]
) -> tuple[list[float], str]:
    """Give loss and gradient norm, and the type that they were computed in."""
    import torch

    inputs = trainer._prepare_inputs(batch)
    supervised = (inputs["labels"][:, 1:] != -100).sum()
    loaded.model.eval()  # dropout is drawn once for tokens that rows share, so it must be off
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        autocast = torch.is_autocast_enabled(loaded.device)
        dtype = str(torch.get_autocast_dtype(loaded.device)) if autocast else loaded.compute_dtype
        if "packed" not in inputs:
            loss = trainer.compute_loss(loaded.model, inputs, num_items_in_batch=supervised)
            loss = loss / trainer.processes.count  # by which the trainer multiplies
    if "packed" in inputs:
        loss = trainer.packed_gradients(
            inputs["packed"], supervised, backward=torch.autograd.backward
        )
    else:
        torch.autograd.backward(loss)
    gradients = [p.grad.float().norm() for p in loaded.model.parameters() if p.grad is not None]
    loaded.model.zero_grad(set_to_none=True)
    loaded.model.train()
    trainer._metrics["train"].clear()
    trainer._total_train_tokens = 0
    figures = [float(loss.detach()), float(torch.stack(gradients).norm())]
    return figures, dtype.removeprefix("torch.")
