"""Measure on a CUDA machine what the project claims: `make gpu-check`, under eight minutes.

Needs no network and no installed package: weights, tokenizer and rows are made on the spot, in the
real model's shape. What is measured stands in `PLAN`, the most important first: correctness, then
speed and memory. Measurements of one model share a process; a failure, a lack of memory or a hang
costs that measurement alone. The JSON file is whole at any time.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inputs import (
    TOKENIZER_FILE,
    TRAINING_FILE,
    TRAINING_ROWS,
    Lengths,
    Row,
    add_real_flag,
    generated_rows,
    llama_shape,
    machine,
    prompt_of,
    random_llama,
    rows_of,
    tokenizer_for,
)

from tinyagent_fast.errors import is_out_of_memory
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.published import TINYLLAMA_32K
from tinyagent_fast.runs import write_json

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 3
NO_CUDA_EXIT = 2
BUDGET_OVER = "the time for the whole check was over"
SUMMARY_S = 5.0
LEAST_S = 20.0
"""With less time left nothing is started."""
LOG_LINES = 30
NUMERICS_ROWS = 3
STOPPING = (signal.SIGINT, signal.SIGTERM)
ENVIRONMENT = ("UNSLOTH_", "TORCH", "PYTORCH_", "TRITON_", "NVIDIA_VISIBLE", "CUDA_", "OMP_")

# --------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Every size of a run; `FULL` is the real model's shape, `TINY` goes through in seconds."""

    shape: ModelShape = TINYLLAMA_32K
    positions: int = 32768
    matmul_sizes: tuple[int, ...] = (4096, 8192)
    rows: int = 128
    row_lengths: Lengths = TRAINING_ROWS
    row_max_tokens: int = 4600
    warmup_steps: int = 4
    steps: int = 6
    steps_s: float = 20.0
    prompts: int = 32
    single_prompts: int = 4
    new_tokens: int = 48
    eval_batch: int = 16
    shapes: tuple[tuple[int, int], ...] = ((4, 4608), (2, 32768))
    """Batches and row lengths whose memory is measured."""


