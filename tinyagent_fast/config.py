"""Settings of a run as frozen dataclasses; presets.py fills them, config_file.py stores them.

Precedence: defaults < preset < `--config` file < flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tinyagent_fast.errors import ConfigError

Backend = Literal["auto", "unsloth", "transformers"]
Weights = Literal["nf4", "bf16", "fp16", "fp32"]
Checkpointing = Literal["unsloth", "true", "false"]
PromptFormat = Literal["alpaca", "flat", "chat"]
Targets = Literal["all-linear", "attention"]
Batching = Literal["prefix-grouped", "length-grouped", "packed", "shuffled"]
QuantisationAware = Literal["off", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
Tracker = Literal["off", "tensorboard", "trackio", "wandb"]

BASE_MODEL = "Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct"
"""The model that the published TinyAgent-1.1B was fine-tuned from."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and what to do with entries and rows that do not fit."""

    train: Path | None = None
    """Training file in the published schema; None generates one."""
    test: Path | None = None
    """Test file in the published schema; None takes the generated one."""
    points: Literal["plan", "join", "all"] = "plan"
    """Which points of an entry become training rows; evaluation always takes the plans."""
    on_bad_entry: Literal["error", "skip"] = "error"
    """What to do with entries that break the schema; skipped ones are counted and listed."""
    over_long: Literal["error", "drop"] = "error"
    """What to do with rows over model.max-length-tokens; no row is ever cut."""
    validation_entries: int = 1000
    """Entries taken out of the training file for validation."""
    limit_entries: int | None = None
    """Use only this many training entries (seeded choice); None uses all."""
    generated_entries: int = 8000
    """Training entries to generate when `train` is None; 200 test entries come with them."""
    generated_max_calls: int = 7
    """Most calls of a generated plan, join not counted; fewer are easier to learn."""
    catalogue: Path | None = None
    """YAML file with tools of your own, for generating and scoring; None takes TinyAgent's 16."""
    seed: int = 0
    """Seed of the split and of generated data."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which base model and how it is held in memory."""

    base: str = BASE_MODEL
    """Folder or hub name of the base model; `nano` and `random` are built on the spot."""
    revision: str | None = None
    """Revision on the hub."""
    backend: Backend = "auto"
    """`auto` is unsloth where CUDA and unsloth are there, transformers otherwise."""
    weights: Weights = "nf4"
    """Base weights: 4-bit NF4 with double quantisation, or 16/32-bit."""
    gradient_checkpointing: Checkpointing = "false"
    """Recompute activations to save memory; `unsloth` also moves them to host memory."""
    prompt_format: PromptFormat = "alpaca"
    """The prompt template; it is stored with the adapter and used wherever that is used."""
    max_length_tokens: int = 4608
    """Longest row allowed, prompt and completion together."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapter."""

    rank: int = 32
    """Rank of the low-rank update; higher can hold more and costs memory."""
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input; 0 keeps every fused kernel in use."""
    targets: Targets = "all-linear"
    """All seven linear modules of a layer, or the four of attention."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    epochs: float = 3.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps; overrides epochs."""
    batch: int | Literal["auto"] = 1
    """Rows per micro-batch of each process; `auto` takes the most that are predicted to fit, at the
    same product of batch and accumulation."""
    accumulation: int = 8
    """Micro-batches per optimizer step."""
    learning_rate: float = 7e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after warm-up."""
    warmup: float = 0.03
    """Share of steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's weight decay on the adapter."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    optimizer: Literal["adamw_8bit", "adamw_torch"] = "adamw_8bit"
    """8-bit AdamW of bitsandbytes, or torch's."""
    batching: Batching = "prefix-grouped"
    """Rows with long common beginnings together (by length where prefixes are not shared), rows of
    similar length, rows packed to max-length-tokens, or plain shuffling."""
    shared_prefix: Literal["auto", "on", "off"] = "auto"
    """Compute the beginning that rows of a micro-batch share once, exactly; and no dead work."""
    seed: int = 3407
    """Seed of the adapter's weights and of the order of rows."""
    evaluations: int = 6
    """How often plan success is measured on the validation sample during training."""
    save_every_steps: int | None = None
    """Save a resumable checkpoint every so many steps; None saves with every evaluation."""
    early_stopping: int | None = None
    """Stop after this many evaluations without a better one; None never stops early."""
    qat: QuantisationAware = "off"
    """Quantisation-aware training: compute with weights rounded as this GGUF type holds them."""
    threads: int | None = None
    """CPU threads; None times one step with one thread and with all, and takes the faster."""

    @property
    def rows_per_batch(self) -> int:
        """The batch as a number, which it is from the first moment of a run."""
        assert self.batch != "auto", "training resolves `auto` before anything uses the batch"
        return self.batch


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Generation and scoring."""

    batch: int = 16
    """Prompts generated together."""
    max_new_tokens: int = 300
    """Tokens after which a plan counts as truncated."""
    sample: int = 200
    """Validation entries on which checkpoints are compared during training."""
    parity_prompts: int = 8
    """Prompts generated at batch 1 and at batch N before a sweep; 0 skips the comparison."""
    lookup_tokens: int = 0
    """Guesses from the prompt that a decoding step checks at once; plans stay the same."""
    limit: int | None = None
    """Evaluate only the first so many test entries; None takes all."""
    before_and_after: bool = False
    """Let training measure the test entries before its first step and after its last."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's result."""

    preset: str = "default"
    """The preset that this config started from."""
    name: str | None = None
    """Name of the run's folder; None makes one from preset and time."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    track: Tracker = "off"
    """Experiment tracker that gets every logged figure too; its package must be installed."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def check_config(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other, all at once.

    Args:
        config: The resolved config.

    Raises:
        ConfigError: Lists every problem.
    """
    c = config
    problems = _too_small(config)
    for section in (c.data, c.model, c.lora, c.train, c.eval):
        name = type(section).__name__.removesuffix("Config").lower()
        problems += [
            f"{name}.{key.replace('_', '-')} must be a finite number, got {value}"
            for key, value in vars(section).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
    if not 0 < c.train.learning_rate < 1:
        problems.append(f"train.learning-rate must be in (0, 1), got {c.train.learning_rate}")
    if not 0 <= c.train.warmup < 1:
        problems.append(f"train.warmup is a share in [0, 1), got {c.train.warmup}")
    if not 0 <= c.lora.dropout < 1:
        problems.append(f"lora.dropout must be in [0, 1), got {c.lora.dropout}")
    if c.train.epochs <= 0:
        problems.append(f"train.epochs must be more than 0, got {c.train.epochs}")
    if c.train.max_grad_norm <= 0:
        problems.append(f"train.max-grad-norm must be more than 0, got {c.train.max_grad_norm}")
    if c.train.evaluations and not (c.eval.sample and c.data.validation_entries):
        problems.append(
            "train.evaluations needs eval.sample and data.validation-entries above 0 "
            "(or set train.evaluations to 0)"
        )
    if c.train.qat != "off":
        problems += _no_qat(c)
    if problems:
        raise ConfigError(
            f"{len(problems)} setting(s) cannot be used",
            "\n       ".join(problems),
            "change them on the command line or in the config file",
        )


def _no_qat(config: Config) -> list[str]:
    """Say what stands against quantisation-aware training."""
    problems = []
    if config.model.weights == "nf4":
        problems.append("train.qat needs model.weights in 16 or 32 bits, not nf4")
    if config.model.backend == "unsloth":
        problems.append("train.qat needs model.backend transformers: its kernels round nothing")
    if config.lora.dropout:
        problems.append("train.qat needs lora.dropout 0: the sum with the base is rounded")
    return problems


def _too_small(config: Config) -> list[str]:
    c = config
    counts = {
        "model.max-length-tokens": c.model.max_length_tokens,
        "lora.rank": c.lora.rank,
        "lora.alpha": c.lora.alpha,
        "train.batch": c.train.batch,
        "train.accumulation": c.train.accumulation,
        "eval.batch": c.eval.batch,
        "eval.max-new-tokens": c.eval.max_new_tokens,
        "data.generated-entries": c.data.generated_entries,
        "data.generated-max-calls": c.data.generated_max_calls,
        "data.limit-entries": c.data.limit_entries,
        "train.max-steps": c.train.max_steps,
        "train.save-every-steps": c.train.save_every_steps,
        "train.early-stopping": c.train.early_stopping,
        "train.threads": c.train.threads,
        "eval.limit": c.eval.limit,
    }
    not_negative = {
        "data.validation-entries": c.data.validation_entries,
        "train.evaluations": c.train.evaluations,
        "eval.sample": c.eval.sample,
        "eval.parity-prompts": c.eval.parity_prompts,
        "eval.lookup-tokens": c.eval.lookup_tokens,
        "train.weight-decay": c.train.weight_decay,
    }
    problems = [
        f"{name} must be 1 or more, got {value}"
        for name, value in counts.items()
        if isinstance(value, int) and value < 1
    ]
    problems += [
        f"{name} must be 0 or more, got {value}"
        for name, value in not_negative.items()
        if value < 0
    ]
    return problems
