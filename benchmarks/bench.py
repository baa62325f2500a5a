"""Measure this project against the usual ways on a CPU: `make bench`, `--quick` in a minute.

All ways of a part run in turns in one process, and only ratios within a round are made, so a busy
machine changes seconds more than ratios. Weights are random: the time of a step does not depend on
them. A GPU is measured by `make gpu-check`. The result is one JSON file, a picture and a table.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inputs import (
    TEST_PROMPTS,
    TRAINING_ROWS,
    Lengths,
    Row,
    generated_rows,
    machine,
    random_llama,
)

from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.models.published import PUBLISHED

if TYPE_CHECKING:
    import torch

    from tinyagent_fast.inference.engine import Prompt
    from tinyagent_fast.models.loading import LoadedModel
    from tinyagent_fast.prompts.tokens import PromptTokenizer

FORMAT = 2
REAL_DATA = "TINYAGENT_FAST_REAL_DATA"
TRAINING_FILE, TESTING_FILE = "training_data.json", "testing_data.json"
TOKENIZER_FILE = "llama_tokenizer.model"
RESULT = Path(__file__).resolve().parent / "results" / "bench.json"
QUICK_RESULT = Path(tempfile.gettempdir()) / "tinyagent-fast-bench" / "quick.json"
HEAD_DIM = 64
LORA_RANK = 16
LOOKUP_TOKENS = 4
Tell = Callable[[str], None]
"""Is told of each way before it runs."""
NEVER_WRITTEN_ID = 2**30
"""Stands for EOS, so that random weights write as many tokens as are asked for."""

PADDED, PACKED, PADDING_FREE = "TRL padded", "TRL packed", "TRL padding-free"
UNSHARED, SHARED = "ours, nothing shared", "ours"
SINGLE, STATIC, LOOKUP = "one at a time", "static left-padded", f"ours, lookup {LOOKUP_TOKENS}"
WORTH_A_ROUND = 1.15
"""TRL's ways that take longer than this on two rows are not timed on all of them."""


# --------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Everything that `FULL` and `QUICK` differ in."""

    shape: str | None = None
    """A published base's short name, whose sizes are taken instead of those below."""
    hidden: int = 1024
    layers: int = 6
    vocab: int = 32000
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


