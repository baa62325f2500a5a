"""Time a training step: TRL's SFTTrainer, and this project with and without shared prefixes.

A step is forward and backward; the optimizer's, which is the same for all, is left out. The same
model, adapter, rows and normalisation go through all ways, and their gradients are compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench_inputs import Row
from bench_rounds import in_turns, summary

from tinyagent_fast.prompts.tokens import IGNORED
from tinyagent_fast.shared_prefix.forward import shared_prefix_loss
from tinyagent_fast.shared_prefix.packing import PackedSequence, pack

Gradients = dict[str, torch.Tensor]

PADDED, PACKED, PADDING_FREE = "TRL padded", "TRL packed", "TRL padding-free"
UNSHARED, SHARED = "ours, nothing shared", "ours"
_TRIED_ROWS = 2
_WORTH_A_ROUND = 1.15
"""TRL's ways that take longer than this on a few rows are not timed on all of them."""


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass gave."""

    loss: float
    gradients: Gradients


class TrlWays:
    """TRL's own batches and loss: its trainer with one setting each, over one model."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Keep the model.

        Args:
            model: With its adapter.
            tokenizer: A transformers tokenizer with a padding token.
        """
        self.model = model
        self.tokenizer = tokenizer
        self._folder = tempfile.TemporaryDirectory()
        self._padded: Any = None

    def padded(self, rows: Sequence[Row]) -> Callable[[], torch.Tensor]:
        """Make the loss of a padded batch.

        Args:
            rows: The micro-batch.

        Returns:
            The forward pass.
        """
        if self._padded is None:
            self._padded = self._trainer(rows)
        return self._loss(self._padded, rows)

    def packed(self, rows: Sequence[Row]) -> Callable[[], torch.Tensor]:
        """Make the loss of all rows packed into one, best fit decreasing.

        Args:
            rows: The micro-batch.

        Returns:
            The forward pass.
        """
        length = sum(len(row["input_ids"]) for row in rows)
        trainer = self._trainer(rows, packing=True, max_length=length)
        return self._loss(trainer, list(trainer.train_dataset), supervised_tokens(rows))

    def padding_free(self, rows: Sequence[Row]) -> Callable[[], torch.Tensor]:
        """Make the loss of a micro-batch that the collator flattens.

        Args:
            rows: The micro-batch.

        Returns:
            The forward pass.
        """
        return self._loss(self._trainer(rows, padding_free=True), rows)

    def _trainer(self, rows: Sequence[Row], **settings: Any) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = {
            "output_dir": self._folder.name,
            "per_device_train_batch_size": len(rows),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": None,
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        }
        return SFTTrainer(
            model=self.model,
            args=SFTConfig(**arguments),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=self.tokenizer,
        )

    def _loss(
        self, trainer: Any, rows: Sequence[Any], supervised: int | None = None
    ) -> Callable[[], torch.Tensor]:
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        items = torch.tensor(supervised_tokens(rows) if supervised is None else supervised)

        def loss() -> torch.Tensor:
            with trainer.compute_loss_context_manager():
                value: torch.Tensor = trainer.compute_loss(
                    self.model, dict(inputs), num_items_in_batch=items
                )
            return value

        return loss


def supervised_tokens(rows: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """Count the tokens with loss.

    Args:
        rows: With labels.

    Returns:
        What a step's loss is divided by.
    """
    return sum(label != IGNORED for row in rows for label in row["labels"][1:])


def ours(model: Any, packed: PackedSequence) -> Callable[[], torch.Tensor]:
    """Make this project's loss of a micro-batch.

    Args:
        model: With its adapter.
        packed: The rows, prefixes shared or not.

    Returns:
        The forward pass.
    """
    return lambda: shared_prefix_loss(model, packed)


def step_of(model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], Step]:
    """Add the backward pass to a forward pass.

    Args:
        model: Whose gradients are made.
        loss: The forward pass.

    Returns:
        The whole step.
    """

    def step() -> Step:
        model.zero_grad(set_to_none=True)
        value = loss()
        torch.autograd.backward(value)
        # Gradients are not copied: the next step makes new ones.
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return Step(value.item(), found)

    return step


def difference(found: Step, wanted: Step) -> dict[str, float]:
    """Compare two steps.

    Args:
        found: One of them.
        wanted: The other; differences are relative to it.

    Returns:
        Relative difference of the losses, and the largest one of a parameter's gradients.
    """
    if found.gradients.keys() != wanted.gradients.keys():
        raise RuntimeError("two ways give gradients to different parameters")
    worst = max(
        float((found.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in wanted.gradients.items()
    )
    return {"loss": abs(found.loss - wanted.loss) / wanted.loss, "largest_gradient": worst}


def measure_training(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time one micro-batch through TRL's best way and through ours.

    Args:
        model: With its adapter, in training mode.
        tokenizer: A transformers tokenizer.
        rows: The micro-batch, which is the effective batch too.
        rounds: How often each way runs.
        tell: Called with a way's name before it runs.

    Returns:
        The figures.
    """
    trl = TrlWays(model, tokenizer)
    tried = _try_trl(trl, rows, tell)
    shared, unshared = pack(rows), pack(rows, smallest_shared_tokens=None)
    losses = {
        PADDED: trl.padded,
        PACKED: trl.packed,
        PADDING_FREE: trl.padding_free,
    }
    ways = {name: step_of(model, losses[name](rows)) for name in tried["timed"]}
    ways[UNSHARED] = step_of(model, ours(model, unshared))
    ways[SHARED] = step_of(model, ours(model, shared))
    timed = in_turns(ways, rounds, tell)
    best = min(tried["timed"], key=lambda name: sorted(timed.seconds[name])[rounds // 2])
    wanted = timed.results[PADDED]
    compared = {n: difference(s, wanted) for n, s in timed.results.items() if n != PADDED}
    # Over a few rows only, for ways that were not timed on all.
    compared = {**{n: d for n, d in tried["differences"].items() if n not in ways}, **compared}
    model.zero_grad(set_to_none=True)
    return {
        "what": "forward and backward of one micro-batch; the optimizer step is left out",
        "rows": len(rows),
        "mean_tokens": round(sum(len(r["input_ids"]) for r in rows) / len(rows), 1),
        "supervised_tokens": supervised_tokens(rows),
        "prefix_tokens": shared.prefix_tokens,
        "padded_tokens": shared.plain_tokens,
        "computed_tokens": {UNSHARED: unshared.computed_tokens, SHARED: shared.computed_tokens},
        "computed_share": round(shared.computed_tokens / shared.plain_tokens, 4),
        "baseline": best,
        "trl_tried": {k: v for k, v in tried.items() if k != "differences"},
        "ways": summary(timed, dict.fromkeys(ways, len(rows)), best),
        "differences_from_padded": compared,
    }


def _try_trl(trl: TrlWays, rows: Sequence[Row], tell: Callable[[str], None]) -> dict[str, Any]:
    """Run TRL's ways on a few rows, to leave out those whose attention costs too much.

    Without FlashAttention a flattened batch attends with a dense mask, so its time grows with the
    square of its rows: what loses with two of them loses more with all.
    """
    few = list(rows[:_TRIED_ROWS])
    losses = {PADDED: trl.padded, PACKED: trl.packed, PADDING_FREE: trl.padding_free}
    ways = {name: step_of(trl.model, make(few)) for name, make in losses.items()}
    step_of(trl.model, ours(trl.model, pack(few)))()  # warms up
    timed = in_turns(ways, 1, lambda name: tell(f"{name}, {len(few)} rows"))
    # By CPU time, because there is one round only.
    seconds = {name: taken[0] for name, taken in timed.cpu_seconds.items()}
    kept = [name for name in ways if seconds[name] <= _WORTH_A_ROUND * seconds[PADDED]]
    wanted = timed.results[PADDED]
    return {
        "rows": len(few),
        "cpu_seconds": {name: round(s, 4) for name, s in seconds.items()},
        "timed": kept,
        "differences": {n: difference(s, wanted) for n, s in timed.results.items() if n != PADDED},
    }
