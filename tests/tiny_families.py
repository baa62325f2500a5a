"""A tiny random model of each kind that people fine-tune, with a tokenizer cut as theirs are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyagent_fast.export import vocabulary
from tinyagent_fast.models.families import FAMILIES

SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    # Wide initial weights: with those of a real model, so few dimensions give no confident logits.
    "initializer_range": 0.2,
}
"""Rows of 96 are no multiple of 256, as those of SmolLM2 with 576; those of 256 are."""

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + "
    "m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """How a tiny model differs from a plain Llama."""

    model_type: str = "llama"
    pre: str
    """How llama.cpp names its tokenizer's way to cut text."""
    special: Mapping[str, str]
    """Special tokens by what transformers calls them."""
    more_special: Sequence[str] = ()
    template: str
    config: Mapping[str, Any]
    layers: int = 2


_ROPE_3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

MODELS: Mapping[str, TinyModel] = {
    "smollm2": TinyModel(
        pre="smollm",
        special={"unk": "<|endoftext|>", "bos": "<|im_start|>", "eos": "<|im_end|>"},
        template=_CHATML,
        config={
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "llama3": TinyModel(
        pre="llama-bpe",
        special={"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        more_special=("<|start_header_id|>", "<|end_header_id|>"),
        template=_LLAMA_3,
        config={"tie_word_embeddings": False, "rope_parameters": _ROPE_3},
    ),
    "qwen2": TinyModel(
        model_type="qwen2",
        pre="qwen2",
        special={"eos": "<|im_end|>", "pad": "<|endoftext|>"},
        more_special=("<|im_start|>",),
        template=_CHATML,
        config={
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen3": TinyModel(
        model_type="qwen3",
        pre="qwen2",
        special={"eos": "<|im_end|>", "pad": "<|endoftext|>"},
        more_special=("<|im_start|>",),
        template=_CHATML,
        config={
            "head_dim": 64,  # as in Qwen3, not hidden size by heads
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "gemma3": TinyModel(
        model_type="gemma3_text",
        pre="default",
        special={"unk": "<unk>", "bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
        more_special=("<start_of_turn>", "<end_of_turn>"),
        template=_GEMMA,
        config={"query_pre_attn_scalar": 32, "sliding_window": 32, "rms_norm_eps": 1e-6},
        layers=7,  # the sixth sees all tokens
    ),
}
"""By the name of the model that each is like."""


def make_model(name: str, folder: Path, texts: Sequence[str]) -> Path:
    """Write a tiny random model of a kind, with a tokenizer trained on some texts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tinyagent_fast.models.loading import save_model

    kind = MODELS[name]
    tokenizer = make_tokenizer(kind, texts)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = AutoConfig.for_model(
        kind.model_type,
        **{
            **SHAPE,
            "num_hidden_layers": kind.layers,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **kind.config,
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    # What a fresh model has as zeros and ones must not be what a mistake would put there too.
    for key, values in model.named_parameters():
        if values.dim() == 1:
            torch.nn.init.normal_(values, std=0.2)
            if not key.endswith("bias") and not FAMILIES[kind.model_type].norm_shift:
                values.data += 1
    save_model(model, tokenizer, folder)
    return folder


def make_tokenizer(kind: TinyModel, texts: Sequence[str]) -> Any:
    """Train a tokenizer that cuts text as a kind's own does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys((*kind.special.values(), *kind.more_special)))
    if kind.pre == "default":
        return _gemma_tokenizer(kind, special, texts)
    patterns, ignore_merges = vocabulary.PRE_TOKENIZERS[kind.pre]
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if kind.pre == "smollm":
        cuts = [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        core.pre_tokenizer = pre.Sequence(cuts)
    else:
        core.pre_tokenizer = vocabulary.byte_level_words(patterns)
    core.normalizer = normalizers.NFC() if kind.pre == "qwen2" else None
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(one, special=True, normalized=False) for one in special],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    names = {f"{name}_token": text for name, text in kind.special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=kind.template, **names)


def _gemma_tokenizer(kind: TinyModel, special: Sequence[str], texts: Sequence[str]) -> Any:
    """Train a SentencePiece BPE, and write it as Gemma's tokenizer.json, without a first space."""
    import tempfile

    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    from tinyagent_fast.prompts.loading import tokenizer_from_sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
            model_prefix=f"{folder}/tokenizer",
            model_type="bpe",
            vocab_size=700,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
        trained = tokenizer_from_sentencepiece(Path(folder) / "tokenizer.model")
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    ids = {piece: at for at, piece in enumerate(model["vocab"])}
    # The first three are <unk>, <s> and </s>: Gemma names them otherwise.
    renamed = {"<s>": "<bos>", "</s>": "<eos>"}
    vocab = {renamed.get(piece, piece): at for piece, at in ids.items()}
    merges = [tuple(pair) for pair in model["merges"]]
    core = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.pre_tokenizer = pre.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    names = {f"{name}_token": text for name, text in kind.special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=kind.template, **names)