FULL = Sizes()
QUICK = Sizes(
    hidden=64,
    layers=1,
    vocab=1000,
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
# Inputs: random Llamas; rows and prompts of the published lengths, or real ones


def sized_llama(sizes: Sizes, positions: int) -> Any:
    """Build a Llama of these sizes, with TinyLlama's proportions, or of a published shape."""
    if sizes.shape is not None:
        shape = PUBLISHED[sizes.shape].shape
        return random_llama(replace(shape, vocab=max(shape.vocab, sizes.vocab)), positions)
    heads = sizes.hidden // HEAD_DIM
    shape = ModelShape(
        hidden=sizes.hidden,
        intermediate=sizes.hidden * 11 // 4,
        layers=sizes.layers,
        heads=heads,
        kv_heads=heads // 4 if heads % 4 == 0 else heads,
        head_dim=HEAD_DIM,
        vocab=sizes.vocab,
        tied=False,
    )
    return random_llama(shape, positions)


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


def word_tokenizer(vocab: int) -> PromptTokenizer:
    """Make a tokenizer whose every id is a word, so that any ids are a text and back."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tinyagent_fast.prompts.tokens import PromptTokenizer

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=core, **special), "flat")


def tokenizer_for(real: Path | None, vocab: int) -> PromptTokenizer:
    """Give the Llama tokenizer beside real data, or one whose every id is a word."""
    if real is None:
        return word_tokenizer(vocab)
    from tinyagent_fast.prompts.loading import tokenizer_from_sentencepiece
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    loaded = tokenizer_from_sentencepiece(real / TOKENIZER_FILE)
    loaded.pad_token = loaded.unk_token
    return PromptTokenizer(loaded, "alpaca")


def plan_examples(path: Path, count: int, seed: int = 0) -> list[Any]:
    """Read plans of a file in the published schema, chosen at random among its first entries."""
    from tinyagent_fast.data.reading import read_entries

    entries = islice(read_entries(path, on_bad_entry="skip"), max(400, count))
    found = [e for entry in entries for e in entry.examples if e.kind == "plan"]
    return random.Random(f"bench/{seed}").sample(found, min(count, len(found)))


def training_rows(real: Path | None, tokenizer: PromptTokenizer, sizes: Sizes) -> list[Row]:
    """Give the rows of one micro-batch."""
    if real is None:
        return generated_rows(sizes.training_rows, sizes.batch, sizes.vocab)
    rows = tokenizer.training_rows(plan_examples(real / TRAINING_FILE, sizes.batch))
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]


def prompts_by_kind(real: Path | None, sizes: Sizes) -> dict[str, list[Prompt]]:
    """Give one batch of prompts like those of training, and one like those of the test file."""
    from tinyagent_fast.inference.engine import Prompt

    kinds = {
        "training-shaped": (TRAINING_FILE, sizes.training_rows),
        "test-shaped": (TESTING_FILE, sizes.test_prompts),
    }
    found = {}
    for seed, (kind, (name, lengths)) in enumerate(kinds.items()):
        if real is not None:
            examples = plan_examples(real / name, sizes.eval_batch)
            found[kind] = [Prompt(system=e.system, user=e.user) for e in examples]
            continue
        rows = generated_rows(lengths, sizes.eval_batch, sizes.vocab, seed)
        ids = [row["input_ids"][: len(row["input_ids"]) - lengths.supervised] for row in rows]
        found[kind] = [Prompt(system=None, user=" ".join(f"w{i}" for i in one)) for one in ids]
    return found


def shared_share(sequences: Sequence[Sequence[int]]) -> float:
    """Measure how many of all tokens stand in the beginning of another sequence too.

    Returns:
        Share of the tokens that a trie of all sequences saves.
    """
    saved = 0
    for one, other in pairwise(sorted(list(s) for s in sequences)):
        pairs = enumerate(zip(one, other, strict=False))
        saved += next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
    return saved / sum(map(len, sequences))


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

    def ways(self, samples: Mapping[str, int], baseline: str) -> dict[str, Any]:
        """Give each way's seconds, samples/s, and ratio of these to the baseline's in each round.

        Args:
            samples: How many each way did in a round.
            baseline: The way to compare with, by the clock and by CPU time.
        """

        def ratios(seconds: Mapping[str, Sequence[float]], name: str) -> dict[str, Any]:
            share = samples[name] / samples[baseline]
            pairs = zip(seconds[name], seconds[baseline], strict=True)
            return spread([share * b / a for a, b in pairs])

        return {
            name: {
                "samples": samples[name],
                "seconds": spread(taken),
                "samples_per_s": spread([samples[name] / s for s in taken]),
                "ratio": ratios(self.seconds, name),
                "cpu_ratio": ratios(self.cpu_seconds, name),
            }
            for name, taken in self.seconds.items()
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


def supervised_tokens(rows: Sequence[Row]) -> int:
    """Count the tokens with loss, which a step's loss is divided by."""
    return sum(label != -100 for row in rows for label in row["labels"][1:])


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
    items = torch.tensor(supervised_tokens(rows))

    def loss() -> Any:
        with trainer.compute_loss_context_manager():
            return trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)

    return loss


