"""What `bench` measures on: random Llamas, rows and prompts of the published lengths, or real ones.

Generated rows are random token ids: how long they are and how much they share decides the time of
a step, not what they say. Real ones come from a folder with training_data.json, testing_data.json
and llama_tokenizer.model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from bench_sizes import Lengths, Shape, Sizes

from tinyagent_fast.data.reading import read_entries
from tinyagent_fast.data.schema import Example
from tinyagent_fast.prompts.templates import render
from tinyagent_fast.prompts.tokenizers import tokenizer_from_sentencepiece
from tinyagent_fast.prompts.tokens import IGNORED, EncodedRow, PromptTokenizer

TRAINING_FILE, TESTING_FILE = "training_data.json", "testing_data.json"
TOKENIZER_FILE = "llama_tokenizer.model"
NEVER_WRITTEN_ID = 2**30
"""Stands for EOS, so that random weights write as many tokens as are asked for."""
LORA_RANK = 16
_CONSIDERED_ENTRIES = 400

Row = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one kind, and what follows them in the data."""

    ids: list[list[int]]
    plans: list[list[int]] | None
    """None for generated prompts, which are followed by nothing."""


def random_llama(shape: Shape, positions: int) -> Any:
    """Build a Llama of random fp32 weights, always the same ones.

    Args:
        shape: Its sizes.
        positions: Tokens that a row may have.

    Returns:
        A `LlamaForCausalLM`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=positions,
        )
    )


def with_adapter(model: Any, rank: int = LORA_RANK) -> Any:
    """Put LoRA on all linear layers, its weights not zero, so that all gradients are at work.

    Args:
        model: The base.
        rank: Rank of the adapter.

    Returns:
        A PEFT model in training mode.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def generated_rows(lengths: Lengths, count: int, vocab: int, seed: int = 0) -> list[Row]:
    """Draw rows of random tokens that begin alike.

    Args:
        lengths: Mean, spread, shared beginning and supervised end.
        count: How many.
        vocab: Ids are below it.
        seed: Of all that is drawn.

    Returns:
        Rows with input_ids and labels.
    """
    rng = random.Random(f"bench/{seed}")
    beginning = _random_ids(rng, lengths.shared, vocab)
    rows = []
    for _ in range(count):
        drawn = round(rng.gauss(lengths.mean, lengths.deviation))
        size = min(max(drawn, 2 * lengths.mean - lengths.longest()), lengths.longest())
        ids = beginning + _random_ids(rng, max(size - lengths.shared, 2), vocab)
        labels = [IGNORED] * (len(ids) - lengths.supervised) + ids[len(ids) - lengths.supervised :]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def generated_prompts(lengths: Lengths, count: int, vocab: int, seed: int = 0) -> Prompts:
    """Draw prompts of random tokens that begin alike.

    Args:
        lengths: Of whole rows; what is supervised is left out.
        count: How many.
        vocab: Ids are below it.
        seed: Of all that is drawn.

    Returns:
        The prompts.
    """
    rows = generated_rows(lengths, count, vocab, seed)
    end = -lengths.supervised if lengths.supervised else None
    return Prompts(ids=[row["input_ids"][:end] for row in rows], plans=None)


def _random_ids(rng: random.Random, count: int, vocab: int) -> list[int]:
    return [rng.randrange(3, vocab) for _ in range(count)]


def word_tokenizer(vocab: int) -> PromptTokenizer:
    """Make a tokenizer whose every id is a word of its own, to tell random outputs apart.

    Args:
        vocab: Number of ids.

    Returns:
        The tokenizer; models never write its EOS.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, vocab)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    return PromptTokenizer(made)


def real_tokenizer(folder: Path) -> PromptTokenizer:
    """Load the tokenizer beside real data.

    Args:
        folder: Holds llama_tokenizer.model.

    Returns:
        The tokenizer, padding with `<unk>`.
    """
    loaded = tokenizer_from_sentencepiece(folder / TOKENIZER_FILE)
    loaded.pad_token = loaded.unk_token
    return PromptTokenizer(loaded)


def real_rows(
    folder: Path, name: str, tokenizer: PromptTokenizer, count: int, seed: int = 0
) -> list[EncodedRow]:
    """Encode plans of a real file, chosen at random among its first entries.

    Args:
        folder: Holds the file.
        name: training_data.json or testing_data.json.
        tokenizer: Encodes and proves them.
        count: How many.
        seed: Of the choice.

    Returns:
        The rows.
    """
    found = list(islice(plan_examples(folder / name), _CONSIDERED_ENTRIES))
    chosen = random.Random(f"bench/{seed}").sample(found, min(count, len(found)))
    return tokenizer.encode_rows([(e.key, render(e, "alpaca")) for e in chosen])


def training_rows(real: Path | None, tokenizer: PromptTokenizer, sizes: Sizes) -> list[Row]:
    """Give one micro-batch.

    Args:
        real: Folder of real data; none draws random tokens.
        tokenizer: From `tokenizer_for`.
        sizes: Lengths and number of rows.

    Returns:
        Rows with input_ids and labels.
    """
    if real is None:
        return generated_rows(sizes.training_rows, sizes.batch, sizes.shape.vocab)
    found = real_rows(real, TRAINING_FILE, tokenizer, sizes.batch)
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in found]


def prompts_by_kind(
    real: Path | None, tokenizer: PromptTokenizer, sizes: Sizes
) -> dict[str, Prompts]:
    """Give one batch of prompts like those of training, and one like those of the test file.

    Args:
        real: Folder of real data; none draws random tokens.
        tokenizer: From `tokenizer_for`.
        sizes: Lengths and number of prompts.

    Returns:
        Prompts by what they are like.
    """
    count, vocab = sizes.eval_batch, sizes.shape.vocab
    if real is None:
        return {
            "training-shaped": generated_prompts(sizes.training_rows, count, vocab),
            "test-shaped": generated_prompts(sizes.test_prompts, count, vocab, seed=1),
        }
    found = {}
    for kind, name in (("training-shaped", TRAINING_FILE), ("test-shaped", TESTING_FILE)):
        rows = real_rows(real, name, tokenizer, count)
        found[kind] = Prompts(
            ids=[row.input_ids[: row.prompt_tokens] for row in rows],
            plans=[row.input_ids[row.prompt_tokens :] for row in rows],
        )
    return found


def tokenizer_for(real: Path | None, vocab: int) -> PromptTokenizer:
    """Give the tokenizer that fits the rows.

    Args:
        real: Folder of real data; none makes one for random tokens.
        vocab: Number of ids of the made one.

    Returns:
        The tokenizer.
    """
    return word_tokenizer(vocab) if real is None else real_tokenizer(real)


def plan_examples(path: Path) -> Iterator[Example]:
    """Read the plans of a file.

    Args:
        path: In the published schema.

    Yields:
        One example for each plan.
    """
    for entry in read_entries(path, on_bad_entry="skip"):
        yield from (e for e in entry.examples if e.kind == "plan")


def shared_share(sequences: Sequence[Sequence[int]]) -> float:
    """Measure how many of all tokens stand in the beginning of another sequence too.

    Args:
        sequences: Token ids.

    Returns:
        Share of the tokens that a trie of all sequences saves.
    """
    ordered = sorted(list(s) for s in sequences)
    saved = 0
    for one, other in pairwise(ordered):
        pairs = enumerate(zip(one, other, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))
        saved += same
    return saved / sum(map(len, ordered))
