"""Settings of a run as frozen dataclasses, their checks, and their YAML.

Precedence: defaults < preset (presets.py) < `--config` file < flags. Every unknown key of a file is
an error with the nearest known name, and `parse_config(dump_config(config)) == config`.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from tinyagent_fast.errors import ConfigError, did_you_mean, shown
from tinyagent_fast.strict_yaml import load_yaml

Backend = Literal["auto", "unsloth", "transformers"]
Weights = Literal["nf4", "bf16", "fp16", "fp32"]
CpuCompute = Literal["auto", "fp32", "bf16"]
Checkpointing = Literal["unsloth", "true", "false", "auto"]
PromptFormat = Literal["alpaca", "flat", "chat"]
Targets = Literal["all-linear", "attention"]
Batching = Literal["prefix-grouped", "length-grouped", "packed", "shuffled"]
Prompts = Literal["as-is", "retrieved", "short"]
RetrieverKind = Literal["tfidf", "encoder"]
GrammarUse = Literal["on", "off"]
Points = Literal["plan", "join", "all"]
OnBadEntry = Literal["error", "skip"]
Leaks = Literal["drop", "keep", "error"]
QuantisationAware = Literal["off", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
Tracker = Literal["off", "tensorboard", "trackio", "wandb"]

BASE_MODEL = "Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct"
"""The model that the published TinyAgent-1.1B was fine-tuned from."""
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
"""22.7 M parameters, Apache-2.0, with weights as safetensors."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and what to do with entries and rows that do not fit."""

    train: Path | None = None
    """Training file in the published schema; None generates one."""
    test: Path | None = None
    """Test file in the published schema; None takes the generated one, and none beside a training
    file of your own: then nothing is measured on test queries."""
    points: Points = "plan"
    """Which points of an entry become training rows; evaluation always takes the plans."""
    joins_per_plan: float | None = None
    """Join points for each plan among the training rows, chosen with the seed; replans are all
    kept. None keeps every join."""
    on_bad_entry: OnBadEntry = "error"
    """What to do with entries that break the schema; skipped ones are counted and listed."""
    over_long: Literal["error", "drop"] = "error"
    """What to do with rows over model.max-length-tokens; no row is ever cut."""
    leaks: Leaks = "drop"
    """What to do with training rows whose query stands in the test file too: leave them out and
    count them, train on them, or stop."""
    prompts: Prompts = "as-is"
    """System prompts of plans as the file has them, or rewritten: tools and examples that a
    retriever chooses by the query, and the tools that the plan calls; `short` just names these
    tools in one line with the time, as generated data does."""
    retrieval_recall: float = 0.98
    """Share of queries for which the retriever should find all tools; higher lists more tools."""
    retriever: RetrieverKind = "tfidf"
    """What scores the tools: linear classifiers over TF-IDF, trained in seconds on a CPU, or an
    encoder, fine-tuned in minutes, best on a GPU."""
    retriever_encoder: str = ENCODER
    """Folder or hub name of the encoder to fine-tune; its weights must be safetensors."""
    retriever_epochs: int = 6
    """Passes of the encoder over the training queries."""
    retriever_learning_rate: float = 2e-4
    """Peak learning rate of the encoder; larger encoders need a lower one."""
    validation_entries: int = 1000
    """Entries taken out of the training file for validation."""
    limit_entries: int | None = None
    """Use only this many training entries (seeded choice); None uses all."""
    generated_entries: int = 8000
    """Training entries to generate when `train` is None (200 test entries come with them), or
    with `with_generated`."""
    with_generated: bool = False
    """Train on `generated_entries` generated entries too, mixed with those of the training file, in
    `short` or `retrieved` prompts; those that ask what is held out are left out and counted. A few
    hundred entries of your own shall not make a small model forget what many plans teach."""
    own_passes: int = 1
    """How often each row of the training file is taken in an epoch, among generated ones."""
    generated_max_calls: int = 8
    """Most calls of a generated plan, join not counted; fewer are easier to learn."""
    catalogue: Path | None = None
    """YAML file with tools of your own, for generating and scoring; None takes TinyAgent's 16."""
    seed: int = 0
    """Seed of the split, of generated data and of the retriever's encoder."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which base model and how it is held in memory."""

    base: str = BASE_MODEL
    """Folder, .gguf file or hub name of the base model; `smollm2-135m` is a published one that is
    fetched from where it can be had, `nano` and `random` are built on the spot."""
    revision: str | None = None
    """Revision on the hub."""
    backend: Backend = "auto"
    """`auto` is unsloth where CUDA and unsloth are there, transformers otherwise."""
    weights: Weights = "nf4"
    """Base weights: 4-bit NF4 with double quantisation, or 16/32-bit."""
    cpu_compute: CpuCompute = "auto"
    """What a CPU computes in, where weights are not in 4 bits: `auto` is bf16 if the processor has
    instructions for it, a timing shows that it is faster, and the loss stays the same."""
    gradient_checkpointing: Checkpointing = "false"
    """Recompute activations to save memory; `unsloth` also moves them to host memory, `auto`
    recomputes only in those micro-batches of shared prefixes that would not fit otherwise."""
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

    def steps(self, rows: int, processes: int = 1) -> int:
        """Count the optimizer steps over rows, or packed rows, as the trainer does."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(self.epochs * self._steps_per_epoch(rows, processes))

    def passes(self, rows: int, processes: int = 1) -> float:
        """Say how many epochs over rows, or packed rows, these steps are."""
        if self.max_steps is None:
            return self.epochs
        return self.max_steps / self._steps_per_epoch(rows, processes)

    def _steps_per_epoch(self, rows: int, processes: int) -> int:
        micro_batches = math.ceil(rows / (self.rows_per_batch * processes))
        return max(1, math.ceil(micro_batches / self.accumulation))


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
    before_limit: int | None = None
    """Of these, measure only the first so many before the first step: a model that cannot plan yet
    writes on and on. None measures all."""


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


_SEEDS = frozenset({"data.seed", "train.seed"})
_MAY_BE_ZERO = frozenset(
    {"data.validation-entries", "train.evaluations"}
    | {f"eval.{name}" for name in ("sample", "parity-prompts", "lookup-tokens")}
)
"""Counts that may be 0; every other one must be at least 1."""
_RANGES: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "data.retrieval-recall": ("in (0, 1)", lambda value: 0 < value < 1),
    "data.retriever-learning-rate": ("in (0, 1)", lambda value: 0 < value < 1),
    "data.joins-per-plan": ("0 or more", lambda value: value >= 0),
    "train.learning-rate": ("in (0, 1)", lambda value: 0 < value < 1),
    "train.warmup": ("a share in [0, 1)", lambda value: 0 <= value < 1),
    "train.epochs": ("more than 0", lambda value: value > 0),
    "train.max-grad-norm": ("more than 0", lambda value: value > 0),
    "train.weight-decay": ("0 or more", lambda value: value >= 0),
    "lora.dropout": ("in [0, 1)", lambda value: 0 <= value < 1),
}


_MOST_THREADS = 1024
_LARGEST = 2**31 - 1
_MOST = {"train.threads": _MOST_THREADS, "data.own-passes": 1000}
"""Of counts that would take a machine's memory or hours long before the largest number."""
_UNIONS = (typing.Union, types.UnionType)
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_MADE_BY = {"Config": "preset_config('smoke')", "Run": "find_run('latest')"}