def measure_training(real: Path | None, sizes: Sizes, tell: Tell) -> Any:
    """Time one micro-batch through TRL's best way and through ours, and compare gradients."""
    from tinyagent_fast.shared_prefix.forward import shared_prefix_loss
    from tinyagent_fast.shared_prefix.packing import pack

    tokenizer = tokenizer_for(real, sizes.vocab)
    rows = training_rows(real, tokenizer, sizes)
    model = with_adapter(sized_llama(sizes, max(len(row["input_ids"]) for row in rows)))
    packed = {UNSHARED: pack(rows, smallest_shared_tokens=None), SHARED: pack(rows)}
    with tempfile.TemporaryDirectory() as name:

        def trl(way: str, some: Sequence[Row]) -> Callable[[], Step]:
            return step_of(model, trl_loss(model, tokenizer.hf, some, Path(name), way))

        few = rows[:2]
        tried = in_turns(
            {way: trl(way, few) for way in (PADDED, PACKED, PADDING_FREE)},
            1,
            lambda way: tell(f"{way}, {len(few)} rows"),
        )
        wanted = tried.results[PADDED]
        compared = {n: s.difference(wanted) for n, s in tried.results.items() if n != PADDED}
        # Without FlashAttention a flattened batch attends with a dense mask, so what loses with
        # two rows loses more with all. By CPU time, because there is one round only.
        cpu_seconds = {way: taken[0] for way, taken in tried.cpu_seconds.items()}
        limit_s = WORTH_A_ROUND * cpu_seconds[PADDED]
        usual = [way for way, taken_s in cpu_seconds.items() if taken_s <= limit_s]
        ways = {way: trl(way, rows) for way in usual}
        for way, one in packed.items():
            ways[way] = step_of(model, partial(shared_prefix_loss, model, one))
        ways[SHARED]()  # warms up
        timed = in_turns(ways, sizes.rounds, tell)
    best = min(usual, key=lambda way: statistics.median(timed.seconds[way]))
    wanted = timed.results[PADDED]
    compared |= {n: s.difference(wanted) for n, s in timed.results.items() if n != PADDED}
    return {
        "rows": len(rows),
        "mean_tokens": round(statistics.mean(len(row["input_ids"]) for row in rows), 1),
        "supervised_tokens": supervised_tokens(rows),
        "prefix_tokens": packed[SHARED].prefix_tokens,
        "padded_tokens": packed[SHARED].plain_tokens,
        "computed_tokens": {way: one.computed_tokens for way, one in packed.items()},
        "baseline": best,
        "tried_on_two_rows_cpu_s": {way: round(s, 4) for way, s in cpu_seconds.items()},
        "ways": timed.ways(dict.fromkeys(ways, len(rows)), best),
        "differences_from_padded": compared,
    }


# --------------------------------------------------------------------------------------------------
# Greedy evaluation: random weights never stop, so every way writes the same number of tokens


def stock_texts(
    loaded: LoadedModel, prompts: Mapping[int, list[int]], sizes: Sizes
) -> dict[int, str]:
    """Complete prompts in one left-padded batch of transformers' own `generate`."""
    import torch

    tokenizer = loaded.tokenizer
    longest = max(map(len, prompts.values()))
    ids = [[tokenizer.pad_id] * (longest - len(row)) + row for row in prompts.values()]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts.values()]
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            max_new_tokens=sizes.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=NEVER_WRITTEN_ID,
        )
    new = output[:, longest:].tolist()
    return {
        index: tokenizer.decode_continuation(prompts[index], row)
        for index, row in zip(prompts, new, strict=True)
    }


def measure_evaluation(real: Path | None, sizes: Sizes, tell: Tell) -> Any:
    """Time all ways on one batch of each kind of prompt; one at a time, only some of them."""
    from tinyagent_fast.models.loading import LoadedModel
    from tinyagent_fast.prompts.builder import encode_prompts

    tokenizer = tokenizer_for(real, sizes.vocab)
    ids_by_kind = {
        kind: encode_prompts(tokenizer, prompts)
        for kind, prompts in prompts_by_kind(real, sizes).items()
    }
    longest = max(len(ids) for found in ids_by_kind.values() for ids in found)
    model = sized_llama(sizes, longest + sizes.new_tokens).eval()
    tokenizer.eos_id = NEVER_WRITTEN_ID
    loaded = LoadedModel(
        model=model,
        tokenizer=tokenizer,
        backend="transformers",
        device="cpu",
        compute_dtype="float32",
    )
    return {
        kind: _evaluated(
            loaded,
            dict(enumerate(ids)),
            sizes,
            lambda way, kind=kind: tell(f"{kind} prompts, {way}"),  # type: ignore[misc]
        )
        for kind, ids in ids_by_kind.items()
    }


