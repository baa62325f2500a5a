"""What `gpu_check` feeds the project: a base of the real shape, a tokenizer, rows, prompts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_check_plan import COMPLETION_TOKENS, Scale

from tinyagent_fast.data.generation.catalogue import load_catalogue
from tinyagent_fast.data.generation.dataset import GenerationSpec, generate_entries
from tinyagent_fast.data.schema import Entry, Example, entry_from_json
from tinyagent_fast.models.nano import train_bpe_tokenizer
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.rows import RowFile, encode_examples
from tinyagent_fast.prompts.templates import render
from tinyagent_fast.prompts.tokenizers import load_tokenizer, tokenizer_from_sentencepiece
from tinyagent_fast.prompts.tokens import IGNORED, PromptTokenizer

_SEED = 0
_EXAMPLES_FOR_TOKENIZER = 150
_CUT = "\n###\n"


def generated_examples(count: int, style: str, part: str) -> list[Example]:
    """Generate plans with the project's own generator.

    Args:
        count: How many.
        style: `full` or `short` prompts.
        part: Other parts have other queries.

    Returns:
        One example an entry, its plan.
    """
    spec = GenerationSpec(prompt_style="full" if style == "full" else "short")
    rng = random.Random(f"gpu_check/{part}")
    examples = []
    for key, raw in generate_entries(load_catalogue(), spec, count, rng, set()):
        entry = entry_from_json(key, raw)
        assert isinstance(entry, Entry), f"a generated entry breaks the schema: {entry}"
        examples.append(entry.examples[0])
    return examples


def write_tokenizer(folder: Path, scale: Scale, file: Path | None) -> dict[str, Any]:
    """Put a tokenizer into the base's folder.

    Args:
        folder: The base's folder.
        scale: Vocabulary size of a tokenizer that is made here.
        file: A SentencePiece tokenizer.model to use instead.

    Returns:
        Where it came from and how many pieces it has.
    """
    if file is not None:
        shutil.copyfile(file, folder / "tokenizer.model")
        tokenizer = tokenizer_from_sentencepiece(folder / "tokenizer.model")
        tokenizer.save_pretrained(str(folder))
        return {"tokenizer": file.name, "pieces": len(tokenizer)}
    texts = []
    for example in generated_examples(_EXAMPLES_FOR_TOKENIZER, scale.prompt_style, "tokenizer"):
        rendered = render(example, "alpaca")
        texts.append(rendered.prompt + rendered.completion)
    tokenizer = _with_unused_pieces(
        train_bpe_tokenizer(texts, scale.trained_pieces), scale.vocab_pieces
    )
    tokenizer.save_pretrained(str(folder))
    return {"tokenizer": "made from generated prompts", "pieces": len(tokenizer)}


def _with_unused_pieces(tokenizer: Any, pieces: int) -> Any:
    """Fill the vocabulary with pieces that no merge leads to, so that it has the real size."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = core["model"]["vocab"]
    for index in range(len(vocabulary), pieces):
        vocabulary[f"unused{index:05d}"] = index
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )


def write_base(folder: Path, scale: Scale) -> dict[str, Any]:
    """Write random bf16 weights and a config in TinyLlama's layout, without building the model.

    Args:
        folder: The base's folder.
        scale: The shape.

    Returns:
        Parameters and bytes.

    Source: config.json of Doctor-Shotgun/TinyLlama-1.1B-32k-Instruct.
    """
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(_SEED)
    tensors = {}
    for name, shape in _parameters(scale):
        weight = torch.empty(shape, dtype=torch.float32, device=device)
        if len(shape) == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.02, generator=generator)
        tensors[name] = weight.to(torch.bfloat16).cpu()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": scale.hidden,
        "intermediate_size": scale.ffn,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads,
        "num_key_value_heads": scale.kv_heads,
        "vocab_size": scale.vocab_pieces,
        "max_position_embeddings": scale.max_position_tokens,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    elements = sum(t.numel() for t in tensors.values())
    return {"parameters": elements, "gib": round(2 * elements / 2**30, 3)}