P = ParamSpec("P")
R = TypeVar("R")


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that Python code calls take values of its hints' types only.

    A path may be given as text, and what settings hold is looked at too.

    Raises:
        ConfigError: On the call; it lists every value of a wrong type, and every unknown choice.
    """
    signature = inspect.signature(function)
    hints = functools.cache(lambda: typing.get_type_hints(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given, problems = signature.bind(*args, **kwargs), list[str]()
        for name, value in given.arguments.items():
            if name in hints():  # `self` is not
                given.arguments[name] = _checked(name, value, hints()[name], problems)
        if problems:
            listed = "\n       ".join(problems)
            raise ConfigError(f"{function.__name__}()", listed, "give values of these types")
        return function(*given.args, **given.kwargs)

    return call


def _checked(name: str, value: Any, hint: Any, problems: list[str]) -> Any:
    """Convert a value and what settings hold; add a problem for each of another type."""
    try:
        value = _converted(value, hint)
    except (TypeError, ValueError, OverflowError):
        names = Path in (hint, *typing.get_args(hint))
        wrong = "empty" if names and value == "" else f"not {_described(hint, value)}"
        problems.append(f"{name}: {shown(value)} is {wrong}")
        return value
    if _are_settings(value):
        parts = typing.get_type_hints(type(value)).items()
        value = replace(
            value, **{n: _checked(f"{name}.{n}", getattr(value, n), h, problems) for n, h in parts}
        )
    return value


def _are_settings(value: Any) -> bool:
    """Say whether it is an object of fields that stay; a planner, say, is none."""
    known = not isinstance(value, type) and is_dataclass(value)
    return known and value.__dataclass_params__.frozen


def check_threads(threads: int | None) -> None:
    """Refuse a number of CPU threads that no machine has; None is for all of this one's.

    Raises:
        ConfigError: It is such a number.
    """
    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        why = f"it must be from 1 to {_MOST_THREADS:,}"
        raise ConfigError(f"--threads {threads}", why, "leave it out")


def check_config(config: Config) -> None:
    """Refuse settings that are out of range or contradict each other, all at once.

    Raises:
        ConfigError: Lists every problem.
    """
    problems = []
    for section in fields(config):
        part = getattr(config, section.name)
        for item in fields(part) if is_dataclass(part) else ():
            name = f"{section.name}.{item.name.replace('_', '-')}"
            wanted = _wanted(name, getattr(part, item.name))
            if wanted is not None:
                problems.append(f"{name} must be {wanted}, got {getattr(part, item.name)}")
    train = config.train
    if config.model.backend == "unsloth" and config.model.weights == "fp32":
        problems.append(
            "model.weights fp32 needs model.backend transformers: Unsloth trains in 16 bits"
        )
    if train.evaluations and not (config.eval.sample and config.data.validation_entries):
        problems.append(
            "train.evaluations needs eval.sample and data.validation-entries above 0 "
            "(or set train.evaluations to 0)"
        )
    if config.data.with_generated and config.data.train is None:
        problems.append("data.with-generated needs data.train, the file to mix them with")
    if config.data.with_generated and config.data.prompts == "as-is":
        problems.append(
            "data.with-generated needs data.prompts short (or retrieved), so that all rows have "
            "prompts of one kind"
        )
    if config.data.own_passes > 1 and not config.data.with_generated:
        problems.append("data.own-passes needs data.with-generated (else set train.epochs)")
    if config.data.prompts != "as-is" and config.data.points == "join":
        problems.append(f"data.prompts {config.data.prompts} needs data.points plan or all")
    if config.data.retriever == "tfidf" and config.data.retriever_encoder != ENCODER:
        problems.append("data.retriever-encoder needs data.retriever encoder")
    if config.data.joins_per_plan is not None and config.data.points != "all":
        problems.append("data.joins-per-plan needs data.points all")
    if train.qat != "off":
        if config.model.weights == "nf4":
            problems.append("train.qat needs model.weights in 16 or 32 bits, not nf4")
        if config.model.backend == "unsloth":
            problems.append("train.qat needs model.backend transformers: its kernels round nothing")
        if config.lora.dropout:
            problems.append("train.qat needs lora.dropout 0: the sum with the base is rounded")
    if problems:
        raise ConfigError(
            f"{len(problems)} setting(s) cannot be used",
            "\n       ".join(problems),
            "change them on the command line or in the config file",
        )


def _wanted(name: str, value: object) -> str | None:
    """Say what a value out of range should have been; None where it is right."""
    if value == "":
        return "a text that is not empty"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, float):
        wanted, is_right = _RANGES[name]
        return None if is_right(value) else wanted
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if name in _SEEDS:
        return None if 0 <= value < 2**32 else "from 0 to 4,294,967,295"
    least = 0 if name in _MAY_BE_ZERO else 1
    if value > (most := _MOST.get(name, _LARGEST)):
        return f"{most:,} or less"
    return None if value >= least else f"{least} or more"


def to_mapping(config: Config) -> dict[str, Any]:
    """Turn a config into nested dicts of strings, numbers, booleans and None."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: str(v) if isinstance(v, Path) else v for name, v in items}

    return asdict(config, dict_factory=plain)


