"""Measure this project against the usual ways on a CPU: `make bench`, `--quick` in a minute.

All ways of a part run in turns in one process, and only ratios within a round are made, so a busy
machine changes seconds more than ratios. Weights are random: the time of a step does not depend on
them. A GPU is measured by `make gpu-check`. The result is one JSON file, a picture and a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inputs import (
    TEST_PROMPTS,
    TESTING_FILE,
    TRAINING_FILE,
    TRAINING_ROWS,
    Lengths,
    Row,
    add_real_flag,
    llama_shape,
    machine,
    plan_examples,
    prompt_of,
    random_llama,
    rows_of,
    tokenizer_for,
)

from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.published import PUBLISHED

if TYPE_CHECKING:
    import torch

    from tinyagent_fast.inference.torch_engine import TorchEngine
    from tinyagent_fast.models.loading import LoadedModel

FORMAT = 3
RESULT = Path(__file__).resolve().parent / "results" / "bench.json"
QUICK_RESULT = Path(tempfile.gettempdir()) / "tinyagent-fast-bench" / "quick.json"
LORA_RANK = 16
LOOKUP_TOKENS = 4
Tell = Callable[[str], None]
"""Is told of each way before it runs."""
NEVER_WRITTEN_ID = 2**30
"""Stands for EOS, so that random weights write as many tokens as are asked for."""

PADDED, PACKED, PADDING_FREE = "TRL padded", "TRL packed", "TRL padding-free"
UNSHARED, SHARED = "ours, nothing shared", "ours"
SINGLE, STATIC, LOOKUP = "one at a time", "static left-padded", f"ours, lookup {LOOKUP_TOKENS}"
READ, JSON_LOAD = "read and validate", "json.load alone"
PROVE, TOKENISE = "tokenise and prove", "tokenise alone"
SCORE = "score"


# --------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that `FULL` and `QUICK` differ in."""

    shape: ModelShape
    training_rows: Lengths = TRAINING_ROWS
    test_prompts: Lengths = TEST_PROMPTS
    batch: int = 8
    eval_batch: int = 16
    new_tokens: int = 88
    single_prompts: int = 4
    rounds: int = 3
    data_entries: int = 1500
    data_rows: int = 800
    tokenizer_pieces: int = 4000


FULL = Sizes(shape=llama_shape(hidden=1024, layers=6, vocab=32000))
QUICK = Sizes(
    shape=llama_shape(hidden=64, layers=1, vocab=1000),
    training_rows=Lengths(shared=100, mean=180, deviation=20, supervised=9),
    test_prompts=Lengths(shared=8, mean=90, deviation=10, supervised=0),
    batch=3,
    eval_batch=4,
    new_tokens=6,
    single_prompts=2,
    rounds=2,
    data_entries=60,
    data_rows=40,
    tokenizer_pieces=600,
)


# --------------------------------------------------------------------------------------------------
# Timing: all ways in turns, so that a busy machine slows all of them


@dataclass(frozen=True)
class Timed:
    """What each way took and gave, round by round."""

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    """Of all threads of this process; what other programs take hardly counts here."""
    results: dict[str, Any]
    """Of the first round."""

    def figures(
        self, samples: Mapping[str, int], compared: Mapping[str, Sequence[str]]
    ) -> dict[str, Any]:
        """Give the rate of each way, and how many times as fast some are as others in each round.

        Args:
            samples: How many each way did in a round.
            compared: The usual ways that a way is compared with, by the clock and by CPU time.
        """

        def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
            return {
                way: {
                    usual: spread(
                        [
                            samples[way] / ours * theirs / samples[usual]
                            for ours, theirs in zip(seconds[way], seconds[usual], strict=True)
                        ]
                    )
                    for usual in usuals
                }
                for way, usuals in compared.items()
            }

        return {
            "ways": {
                way: {
                    "samples": samples[way],
                    "seconds": spread(taken),
                    "cpu_seconds": spread(self.cpu_seconds[way]),
                    "samples_per_s": spread([samples[way] / s for s in taken]),
                }
                for way, taken in self.seconds.items()
            },
            "ratios": ratios(self.seconds),
            "cpu_ratios": ratios(self.cpu_seconds),
        }


