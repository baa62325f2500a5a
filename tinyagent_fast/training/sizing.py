"""The batch for a card: the largest that is predicted to fit, with the effective batch kept.

`plan` recommends by it, `--train.batch auto` is resolved by it before the model is loaded, and the
checks before step 1 hold its prediction against what was measured. It needs no torch; where torch
is, `usable_gib` asks it for the memory of the GPU at hand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from tinyagent_fast.config import Checkpointing, Config
from tinyagent_fast.presets import PRESETS
from tinyagent_fast.training.footprint import (
    GIB,
    RESERVE_GIB,
    MemoryPrediction,
    ModelShape,
    predict_memory,
)


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """Lengths of the training rows."""

    rows: int
    mean_tokens: float
    longest_tokens: int
    supervised_tokens: float
    """Mean tokens with loss of a row."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What to train with on a card."""

    batch: int
    accumulation: int
    row_tokens: int
    """What rows are padded or packed to, at most."""
    checkpointing: Checkpointing
    prediction: MemoryPrediction
    fits: bool
    """Whether the prediction and its error are within the card's memory."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All that the memory of a run is predicted from."""

    config: Config
    shape: ModelShape
    lengths: RowLengths
    backend: str
    """`unsloth` or `transformers`, with `auto` resolved."""
    usable_gib: float
    """Memory of the card without what is reserved."""

    @property
    def row_tokens(self) -> int:
        """Tokens of the longest row of a micro-batch, packed rows being filled up."""
        packed = self.config.train.batching == "packed"
        return self.config.model.max_length_tokens if packed else self.lengths.longest_tokens

    def predict(
        self, batch: int, checkpointing: Checkpointing, computed_tokens: int | None = None
    ) -> MemoryPrediction:
        """Predict the memory of a micro-batch of the longest rows.

        Args:
            batch: Its rows.
            checkpointing: What is computed again.
            computed_tokens: Tokens computed where prefixes are shared; none for a padded batch.

        Returns:
            The prediction.
        """
        return predict_memory(
            self.shape,
            self.config.model,
            self.config.lora,
            optimizer=self.config.train.optimizer,
            backend=self.backend,
            batch=batch,
            row_tokens=self.row_tokens,
            supervised_tokens=round(batch * self.lengths.supervised_tokens),
            checkpointing=checkpointing,
            computed_tokens=computed_tokens,
            usable_gib=self.usable_gib,
        )

    def as_configured(self, computed_tokens: int | None = None) -> MemoryPrediction:
        """Predict the memory of the config's own micro-batch, which must be a number by now.

        Args:
            computed_tokens: As in `predict`.

        Returns:
            The prediction.
        """
        train, model = self.config.train, self.config.model
        return self.predict(train.rows_per_batch, model.gradient_checkpointing, computed_tokens)

    def largest(self, checkpointing: Checkpointing, most: int | None = None) -> Recommendation:
        """Find the largest batch that fits and divides the rows of an optimizer step.

        Args:
            checkpointing: What is computed again.
            most: Rows that the batch must not exceed.

        Returns:
            The batch, or a batch of one with `fits` false.
        """
        wanted = rows_per_step(self.config)
        batch = min(wanted, most or wanted)
        prediction = self.predict(batch, checkpointing)
        while batch > 1 and (wanted % batch or not prediction.fits(self.usable_gib)):
            batch -= 1
            prediction = self.predict(batch, checkpointing)
        return Recommendation(
            batch=batch,
            accumulation=wanted // batch,
            row_tokens=self.row_tokens,
            checkpointing=checkpointing,
            prediction=prediction,
            fits=prediction.fits(self.usable_gib),
        )

    def to_json(self) -> dict[str, Any]:
        """Give what was predicted and from what, as plain values."""
        predicted = self.as_configured()
        return {
            "predicted": {**asdict(predicted), "total_gib": predicted.total_gib},
            "usable_gib": self.usable_gib,
            "backend": self.backend,
            "row_tokens": self.row_tokens,
            "batch": self.config.train.rows_per_batch,
            "checkpointing": self.config.model.gradient_checkpointing,
            "shape": asdict(self.shape),
        }


def rows_per_step(config: Config) -> int:
    """Count the rows of an optimizer step; with `batch: auto` those of the config's preset.

    Args:
        config: The config.

    Returns:
        Batch times accumulation.
    """
    return preset_batch(config) * config.train.accumulation


def preset_batch(config: Config) -> int:
    """Give the batch that a config has, or with `auto` the one that its preset has.

    Args:
        config: The config.

    Returns:
        Rows per micro-batch.
    """
    if config.train.batch != "auto":
        return config.train.batch
    preset = PRESETS[config.preset]() if config.preset in PRESETS else Config()
    return preset.train.rows_per_batch


def recommend(forecast: Forecast) -> Recommendation:
    """Choose batch, accumulation and checkpointing for a card, with the effective batch kept.

    Nothing is computed twice where the batch that was asked for, or two of the longest rows, fit
    without it.

    Args:
        forecast: Card, model and rows.

    Returns:
        The largest batch that fits, or a batch of one with `fits` false.
    """
    found = forecast.largest("false")
    enough = min(preset_batch(forecast.config), 2)
    if found.fits and found.batch >= enough:
        return found
    return forecast.largest("unsloth" if forecast.backend == "unsloth" else "true")


def with_batch(config: Config, batch: int) -> Config:
    """Put a batch into a config, with the accumulation that keeps the rows of a step.

    Args:
        config: The config, maybe with `batch: auto`.
        batch: Divides the rows of an optimizer step.

    Returns:
        The config with numbers; nothing else changes.
    """
    train = replace(config.train, batch=batch, accumulation=rows_per_step(config) // batch)
    return replace(config, train=train)


def usable_gib() -> float | None:
    """Measure the memory that a run may use on the GPU at hand.

    Returns:
        What is free or held by this process, less what the context still takes; none without CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return min((free + torch.cuda.memory_reserved()) / GIB, total / GIB - RESERVE_GIB)
