"""Checks before the first step, so that what can fail fails in the first minute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.errors import TrainingError, is_out_of_memory
from tinyagent_fast.inference.engine import Limits
from tinyagent_fast.inference.torch_engine import TorchEngine
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.training.memory import GIB, MemoryEstimator
from tinyagent_fast.training.trainer import collate, rehearse

_EVALUATION_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class PreflightReport:
    """What the checks measured."""

    checked_rows: int
    longest_batch_tokens: int
    longest_batch_s: float
    peak_gib: float | None = None
    """The most that was reserved on the GPU, by training and by generation."""
    longest_batch_gib: float | None = None
    """The most that was reserved for the longest batch; the optimizer's moments come later."""
    longest_batch_predicted_gib: float | None = None

    def sentence(self) -> str:
        """Say what was checked, and with a GPU what was measured beside what had been predicted."""
        text = (
            f"checked: {self.checked_rows} rows through the trainer's collator equal ours; longest "
            f"batch of {self.longest_batch_tokens} tokens in {self.longest_batch_s:.2f} s"
        )
        measured, predicted = self.longest_batch_gib, self.longest_batch_predicted_gib
        if measured is None or self.peak_gib is None:
            return text
        text += f"; peak {self.peak_gib:.2f} GiB, for the longest batch {measured:.2f} GiB"
        if predicted is None:
            return text
        return f"{text}, predicted {predicted:.2f} GiB ({100 * (predicted / measured - 1):+.0f} %)"


def preflight(
    trainer: Any,
    loaded: LoadedModel,
    rows: Any,
    evaluation_prompts: Sequence[list[int]],
    evaluation_batch: int,
    estimator: MemoryEstimator | None = None,
) -> PreflightReport:
    """Compare a real batch with ours, then run the longest batch and one evaluation batch.

    Raises:
        TrainingError: The trainer's batch is not ours, the loss is not finite, or memory runs out.
    """
    import torch

    checked = check_collator(trainer, rows, loaded.tokenizer.pad_id)
    cuda = loaded.device == "cuda"
    if cuda:
        # What loading took for a moment is no part of training.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        started = time.perf_counter()
        inputs = rehearse(trainer, loaded, _longest_rows(trainer))
        train_s = time.perf_counter() - started
        train_gib = _reserved_gib() if cuda else None
        longest = sorted(evaluation_prompts, key=len)[-evaluation_batch:]
        limits = Limits(stop=END_OF_PLAN, max_new_tokens=_EVALUATION_TOKENS, batch=evaluation_batch)
        list(TorchEngine(loaded).complete_tokens(longest, limits))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _out_of_memory(trainer, evaluation_batch, error, estimator) from error
    packed = inputs.get("packed")
    largest = None if packed is None else packed.largest_tokens
    predicted = estimator.estimate(computed_tokens=largest) if estimator else None
    return PreflightReport(
        checked_rows=checked,
        longest_batch_tokens=int(inputs["input_ids"].numel()),
        longest_batch_s=train_s,
        peak_gib=_reserved_gib() if cuda else None,
        longest_batch_gib=train_gib,
        longest_batch_predicted_gib=predicted.total_gib if predicted else None,
    )


def _reserved_gib() -> float:
    """Give the most memory that torch has reserved since its statistics were reset."""
    import torch

    return torch.cuda.max_memory_reserved() / GIB


def check_collator(trainer: Any, rows: Any, pad_id: int) -> int:
    """Push rows through the trainer's own dataset and collator and compare with ours.

    Returns:
        How many rows were compared.

    Raises:
        TrainingError: Ids or labels differ.
    """
    dataset = trainer.train_dataset
    count: int = min(len(dataset), max(2, trainer.args.per_device_train_batch_size))
    if trainer.args.packing:
        if sum(map(sum, dataset["seq_lengths"])) != sum(rows["length"]):
            raise _other_batch("the number of tokens")
        return _check_packed(trainer.data_collator([dataset[i] for i in range(count)]), rows)
    if len(dataset) != len(rows):
        raise _other_batch("the number of rows")
    # The longest row is among them, because cutting would show there.
    lengths = list(rows["length"])
    indices = [*range(count), lengths.index(max(lengths))]
    batch = trainer.data_collator([dataset[i] for i in indices])
    for name, ours in collate([rows[i] for i in indices], pad_id).items():
        if name not in batch or batch[name].tolist() != ours.tolist():
            raise _other_batch(name)
    return len(set(indices))