def in_turns(
    ways: Mapping[str, Callable[[], Any]], rounds: int, tell: Tell = lambda _: None
) -> Timed:
    """Run all ways one after the other, and that several times."""
    timed = Timed({name: [] for name in ways}, {name: [] for name in ways}, {})
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again before every timing
    try:
        for _ in range(rounds):
            for name, run in ways.items():
                tell(name)
                gc.collect()
                started, cpu_started = time.perf_counter(), time.process_time()
                found = run()
                timed.seconds[name].append(time.perf_counter() - started)
                timed.cpu_seconds[name].append(time.process_time() - cpu_started)
                timed.results.setdefault(name, found)
    finally:
        gc.unfreeze()
    return timed


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Summarise one figure: median, smallest, largest and every round."""
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "rounds": [round(v, 5) for v in values],
    }


# --------------------------------------------------------------------------------------------------
# A training step: forward and backward; the optimizer's part, the same for all, is left out


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass gave."""

    loss: float
    gradients: dict[str, torch.Tensor]

    def difference(self, wanted: Step) -> dict[str, float]:
        """Compare with another step: relative differences of loss and of the worst gradient."""
        if self.gradients.keys() != wanted.gradients.keys():
            raise RuntimeError("two ways give gradients to different parameters")
        worst = max(
            float((self.gradients[name] - gradient).norm() / gradient.norm())
            for name, gradient in wanted.gradients.items()
        )
        loss = abs(self.loss - wanted.loss) / wanted.loss
        return {"loss": loss, "largest_gradient": worst}


def step_of(model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], Step]:
    """Add the backward pass to a forward pass."""

    def step() -> Step:
        import torch

        model.zero_grad(set_to_none=True)
        value = loss()
        torch.autograd.backward(value)
        # Gradients are not copied: the next step makes new ones.
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return Step(value.item(), found)

    return step


def with_adapter(model: Any) -> Any:
    """Put LoRA on all linear layers, its weights not zero, so that all gradients are at work."""
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def trl_loss(
    model: Any, tokenizer: Any, rows: Sequence[Row], folder: Path, way: str
) -> Callable[[], torch.Tensor]:
    """Make TRL's own loss of a micro-batch, in one of its ways.

    Args:
        model: With its adapter.
        tokenizer: A transformers tokenizer with a padding token.
        rows: The micro-batch.
        folder: The trainer writes into it.
        way: `PADDED`, `PACKED` (best fit decreasing, into one row) or `PADDING_FREE`.
    """
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tinyagent_fast.prompts.tokens import IGNORED

    longest = sum(len(row["input_ids"]) for row in rows) if way == PACKED else None
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(rows),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=longest,
            packing=way == PACKED,
            padding_free=way == PADDING_FREE,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
    )
    batch = list(trainer.train_dataset) if way == PACKED else rows
    inputs = trainer._prepare_inputs(trainer.data_collator(batch))
    items = torch.tensor(sum(label != IGNORED for row in rows for label in row["labels"][1:]))

    def loss() -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)

    return loss


def measure_training(real: Path | None, sizes: Sizes, tell: Tell) -> Any:
    """Time one micro-batch through TRL's best way and through ours, and compare gradients."""
    from tinyagent_fast.shared_prefix.forward import shared_prefix_loss
    from tinyagent_fast.shared_prefix.packing import pack

    tokenizer = tokenizer_for(real, sizes.shape.vocab)
    rows = rows_of(real, TRAINING_FILE, sizes.batch, sizes.training_rows, sizes.shape.vocab)
    lengths = [len(row["input_ids"]) for row in rows]
    model = with_adapter(random_llama(sizes.shape, max(lengths)))
    shared = pack(rows)
    packed = {UNSHARED: pack(rows, smallest_shared_tokens=None), SHARED: shared}
    with tempfile.TemporaryDirectory() as name:

        def trl(way: str, some: Sequence[Row]) -> Callable[[], Step]:
            return step_of(model, trl_loss(model, tokenizer.hf, some, Path(name), way))

        few = rows[:2]
        tried = in_turns(
            {way: trl(way, few) for way in (PADDED, PACKED, PADDING_FREE)},
            1,
            lambda way: tell(f"{way}, {len(few)} rows"),
        )
        # Without FlashAttention a flattened batch attends with a dense mask, so what loses with
        # two rows loses more with all. By CPU time, because there is one round only.
        cpu_seconds = {way: taken[0] for way, taken in tried.cpu_seconds.items()}
        best = min(cpu_seconds, key=cpu_seconds.__getitem__)
        ways = {way: trl(way, rows) for way in dict.fromkeys((PADDED, best))}
        for way, one in packed.items():
            ways[way] = step_of(model, partial(shared_prefix_loss, model, one))
        ways[SHARED]()  # warms up
        timed = in_turns(ways, sizes.rounds, tell)
    return {
        "training step": {
            "rows": len(rows),
            "mean_tokens": round(statistics.mean(lengths), 1),
            "supervised_tokens": shared.supervised_tokens,
            "prefix_tokens": shared.prefix_tokens,
            "padded_tokens": shared.plain_tokens,
            "computed_tokens": {way: one.computed_tokens for way, one in packed.items()},
            "computed_share": round(shared.computed_tokens / shared.plain_tokens, 4),
            "tried_on_two_rows_cpu_s": {way: round(s, 4) for way, s in cpu_seconds.items()},
            "differences_from_padded": {
                way: step.difference(some.results[PADDED])
                for some in (tried, timed)
                for way, step in some.results.items()
                if way != PADDED
            },
            **timed.figures(dict.fromkeys(ways, len(rows)), {way: [best] for way in packed}),
        }
    }