def _evaluated(
    loaded: LoadedModel,
    ids: Mapping[int, list[int]],
    sizes: Sizes,
    tell: Tell,
) -> dict[str, Any]:
    from tinyagent_fast.inference.engine import Limits
    from tinyagent_fast.inference.torch_engine import TorchEngine

    engines = {
        SHARED: TorchEngine(loaded),
        LOOKUP: TorchEngine(loaded, lookup_tokens=LOOKUP_TOKENS),
    }
    order = sorted(ids, key=lambda index: len(ids[index]))
    count = min(sizes.single_prompts, len(order))
    # Spread over the lengths, so that their mean is about that of all.
    some = [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]

    def stock(*indices: int) -> dict[int, str]:
        return stock_texts(loaded, {index: ids[index] for index in indices}, sizes)

    def ours(engine: TorchEngine) -> dict[int, str]:
        # From ids, as stock code is timed: text becomes ids before any way starts.
        limits = Limits(stop="\0", max_new_tokens=sizes.new_tokens, batch=sizes.eval_batch)
        found = engine.complete_tokens(list(ids.values()), limits)
        return {index: completion.text for index, completion in found}

    ways: dict[str, Callable[[], dict[int, str]]] = {
        SINGLE: lambda: {index: text for one in some for index, text in stock(one).items()},
        STATIC: lambda: stock(*ids),
        **{name: partial(ours, engine) for name, engine in engines.items()},
    }
    stock_texts(loaded, {0: ids[0][:32]}, sizes)  # warms up
    timed = in_turns(ways, sizes.rounds, tell)
    samples = {name: len(timed.results[name]) for name in ways}
    over_static = timed.ways(samples, STATIC)
    texts = timed.results

    def equal(name: str, other: str) -> str:
        both = texts[name].keys() & texts[other].keys()
        return f"{sum(texts[name][i] == texts[other][i] for i in both)} of {len(both)}"

    return {
        "prompts": len(ids),
        "batch": sizes.eval_batch,
        "new_tokens": sizes.new_tokens,
        "mean_tokens": round(statistics.mean(map(len, ids.values())), 1),
        "shared_share": round(shared_share(list(ids.values())), 4),
        "baseline": SINGLE,
        "ways": timed.ways(samples, SINGLE),
        "over_static": {name: over_static[name]["ratio"] for name in engines},
        "equal_outputs": {
            name: {"to_one_at_a_time": equal(name, SINGLE), "to_static": equal(name, STATIC)}
            for name in engines
        },
    }


# --------------------------------------------------------------------------------------------------
# What happens before training and after generating: reading, tokenising, scoring