@typed
def dump_config(config: Config) -> str:
    """Write a config as YAML that `parse_config` turns back into an equal config."""
    import yaml

    plain = to_mapping(config)
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if re.search("[\x85\u2028\u2029]", text):
        # PyYAML writes these as they are, and reads them as line breaks.
        text = yaml.safe_dump(plain, sort_keys=False)
    return text


def parse_config(
    text: str, base: Config | None = None, source: str = "config", *, whole: bool = False
) -> Config:
    """Read YAML over a base config; every unknown key and wrong type is an error.

    Sections and keys may be left out: then `base` holds, or the defaults. In a `whole` config, such
    as that of a run, every section must be there.

    Raises:
        ConfigError: Lists all problems, with the nearest known name for each unknown key.
    """
    try:
        raw = load_yaml(text)
    except ValueError as error:
        raise ConfigError(source, f"it is no valid YAML: {error}", "correct the file") from error
    there = raw if isinstance(raw, Mapping) else {}
    sections = (f.name for f in fields(Config) if is_dataclass(f.default_factory))
    if whole and (lacks := [name for name in sections if name not in there]):
        why = f"it is cut off: it lacks {', '.join(lacks)}"
        raise ConfigError(source, why, "put it back as it was written, or train again")
    problems: list[str] = []
    config: Config = _merge(base or Config(), {} if raw is None else raw, "", problems)
    if problems:
        raise ConfigError(
            f"{source} has {len(problems)} problem(s)",
            "\n       ".join(problems),
            "`tinyagent-fast train --help` lists every setting",
        )
    return config