# --------------------------------------------------------------------------------------------------
# Greedy evaluation: random weights never stop, so every way writes the same number of tokens


def shared_share(sequences: Sequence[list[int]]) -> float:
    """Measure how many of all tokens stand in the beginning of another sequence too.

    Returns:
        Share of the tokens that a trie of all sequences saves.
    """
    from tinyagent_fast.inference.grouping import common_tokens

    saved = sum(common_tokens(one, other) for one, other in pairwise(sorted(sequences)))
    return saved / sum(map(len, sequences))


def prompts_by_kind(real: Path | None, sizes: Sizes) -> dict[str, list[list[int]]]:
    """Give one batch of prompts like those of training, and one like those of the test file."""
    kinds = {
        "training-shaped": (TRAINING_FILE, sizes.training_rows),
        "test-shaped": (TESTING_FILE, sizes.test_prompts),
    }
    found = {}
    for kind, (file, lengths) in kinds.items():
        rows = rows_of(real, file, sizes.eval_batch, lengths, sizes.shape.vocab)
        found[kind] = [prompt_of(row) for row in rows]
    return found


def measure_evaluation(real: Path | None, sizes: Sizes, tell: Tell) -> Any:
    """Time all ways on one batch of each kind of prompt; one at a time, only some of them."""
    from tinyagent_fast.models.loading import LoadedModel

    prompts = prompts_by_kind(real, sizes)
    longest = max(len(ids) for found in prompts.values() for ids in found)
    tokenizer = tokenizer_for(real, sizes.shape.vocab)
    tokenizer.end_ids = frozenset({NEVER_WRITTEN_ID})
    loaded = LoadedModel(
        model=random_llama(sizes.shape, longest + sizes.new_tokens).eval(),
        tokenizer=tokenizer,
        backend="transformers",
        device="cpu",
        compute_dtype="float32",
    )
    return {
        f"evaluation, {kind}": _evaluated(
            loaded,
            ids,
            sizes,
            lambda way, kind=kind: tell(f"{kind} prompts, {way}"),  # type: ignore[misc]
        )
        for kind, ids in prompts.items()
    }


def _evaluated(
    loaded: LoadedModel, ids: Sequence[list[int]], sizes: Sizes, tell: Tell
) -> dict[str, Any]:
    from tinyagent_fast.inference.engine import Limits
    from tinyagent_fast.inference.torch_engine import TorchEngine

    # The model's own `generate`, padded on the left. All ways begin with ids.
    stock = TorchEngine(loaded, shared_prefix=False)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    count = min(sizes.single_prompts, len(order))
    # Spread over the lengths, so that their mean is about that of all.
    some = [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]

    def write(engine: TorchEngine, chosen: Sequence[int], batch: int) -> dict[int, str]:
        limits = Limits(stop="\0", max_new_tokens=sizes.new_tokens, batch=batch)
        found = engine.complete_tokens([ids[index] for index in chosen], limits)
        return {chosen[at]: completion.text for at, completion in found}

    ways = {
        SINGLE: partial(write, stock, some, 1),
        STATIC: partial(write, stock, order, sizes.eval_batch),
        SHARED: partial(write, TorchEngine(loaded), order, sizes.eval_batch),
        LOOKUP: partial(
            write, TorchEngine(loaded, lookup_tokens=LOOKUP_TOKENS), order, sizes.eval_batch
        ),
    }
    write(stock, some[:1], 1)  # warms up
    timed = in_turns(ways, sizes.rounds, tell)
    texts = timed.results

    def equal(name: str, other: str) -> str:
        both = texts[name].keys() & texts[other].keys()
        return f"{sum(texts[name][i] == texts[other][i] for i in both)} of {len(both)}"

    compared = {name: (SINGLE, STATIC) for name in (SHARED, LOOKUP)}
    return {
        "prompts": len(ids),
        "batch": sizes.eval_batch,
        "new_tokens": sizes.new_tokens,
        "mean_tokens": round(statistics.mean(map(len, ids)), 1),
        "shared_share": round(shared_share(ids), 4),
        "equal_outputs": {
            name: {usual: equal(name, usual) for usual in usuals}
            for name, usuals in compared.items()
        },
        **timed.figures({name: len(found) for name, found in texts.items()}, compared),
    }