def _parameters(scale: Scale) -> Iterator[tuple[str, tuple[int, ...]]]:
    key_value = scale.hidden // scale.heads * scale.kv_heads
    yield "model.embed_tokens.weight", (scale.vocab_pieces, scale.hidden)
    for layer in range(scale.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (scale.hidden, scale.hidden)
        yield f"{at}.self_attn.k_proj.weight", (key_value, scale.hidden)
        yield f"{at}.self_attn.v_proj.weight", (key_value, scale.hidden)
        yield f"{at}.self_attn.o_proj.weight", (scale.hidden, scale.hidden)
        yield f"{at}.mlp.gate_proj.weight", (scale.ffn, scale.hidden)
        yield f"{at}.mlp.up_proj.weight", (scale.ffn, scale.hidden)
        yield f"{at}.mlp.down_proj.weight", (scale.hidden, scale.ffn)
        yield f"{at}.input_layernorm.weight", (scale.hidden,)
        yield f"{at}.post_attention_layernorm.weight", (scale.hidden,)
    yield "model.norm.weight", (scale.hidden,)
    yield "lm_head.weight", (scale.vocab_pieces, scale.hidden)


def write_rows(base: Path, path: Path, scale: Scale) -> RowFile:
    """Encode generated plans whose prompts are filled up to the published lengths.

    Args:
        base: Its folder holds the tokenizer.
        path: Target, a folder.
        scale: Number and lengths of the rows.

    Returns:
        The rows.
    """
    tokenizer = PromptTokenizer(load_tokenizer(base))
    examples = _short_enough(tokenizer, scale)
    blocks = [f"Question: {e.query}\n{e.output}{END_OF_PLAN}{_CUT}" for e in examples]
    lengths = [len(ids) for ids in tokenizer.encode_texts(blocks)]
    rendered = [render(e, "alpaca") for e in examples]
    sizes = [len(i) for i in tokenizer.encode_texts([r.prompt + r.completion for r in rendered])]
    rng = random.Random(_SEED)
    filled = []
    for example, size in zip(examples, sizes, strict=True):
        target = rng.gauss(scale.row_mean_tokens, scale.row_deviation_tokens)
        target = min(target, scale.row_max_tokens - 40)
        system, tokens = example.system or "", size
        while True:
            chosen = rng.randrange(len(blocks))
            tokens += lengths[chosen]
            if tokens > target:
                break
            system += blocks[chosen]
        filled.append(replace(example, system=system))
    return encode_examples(
        filled, tokenizer, path, max_length_tokens=scale.row_max_tokens, over_long="drop"
    )


def _short_enough(tokenizer: PromptTokenizer, scale: Scale) -> list[Example]:
    """Generate the wanted number of examples, none longer than a row may be."""
    found = generated_examples(2 * scale.rows, scale.prompt_style, "rows")
    texts = [(r.prompt, r.completion) for r in (render(e, "alpaca") for e in found)]
    sizes = [len(ids) for ids in tokenizer.encode_texts([p + c for p, c in texts])]
    kept = [e for e, size in zip(found, sizes, strict=True) if size < scale.row_max_tokens - 8]
    return kept[: scale.rows]


def exact_rows(rows: Any, batch: int, tokens: int, steps: int) -> Any:
    """Make rows of exactly so many tokens out of encoded ones.

    Args:
        rows: The encoded rows.
        batch: Rows of a step.
        tokens: Length of each row.
        steps: Steps to feed.

    Returns:
        A dataset with input_ids, labels and length; the last tokens of a row are supervised.
    """
    from datasets import Dataset

    source = [i for k in range(min(len(rows), 64)) for i in rows[k]["input_ids"][1:]]
    supervised = min(COMPLETION_TOKENS, tokens // 2)
    bos = rows[0]["input_ids"][0]
    columns: dict[str, list[Any]] = {"key": [], "input_ids": [], "labels": [], "length": []}
    for index in range(batch * steps):
        start = 997 * index % len(source)
        ids = [bos, *_cycle(source, start, tokens - 1)]
        columns["key"].append(str(index))
        columns["input_ids"].append(ids)
        columns["labels"].append([IGNORED] * (tokens - supervised) + ids[-supervised:])
        columns["length"].append(tokens)
    return Dataset.from_dict(columns)


def _cycle(source: Sequence[int], start: int, count: int) -> list[int]:
    turned = [*source[start:], *source[:start]]
    return (turned * (count // len(turned) + 1))[:count]


def prompts_of(rows: Any, scale: Scale) -> list[list[int]]:
    """Cut prompts of about the wanted length out of encoded rows.

    Args:
        rows: The encoded rows.
        scale: Number and length of the prompts.

    Returns:
        Token ids of each prompt, all of different length within a tenth.
    """
    source = [i for k in range(min(len(rows), 64)) for i in rows[k]["input_ids"][1:]]
    bos = rows[0]["input_ids"][0]
    spread = max(1, scale.prompt_tokens // 10)
    prompts = []
    for index in range(scale.prompts):
        length = scale.prompt_tokens - spread // 2 + 37 * index % spread
        prompts.append([bos, *_cycle(source, 1009 * index % len(source), length)])
    return prompts