def measure_data(real: Path | None, sizes: Sizes, tell: Tell) -> Any:
    """Time reading, tokenising and scoring on one core; the file is in the system's cache."""
    from tinyagent_fast.data.reading import read_entries
    from tinyagent_fast.evaluation.scoring import score_pair
    from tinyagent_fast.models.nano import train_bpe_tokenizer
    from tinyagent_fast.prompts.templates import render
    from tinyagent_fast.prompts.tokens import PromptTokenizer

    with tempfile.TemporaryDirectory() as folder:
        path = real / TRAINING_FILE if real else _generated_file(sizes, Path(folder))
        examples = plan_examples(path, sizes.data_rows)
        rendered = [(e.key, render(e, "alpaca")) for e in examples]
        whole = [text.prompt + text.completion for _, text in rendered]
        if real:
            tokenizer = tokenizer_for(real, sizes.vocab)
        else:
            trained = train_bpe_tokenizer(whole[:200], sizes.tokenizer_pieces)
            tokenizer = PromptTokenizer(trained, "alpaca")
        plans = [e.output for e in examples]
        pairs = [*zip(plans, plans, strict=True), *pairwise(plans)]
        starts = range(0, len(whole), 256)
        ways: dict[str, Callable[[], int]] = {
            "read and validate": lambda: sum(1 for _ in read_entries(path, on_bad_entry="skip")),
            "json.load alone": lambda: len(json.loads(path.read_bytes())),
            "tokenise and prove": lambda: sum(
                len(row.input_ids)
                for s in starts
                for row in tokenizer.encode_rows(rendered[s : s + 256])
            ),
            "tokenise alone": lambda: sum(
                len(ids) for s in starts for ids in tokenizer.encode_texts(whole[s : s + 256])
            ),
            "score": lambda: sum(score_pair(label, found).success for label, found in pairs),
        }
        timed = in_turns(ways, sizes.rounds, tell)
        entries, size_mb = timed.results["read and validate"], path.stat().st_size / 1e6
    counts = dict(zip(ways, (entries, entries, len(whole), len(whole), len(pairs)), strict=True))
    return {
        "entries": entries,
        "size_mb": round(size_mb, 2),
        "rows": len(whole),
        "tokens": timed.results["tokenise and prove"],
        "pairs": len(pairs),
        "per_s": {
            name: spread([counts[name] / s for s in taken]) for name, taken in timed.seconds.items()
        },
        "read_mb_per_s": spread([size_mb / s for s in timed.seconds["read and validate"]]),
        "ratios": {
            way: spread(
                [b / a for a, b in zip(timed.seconds[way], timed.seconds[plain], strict=True)]
            )
            for way, plain in USUAL_DATA_WAYS.items()
        },
    }


USUAL_DATA_WAYS = {"read and validate": "json.load alone", "tokenise and prove": "tokenise alone"}


def _generated_file(sizes: Sizes, folder: Path) -> Path:
    """Write a file with prompts of the published build and length."""
    from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_dataset

    spec = GenerationSpec(train_entries=sizes.data_entries, test_entries=1, prompt_style="full")
    return generate_dataset(spec, folder / "bench-data").train


# --------------------------------------------------------------------------------------------------
# The table and the picture