# --------------------------------------------------------------------------------------------------
# What happens before training and after generating: reading, tokenising, scoring


def measure_data(real: Path | None, sizes: Sizes, tell: Tell) -> Any:
    """Time reading, tokenising and scoring on one core; the file is in the system's cache."""
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset
    from tinyagent_fast.data.reading import read_entries
    from tinyagent_fast.evaluation.scoring import score_pair
    from tinyagent_fast.models.nano import train_bpe_tokenizer
    from tinyagent_fast.prompts.templates import render
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    with tempfile.TemporaryDirectory() as folder:
        if real:
            path = real / TRAINING_FILE
        else:
            # Prompts of the published build and length.
            entries = sizes.data_entries
            spec = GenerationSpec(train_entries=entries, test_entries=1, prompt_style="full")
            path = generate_dataset(spec, Path(folder) / "bench-data").train
        examples = plan_examples(path, sizes.data_rows)
        rendered = [(e.key, render(e, "alpaca")) for e in examples]
        whole = [text.prompt + text.completion for _, text in rendered]
        if real:
            tokenizer = tokenizer_for(real, sizes.shape.vocab)
        else:
            trained = train_bpe_tokenizer(whole[:200], sizes.tokenizer_pieces)
            tokenizer = PromptTokenizer(trained, "alpaca")
        plans = [e.output for e in examples]
        pairs = [*zip(plans, plans, strict=True), *pairwise(plans)]
        starts = range(0, len(whole), 256)
        ways: dict[str, Callable[[], int]] = {
            READ: lambda: sum(1 for _ in read_entries(path, on_bad_entry="skip")),
            JSON_LOAD: lambda: len(json.loads(path.read_bytes())),
            PROVE: lambda: sum(
                len(row.input_ids)
                for s in starts
                for row in tokenizer.encode_rows(rendered[s : s + 256])
            ),
            TOKENISE: lambda: sum(
                len(ids) for s in starts for ids in tokenizer.encode_texts(whole[s : s + 256])
            ),
            SCORE: lambda: sum(score_pair(label, found).success for label, found in pairs),
        }
        timed = in_turns(ways, sizes.rounds, tell)
        size_mb = path.stat().st_size / 1e6
    samples = dict.fromkeys((READ, JSON_LOAD), timed.results[READ])
    samples |= {**dict.fromkeys((PROVE, TOKENISE), len(whole)), SCORE: len(pairs)}
    return {
        "data": {
            "size_mb": round(size_mb, 2),
            "tokens": timed.results[PROVE],
            "read_mb_per_s": spread([size_mb / s for s in timed.seconds[READ]]),
            **timed.figures(samples, {READ: [JSON_LOAD], PROVE: [TOKENISE]}),
        }
    }


PARTS: Mapping[str, Callable[[Path | None, Sizes, Tell], Any]] = {
    "training": measure_training,
    "evaluation": measure_evaluation,
    "data": measure_data,
}
"""Each gives figures by the title of what it measured."""


