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
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inputs import Lengths, generated_rows, random_llama

from tinyagent_fast.errors import is_out_of_memory
from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.published import TINYLLAMA_32K
from tinyagent_fast.runs import environment, write_json

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 2
NO_CUDA_EXIT = 2
SUMMARY_S = 5.0
START_S = 12.0
"""A process takes about so long to start; with less time left none is started."""
LOG_LINES = 30
NUMERICS_ROWS = 3
STOPPING = (signal.SIGINT, signal.SIGTERM)
ENVIRONMENT = ("UNSLOTH_", "TORCH", "PYTORCH_", "TRITON_", "NVIDIA_VISIBLE", "CUDA_", "OMP_")
NOTABLE = ("unsloth", "warn", "error", "compil", "fallback", "falling back", "patched")

# --------------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Every size of a run; `FULL` is the real model's shape, `TINY` goes through in seconds."""

    shape: ModelShape = TINYLLAMA_32K
    positions: int = 32768
    tokenizer_pieces: int = 600
    matmul_sizes: tuple[int, ...] = (4096, 8192)
    prompt_style: Literal["full", "short"] = "full"
    rows: int = 128
    row_mean_tokens: int = 3590
    row_deviation_tokens: int = 420
    row_max_tokens: int = 4600
    warmup_steps: int = 2
    steps: int = 6
    steps_s: float = 20.0
    prompts: int = 32
    single_prompts: int = 4
    new_tokens: int = 48
    eval_batch: int = 16
    shapes: tuple[tuple[int, int], ...] = ((4, 4608), (8, 4608), (1, 32768), (2, 32768))
    test_paths: tuple[str, ...] = ("tests",)