FULL = Scale()
TINY = Scale(
    shape=llama_shape(hidden=128, layers=2, vocab=1100),
    positions=1024,
    matmul_sizes=(64, 128),
    rows=48,
    row_lengths=Lengths(shared=70, mean=140, deviation=10, supervised=9),
    row_max_tokens=170,
    warmup_steps=1,
    steps=1,
    prompts=6,
    single_prompts=2,
    new_tokens=6,
    eval_batch=3,
    shapes=((2, 144), (3, 144)),
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: a function of this file, the model that it gets, and its limits."""

    name: str
    kind: str
    """The key in `KINDS`."""
    preset: str | None = None
    """The preset whose model is loaded; None loads none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the preset, such as `model.backend`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 180.0
    """After so long it is killed; loading and compiling come out of it too."""

    @property
    def model(self) -> tuple[Any, ...] | None:
        """What decides the loaded model; measurements of one model in a row share a process."""
        if self.preset is None:
            return None
        own = {k: v for k, v in self.settings.items() if k.startswith(("model.", "lora."))}
        if own.get("model.gradient_checkpointing") == "false":
            own["model.gradient_checkpointing"] = "auto"  # which loads the same model
        return (self.preset, tuple(sorted(own.items())))


TRANSFORMERS = {"model.backend": "transformers"}
UNSLOTH = {"model.backend": "unsloth"}
KEPT = {"model.gradient_checkpointing": "false"}
CUT_TO_FIT = {"model.gradient_checkpointing": "auto"}
RECOMPUTED = {"model.gradient_checkpointing": "unsloth", "model.max_length_tokens": 32768}
UNSHARED = {"train.shared_prefix": "off"}
SHARED = {"train.shared_prefix": "on"}
BF16 = {"model.weights": "bf16"}
ABOUT_16_ROWS = {"train.batch": 1, "train.accumulation": 4}
"""Of packed rows; each has four or five of those that are packed."""
L4 = "train: l4 preset"
WHOLE = "train: unsloth, whole rows"
CHECKPOINTING = "train: unsloth, unsloth checkpointing"
ONCE = "train: l4 preset, prefix once a step"
ALONE = "train: l4 preset, prefix once a micro-batch"
IN_BF16 = "train: l4 preset, bf16 weights"
PLAIN_SHARED = "train: transformers, shared prefix"
PLAIN_WHOLE = "train: transformers, whole rows"
SEED = "train: seed preset, plain transformers"
STOCK_PACKED = "train: stock Unsloth and TRL, packed rows"
STOCK_PADDING_FREE = "train: stock Unsloth and TRL, padding-free"
EVALUATION = "evaluation: unsloth, NF4"
PLAIN_EVALUATION = "evaluation: transformers, NF4"


def micro_batch(batch: int) -> dict[str, int]:
    """Take so many rows a micro-batch, of the 16 of an optimizer step."""
    return {"train.batch": batch, "train.accumulation": 16 // batch}


def on(name: str, kind: str, *settings: Mapping[str, Any], **changes: Any) -> Measurement:
    """Write a row of the plan; it is of preset `l4` unless it says otherwise."""
    merged = {key: value for some in settings for key, value in some.items()}
    return Measurement(name=name, kind=kind, settings=merged, **{"preset": "l4", **changes})


def plan(scale: Scale) -> list[Measurement]:
    """List all measurements, the most important first."""
    plain, fused = {**TRANSFORMERS, **KEPT}, {**UNSLOTH, **KEPT}
    return [
        Measurement(name="matmul", kind="matmul"),
        Measurement(name="inputs", kind="inputs"),
        # The first backend leaves its losses and gradients for the second one.
        on("numerics: transformers, NF4", "numerics", plain),
        on("numerics: unsloth, NF4", "numerics", fused),
        # Batches without `auto` are such that the longest rows are predicted to fit under the cap.
        on(L4, "train", UNSLOTH, CUT_TO_FIT),
        on(STOCK_PACKED, "stock", fused, ABOUT_16_ROWS, arguments={"packing": 16384}),
        on(STOCK_PADDING_FREE, "stock", fused, micro_batch(4)),
        on(ONCE, "train", UNSLOTH, CUT_TO_FIT, arguments={"prefix_once": True}),
        on(ALONE, "train", UNSLOTH, CUT_TO_FIT, arguments={"prefix_once": False}),
        on(WHOLE, "train", fused, UNSHARED, micro_batch(2)),
        on(EVALUATION, "evaluation", fused),
        on(SEED, "train", TRANSFORMERS, preset="seed"),
        *(
            on(
                f"memory: {batch} x {tokens} tokens, unsloth checkpointing",
                "train",
                UNSLOTH,
                RECOMPUTED,
                UNSHARED,
                arguments={"batch": batch, "tokens": tokens},
            )
            for batch, tokens in scale.shapes
        ),
        on(CHECKPOINTING, "train", UNSLOTH, RECOMPUTED, UNSHARED),
        on(PLAIN_EVALUATION, "evaluation", plain),
        on(PLAIN_SHARED, "train", plain, SHARED, micro_batch(2)),
        on(PLAIN_WHOLE, "train", plain, UNSHARED, micro_batch(1)),
        on("numerics: transformers, bf16", "numerics", plain, BF16),
        on("numerics: unsloth, bf16", "numerics", fused, BF16),
        on(IN_BF16, "train", UNSLOTH, CUT_TO_FIT, BF16),
    ]


RATIOS: Mapping[str, tuple[str, str, str | None]] = {
    "l4_over_seed": ("samples_per_s", L4, SEED),
    "l4_over_stock_unsloth_packed": ("samples_per_s", L4, STOCK_PACKED),
    "l4_over_stock_unsloth_padding_free": ("samples_per_s", L4, STOCK_PADDING_FREE),
    "prefix_once_a_step_over_once_a_micro_batch": ("samples_per_s", ONCE, ALONE),
    "unsloth_over_transformers_shared": ("samples_per_s", L4, PLAIN_SHARED),
    "shared_prefix_on_over_off": ("samples_per_s", PLAIN_SHARED, PLAIN_WHOLE),
    "shared_prefix_on_over_off_unsloth": ("samples_per_s", L4, WHOLE),
    "without_over_with_checkpointing": ("samples_per_s", WHOLE, CHECKPOINTING),
    "bf16_over_nf4": ("samples_per_s", IN_BF16, L4),
    "evaluation_over_one_at_a_time": ("over_one_at_a_time", EVALUATION, None),
    "evaluation_unsloth_over_transformers": ("plans_per_s", EVALUATION, PLAIN_EVALUATION),
}
"""Ratios between two measurements: a figure, the measurement above and the one below.

Without one below, the figure is a ratio already.
"""


# --------------------------------------------------------------------------------------------------
# What is measured; each function runs in a worker process


class ModelNotLoaded(Exception):
    """The model cannot be loaded, so nothing that needs it can be measured."""


class Bench:
    """What the measurements of a process share: sizes, folders, the loaded model, the cap."""

    _on_cpu: Mapping[tuple[str, Any], Any] = {
        ("backend", "unsloth"): "transformers",
        ("gradient_checkpointing", "unsloth"): "true",
    }
    """What a tiny run takes instead of settings that need CUDA."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        """Keep the job and hold the allocator to the cap."""
        import torch

        self.scale = TINY if job["tiny"] else FULL
        self.tiny = bool(job["tiny"])
        self.work = Path(job["work"])
        self.base = self.work / "base"
        self.cap_gib = float(job["cap_gib"])
        self.real = Path(job["real"]) if job["real"] else None
        self.cuda = torch.cuda.is_available()
        self.partial: Callable[..., None] = lambda **_: None
        """Tells figures that stay if the measurement is killed."""
        self._model: Any = None
        self._loaded: Any = None
        if self.cuda and self.cap_gib:
            total = torch.cuda.get_device_properties(0).total_memory / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.cap_gib / total))

    def config(self, item: Measurement) -> Any:
        """Resolve a measurement's preset and settings."""
        from tinyagent_fast.presets import preset_config

        assert item.preset is not None, f"{item.name} has no model"
        config = preset_config(item.preset)
        for name, wanted in item.settings.items():
            section, _, key = name.partition(".")
            value = self._on_cpu.get((key, wanted), wanted) if self.tiny else wanted
            changed = replace(getattr(config, section), **{key: value})
            config = replace(config, **{section: changed})
        return config

    def loaded(self, item: Measurement) -> Any:
        """Load a measurement's model as the project does, or give the one at hand.

        Its memory is counted from here.
        """
        if self._loaded is None or self._model != item.model:
            self._loaded = None
            self.release()
            config = self.config(item)
            try:
                if config.model.backend == "unsloth":
                    import unsloth  # noqa: F401  # patches transformers, so it must come first
                from tinyagent_fast.models.loading import load_for_training

                self._loaded = load_for_training(config, str(self.base))
            except Exception as error:
                raise ModelNotLoaded(f"{type(error).__name__}: {error}") from error
            self._model = item.model
        self.release()
        return self._loaded

    @cached_property
    def rows(self) -> Any:
        """The training rows, without those that are too long for the measurements."""
        from datasets import load_from_disk

        scale, folder = self.scale, self.work / "rows"
        if not folder.exists():
            vocab = scale.shape.vocab
            rows = rows_of(self.real, TRAINING_FILE, scale.rows, scale.row_lengths, vocab)
            kept = [row for row in rows if len(row["input_ids"]) <= scale.row_max_tokens]
            dataset(kept).save_to_disk(str(folder))
        return load_from_disk(str(folder))

    def release(self) -> None:
        """Give back memory that nothing refers to any more, and start the peak counters anew."""
        if not self.cuda:
            return
        import gc

        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def clock(self) -> float:
        """Read the clock once the device has nothing left to do."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def memory(self) -> dict[str, float | None]:
        """Read the allocator: GiB now and at the peak since `release`; None without CUDA."""
        names = ("allocated_gib", "peak_allocated_gib", "peak_reserved_gib")
        if not self.cuda:
            return dict.fromkeys(names)
        import torch

        values = (
            torch.cuda.memory_allocated(),
            torch.cuda.max_memory_allocated(),
            torch.cuda.max_memory_reserved(),
        )
        return {name: round(value / 2**30, 3) for name, value in zip(names, values, strict=True)}


def dataset(rows: Sequence[Row]) -> Any:
    """Make what a trainer takes."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"key": str(at), **row, "length": len(row["input_ids"])} for at, row in enumerate(rows)]
    )


def matmul(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time square bf16 matrix products: the rate that the steps' rates are held against."""
    import torch

    figures: dict[str, Any] = {}
    for size in bench.scale.matmul_sizes:
        device = "cuda" if bench.cuda else "cpu"
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(3):
            torch.matmul(a, b)
        started, repeats = bench.clock(), 2 if bench.tiny else 30
        for _ in range(repeats):
            torch.matmul(a, b)
        seconds = (bench.clock() - started) / repeats
        figures[f"tflop_per_s_{size}"] = round(2 * size**3 / seconds / 1e12, 3)
    return figures


def inputs(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Write the base, a Llama of random bf16 weights, with its tokenizer; measure the rows."""
    import torch

    tokenizer = tokenizer_for(bench.real, bench.scale.shape.vocab).hf
    with torch.device("cuda" if bench.cuda else "cpu"):
        model = random_llama(
            bench.scale.shape,
            bench.scale.positions,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to(torch.bfloat16)
    model.save_pretrained(str(bench.base))
    tokenizer.save_pretrained(str(bench.base))
    lengths = bench.rows["length"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": TOKENIZER_FILE if bench.real else "words",
        "rows_of": TRAINING_FILE if bench.real else "random words",
        "rows": len(lengths),
        "dropped": bench.scale.rows - len(lengths),
        "mean_tokens": round(statistics.fmean(lengths), 1),
        "longest_tokens": max(lengths),
    }


def train(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time optimizer steps through the project's trainer, after a warm-up, and read the peak."""
    from tinyagent_fast.shared_prefix.training import decide_shared_prefix
    from tinyagent_fast.training.trainer import build_trainer

    loaded, config = bench.loaded(item), bench.config(item)
    scale, recipe = bench.scale, config.train
    # One step more than will be made: the trainer saves a checkpoint at its last step.
    steps = scale.warmup_steps + scale.steps + 1
    if "tokens" in item.arguments:
        recipe = replace(recipe, batch=item.arguments["batch"], accumulation=1)
        tokens = item.arguments["tokens"]
        exact = Lengths(shared=1, mean=tokens, deviation=0, supervised=min(88, tokens // 2))
        rows = dataset(generated_rows(exact, recipe.batch * steps, scale.shape.vocab))
    else:
        rows = bench.rows
    if bench.tiny:
        recipe = replace(recipe, accumulation=min(2, recipe.accumulation))
    recipe = replace(recipe, max_steps=steps, save_every_steps=10**6)
    config = replace(config, train=recipe)
    kept_tokens = math.inf
    if config.model.gradient_checkpointing == "auto" and bench.cap_gib:
        kept_tokens = _kept_tokens(bench, loaded, rows, config)
    trainer = build_trainer(
        loaded,
        rows,
        config,
        output_dir=bench.work / "checkpoints",
        shared_prefix=decide_shared_prefix(loaded, recipe, rows, None).on,
        kept_tokens=kept_tokens,
    )
    prefix_once = item.arguments.get("prefix_once")
    if prefix_once is not None:  # else as the trainer does on this card
        trainer.data_collator = replace(trainer.data_collator, prefix_once=prefix_once)
    return _timed(bench, loaded, trainer, config)


def stock(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time Unsloth's own trainer on the same rows: packed to `packing` tokens, or padding-free."""
    loaded, config = bench.loaded(item), bench.config(item)
    if loaded.backend == "unsloth":
        import unsloth  # noqa: F401  # patches trl, so it must come first
    from trl import SFTConfig, SFTTrainer

    from tinyagent_fast.training.trainer import optimizer_name

    packing_tokens = item.arguments.get("packing")
    recipe = replace(config.train, accumulation=1) if bench.tiny else config.train

    class CountingTrainer(SFTTrainer):  # type: ignore[misc]
        tokens_seen = tokens_padded = tokens_computed = 0

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.tokens_seen += inputs["input_ids"].numel()
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = CountingTrainer(
        model=loaded.model,
        args=SFTConfig(
            output_dir=str(bench.work / "checkpoints"),
            per_device_train_batch_size=recipe.batch,
            gradient_accumulation_steps=recipe.accumulation,
            max_steps=bench.scale.warmup_steps + bench.scale.steps + 1,
            learning_rate=recipe.learning_rate,
            optim=optimizer_name(recipe, cuda=True) if bench.cuda else "adamw_torch",
            use_cpu=not bench.cuda,
            bf16=bench.cuda and loaded.compute_dtype == "bfloat16",
            fp16=bench.cuda and loaded.compute_dtype == "float16",
            gradient_checkpointing=False,
            # trl cuts no rows without packing, and refuses a length that it does not hold to.
            max_length=packing_tokens and min(packing_tokens, bench.scale.positions),
            packing=packing_tokens is not None,
            padding_free=packing_tokens is None,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=bench.rows.select_columns(["input_ids", "labels"]),
        processing_class=loaded.tokenizer.hf,
    )
    figures = _timed(bench, loaded, trainer, replace(config, train=recipe))
    if figures["tokens_per_s"] is not None:  # of packed rows nobody knows how many came
        mean_tokens = statistics.fmean(bench.rows["length"])
        figures["samples_per_s"] = round(figures["tokens_per_s"] / mean_tokens, 3)
    return {**figures, "micro_batch_tokens": packing_tokens}


def _kept_tokens(bench: Bench, loaded: Any, rows: Any, config: Any) -> int:
    """Predict the most tokens of a micro-batch under the cap, as a run does."""
    from tinyagent_fast.training.memory import RESERVE_GIB, MemoryEstimator, RowLengths

    estimator = MemoryEstimator(
        config=config,
        shape=ModelShape.from_config(loaded.model.config.to_dict()),
        lengths=RowLengths.of(list(rows), config),
        backend=loaded.backend,
        usable_gib=bench.cap_gib - RESERVE_GIB,
    )
    return estimator.kept_tokens(config.train.rows_per_batch)


def _timed(bench: Bench, loaded: Any, trainer: Any, config: Any) -> dict[str, Any]:
    """Let a trainer run, with a clock at each of its steps."""
    from transformers import TrainerCallback

    recipe = config.train
    seconds: list[float] = []
    tokens: list[int] = []

    def figures() -> dict[str, Any]:
        computed, padded = trainer.tokens_computed, trainer.tokens_padded
        return {
            "fused_layers": loaded.fused,
            "notes": list(loaded.notes),
            "batch": recipe.batch,
            "accumulation": recipe.accumulation,
            "checkpointing": config.model.gradient_checkpointing,
            "backend": loaded.backend,
            "weights": config.model.weights,
            **rates(seconds, tokens, bench.scale.warmup_steps, recipe.batch * recipe.accumulation),
            "losses": [round(e["loss"], 4) for e in trainer.state.log_history if "loss" in e],
            **bench.memory(),
            "computed_share": round(computed / padded, 4) if padded else None,
        }

    class Stopper(TrainerCallback):  # type: ignore[misc]
        started_s = 0.0
        seen_tokens = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started_s, self.seen_tokens = bench.clock(), trainer.tokens_seen

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = bench.clock()
            seconds.append(now - self.started_s)
            tokens.append(trainer.tokens_seen - self.seen_tokens)
            measured = seconds[bench.scale.warmup_steps :]
            enough = len(measured) >= 2 and sum(measured) >= bench.scale.steps_s
            if enough or len(measured) >= bench.scale.steps:
                control.should_training_stop = True
            bench.partial(figures=figures())
            self.started_s, self.seen_tokens = bench.clock(), trainer.tokens_seen

    trainer.add_callback(Stopper())
    trainer.train()
    return figures()


def rates(
    seconds: list[float], tokens: list[int], warmup: int, rows_per_step: int
) -> dict[str, Any]:
    """Turn step times into rates by the median step, leaving the warm-up out.

    One step of a card that others use too may take five times as long.
    """
    measured, counted = seconds[warmup:], tokens[warmup:]
    median = statistics.median(measured) if measured else math.nan
    return {
        "step_s": [round(s, 4) for s in seconds],
        "first_step_s": round(seconds[0], 3) if seconds else None,
        "median_step_s": round(median, 4) if measured else None,
        "tokens_per_s": round(statistics.fmean(counted) / median, 1) if measured else None,
        "samples_per_s": round(rows_per_step / median, 3) if measured else None,
    }


def numerics(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Compare loss and gradient of some rows: packed with whole rows, and with other backends.

    The first measurement of some weights leaves those of whole rows for the ones that follow.
    """
    import torch

    from tinyagent_fast.shared_prefix.forward import shared_prefix_loss, unsupported
    from tinyagent_fast.shared_prefix.packing import pack, pack_step
    from tinyagent_fast.shared_prefix.step import step_gradients
    from tinyagent_fast.training.trainer import collate

    loaded, rows = bench.loaded(item), bench.rows
    if loaded.backend == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(loaded.model)  # which its trainer undoes
    loaded.model.train()
    adapter = sorted((name, p) for name, p in loaded.model.named_parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in adapter:  # the same values with every backend, none of them zero
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(values.to(parameter.dtype))
    lengths = rows["length"]
    shortest = sorted(range(len(rows)), key=lambda row: lengths[row])[:NUMERICS_ROWS]
    batch = [rows[row] for row in shortest]
    packed = pack(batch).each(lambda tensor: tensor.to(loaded.device))
    step = pack_step(batch, len(batch) - 1).each(lambda tensor: tensor.to(loaded.device))

    def backward(loss_of: Callable[[], Any]) -> Any:
        with loaded.autocast():
            loss = loss_of()
        loss.backward()
        return loss.detach()

    def of_row(row: Any) -> Any:
        of_cpu = collate([row], loaded.tokenizer.pad_id)
        inputs = {name: tensor.to(loaded.device) for name, tensor in of_cpu.items()}
        loss = loaded.model(**inputs, use_cache=False).loss
        return loss * sum(label >= 0 for label in row["labels"]) / packed.supervised_tokens

    ways: dict[str, Callable[[], Any]] = {
        # One at a time: together they would not fit under the cap.
        "whole rows": lambda: sum(backward(partial(of_row, row)) for row in batch)
    }
    if unsupported(loaded.model, "training") is None:
        ways["shared prefix"] = lambda: backward(lambda: shared_prefix_loss(loaded.model, packed))
        ways["prefix once a step"] = lambda: step_gradients(
            loaded.model, step, autocast=loaded.autocast
        )
    found: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        loaded.model.zero_grad(set_to_none=True)
        loss = way()
        gradients = [p.grad.float().cpu().flatten() for _, p in adapter]
        found[name] = {"loss": float(loss), "gradient": torch.cat(gradients)}
    loaded.model.zero_grad(set_to_none=True)
    figures: dict[str, Any] = {
        "loss": found["whole rows"]["loss"],
        "computed_share": round(packed.computed_tokens / packed.plain_tokens, 4),
        **bench.memory(),
    }
    kept = bench.work / f"numerics-{bench.config(item).model.weights}.pt"
    if not kept.exists():
        torch.save({"backend": loaded.backend, **found.pop("whole rows")}, kept)
    wanted = torch.load(kept)
    for name, other in found.items():
        figures[f"{loaded.backend}, {name}, against {wanted['backend']}, whole rows"] = {
            "loss_relative_difference": abs(other["loss"] - wanted["loss"]) / wanted["loss"],
            "gradient_relative_difference": float(
                (other["gradient"] - wanted["gradient"]).norm() / wanted["gradient"].norm()
            ),
        }
    return figures


def evaluation(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time plans one at a time, in batches and with lookup, and compare what was written."""
    from tinyagent_fast.inference.engine import Limits
    from tinyagent_fast.inference.torch_engine import TorchEngine
    from tinyagent_fast.plans.grammar import END_OF_PLAN

    loaded, scale = bench.loaded(item), bench.scale
    prompts = [prompt_of(row) for row in bench.rows.select(range(scale.prompts))]
    engine, guessing = TorchEngine(loaded), TorchEngine(loaded, lookup_tokens=4)
    padding = TorchEngine(loaded, shared_prefix=False)

    def write(
        writer: Any, chosen: Sequence[list[int]], batch: int, tokens: int
    ) -> tuple[dict[int, str], float]:
        started = bench.clock()
        limits = Limits(stop=END_OF_PLAN, max_new_tokens=tokens, batch=batch)
        found = writer.complete_tokens(chosen, limits)
        texts = {index: completion.text for index, completion in found}
        return texts, round(len(chosen) / (bench.clock() - started), 4)

    write(engine, prompts[: scale.eval_batch], scale.eval_batch, 2)  # warms up
    bench.release()
    singles = prompts[: scale.single_prompts]
    alone, alone_per_s = write(engine, singles, 1, scale.new_tokens)
    together, per_s = write(engine, prompts, scale.eval_batch, scale.new_tokens)
    peak = bench.memory()["peak_reserved_gib"]
    guessed, guessed_per_s = write(guessing, prompts, scale.eval_batch, scale.new_tokens)
    figures = {
        "path": engine.notes(),
        "prompts": len(prompts),
        "batch": scale.eval_batch,
        "new_tokens": scale.new_tokens,
        "plans_per_s_one_at_a_time": alone_per_s,
        "plans_per_s": per_s,
        "plans_per_s_lookup": guessed_per_s,
        "over_one_at_a_time": round(per_s / alone_per_s, 4),
        "peak_reserved_gib": peak,
        "batch_against_one_at_a_time": equal_texts(alone, together),
        "lookup_against_batch": equal_texts(together, guessed),
    }
    bench.partial(figures=figures)  # the model's own way is another library's, and may fail
    bench.release()
    padded, padded_per_s = write(padding, singles, len(singles), scale.new_tokens)
    return {
        **figures,
        "plans_per_s_left_padded": padded_per_s,
        "batch_against_left_padded": equal_texts(padded, together),
    }


def equal_texts(one: Mapping[int, str], other: Mapping[int, str]) -> str:
    """Count equal texts of the same prompts; a random model's near-ties make some differ."""
    return f"{sum(other[index] == text for index, text in one.items())} of {len(one)}"


KINDS: Mapping[str, Callable[[Bench, Measurement], dict[str, Any]]] = {
    "matmul": matmul,
    "inputs": inputs,
    "numerics": numerics,
    "train": train,
    "stock": stock,
    "evaluation": evaluation,
}


def measure(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one measurement and turn whatever happens into a result."""
    started = time.perf_counter()
    try:
        result: dict[str, Any] = {"status": "ok", "figures": run()}
    except Exception as error:
        result = {
            "status": "oom" if is_out_of_memory(error) else "failed",
            "reason": " ".join(f"{type(error).__name__}: {error}".split())[:500],
            "log": traceback.format_exc().splitlines()[-LOG_LINES:],
            "model_broken": isinstance(error, ModelNotLoaded),
        }
    return {**result, "seconds": round(time.perf_counter() - started, 3)}


def work(job_file: Path) -> None:
    """Measure one after the other until one fails, as CUDA's state is then unknown."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    job = json.loads(job_file.read_text(encoding="utf-8"))
    results, bench = Results(Path(job["results"])), Bench(job)
    for raw in job["measurements"]:
        item = Measurement(**raw)
        if job["deadline"] - time.time() < job["least_s"]:
            results.record(item, status="not run", reason="too few seconds were left")
            continue
        results.record(item, status="running")
        bench.partial = partial(results.record, item)
        faulthandler.dump_traceback_later(item.limit_s, exit=True)  # ends a hang
        result = measure(partial(KINDS[item.kind], bench, item))
        faulthandler.cancel_dump_traceback_later()
        results.record(item, **result)
        if result["status"] != "ok":
            break
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of libraries are not waited for


# --------------------------------------------------------------------------------------------------
# Processes, results, table


class Results:
    """The one JSON file; it is replaced as a whole after every change, by whoever measures."""

    def __init__(self, path: Path, head: Mapping[str, Any] | None = None) -> None:
        """Start the file, or without a head go on with the one that is there."""
        self.path = path
        self.measurements: dict[str, dict[str, Any]] = {}
        self.head = dict(head or {})
        if head is None:
            self.read()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write()

    def read(self) -> None:
        """Take over what others have written."""
        content = json.loads(self.path.read_text(encoding="utf-8"))
        self.measurements = content.pop("measurements")
        self.head = content

    def record(self, item: Measurement, **changes: Any) -> None:
        """Set fields of a measurement's result and write the file."""
        start = {"status": None, "reason": None, "figures": None, "seconds": None, **asdict(item)}
        entry = self.measurements.setdefault(item.name, start)
        # Not every reader of JSON knows NaN and Infinity: they become text.
        entry |= json.loads(json.dumps(changes, default=str), parse_constant=str)
        self.write()

    def write(self) -> None:
        """Replace the file."""
        self.head["ratios"] = ratios(self.measurements)
        write_json(self.path, {**self.head, "measurements": self.measurements})


def ratios(measurements: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Put measured figures in relation; a ratio of something unmeasured is None."""

    def figure(name: str, key: str) -> float | None:
        entry = measurements.get(name) or {}
        value = (entry.get("figures") or {}).get(key)
        return value if entry.get("status") == "ok" and isinstance(value, int | float) else None

    found: dict[str, float | None] = {}
    for name, (key, top, bottom) in RATIOS.items():
        above, below = figure(top, key), figure(bottom, key) if bottom else 1.0
        found[name] = round(above / below, 4) if above is not None and below else None
    return found


@dataclass
class Runner:
    """Starts a worker for the measurements of each model, and records what it measured."""

    results: Results
    job: Mapping[str, Any]
    """What every worker gets: tiny, work, cap_gib, real, least_s and deadline."""
    say: Callable[[str], None] = print
    worker: Sequence[str] = (sys.executable, str(Path(__file__).resolve()), "--work")

    def run(self, measurements: Sequence[Measurement]) -> None:
        """Measure everything; whatever happens to one, the next ones follow."""
        rest = list(measurements)
        while rest:
            models = [None if self.job.get("tiny") else item.model for item in rest]
            # A tiny run loads its libraries once: one process for everything.
            count = next((n for n, model in enumerate(models) if model != models[0]), len(rest))
            group, rest = rest[:count], rest[count:]
            left_s = self.job["deadline"] - time.time()
            needed = self.results.measurements.get("inputs", {"status": "ok"})
            if group[0].preset and needed["status"] != "ok":
                self._give_up(group, "it needs the inputs")
            elif left_s < self.job["least_s"]:
                self._give_up(group, f"{max(0.0, left_s):.0f} s were left")
            else:
                rest = self._run_worker(group, left_s) + rest

    def _run_worker(self, group: Sequence[Measurement], left_s: float) -> list[Measurement]:
        """Run one worker until it ends or time is up; give what is still to be measured."""
        log, job_file = (Path(self.job["work"]) / name for name in ("log.txt", "job.json"))
        job = {"results": str(self.results.path), "measurements": [asdict(item) for item in group]}
        job_file.write_text(json.dumps({**self.job, **job}), encoding="utf-8")
        # A signal while it starts would leave it running.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [*self.worker, str(job_file)],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            reason = "it was stopped from outside"
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
                reason = f"the process ended with {process.wait(timeout=max(1.0, left_s))}"
            except subprocess.TimeoutExpired:
                reason = BUDGET_OVER
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the worker and its children
                process.wait()
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                rest = self._untried(group, reason, lines)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return rest

    def _untried(
        self, group: Sequence[Measurement], reason: str, log: Sequence[str]
    ) -> list[Measurement]:
        """Blame the measurement that a worker did not finish; give those it did not come to."""
        self.results.read()
        rest = [item for item in group if item.name not in self.results.measurements]
        if len(rest) == len(group):
            self._give_up(rest, f"its process did not start: {reason}", "crashed", log)
            return []
        for item in group[: len(group) - len(rest)]:
            entry = self.results.measurements[item.name]
            if entry["status"] == "running":
                hung = reason == BUDGET_OVER or any(line.startswith("Timeout (") for line in log)
                self._give_up([item], reason, "timeout" if hung else "crashed", log)
                continue
            self.say(f"{item.name}: {entry['status']} {entry['reason'] or ''}".rstrip())
            if entry.get("model_broken"):
                self._give_up(rest, "its model cannot be loaded")
                return []
        return rest

    def _give_up(
        self,
        items: Sequence[Measurement],
        reason: str,
        status: str = "not run",
        log: Sequence[str] = (),
    ) -> None:
        for item in items:
            self.results.record(item, status=status, reason=reason, log=list(log[-LOG_LINES:]))
            self.say(f"{item.name}: {status}, {reason}")


def print_table(results: Results) -> None:
    """Print what came out."""
    for name, entry in results.measurements.items():
        figures = {k: v for k, v in (entry["figures"] or {}).items() if v is not None}
        for long in ("step_s", "notes", "losses"):
            figures.pop(long, None)
        told = ", ".join(f"{key} {json.dumps(value)}" for key, value in figures.items())
        print(f"{name}: {entry['status']}; {told or entry['reason']}")
    for name, value in ratios(results.measurements).items():
        print(f"{name}: {'not measured' if value is None else value}")


def set_environment(folder: Path, flags: argparse.Namespace) -> None:
    """Keep libraries off the network, their caches in the work folder, all memory below the cap."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_AUTO_INSTALL": "0",
        "PYTHONUNBUFFERED": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }
    # Unsloth asks for it when it is imported, which is too late once a cap has been set.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if flags.cap_gib:
        # Unsloth sizes the chunks of its loss by the free memory of the whole card.
        os.environ.setdefault("UNSLOTH_CE_LOSS_TARGET_GB", "2")
    if flags.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    names = [item.name for item in plan(FULL)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for everything")
    parser.add_argument("--cap-gib", type=float, default=22.0, help="GPU memory to use; 0: all")
    add_real_flag(parser, TRAINING_FILE)
    parser.add_argument("--only", nargs="*", default=[], help="measurements whose name has a word")
    parser.add_argument("--tiny", action="store_true", help="everything on the CPU, in small")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    unknown = [word for word in flags.only if not any(word in name for name in names)]
    if unknown:
        parser.error(f"--only {' '.join(unknown)}: measurements are {'; '.join(names)}")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table.

    Args:
        arguments: Without the program's name; None takes those of the process.

    Returns:
        0 when all that was tried ran or only lacked memory, 1 when something failed, 2 without a
        CUDA device.
    """
    flags = parse_flags(arguments)
    if flags.work:
        work(flags.work)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        return check(flags, Path(folder))


def check(flags: argparse.Namespace, folder: Path) -> int:
    """Measure with files in a folder; gives the exit status."""
    started = time.time()
    set_environment(folder, flags)
    import torch  # here, so that the environment knows the card

    if not torch.cuda.is_available() and not flags.tiny:
        print(
            "error: no CUDA device was found\n"
            "  why: every figure of this check is one of a GPU\n"
            "  fix: run it on a CUDA machine; --tiny goes through everything on the CPU"
        )
        return NO_CUDA_EXIT
    about = machine()
    card = about["gpu"]["name"] if about["gpu"] else "cpu-tiny"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(started))
    head = {
        "format": FORMAT,
        "tiny": flags.tiny,
        "seconds": None,
        "budget_s": flags.budget_s,
        "cap_gib": flags.cap_gib,
        "machine": {
            **about,
            "settings": {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)},
        },
    }
    results = Results(flags.out / f"gpu-check-{name}-{stamp}.json", head)
    job = {
        "tiny": flags.tiny,
        "work": str(folder),
        "cap_gib": flags.cap_gib,
        "real": str(flags.real.resolve()) if flags.real and not flags.tiny else None,
        "least_s": LEAST_S,
        "deadline": started + flags.budget_s - SUMMARY_S,
    }
    chosen = [
        item
        for item in plan(TINY if flags.tiny else FULL)
        if not flags.only or item.name == "inputs" or any(w in item.name for w in flags.only)
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        Runner(results, job).run(chosen)
    except KeyboardInterrupt:
        print("stopped from outside; what was measured is kept")
    finally:
        print_table(results)
        results.head["seconds"] = round(time.time() - started, 1)
        results.write()
        print(f"results: {results.path}")
    bad = [e for e in results.measurements.values() if e["status"] not in ("ok", "oom", "not run")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