# --------------------------------------------------------------------------------------------------
# The table and the picture


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the ways of all parts as a Markdown table, with the conditions of each below it."""
    lines = ["| what | way | samples/s | times as fast |", "|---|---|---|---|"]
    notes = []
    for part in parts.values():
        for title, figures in part["figures"].items():
            for way, taken in figures["ways"].items():
                ratios = figures["ratios"].get(way, {}).items()
                times = "; ".join(f"{_times(ratio)} {usual}" for usual, ratio in ratios)
                rate = f"{taken['samples_per_s']['median']:.4g}"
                lines.append(f"| {title} | {way} | {rate} | {times or '-'} |")
            told = ((k, v) for k, v in figures.items() if isinstance(v, int | float))
            counted = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in told)
            notes.append(f"- {title}: {counted}; {_conditions(part['run'])}")
    return "\n".join([*lines, "", *notes])


def _times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})"


def _conditions(run: Mapping[str, Any]) -> str:
    quick = "quick sizes, which only show that everything runs; " if run["quick"] else ""
    installed = run["environment"]["versions"]
    versions = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "trl"))
    return (
        f"{quick}{run['rows']} rows, hidden {run['model']['hidden']}, {run['model']['layers']} "
        f"layers, {run['rounds']} rounds, {run['threads']} of {run['environment']['cpus']} CPU "
        f"threads, load {run['load_average']}, {versions}"
    )


def plot(parts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw how many times as fast ours is as each usual way."""
    from matplotlib.figure import Figure

    panels = [panel for part in parts.values() for panel in part["figures"].items()]
    figure = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, figures) in zip(every, panels, strict=True):
        bars = {
            f"{way}\n/ {usual}": ratio
            for way, ratios in figures["ratios"].items()
            for usual, ratio in ratios.items()
        }
        middle = [ratio["median"] for ratio in bars.values()]
        low = [ratio["median"] - ratio["min"] for ratio in bars.values()]
        high = [ratio["max"] - ratio["median"] for ratio in bars.values()]
        drawn = axes.barh(list(bars), middle, xerr=[low, high], color="#1f6f8b")
        axes.bar_label(drawn, [f"{times:.2f}x" for times in middle], padding=6)
        axes.axvline(1, color="#9aa5ad", linewidth=0.8)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("times as many samples/s")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------
# The command


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, under a minute")
    parser.add_argument("--out", type=Path, help="the JSON; other parts that it holds are kept")
    add_real_flag(parser, TRAINING_FILE, TESTING_FILE)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, help="how often each way runs")
    parser.add_argument("--batch", type=int, help="rows of the training step")
    parser.add_argument("--single-prompts", type=int, help="prompts that go one at a time")
    llamas = [name for name, base in PUBLISHED.items() if base.shape.model_type == "llama"]
    parser.add_argument("--shape", choices=llamas, help="a published base's layers and sizes")
    flags = parser.parse_args(arguments)
    for name, value in vars(flags).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    flags.out = flags.out or (QUICK_RESULT if flags.quick else RESULT)
    return flags


def resolve_sizes(flags: argparse.Namespace) -> Sizes:
    """Give the default sizes, or those of `--quick`, with what flags change."""
    sizes = QUICK if flags.quick else FULL
    given = {name: getattr(flags, name) for name in ("rounds", "batch", "single_prompts")}
    shape = PUBLISHED[flags.shape].shape if flags.shape else sizes.shape
    vocab = max(shape.vocab, FULL.shape.vocab if flags.real else 0)
    changed = {name: value for name, value in given.items() if value is not None}
    return replace(sizes, shape=replace(shape, vocab=vocab), **changed)


def set_threads(threads: int) -> None:
    """Limit every library before it starts threads of its own, and keep them quiet and offline."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    from tinyagent_fast.models.libraries import quieten

    quieten()
    torch.set_num_threads(threads)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()


def earlier_parts(out: Path, quick: bool) -> dict[str, Any]:
    """Read the parts of an earlier result that can stand beside new ones, `quick` or not."""
    if not out.exists():
        return {}
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
        parts = content["parts"] if content["format"] == FORMAT else {}
    except (ValueError, KeyError, TypeError):
        parts = {}
    kept = {name: part for name, part in parts.items() if part["run"]["quick"] == quick}
    print(f"{out}: of its parts {', '.join(kept) or 'none'} is kept", file=sys.stderr)
    return kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    flags = parse_flags(arguments)
    set_threads(flags.threads)
    from tinyagent_fast.runs import write_json

    sizes = resolve_sizes(flags)
    parts = earlier_parts(flags.out, flags.quick)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    about = machine()
    for name in flags.parts:

        def tell(way: str, part: str = name) -> None:
            print(f"{time.strftime('%H:%M:%S')} {part}: {way}", file=sys.stderr, flush=True)

        load, started = os.getloadavg()[0], time.time()
        figures = PARTS[name](flags.real, sizes, tell)
        run = {
            "quick": flags.quick,
            "rows": "real" if flags.real else "generated",
            "rounds": sizes.rounds,
            "threads": flags.threads,
            "model": {key: getattr(sizes.shape, key) for key in ("hidden", "layers", "vocab")},
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
            "seconds": round(time.time() - started, 1),
            "environment": about,
        }
        parts[name] = {"run": run, "figures": figures}
        # After every part, so that what was measured stays whatever comes.
        parts = {key: parts[key] for key in PARTS if key in parts}
        write_json(flags.out, {"format": FORMAT, "parts": parts})
    picture = flags.out.with_suffix(".png")
    plot(parts, picture)
    print(table(parts))
    print(f"\nresults: {flags.out}, {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
