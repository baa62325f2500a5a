"""What `gpu_check` measures: sizes, models, measurements and their order of importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

COMPLETION_TOKENS = 88
"""Supervised tokens of a synthetic row, as many as a published plan has."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Every size of a run; `FULL` is the real model's shape, `TINY` goes through in seconds."""

    hidden: int = 2048
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    ffn: int = 5632
    vocab_pieces: int = 32000
    trained_pieces: int = 600
    max_position_tokens: int = 32768
    matmul_sizes: tuple[int, ...] = (4096, 8192)
    matmul_repeats: int = 30
    prompt_style: str = "full"
    rows: int = 128
    row_mean_tokens: int = 3590  # rows end up half an example block shorter
    row_deviation_tokens: int = 420
    row_max_tokens: int = 4600
    checkpointed_shapes: tuple[tuple[int, int], ...] = (
        (1, 4608),
        (2, 4608),
        (8, 4608),
        (1, 16384),
        (1, 32768),
        (2, 32768),
        (4, 32768),
    )
    plain_shapes: tuple[tuple[int, int], ...] = ((4, 4608), (1, 16384))
    main_shape: tuple[int, int] = (4, 4608)
    warmup_steps: int = 2
    steps: int = 5
    steps_s: float = 12.0
    recipe_steps: int = 6
    recipe_s: float = 25.0
    prompts: int = 32
    prompt_tokens: int = 1800
    new_tokens: int = 64
    batches: tuple[int, ...] = (16, 32)
    single_prompts: int = 8
    memorised_rows: int = 8
    memorise_steps: int = 150
    memorise_s: float = 30.0
    test_paths: tuple[str, ...] = ("tests",)