def table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the measured parts as a Markdown table, with the conditions of each below it."""
    rows: list[Sequence[str]] = [("what", "ours", "the usual way", "times as fast", "conditions")]
    rows.append(("---",) * len(rows[0]))
    for name, part in parts.items():
        rows += PARTS[name][1](part["figures"], part["run"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = []
    for name, part in parts.items():
        run = part["run"]
        versions = run["environment"]["versions"]
        told = ", ".join(f"{p} {versions[p]}" for p in ("torch", "transformers", "trl"))
        load = " to ".join(f"{value:.1f}" for value in run["load_average"])
        quick = "quick sizes, which only show that everything runs; " if run["quick"] else ""
        notes.append(
            f"- {name}: {quick}{run['rows']} rows, {run['rounds']} rounds, {run['threads']} of "
            f"{run['environment']['cpus']} CPU threads, load {load}, {told}; `{run['command']}`"
        )
    return "\n".join([*lines, "", *notes])


def _training_rows(figures: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    usual = figures["baseline"]
    for name in (UNSHARED, SHARED):
        computed = figures["computed_tokens"][name] / figures["padded_tokens"]
        yield (
            f"training step, {name}",
            _rate(figures["ways"][name]),
            f"{_rate(figures['ways'][usual])} ({usual})",
            _times(figures["ways"][name]["ratio"]),
            f"{figures['rows']} rows of {figures['mean_tokens']:,.0f} tokens, "
            f"{100 * computed:.0f} % of the padded tokens computed, {_shape(run)}; of the last "
            "layer ours computes only what the loss needs",
        )


def _evaluation_rows(figures: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for kind, found in figures.items():
        for name, over_static in found["over_static"].items():
            ratios = {SINGLE: found["ways"][name]["ratio"], STATIC: over_static}
            for usual, ratio in ratios.items():
                yield (
                    f"evaluation, {name}",
                    _rate(found["ways"][name]),
                    f"{_rate(found['ways'][usual])} ({usual})",
                    _times(ratio),
                    f"{found['prompts']} {kind} prompts of {found['mean_tokens']:,.0f} tokens, "
                    f"{100 * found['shared_share']:.0f} % shared, batch {found['batch']}, "
                    f"{found['new_tokens']} tokens written, {_shape(run)}",
                )


def _data_rows(figures: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    conditions = {
        "read and validate": f"{figures['entries']:,} entries, {figures['size_mb']} MB, "
        f"{figures['read_mb_per_s']['median']:.0f} MB/s",
        "tokenise and prove": f"{figures['rows']:,} rows, {figures['tokens']:,} tokens",
        "score": f"{figures['pairs']:,} pairs",
    }
    for name, told in conditions.items():
        plain = USUAL_DATA_WAYS.get(name)
        yield (
            name,
            f"{figures['per_s'][name]['median']:,.0f}/s",
            f"{figures['per_s'][plain]['median']:,.0f}/s ({plain})" if plain else "not comparable",
            _times(figures["ratios"][name]) if plain else "not applicable",
            told,
        )


PARTS: Mapping[str, tuple[Callable[[Path | None, Sizes, Tell], Any], Callable[..., Any]]] = {
    "training": (measure_training, _training_rows),
    "evaluation": (measure_evaluation, _evaluation_rows),
    "data": (measure_data, _data_rows),
}
"""What measures each part, and what makes rows of the table of its figures and run."""


def _rate(way: Mapping[str, Any]) -> str:
    return f"{way['samples_per_s']['median']:.4g} samples/s"


def _times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})"


def _shape(run: Mapping[str, Any]) -> str:
    return f"hidden {run['model']['hidden']}, {run['model']['layers']} layers"


def plot(parts: Mapping[str, Mapping[str, Any]], path: Path) -> Path | None:
    """Draw each way's samples/s relative to the baseline; None if no part has such figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, str, Mapping[str, Any]]] = []
    if "training" in parts:
        figures = parts["training"]["figures"]
        panels.append((f"Training step\n{figures['rows']} rows", "#1f6f8b", figures["ways"]))
    for kind, found in parts.get("evaluation", {}).get("figures", {}).items():
        title = f"Evaluation\n{found['prompts']} {kind} prompts"
        panels.append((title, "#c8553d", found["ways"]))
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(11, 3.4), squeeze=False, layout="constrained"
    )
    for axis, (title, colour, ways) in zip(axes[0], panels, strict=True):
        ratios = [way["ratio"] for way in ways.values()]
        middle = [ratio["median"] for ratio in ratios]
        low = [ratio["median"] - ratio["min"] for ratio in ratios]
        high = [ratio["max"] - ratio["median"] for ratio in ratios]
        colours = [colour if name.startswith("ours") else "#9aa5ad" for name in ways]
        bars = axis.barh(list(ways), middle, xerr=[low, high], color=colours)
        axis.bar_label(bars, [f"{ratio['median']:.2f}x" for ratio in ratios], padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("times as many samples/s")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# --------------------------------------------------------------------------------------------------
# The command


SIZES = {
    "rounds": "how often each way runs",
    "layers": "of the model",
    "hidden": "numbers a token",
    "batch": "rows of the training step",
    "eval_batch": "prompts generated together",
    "new_tokens": "written for a prompt",
    "single_prompts": "prompts that go one at a time",
}
"""What flags change of `Sizes`."""


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, under a minute")
    parser.add_argument("--out", type=Path, help="the JSON; other parts that it holds are kept")
    real = os.environ.get(REAL_DATA)
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(real) if real else None,
        help=f"folder of real data (or ${REAL_DATA}); without it rows are generated",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    for name, told in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=told)
    llamas = [name for name, base in PUBLISHED.items() if base.shape.model_type == "llama"]
    parser.add_argument("--shape", choices=llamas, help="a published base's layers and sizes")
    flags = parser.parse_args(arguments)
    flags.parts = [name for name in flags.parts.split(",") if name]
    if not flags.parts or any(name not in PARTS for name in flags.parts):
        parser.error(f"--parts {','.join(flags.parts)}: parts are {', '.join(PARTS)}")
    for name, value in vars(flags).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if flags.hidden is not None and flags.hidden % HEAD_DIM:
        parser.error(f"--hidden {flags.hidden}: it must be a multiple of {HEAD_DIM}")
    if flags.real is not None:
        wanted = (TRAINING_FILE, TESTING_FILE, TOKENIZER_FILE)
        missing = [name for name in wanted if not (flags.real / name).is_file()]
        if missing:
            parser.error(f"--real {flags.real}: it holds no {', '.join(missing)}")
    flags.out = flags.out or (QUICK_RESULT if flags.quick else RESULT)
    return flags


