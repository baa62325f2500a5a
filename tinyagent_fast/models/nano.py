"""The small models that need no download: `nano` is trained on the spot, `random` is not.

`nano` is a Llama of two million parameters with its own byte-level BPE. It is pretrained for a few
minutes on requests that a single call answers, so it knows the tools one by one but not how to
plan; LoRA then teaches it to plan through the same code that trains the real model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinyagent_fast.models.families import ModelShape
from tinyagent_fast.prompts.tokens import IGNORED, EncodedRow

if TYPE_CHECKING:
    import torch

UNK, BOS, EOS = "<unk>", "<s>", "</s>"

# What merges are learned on: no quote or bracket is part of a word, so that a quoted name is made
# of the same tokens in a request and in a plan, and a small model can copy it. Digits stay single:
# ten of them are learned sooner than a hundred numbers.
_MERGED = r"_[A-Za-z]+| ?[A-Za-z]+|\p{N}| ?[^\sA-Za-z\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"

NANO_SHAPE = ModelShape(
    hidden=256, intermediate=256, layers=3, heads=4, kv_heads=2, head_dim=64, vocab=1536, tied=True
)
"""A hidden size that 256 divides keeps real K-quants possible."""
RANDOM_SHAPE = replace(NANO_SHAPE, hidden=64, intermediate=128, layers=2, head_dim=16)
"""Of the base that is not trained at all."""
_MAX_POSITION_TOKENS = 16384


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """How the nano base is pretrained; part of its cache key."""

    entries: int = 6000
    lists: int = 6000
    steps: int = 800
    batch: int = 16
    learning_rate: float = 1.5e-3
    seed: int = 0


def train_bpe_tokenizer(texts: Sequence[str], vocab_pieces: int) -> Any:
    """Train a byte-level BPE tokenizer, so that every text can be encoded and given back.

    Returns:
        A transformers fast tokenizer of so many tokens, `<unk>`, `<s>` and `</s>` included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tinyagent_fast.export.vocabulary import LLAMA_3_WORDS, byte_level_words

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = byte_level_words([_MERGED])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_pieces,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.pre_tokenizer = byte_level_words([LLAMA_3_WORDS])  # llama.cpp knows it by name
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=UNK
    )


def random_llama(shape: ModelShape, tokenizer: Any, seed: int) -> Any:
    """Build a Llama in fp32 with random weights and the vocabulary of a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=_MAX_POSITION_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )


def begin_with_copying(model: Any, seed: int) -> None:
    """Set a random Llama's first weights so that it can copy from its context before any step.

    A planner copies most of what it writes. Layer 0 gets two heads that look one and two tokens
    back, and layer 1 one that looks for what followed the present token before and raises the logit
    of that. A small model needs about a thousand steps to find these by itself. Every weight can be
    trained away again. Source: Olsson et al., In-context Learning and Induction Heads (2022).
    """
    import torch

    shape = model.config
    hidden, width = shape.hidden_size, shape.head_dim
    half, quarter = width // 2, width // 4
    # Rotations of 0.1 to 1 a token tell neighbours apart; slow ones leave what is compared alone.
    fast = half // 4
    slow = torch.cat([torch.arange(quarter, half), torch.arange(half + quarter, width)])
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0].T
    shared, rest = directions[0], directions[1:]
    own, one_back, two_back = (rest[n * width : (n + 1) * width] for n in range(3))
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if weight.dim() == 2:  # wide enough to attend sharply, and small beside the tokens
                weight.mul_(0.5 if "o_proj" in name or "down_proj" in name else 3.0)
        embeddings = model.model.embed_tokens.weight.mul_(5.0)
        # A part that all tokens share moves all logits alike, and lets a head see positions only.
        embeddings.add_(embeddings.norm(dim=1).mean() * shared)
        first, second = (layer.self_attn for layer in model.model.layers[:2])
        rotations = shape.rope_parameters["rope_theta"] ** (-torch.arange(fast) / half)
        first.k_proj.weight[:width] = 0
        first.k_proj.weight[:fast] = 0.5 * shared
        first.v_proj.weight[:width] = own
        for head, kept in enumerate((one_back, two_back)):
            rows, angles = slice(head * width, (head + 1) * width), (head + 1) * rotations[:, None]
            query = first.q_proj.weight[rows].zero_()
            query[:fast] = 0.5 * angles.cos() * shared
            query[half : half + fast] = -0.5 * angles.sin() * shared
            first.o_proj.weight[:, rows] = 0.3 * kept.T
        second.q_proj.weight[:width] = 0
        second.k_proj.weight[:width] = 0
        second.q_proj.weight[slow] = 4.0 * own[:half]
        second.k_proj.weight[slow] = 4.0 * one_back[:half]
        second.v_proj.weight[:width] = own
        second.o_proj.weight[:, :width] = 0.3 * own.T


def pretrain(
    model: Any,
    rows: Sequence[EncodedRow],
    pad_id: int,
    spec: PretrainSpec,
    on_progress: Callable[[int, int], None] = lambda _step, _steps: None,
) -> float:
    """Train all weights in place, with loss on completions.

    Returns:
        The loss of the last batch before its step, in nats per supervised token.
    """
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=spec.learning_rate,
        total_steps=spec.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    model.train()
    for step, (input_ids_BT, labels_BT) in enumerate(_batches(rows, pad_id, spec), start=1):
        # Padding stands on the right, where a causal model does not look: no mask is needed.
        hidden_BTH = model.model(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        supervised_BT = labels_BT[:, 1:] != IGNORED
        logits_NV = model.lm_head(hidden_BTH[:, :-1][supervised_BT])
        loss = cross_entropy(logits_NV, labels_BT[:, 1:][supervised_BT])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == spec.steps:
            on_progress(step, spec.steps)
    model.eval()
    return float(loss.detach())


def _batches(
    rows: Sequence[EncodedRow], pad_id: int, spec: PretrainSpec
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels of `spec.steps` batches of similar length, in seeded random order."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rng = random.Random(spec.seed)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    starts = list(range(0, len(by_length) - spec.batch + 1, spec.batch))
    order: list[int] = []
    for _ in range(spec.steps):
        if not order:
            order = rng.sample(starts, len(starts))
        start = order.pop()
        chosen = [rows[i] for i in by_length[start : start + spec.batch]]
        ids = [torch.tensor(row.input_ids) for row in chosen]
        labels = [torch.tensor(row.labels) for row in chosen]
        yield pad_sequence(ids, True, pad_id), pad_sequence(labels, True, IGNORED)