FULL = Scale()
TINY = Scale(
    hidden=128,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=256,
    vocab_pieces=1100,
    max_position_tokens=1024,
    matmul_sizes=(64, 128),
    matmul_repeats=2,
    prompt_style="short",
    rows=48,
    row_mean_tokens=140,
    row_deviation_tokens=10,
    row_max_tokens=170,
    checkpointed_shapes=((1, 144), (2, 144)),
    plain_shapes=((2, 144),),
    main_shape=(3, 144),
    warmup_steps=1,
    steps=1,
    recipe_steps=1,
    prompts=6,
    prompt_tokens=60,
    new_tokens=6,
    batches=(3, 6),
    single_prompts=2,
    memorised_rows=2,
    memorise_steps=2,
    test_paths=("tests/plans",),
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the project loads it: a preset, and what differs from it."""

    preset: str = "l4"
    backend: str = "unsloth"
    weights: str | None = None
    checkpointing: str | None = None
    max_length_tokens: int = 4608


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement: a function of `gpu_check_parts` or `gpu_check_decoding` and its limits."""

    name: str
    kind: str
    least_s: float
    """With less time left it is not started."""
    limit_s: float
    """After so long it is killed."""
    model: ModelSpec | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    """Measurements without whose success this one cannot run."""

    def to_json(self) -> dict[str, Any]:
        """Give plain values for the worker's job file and for the results."""
        return {**asdict(self), "arguments": dict(self.arguments)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Measurements that share a process, because they share a model that takes long to load."""

    name: str
    measurements: tuple[Measurement, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    after: str | None = None
    """If this measurement failed, the group runs without what may have broken it."""
    without: Mapping[str, str] = field(default_factory=dict)
    """The environment that then counts too."""


L4_TRAINING = "train: l4 preset"
SHARING = ("train: transformers, shared prefix off", "train: transformers, shared prefix on")
DECODING = {
    "generate: shared prefix off": {"shared_prefix": False, "lookup_tokens": 0},
    "generate: shared prefix on": {"shared_prefix": True, "lookup_tokens": 0},
    "generate: shared prefix on, lookup 4": {"shared_prefix": True, "lookup_tokens": 4},
}
"""Evaluation of prompts that begin alike, each row with one thing more than the one before."""
_INPUTS = ("base", "rows")
_NO_BLOCK_COMPILE = {"UNSLOTH_BLOCK_COMPILE": "0"}


def groups(scale: Scale) -> list[Group]:
    """List all measurements, the most important first.

    Args:
        scale: The sizes.

    Returns:
        Groups in the order in which they run.
    """
    return [*_first_groups(scale), *_later_groups(scale)]


def _first_groups(scale: Scale) -> list[Group]:
    """List what the others need, and what decides: the preset, the baseline, block compile."""
    l4, seed = ModelSpec(), ModelSpec(preset="seed", backend="transformers")
    return [
        Group(
            name="inputs",
            measurements=(
                _simple("matmul", "matmul", 5, 40),
                _simple("base", "base", 10, 90),
                _simple("rows", "rows", 5, 60, needs=("base",)),
            ),
        ),
        Group(
            name="l4",
            measurements=(
                _on("load: l4 preset", "load", l4, 30, 120),
                _on(L4_TRAINING, "train_rows", l4, 40, 200),
                _shape("unsloth checkpointing", scale.main_shape, l4),
                _on("generate", "generate", l4, 20, 120),
            ),
        ),
        Group(
            name="seed",
            measurements=(_on("train: seed preset", "train_rows", seed, 40, 150),),
        ),
        Group(
            name="no block compile",
            measurements=(_on(f"{L4_TRAINING} without block compile", "train_rows", l4, 35, 120),),
            environment=_NO_BLOCK_COMPILE,
        ),
    ]


def _later_groups(scale: Scale) -> list[Group]:
    """List shapes, numerics, the whole way, other weights and batching, the project's tests."""
    longest = scale.max_position_tokens
    l4, reference = ModelSpec(), ModelSpec(backend="transformers")
    long_l4 = ModelSpec(max_length_tokens=longest)
    plain = ModelSpec(checkpointing="false", max_length_tokens=longest)
    bf16 = ModelSpec(weights="bf16")
    bf16_plain = ModelSpec(weights="bf16", checkpointing="false")
    shapes = [_shape("unsloth checkpointing", s, long_l4) for s in scale.checkpointed_shapes]
    plain_shapes = [_shape("no checkpointing", s, plain) for s in scale.plain_shapes]
    return [
        _group("shapes", *shapes),
        _group("numerics", _on("numerics: unsloth", "numerics", l4, 30, 150)),
        _group("reference", _on("numerics: transformers", "numerics", reference, 25, 90)),
        _group(
            "whole way",
            _on("preflight", "preflight", l4, 35, 150),
            _on("memorise", "memorise", l4, 30, 120),
        ),
        _sharing_group(reference),
        _group("plain", *plain_shapes),
        _group(
            "bf16",
            _on("load: bf16 weights", "load", bf16, 25, 90),
            _on("train: bf16 weights", "train_rows", bf16, 25, 120),
        ),
        _group(
            "bf16 plain",
            _on("train: bf16 weights, no checkpointing", "train_rows", bf16_plain, 35, 120),
        ),
        _group(
            "packed",
            _on("train: packed rows", "train_rows", long_l4, 35, 150, packed=True),
        ),
        _group(
            "reference generation",
            _on("generate: transformers", "generate", reference, 40, 150),
        ),
        Group(name="tests", measurements=(_simple("tests", "gpu_tests", 20, 240),)),
    ]


def _sharing_group(model: ModelSpec) -> Group:
    """List the rows with and without shared prefixes, the same in everything else.

    Generation comes first: TRL's trainer replaces the forward pass of the model that it is given,
    and generation with shared prefixes then keeps away from it.
    """
    switches = zip(SHARING, ("off", "on"), strict=True)
    return _group(
        "shared prefix",
        *(_on(n, "generate_alike", model, 20, 90, **how) for n, how in DECODING.items()),
        *(_on(n, "train_rows", model, 35, 120, shared_prefix=to) for n, to in switches),
    )


def as_one_process(every: list[Group]) -> list[Group]:
    """Put all measurements into one group, so that a quick run loads its libraries once.

    Args:
        every: The groups.

    Returns:
        One group without an environment of its own.
    """
    measurements = tuple(m for group in every for m in group.measurements)
    return [Group(name="all", measurements=measurements)]


def _group(name: str, *measurements: Measurement) -> Group:
    """Make a group that does without block compile where that has broken the first training."""
    return Group(name=name, measurements=measurements, after=L4_TRAINING, without=_NO_BLOCK_COMPILE)


def _simple(
    name: str, kind: str, least_s: float, limit_s: float, needs: tuple[str, ...] = ()
) -> Measurement:
    return Measurement(name=name, kind=kind, least_s=least_s, limit_s=limit_s, needs=needs)


def _on(
    name: str, kind: str, model: ModelSpec, least_s: float, limit_s: float, **arguments: Any
) -> Measurement:
    return Measurement(
        name=name,
        kind=kind,
        least_s=least_s,
        limit_s=limit_s,
        model=model,
        arguments=arguments,
        needs=_INPUTS,
    )


def _shape(prefix: str, shape: tuple[int, int], model: ModelSpec) -> Measurement:
    batch, tokens = shape
    name = f"step {batch} x {tokens}: {prefix}"
    return _on(name, "train_shape", model, 20, 100, batch=batch, tokens=tokens)
