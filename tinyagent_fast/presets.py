"""Presets: one function per kind of machine or recipe, each returning a complete config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from tinyagent_fast.config import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    parse_config,
    typed,
)
from tinyagent_fast.errors import ConfigError, did_you_mean, plainly
from tinyagent_fast.strict_yaml import read_yaml_text

REAL_TRAIN = Path("data/training_data.json")
REAL_TEST = Path("data/testing_data.json")


def seed() -> Config:
    """The public re-training's recipe: attention only, batch 1 x 8, three epochs, 7e-5.

    Source: github.com/SamvelMinasyan/TinyAgent (78.4 % with a capped evaluation, 82.1 % without).
    """
    return Config(
        preset="seed",
        data=DataConfig(train=REAL_TRAIN, test=REAL_TEST),
        model=ModelConfig(backend="transformers"),
        lora=LoraConfig(rank=16, dropout=0.1, targets="attention"),
        train=TrainConfig(batching="shuffled", shared_prefix="off"),
    )


def paper() -> Config:
    """What the authors published of their recipe: three epochs at 7e-5 on plans and joins.

    Source: the TinyAgent blog post; rank, targets and batch are not stated there, ours stand in.
    """
    return Config(
        preset="paper",
        data=DataConfig(train=REAL_TRAIN, test=REAL_TEST, points="all"),
        model=ModelConfig(gradient_checkpointing="auto"),
        train=TrainConfig(batch=4, accumulation=4),
    )


def l4() -> Config:
    """One 24 GB L4: NF4, eight rows that share their beginning, recomputed where they are long."""
    return Config(
        preset="l4",
        data=DataConfig(train=REAL_TRAIN, test=REAL_TEST),
        model=ModelConfig(gradient_checkpointing="auto"),
        train=TrainConfig(
            batch=8,
            accumulation=2,
            learning_rate=2e-4,
            schedule="cosine",
            # Moments in 8 bits would save 0.14 GiB, and on a fast card take longer to launch.
            optimizer="adamw_torch",
        ),
        eval=EvalConfig(batch=32),
    )


def t4() -> Config:
    """One 16 GB T4, as on free Colab: NF4, four rows that share their beginning, one epoch."""
    return replace(
        l4(),
        preset="t4",
        train=replace(l4().train, epochs=1.0, batch=4, accumulation=4),
        eval=EvalConfig(batch=16),
    )


def a100() -> Config:
    """One A100 of 40 GB or better: bf16 weights, 16 rows that share their beginning."""
    return replace(
        l4(),
        preset="a100",
        model=replace(l4().model, weights="bf16"),
        train=replace(l4().train, batch=16, accumulation=1),
        eval=EvalConfig(batch=64),
    )


def cpu() -> Config:
    """A laptop without a GPU: SmolLM2-135M learns generated plans of up to eight calls."""
    return Config(
        preset="cpu",
        # More entries than the steps see: the retriever learns from all of them in seconds.
        data=DataConfig(validation_entries=200, generated_entries=6_400, prompts="retrieved"),
        model=ModelConfig(
            base="smollm2-135m", backend="transformers", weights="fp32", max_length_tokens=1024
        ),
        # As good as rank 32 with alpha 32, and a step is cheaper.
        lora=LoraConfig(rank=16, alpha=32),
        train=TrainConfig(
            epochs=1.0,
            max_steps=600,
            batch=4,
            accumulation=1,
            learning_rate=2e-3,
            schedule="linear",
            warmup=0.05,
            optimizer="adamw_torch",
            evaluations=2,
            batching="length-grouped",
        ),
        eval=EvalConfig(
            batch=50, sample=32, parity_prompts=4, before_and_after=True, before_limit=16
        ),
    )


def nano() -> Config:
    """A toy without a download: a base made on the spot, and short generated plans."""
    return Config(
        preset="nano",
        data=DataConfig(validation_entries=200, generated_entries=24_200, generated_max_calls=3),
        model=ModelConfig(
            base="nano", backend="transformers", weights="fp32", max_length_tokens=1024
        ),
        lora=LoraConfig(alpha=64),
        train=TrainConfig(
            epochs=1.0,
            batch=16,
            accumulation=1,
            learning_rate=2.5e-3,
            schedule="cosine",
            warmup=0.05,
            optimizer="adamw_torch",
            evaluations=4,
            # Steps of rows with the same tools would teach worse, and a small model gains nothing.
            batching="length-grouped",
        ),
        eval=EvalConfig(batch=50, sample=60, before_and_after=True),
    )


def smoke() -> Config:
    """A few steps of a tiny random model on any data, to see that everything runs."""
    return replace(
        nano(),
        preset="smoke",
        data=DataConfig(validation_entries=8, limit_entries=64, generated_entries=400),
        model=ModelConfig(
            base="random", backend="transformers", weights="fp32", max_length_tokens=8192
        ),
        train=TrainConfig(
            max_steps=8, batch=2, accumulation=2, learning_rate=1e-3, evaluations=1, threads=1
        ),
        eval=EvalConfig(
            batch=4,
            max_new_tokens=32,
            sample=4,
            parity_prompts=2,
            limit=8,
            before_and_after=True,
        ),
    )


PRESETS: Mapping[str, Callable[[], Config]] = {
    preset.__name__: preset for preset in (cpu, nano, smoke, l4, t4, a100, paper, seed)
}
"""Every preset by name."""


@typed
def preset_config(name: str) -> Config:
    """Make the config of a preset, a key of `PRESETS`.

    Raises:
        ConfigError: No preset has that name.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"preset {name!r}",
            f"there is none of that name{did_you_mean(name, PRESETS)}",
            f"take one of: auto, {', '.join(PRESETS)}",
        )
    return PRESETS[name]()


def choose_preset() -> tuple[str, str]:
    """Choose the preset for this machine; the second value is the reason, for the user."""
    from tinyagent_fast.models.libraries import set_environment

    set_environment()
    import torch

    if not torch.cuda.is_available():
        why = "no CUDA device was found, so a small model learns generated data"
        return "cpu", f"{why} (--preset nano, a toy, needs no download and 5 to 10 minutes)"
    properties = torch.cuda.get_device_properties(0)
    memory_gib = properties.total_memory / 2**30
    preset = preset_of_card(memory_gib, properties.major)
    return preset, f"{properties.name} with {memory_gib:.0f} GiB was found"


def preset_of_card(memory_gib: float, capability_major: int) -> str:
    """Choose the preset for a GPU; 8 is the first major compute capability with bf16."""
    preset = "t4" if memory_gib < 18 else "l4" if memory_gib < 36 else "a100"
    return preset if capability_major >= 8 else "t4"


@typed
def load_config(
    path: str | Path,
    *,
    preset: str | None = None,
    default: Callable[[], str] | None = None,
) -> Config:
    """Read a YAML file over a preset; a run's config.yaml is such a file.

    Without `preset` it is the one that the file names, else what `default` chooses, else none.

    Raises:
        ConfigError: The file cannot be read; an unknown preset, key or wrong value is in it.
    """
    try:
        text = read_yaml_text(Path(path))
    except (OSError, ValueError) as error:  # also a name with a character of value 0
        raise ConfigError(
            f"config {path}", f"it cannot be read: {plainly(error)}", "check the path"
        ) from error
    # A file that names no preset has the name that a plain config has.
    named = parse_config(text, source=str(path)).preset
    name = preset or (named if named != Config().preset else default and default())
    base = preset_config(name) if name else Config()
    # A file that was written for another preset must not rename the one that is taken.
    return replace(parse_config(text, base, str(path)), preset=base.preset)