def _merge(base: Any, raw: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(raw, Mapping):
        where = path.rstrip(".") or "the top level"
        problems.append(f"{where}: must be a mapping, got {shown(raw)}")
        return base
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in raw.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            hint = did_you_mean(name, hints) or f"; known: {', '.join(hints)}"
            problems.append(f"{path}{key!s:.200}: unknown setting{hint}")
        elif name in changes:
            problems.append(f"{path}{key}: given twice, with - and with _")
        elif is_dataclass(hints[name]):
            changes[name] = _merge(getattr(base, name), value, f"{path}{name}.", problems)
        else:
            changes[name] = _checked(f"{path}{key}", value, hints[name], problems)
    return replace(base, **changes)


def _described(hint: Any, value: object = None) -> str:
    """Name a field's type as who writes YAML knows it, and the choice that a value is near to."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    name = getattr(hint, "__name__", "")
    if origin is Literal:
        wanted = f"one of {', '.join(kinds)}" if len(kinds) > 1 else kinds[0]
        return f"{wanted}{did_you_mean(value, kinds)}"
    if origin in _UNIONS:
        return " or ".join(_described(kind, value) for kind in kinds)
    if is_dataclass(hint):
        return f"an object of the type {name}, such as {_MADE_BY.get(name, f'{name}()')}"
    known: Mapping[Any, str] = {
        types.NoneType: "null",
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text (put it in quotes)",
        Path: "a path",
        Sequence[str]: "a list of texts",
        Iterable[tuple[str, str]]: "a list of pairs of texts",
    }
    return known.get(hint, f"an object of the type {name}")


def _converted(value: Any, hint: Any) -> Any:
    """Convert a value to the type of a field or argument; `2e-4` is a string to YAML 1.1."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in kinds and isinstance(value, str):
            return value
        # A truth value stands for the choice that says the same: `true` and `on` for one another.
        truth = _TRUTH.get(str(value).lower())
        same = [kind for kind in kinds if truth is not None and _TRUTH.get(kind) is truth]
        if len(same) == 1:
            return same[0]
    elif origin in _UNIONS:  # the first type that takes the value; no path is an empty text
        for kind in () if value == "" and Path in kinds else kinds:
            try:
                return _converted(value, kind)
            except (TypeError, ValueError, OverflowError):
                continue
    elif hint is bool and isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    elif isinstance(value, bool) or value is None:
        if type(value) is hint:  # a truth value is no number, although Python takes it for one
            return value
    elif hint is float:
        if math.isfinite(float(value)):
            return float(value)
    elif hint is Path:
        if value != "" and isinstance(value, (str, Path)):
            return Path(value)
    elif isinstance(value, origin or hint) and not (origin and isinstance(value, str)):
        return value  # a text is no list of texts, although Python takes it for one
    raise TypeError(f"{value!r} is not {_described(hint)}")