FULL = Scale()
TINY = Scale(
    shape=ModelShape(
        hidden=128,
        intermediate=256,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=1100,
        tied=False,
    ),
    positions=1024,
    matmul_sizes=(64, 128),
    prompt_style="short",
    rows=48,
    row_mean_tokens=140,
    row_deviation_tokens=10,
    row_max_tokens=170,
    warmup_steps=1,
    steps=1,
    prompts=6,
    single_prompts=2,
    new_tokens=6,
    eval_batch=3,
    shapes=((2, 144), (3, 144)),
    test_paths=("tests/plans",),
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
    environment: Mapping[str, str] = field(default_factory=dict)
    least_s: float = 20.0
    """With less time left it is not started."""
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
        return (self.preset, tuple(sorted(own.items())), tuple(sorted(self.environment.items())))


TRANSFORMERS = {"model.backend": "transformers"}
UNSLOTH = {"model.backend": "unsloth"}
UNSHARED = {"train.shared_prefix": "off"}
SHARED = {"train.shared_prefix": "on"}
LONG = {"model.max_length_tokens": 32768}
BF16 = {"model.weights": "bf16"}
L4 = "train: l4 preset"
WHOLE = "train: unsloth, whole rows"
ONCE = "train: l4 preset, prefix once a step"
ALONE = "train: l4 preset, prefix once a micro-batch"
SEED = "train: seed preset, plain transformers"
STOCK_PACKED = "train: stock Unsloth and TRL, packed rows"
STOCK_PADDING_FREE = "train: stock Unsloth and TRL, padding-free"


def micro_batch(batch: int) -> dict[str, int]:
    """Take so many rows a micro-batch, of the 16 of an optimizer step."""
    return {"train.batch": batch, "train.accumulation": 16 // batch}


def checkpointing(how: str) -> dict[str, str]:
    """Say what is recomputed in the backward pass; every row of the plan says it itself."""
    return {"model.gradient_checkpointing": how}


def on(name: str, kind: str, *settings: Mapping[str, Any], **changes: Any) -> Measurement:
    """Write a row of the plan; it is of preset `l4` unless it says otherwise."""
    merged = {key: value for some in settings for key, value in some.items()}
    return Measurement(name=name, kind=kind, settings=merged, **{"preset": "l4", **changes})


def plan(scale: Scale) -> list[Measurement]:
    """List all measurements, the most important first."""
    plain, fused = {**TRANSFORMERS, **checkpointing("false")}, {**UNSLOTH, **checkpointing("false")}
    cut_to_fit = {**UNSLOTH, **checkpointing("auto")}
    recomputed = {**UNSLOTH, **checkpointing("unsloth"), **UNSHARED, **LONG}
    no_compile = {"UNSLOTH_BLOCK_COMPILE": "0"}
    return [
        Measurement(name="matmul", kind="matmul", least_s=5, limit_s=60),
        Measurement(name="inputs", kind="inputs", least_s=15),
        # The first backend leaves its losses and gradients for the second one.
        on("numerics: transformers, NF4", "numerics", plain),
        on("numerics: unsloth, NF4", "numerics", fused),
        # Batches without `auto` are such that the longest rows are predicted to fit under the cap.
        on(L4, "train", cut_to_fit),
        on(STOCK_PACKED, "stock", fused, arguments={"packing": 16384}),
        on(STOCK_PADDING_FREE, "stock", fused, micro_batch(4)),
        on(ONCE, "train", cut_to_fit, arguments={"prefix_once": True}),
        on(ALONE, "train", cut_to_fit, arguments={"prefix_once": False}),
        on(WHOLE, "train", fused, UNSHARED, micro_batch(2)),
        on("evaluation: unsloth, NF4", "evaluation", fused),
        on(SEED, "train", TRANSFORMERS, preset="seed"),
        on("evaluation: transformers, NF4", "evaluation", plain),
        on("train: transformers, shared prefix", "train", plain, SHARED, micro_batch(2)),
        on("train: transformers, whole rows", "train", plain, UNSHARED, micro_batch(1)),
        on("train: unsloth, unsloth checkpointing", "train", recomputed),
        *(
            on(
                f"memory: {batch} x {tokens} tokens, unsloth checkpointing",
                "train",
                recomputed,
                arguments={"batch": batch, "tokens": tokens},
            )
            for batch, tokens in scale.shapes
        ),
        on("numerics: transformers, bf16", "numerics", plain, BF16),
        on("numerics: unsloth, bf16", "numerics", fused, BF16),
        on("train: l4 preset, bf16 weights", "train", cut_to_fit, BF16),
        on("train: l4 preset, no block compile", "train", cut_to_fit, environment=no_compile),
        Measurement(name="tests", kind="tests", least_s=20, limit_s=240),
    ]


_EVALUATION = "evaluation: transformers, NF4"
RATIOS: Mapping[str, tuple[str, str, str | None]] = {
    "l4_over_seed": ("samples_per_s", L4, SEED),
    "l4_over_stock_unsloth_packed": ("samples_per_s", L4, STOCK_PACKED),
    "l4_over_stock_unsloth_padding_free": ("samples_per_s", L4, STOCK_PADDING_FREE),
    "prefix_once_a_step_over_once_a_micro_batch": ("samples_per_s", ONCE, ALONE),
    "unsloth_over_transformers_shared": (
        "samples_per_s",
        L4,
        "train: transformers, shared prefix",
    ),
    "shared_prefix_on_over_off": (
        "samples_per_s",
        "train: transformers, shared prefix",
        "train: transformers, whole rows",
    ),
    "shared_prefix_on_over_off_unsloth": ("samples_per_s", L4, WHOLE),
    "without_over_with_checkpointing": (
        "samples_per_s",
        WHOLE,
        "train: unsloth, unsloth checkpointing",
    ),
    "bf16_over_nf4": ("samples_per_s", "train: l4 preset, bf16 weights", L4),
    "block_compile_on_over_off": ("samples_per_s", L4, "train: l4 preset, no block compile"),
    "evaluation_over_one_at_a_time": ("over_one_at_a_time", "evaluation: unsloth, NF4", None),
    "evaluation_unsloth_over_transformers": (
        "plans_per_s",
        "evaluation: unsloth, NF4",
        _EVALUATION,
    ),
}
"""Ratios between two measurements: a figure, the measurement above and the one below.

Without one below, the figure is a ratio already.
"""


# --------------------------------------------------------------------------------------------------
# Inputs: a base of the real shape, a tokenizer and rows, made on the spot


def write_base(folder: Path, scale: Scale, tokenizer_file: Path | None) -> dict[str, Any]:
    """Write a Llama of random bf16 weights and its tokenizer.

    Args:
        folder: The base's folder.
        scale: The shape.
        tokenizer_file: A SentencePiece tokenizer.model for real token counts; None trains a BPE.
    """
    import torch

    from tinyagent_fast.models.nano import train_bpe_tokenizer
    from tinyagent_fast.prompts.loading import tokenizer_from_sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_file is not None:
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model")
        tokenizer = tokenizer_from_sentencepiece(folder / "tokenizer.model")
    else:
        texts = [
            f"{e.system}{e.user}{e.output}" for e in generated_examples(150, scale, "tokenizer")
        ]
        tokenizer = train_bpe_tokenizer(texts, scale.tokenizer_pieces)
    tokenizer.save_pretrained(str(folder))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = random_llama(
            scale.shape,
            scale.positions,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to(torch.bfloat16)
    model.save_pretrained(str(folder))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": tokenizer_file.name if tokenizer_file else "made from generated prompts",
    }


def generated_examples(count: int, scale: Scale, part: str) -> list[Any]:
    """Generate plans with the project's own generator; other parts have other queries."""
    from tinyagent_fast.data.generation.catalogue import load_catalogue
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_entries
    from tinyagent_fast.data.schema import Entry, entry_from_json

    spec = GenerationSpec(prompt_style=scale.prompt_style)
    rng = random.Random(f"gpu_check/{part}")
    entries = generate_entries(load_catalogue(), spec, count, rng, set())
    read = (entry_from_json(key, raw) for key, raw in entries)
    return [entry.examples[0] for entry in read if isinstance(entry, Entry)]


def row_examples(tokenizer: Any, scale: Scale) -> list[Any]:
    """Fill the system texts of generated plans up with examples, to the published lengths."""
    from tinyagent_fast.plans.grammar import END_OF_PLAN
    from tinyagent_fast.prompts.templates import render

    def sizes(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer.encode_texts(list(texts))]

    examples = generated_examples(2 * scale.rows, scale, "rows")
    rendered = [render(e, "alpaca") for e in examples]
    tokens = sizes([r.prompt + r.completion for r in rendered])
    blocks = [f"Question: {e.query}\n{e.output}{END_OF_PLAN}\n###\n" for e in examples]
    block_tokens = sizes(blocks)
    rng, filled = random.Random(0), []
    for example, own_tokens in zip(examples, tokens, strict=True):
        if own_tokens >= scale.row_max_tokens - 8:
            continue
        target = rng.gauss(scale.row_mean_tokens, scale.row_deviation_tokens)
        left = min(target, scale.row_max_tokens - 40) - own_tokens
        system = example.system or ""
        while (left := left - block_tokens[chosen := rng.randrange(len(blocks))]) >= 0:
            system += blocks[chosen]
        filled.append(replace(example, system=system))
    return filled[: scale.rows]


def file_examples(path: Path, scale: Scale) -> list[Any]:
    """Take the first rows of a file in the dataset's schema."""
    from tinyagent_fast.data.reading import read_entries

    entries = read_entries(path, on_bad_entry="skip")
    return [entry.examples[0] for entry in islice(entries, scale.rows)]


def exact_rows(tokens: int, count: int, vocab: int) -> Any:
    """Make rows of exactly so many tokens, of which the last 88 are supervised."""
    from datasets import Dataset

    lengths = Lengths(shared=1, mean=tokens, deviation=0, supervised=min(88, tokens // 2))
    rows = generated_rows(lengths, count, vocab)
    return Dataset.from_list(
        [{"key": str(at), **row, "length": tokens} for at, row in enumerate(rows)]
    )


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
        self.tokenizer_file = Path(job["tokenizer"]) if job["tokenizer"] else None
        self.data_file = Path(job["data"]) if job.get("data") else None
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
        """Load a measurement's model as the project does, or give the one at hand."""
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
        return self._loaded

    def rows(self) -> Any:
        """Open the encoded rows."""
        from datasets import Dataset

        return Dataset.from_file(str(self.work / "rows" / "rows.arrow"))

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
    """Write base, tokenizer and rows."""
    from tinyagent_fast.prompts.loading import load_tokenizer
    from tinyagent_fast.prompts.rows import encode_examples
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    figures = write_base(bench.base, bench.scale, bench.tokenizer_file)
    tokenizer = PromptTokenizer(load_tokenizer(bench.base), "alpaca")
    if bench.data_file is None:
        examples = row_examples(tokenizer, bench.scale)
    else:
        examples = file_examples(bench.data_file, bench.scale)
    rows = encode_examples(
        examples,
        tokenizer,
        bench.work / "rows",
        max_length_tokens=bench.scale.row_max_tokens,
        over_long="drop",
    ).statistics
    prompts = [{"system": e.system, "user": e.user} for e in examples[: bench.scale.prompts]]
    (bench.work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    return {
        **figures,
        "rows_of": bench.data_file.name if bench.data_file else "generated plans",
        "rows": rows.rows,
        "dropped": len(rows.dropped),
        "mean_tokens": round(rows.mean_tokens, 1),
        "longest_tokens": rows.longest_tokens,
    }


def fused_layers(model: Any) -> dict[str, int]:
    """Count the layers whose LoRA runs through Unsloth's fused functions."""
    layers = model.get_base_model().model.layers
    functions = {
        "qkv": [getattr(layer.self_attn, "apply_qkv", None) for layer in layers],
        "o": [getattr(layer.self_attn, "apply_o", None) for layer in layers],
        "mlp": [layer.mlp.forward for layer in layers],
    }
    fused = {
        name: sum("apply_lora" in getattr(one, "__name__", "") for one in found)
        for name, found in functions.items()
    }
    return {"layers": len(layers), **fused}


def train(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time optimizer steps through the project's trainer, after a warm-up, and read the peak."""
    loaded, config = bench.loaded(item), bench.config(item)
    scale, rows, recipe = bench.scale, bench.rows(), config.train
    if "tokens" in item.arguments:
        recipe = replace(recipe, batch=item.arguments["batch"], accumulation=1)
        steps = scale.warmup_steps + scale.steps + 1
        rows = exact_rows(item.arguments["tokens"], recipe.batch * steps, scale.shape.vocab)
    if bench.tiny:
        recipe = replace(recipe, accumulation=min(2, recipe.accumulation))
    # One step more than will be made: the trainer saves a checkpoint at its last step.
    recipe = replace(recipe, max_steps=scale.warmup_steps + scale.steps + 1)
    bench.release()
    prefix_once = item.arguments.get("prefix_once")
    figures = _our_training(bench, loaded, rows, config, recipe, prefix_once)
    bench.release()
    return {"fused_layers": fused_layers(loaded.model), "notes": list(loaded.notes), **figures}


def stock(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time Unsloth's own trainer on the same rows: packed to `packing` tokens, or padding-free.

    Where memory does not suffice, micro-batches are halved, so that a rate comes out.
    """
    loaded, config = bench.loaded(item), bench.config(item)
    figures, cut = None, 1
    while figures is None:
        bench.release()
        try:
            figures = _stock_training(bench, loaded, config, item.arguments.get("packing"), cut)
        except Exception as error:
            if cut == 4 or not is_out_of_memory(error):
                raise
            cut *= 2
    if figures["tokens_per_s"] is not None:  # of packed rows nobody knows how many came
        lengths = bench.rows()["length"]
        figures["samples_per_s"] = round(figures["tokens_per_s"] * len(lengths) / sum(lengths), 3)
    bench.release()
    return {"fused_layers": fused_layers(loaded.model), "notes": list(loaded.notes), **figures}


def _stock_training(
    bench: Bench, loaded: Any, config: Any, packing_tokens: int | None, cut: int
) -> dict[str, Any]:
    if loaded.backend == "unsloth":
        import unsloth  # noqa: F401  # patches trl, so it must come first
    from trl import SFTConfig, SFTTrainer

    from tinyagent_fast.training.trainer import optimizer_name

    recipe = config.train
    if packing_tokens:
        packing_tokens //= cut
        recipe = replace(recipe, batch=1, accumulation=4 * cut)  # about 16 rows
    else:
        recipe = replace(recipe, batch=recipe.batch // cut, accumulation=recipe.accumulation * cut)
    if bench.tiny:
        recipe = replace(recipe, accumulation=1)

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
        train_dataset=bench.rows().select_columns(["input_ids", "labels"]),
        processing_class=loaded.tokenizer.hf,
    )
    figures = _timed(bench, loaded, trainer, config, recipe)
    return {"micro_batch_tokens": packing_tokens, **figures}


def _our_training(
    bench: Bench, loaded: Any, rows: Any, config: Any, recipe: Any, prefix_once: bool | None
) -> dict[str, Any]:
    from tinyagent_fast.shared_prefix.training import decide_shared_prefix
    from tinyagent_fast.training.trainer import build_trainer

    kept_tokens = math.inf
    if config.model.gradient_checkpointing == "auto" and bench.cap_gib:
        kept_tokens = _kept_tokens(bench, loaded, rows, replace(config, train=recipe))
    trainer = build_trainer(
        loaded,
        rows,
        replace(config, train=replace(recipe, save_every_steps=10**6)),
        output_dir=bench.work / "checkpoints",
        shared_prefix=decide_shared_prefix(loaded, recipe, rows, None).on,
        kept_tokens=kept_tokens,
    )
    if prefix_once is not None:  # else as the trainer does on this card
        trainer.data_collator = replace(trainer.data_collator, prefix_once=prefix_once)
    return _timed(bench, loaded, trainer, config, recipe)


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


def _timed(bench: Bench, loaded: Any, trainer: Any, config: Any, recipe: Any) -> dict[str, Any]:
    """Let a trainer run; with the end of its builder nothing holds it any more."""
    from transformers import TrainerCallback

    seconds: list[float] = []
    tokens: list[int] = []

    def figures() -> dict[str, Any]:
        computed, padded = trainer.tokens_computed, trainer.tokens_padded
        return {
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
    """Turn step times into rates, leaving the warm-up out."""
    measured, counted = seconds[warmup:], tokens[warmup:]
    total = sum(measured)
    return {
        "step_s": [round(s, 4) for s in seconds],
        "first_step_s": round(seconds[0], 3) if seconds else None,
        "median_step_s": round(statistics.median(measured), 4) if measured else None,
        "tokens_per_s": round(sum(counted) / total, 1) if measured else None,
        "samples_per_s": round(rows_per_step * len(measured) / total, 3) if measured else None,
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

    loaded, rows = bench.loaded(item), bench.rows()
    fill_adapter(loaded.model)
    if loaded.backend == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(loaded.model)  # which its trainer undoes
    loaded.model.train()
    lengths = rows["length"]
    shortest = sorted(range(len(rows)), key=lambda row: lengths[row])[:NUMERICS_ROWS]
    batch = [rows[row] for row in shortest]
    device = "cuda" if bench.cuda else "cpu"
    packed = pack(batch).each(lambda tensor: tensor.to(device))
    step = pack_step(batch, len(batch) - 1).each(lambda tensor: tensor.to(device))
    dtype = getattr(torch, loaded.compute_dtype)
    enabled = bench.cuda and dtype != torch.float32
    autocast = partial(torch.autocast, "cuda", dtype, enabled=enabled)

    def backward(loss_of: Callable[[], Any]) -> Any:
        with autocast():
            loss = loss_of()
        loss.backward()
        return loss.detach()

    def of_row(row: Any) -> Any:
        inputs = collate([row], loaded.tokenizer.pad_id)
        loss = loaded.model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False).loss
        return loss * sum(label >= 0 for label in row["labels"]) / packed.supervised_tokens

    ways: dict[str, Callable[[], Any]] = {
        # One at a time: together they would not fit under the cap.
        "whole rows": lambda: sum(backward(partial(of_row, row)) for row in batch)
    }
    if unsupported(loaded.model, "training") is None:
        ways["shared prefix"] = lambda: backward(lambda: shared_prefix_loss(loaded.model, packed))
        ways["prefix once a step"] = lambda: step_gradients(loaded.model, step, autocast=autocast)
    bench.release()
    found: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        loaded.model.zero_grad(set_to_none=True)
        loss = way()
        gradients = [p.grad.float().cpu().flatten() for _, p in sorted(_adapter(loaded.model))]
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


def fill_adapter(model: Any) -> None:
    """Give the adapter weights that depend on their names alone, none of them zero."""
    import torch

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in sorted(_adapter(model)):
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.copy_(values.to(parameter.dtype))


def _adapter(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _prompts(bench: Bench) -> list[Any]:
    from tinyagent_fast.inference.engine import Prompt

    texts = json.loads((bench.work / "prompts.json").read_text(encoding="utf-8"))
    return [Prompt(**text) for text in texts]


def evaluation(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Time plans one at a time, in batches and with lookup, and compare what was written."""
    from tinyagent_fast.inference.engine import Limits
    from tinyagent_fast.inference.torch_engine import TorchEngine
    from tinyagent_fast.plans.grammar import END_OF_PLAN

    loaded, scale = bench.loaded(item), bench.scale
    prompts = _prompts(bench)
    engine, guessing = TorchEngine(loaded), TorchEngine(loaded, lookup_tokens=4)
    padding = TorchEngine(loaded, shared_prefix=False)

    def write(
        writer: Any, chosen: Sequence[Any], batch: int, tokens: int
    ) -> tuple[dict[int, str], float]:
        started = bench.clock()
        limits = Limits(stop=END_OF_PLAN, max_new_tokens=tokens, batch=batch)
        found = writer.generate(chosen, limits)
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
        "path": engine.notes(prompts),
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


def gpu_tests(bench: Bench, item: Measurement) -> dict[str, Any]:
    """Run the project's tests that need a CUDA device."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "--no-header"]
    done = subprocess.run(
        [*command, *bench.scale.test_paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=item.limit_s,
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines() or ["pytest said nothing"]
    bench.partial(figures={"last_lines": lines[-15:]})
    if done.returncode not in (0, 5):  # 5: no test is marked so
        raise RuntimeError(f"pytest ended with {done.returncode}: {lines[-1]}")
    return {"summary": lines[-1], "last_lines": lines[-15:]}


KINDS: Mapping[str, Callable[[Bench, Measurement], dict[str, Any]]] = {
    "matmul": matmul,
    "inputs": inputs,
    "numerics": numerics,
    "train": train,
    "stock": stock,
    "evaluation": evaluation,
    "tests": gpu_tests,
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
    with Path(job["events"]).open("a", encoding="utf-8") as events:

        def tell(kind: str, item: Measurement, **facts: Any) -> None:
            event = {"event": kind, "name": item.name, **facts}
            events.write(json.dumps(event, default=str) + "\n")
            events.flush()

        bench = Bench(job)
        for raw in job["measurements"]:
            item = Measurement(**raw)
            if job["deadline"] - time.time() < item.least_s:
                tell("result", item, status="not run", reason="too few seconds were left")
                continue
            tell("start", item, status="running")
            bench.partial = partial(tell, "partial", item)
            faulthandler.dump_traceback_later(item.limit_s, exit=True)  # ends a hang
            result = measure(partial(KINDS[item.kind], bench, item))
            faulthandler.cancel_dump_traceback_later()
            tell("result", item, **result)
            if result["status"] != "ok":
                break
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)  # threads of libraries are not waited for


# --------------------------------------------------------------------------------------------------
# Processes, results, table


class Results:
    """The one JSON file; it is replaced as a whole after every change."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        """Start the file."""
        self.path = path
        self.measurements: dict[str, dict[str, Any]] = {}
        self.head = dict(head)
        self.write()

    def record(self, item: Measurement, **changes: Any) -> None:
        """Set fields of a measurement's result and write the file."""
        start = {"status": None, "reason": None, "figures": None, "seconds": None, **asdict(item)}
        entry = self.measurements.setdefault(item.name, start)
        entry.update(changes)
        self.write()

    def write(self) -> None:
        """Replace the file; a full disk is no reason to measure nothing more."""
        self.head["ratios"] = ratios(self.measurements)
        content = finite({**self.head, "measurements": self.measurements})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)
        except OSError as error:
            print(f"cannot write {self.path}: {error}")


def finite(value: Any) -> Any:
    """Make a value that every JSON reader takes: NaN and infinity become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


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
    """What every worker gets: tiny, work, cap_gib, tokenizer and deadline."""
    say: Callable[[str], None] = print
    worker: Sequence[str] = (sys.executable, str(Path(__file__).resolve()), "--work")
    start_s: float = START_S
    _jobs: int = field(default=0, init=False)

    def run(self, measurements: Sequence[Measurement]) -> None:
        """Measure everything; whatever happens to one, the next ones follow."""
        rest = list(measurements)
        while rest:
            models = [None if self.job.get("tiny") else item.model for item in rest]
            # A tiny run loads its libraries once: one process for everything.
            count = next((n for n, model in enumerate(models) if model != models[0]), len(rest))
            group = [item for item in rest[:count] if not self._is_hopeless(item)]
            left_s = self.job["deadline"] - time.time()
            if group and left_s < group[0].least_s + self.start_s:
                self._give_up(group, f"{max(0.0, left_s):.0f} s were left")
                group = []
            rest = [*(self._run_worker(group, left_s) if group else []), *rest[count:]]

    def _is_hopeless(self, item: Measurement) -> bool:
        """Leave out what lacks its inputs, and a shape that holds one that lacked memory."""
        there = self.results.measurements
        smaller = [name for name, result in there.items() if holds_oom(item, result)]
        if item.preset and there.get("inputs", {"status": "ok"})["status"] != "ok":
            self._give_up([item], "it needs the inputs")
            return True
        if smaller:
            self._give_up([item], f"memory did not suffice for {smaller[0]}")
        return bool(smaller)

    def _run_worker(self, group: Sequence[Measurement], left_s: float) -> list[Measurement]:
        """Run one worker until it ends or time is up; give what is still to be measured."""
        self._jobs += 1
        folder = Path(self.job["work"])
        events, log = (folder / f"{name}-{self._jobs}" for name in ("events", "log"))
        events.touch()
        job_file = folder / f"job-{self._jobs}.json"
        job = {**self.job, "events": str(events), "measurements": [asdict(m) for m in group]}
        job_file.write_text(json.dumps(job), encoding="utf-8")
        # A signal while it starts would leave it running.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [*self.worker, str(job_file)],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **group[0].environment},
                    start_new_session=True,
                )
        except BaseException:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            raise
        reason = "the time for the whole check was over"
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
            with suppress(subprocess.TimeoutExpired):
                reason = f"the process ended with {process.wait(timeout=max(1.0, left_s))}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the worker and its children
            process.wait()
            rest = self._record(group, events, log, reason)
        return rest

    def _record(
        self, group: Sequence[Measurement], events: Path, log: Path, reason: str
    ) -> list[Measurement]:
        """Record what a worker told; blame the measurement that it did not finish."""
        by_name = {item.name: item for item in group}
        open_names, broken, current = list(by_name), False, None
        for line in events.read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            kind, name = event.pop("event"), event.pop("name")
            if kind == "start":
                current = name
            broken = broken or event.pop("model_broken", False)
            self.results.record(by_name[name], **event)
            if kind == "result":
                open_names.remove(name)
                current = None
                self.say(f"{name}: {event['status']} {event.get('reason') or ''}".rstrip())
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [x.strip()[:300] for x in lines if any(word in x.lower() for word in NOTABLE)]
        self.results.head.setdefault("logs", {})[group[0].name] = list(dict.fromkeys(told))[:40]
        rest = [by_name[name] for name in open_names]
        started = current is not None or len(rest) < len(group)
        if broken or not started:
            why = "its model cannot be loaded" if broken else f"its process did not start: {reason}"
            self._give_up(rest, why, "not run" if broken else "crashed", lines)
            return []
        if current is not None:
            timeout = any(line.startswith("Timeout (") for line in lines) or "over" in reason
            status = "timeout" if timeout else "crashed"
            self._give_up([by_name[current]], reason, status, lines)
            rest.remove(by_name[current])
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


def holds_oom(item: Measurement, result: Mapping[str, Any]) -> bool:
    """Tell whether a result is a lack of memory at a shape that an item's shape holds."""
    if result["status"] != "oom" or "tokens" not in item.arguments:
        return False
    smaller = result["arguments"]
    return bool(
        "tokens" in smaller
        and result["settings"] == item.settings
        and smaller["batch"] <= item.arguments["batch"]
        and smaller["tokens"] <= item.arguments["tokens"]
    )


def print_table(results: Results) -> None:
    """Print what came out."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measurement", "status", "figures", title="gpu check")
    for name, entry in results.measurements.items():
        figures = {k: v for k, v in (entry["figures"] or {}).items() if v is not None}
        for long in ("step_s", "last_lines", "notes", "losses"):
            figures.pop(long, None)
        told = ", ".join(f"{key} {json.dumps(value)}" for key, value in figures.items())
        table.add_row(name, str(entry["status"]), told or str(entry["reason"] or "")[:160])
    width = None if sys.stdout.isatty() else 150
    Console(highlight=False, markup=False, width=width).print(table)
    for name, value in ratios(results.measurements).items():
        print(f"{name}: {'not measured' if value is None else value}")


def set_environment(folder: Path, flags: argparse.Namespace) -> None:
    """Keep libraries off the network, their caches in the work folder, all memory below the cap."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
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
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model for real token counts")
    parser.add_argument("--data", type=Path, help="a file of the dataset for real rows")
    parser.add_argument("--only", nargs="*", default=[], help="measurements whose name has a word")
    parser.add_argument("--tiny", action="store_true", help="everything on the CPU, in small")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    for name, path in (("--tokenizer", flags.tokenizer), ("--data", flags.data)):
        if path is not None and not path.is_file():
            parser.error(f"{name} {path}: there is no such file")
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
    started = time.time()
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    set_environment(folder, flags)
    import torch  # here, so that the environment knows the card

    about = environment()
    settings = {k: v for k, v in os.environ.items() if k.startswith(ENVIRONMENT)}
    card = about["gpu"]["name"] if about["gpu"] else "cpu-tiny" if flags.tiny else "none"
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    stamp = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(started))
    if not torch.cuda.is_available() and not flags.tiny:
        print(
            "error: no CUDA device was found\n"
            "  why: every figure of this check is one of a GPU\n"
            "  fix: run it on a CUDA machine; --tiny goes through everything on the CPU"
        )
        shutil.rmtree(folder)
        return NO_CUDA_EXIT
    head = {
        "format": FORMAT,
        "tiny": flags.tiny,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": None,
        "budget_s": flags.budget_s,
        "cap_gib": flags.cap_gib,
        "machine": {**about, "command": None, "folder": None, "settings": settings},
    }
    results = Results(flags.out / f"gpu-check-{name}-{stamp}.json", head)
    chosen = [
        item
        for item in plan(TINY if flags.tiny else FULL)
        if not flags.only or item.name == "inputs" or any(w in item.name for w in flags.only)
    ]
    runner = Runner(
        results=results,
        job={
            "tiny": flags.tiny,
            "work": str(folder),
            "cap_gib": flags.cap_gib,
            "tokenizer": str(flags.tokenizer.resolve()) if flags.tokenizer else None,
            "data": str(flags.data.resolve()) if flags.data else None,
            "deadline": started + flags.budget_s - SUMMARY_S,
        },
    )

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        runner.run(chosen)
    except KeyboardInterrupt:
        print("stopped from outside; what was measured is kept")
    finally:
        results.head["seconds"] = round(time.time() - started, 1)
        results.write()
        print_table(results)
        print(f"results: {results.path}")
        shutil.rmtree(folder, ignore_errors=True)
    bad = [e for e in results.measurements.values() if e["status"] not in ("ok", "oom", "not run")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