def _check_packed(batch: Any, rows: Any) -> int:
    """Cut a packed batch at its positions' zeros; each piece must be one of our rows."""
    ids = batch["input_ids"][0].tolist()
    labels = batch["labels"][0].tolist()
    positions = batch["position_ids"][0].tolist()
    starts = [index for index, position in enumerate(positions) if position == 0]
    pieces = list(zip(starts, [*starts[1:], len(ids)], strict=True))
    lengths = list(rows["length"])
    for start, end in pieces:
        same_length = [i for i, length in enumerate(lengths) if length == end - start]
        found = any(
            rows[i]["input_ids"] == ids[start:end] and rows[i]["labels"] == labels[start:end]
            for i in same_length
        )
        if not found:
            raise _other_batch("packed rows")
    return len(pieces)


def _other_batch(name: str) -> TrainingError:
    return TrainingError(
        f"the trainer's batch differs from the rows in {name}",
        "the installed trl or unsloth masks, cuts or packs rows in its own way, so the model would "
        "be trained on something else than what was proved",
        "install the versions of the requirements file (make setup)",
    )


def _longest_rows(trainer: Any) -> list[int]:
    """Choose the rows of the longest batch; packed rows are all about equally long."""
    batch_rows = trainer.args.per_device_train_batch_size
    if trainer.args.packing:
        return list(range(min(batch_rows, len(trainer.train_dataset))))
    lengths = list(trainer.train_dataset["length"])
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])[:batch_rows]


def _out_of_memory(
    trainer: Any, evaluation_batch: int, error: Exception, estimator: MemoryEstimator | None
) -> TrainingError:
    import torch

    peak = _reserved_gib() if torch.cuda.is_available() else 0.0
    args = trainer.args
    batch = trainer.micro_batch_rows
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    smaller = max(n for n in range(1, max(1, batch // 2) + 1) if rows % n == 0)
    predicted = why = ""
    if estimator is not None:
        expected, usable_gib = estimator.estimate(), estimator.usable_gib
        predicted = f"; predicted {expected.total_gib:.1f} GiB for rows of {estimator.row_tokens} "
        predicted += f"tokens, {usable_gib:.1f} usable"
        why = "; by the prediction they do, so it is too low here"
        if not expected.fits(usable_gib):
            how = estimator.config.model.gradient_checkpointing
            found = estimator.largest_batch(how, max(1, batch - 1))
            smaller = found.batch
            why = f"; the largest batch predicted to fit is {smaller if found.fits else 'none'}"
    flags = f"--train.batch {smaller} --train.accumulation {rows // smaller} "
    return TrainingError(
        f"out of memory in the longest batch ({peak:.1f} GiB reserved{predicted}; batch {batch}, "
        f"evaluation batch {evaluation_batch}): {str(error).splitlines()[0]}",
        f"the longest rows do not fit together; this was found before the first step{why}",
        f"{flags}--eval.batch {max(1, evaluation_batch // 2)}{_other_remedy(estimator)}",
    )


def _other_remedy(estimator: MemoryEstimator | None) -> str:
    """Name the flags that save memory at the same batch."""
    if estimator is None:
        return ", or --model.gradient-checkpointing unsloth"
    config = estimator.config
    if config.model.gradient_checkpointing == "false":
        predicted = estimator.estimate(config.train.rows_per_batch, "unsloth")
        text = ", or --model.gradient-checkpointing unsloth"
        return f"{text} (predicted {predicted.total_gib:.1f} GiB)"
    if config.model.weights != "nf4":
        return ", or --model.weights nf4"
    shorter = estimator.row_tokens // 2
    return f", or leave long rows out: --model.max-length-tokens {shorter} --data.over-long drop"