def resolve_sizes(flags: argparse.Namespace) -> Sizes:
    """Give the default sizes, or those of `--quick`, with what flags change."""
    sizes = QUICK if flags.quick else FULL
    given = {name: size for name in SIZES if (size := getattr(flags, name)) is not None}
    if flags.shape is not None:
        shape = PUBLISHED[flags.shape].shape
        given |= {"shape": flags.shape, "hidden": shape.hidden, "layers": shape.layers}
    return replace(sizes, vocab=FULL.vocab if flags.real else sizes.vocab, **given)


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
    # TRL warns of flattened batches without FlashAttention; their gradients are compared here.
    logging.getLogger("trl").setLevel(logging.ERROR)


def earlier_parts(out: Path, quick: bool) -> dict[str, Any]:
    """Read the parts of an earlier result that can stand beside new ones, `quick` or not."""
    if not out.exists():
        return {}
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
        parts = content["parts"] if content["format"] == FORMAT else None
    except (ValueError, KeyError, TypeError):
        parts = None
    if parts is None:
        print(f"{out} is no result of this program: it is replaced", file=sys.stderr)
        return {}
    kept = {name: part for name, part in parts.items() if part["run"]["quick"] == quick}
    for name in parts.keys() - kept.keys():
        print(f"{out}: the earlier part {name} is left out (--quick or not)", file=sys.stderr)
    return kept


def repeatable_command(given: Sequence[str]) -> str:
    """Write the command so that it can be repeated, without folders of this machine."""
    words = ["python", "benchmarks/bench.py"]
    for before, word in zip(["", *given], given, strict=False):
        flag, equals, _ = word.partition("=")
        if before in ("--real", "--out"):
            words.append(before.removeprefix("--").upper())
        elif equals and flag in ("--real", "--out"):
            words.append(f"{flag}={flag.removeprefix('--').upper()}")
        else:
            words.append(word)
    return shlex.join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print."""
    flags = parse_flags(arguments)
    command = repeatable_command(sys.argv[1:] if arguments is None else arguments)
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
        figures = PARTS[name][0](flags.real, sizes, tell)
        run = {
            "command": command,
            "quick": flags.quick,
            "rows": "real" if flags.real else "generated",
            "rounds": sizes.rounds,
            "threads": flags.threads,
            "model": {key: getattr(sizes, key) for key in ("shape", "hidden", "layers", "vocab")},
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
            "seconds": round(time.time() - started, 1),
            "environment": about,
        }
        parts[name] = {"run": run, "figures": figures}
        # After every part, so that what was measured stays whatever comes.
        parts = {key: parts[key] for key in PARTS if key in parts}
        write_json(flags.out, {"format": FORMAT, "parts": parts})
    picture = plot(parts, flags.out.with_suffix(".png"))
    print(table(parts))
    print(f"\nresults: {flags.out}" + (f", {picture}" if picture else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
