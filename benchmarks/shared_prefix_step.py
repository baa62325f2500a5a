"""Time one training step on rows that share a prefix: `python benchmarks/shared_prefix_step.py`.

Three ways take the same rows, one after another in the same process, so that a machine that is
busy slows all of them: TRL's default (a padded batch, the LM head at supervised tokens only), a
packed stream that shares nothing, and one that shares the prefix. The result is one JSON object:
seconds of the fastest step of each way, their ratios, and how far loss and gradients differ.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tinyagent_fast.shared_prefix.forward import shared_prefix_loss
from tinyagent_fast.shared_prefix.layout import pack
from tinyagent_fast.training.trainer import collate

Gradients = dict[str, torch.Tensor]


def adapted_llama(sizes: argparse.Namespace) -> Any:
    """Build a random Llama with LoRA on all linear layers, and TRL's loss in its forward.

    Args:
        sizes: The command line.

    Returns:
        A PEFT model whose adapter is not zero.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer import sft_trainer

    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocab,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=16384,
        )
    ).to(sizes.device, getattr(torch, sizes.dtype))
    lora = LoraConfig(r=sizes.rank, lora_alpha=sizes.rank, target_modules="all-linear")
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    # What loss_type="chunked_nll", TRL's default, does to the model.
    sft_trainer._patch_chunked_ce_lm_head(base, chunk_size=sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE)
    if sizes.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def random_rows(sizes: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Draw rows of one prefix and suffixes of the mean length and spread asked for.

    Args:
        sizes: The command line.

    Returns:
        Rows with input_ids and labels.
    """
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, sizes.vocab) for _ in range(count)]

    prefix, rows = tokens(sizes.prefix), []
    for _ in range(sizes.batch):
        ids = prefix + tokens(sizes.suffix + rng.randint(-sizes.spread, sizes.spread))
        prompt = len(ids) - sizes.supervised
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def timed_step(model: Any, loss: Callable[[], torch.Tensor]) -> tuple[float, float, Gradients]:
    """Make one forward and backward pass.

    Args:
        model: Whose gradients are made.
        loss: The forward pass.

    Returns:
        Seconds, loss and gradients.
    """
    cuda = next(model.parameters()).is_cuda
    model.zero_grad(set_to_none=True)
    gc.collect()
    started = time.perf_counter()
    value = loss()
    torch.autograd.backward(value)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    named = model.named_parameters()
    return seconds, value.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def measure(sizes: argparse.Namespace) -> dict[str, Any]:
    """Time all ways in turns.

    Args:
        sizes: The command line.

    Returns:
        The figures.
    """
    model, rows = adapted_llama(sizes), random_rows(sizes)
    padded = {name: x.to(sizes.device) for name, x in collate(rows, pad_id=0).items()}
    shared = pack(rows).to(sizes.device)
    unshared = pack(rows, smallest_shared_tokens=None).to(sizes.device)
    again = sizes.checkpointing
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "trl": lambda: model(**padded, use_cache=False).loss,
        "unshared": lambda: shared_prefix_loss(model, unshared, checkpointing=again),
        "shared": lambda: shared_prefix_loss(model, shared, checkpointing=again),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses, gradients = {}, {}
    for _ in range(sizes.repeats):
        for name, loss in ways.items():
            with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.dtype != "float32"):
                taken, losses[name], gradients[name] = timed_step(model, loss)
            seconds[name].append(taken)
    best = {name: min(taken) for name, taken in seconds.items()}
    return {
        "sizes": vars(sizes),
        "tokens": {"trl": shared.plain_tokens, "shared": shared.computed_tokens},
        "seconds": best,
        "times_as_fast_as_trl": {name: best["trl"] / taken for name, taken in best.items()},
        "loss_difference": abs(losses["shared"] - losses["trl"]) / losses["trl"],
        "largest_gradient_difference": max(
            float((gradients["shared"][name] - wanted).norm() / wanted.norm())
            for name, wanted in gradients["trl"].items()
        ),
    }


def main() -> None:
    """Read the sizes, measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = {"hidden": 1024, "intermediate": 2816, "layers": 2, "heads": 16, "kv_heads": 4}
    defaults |= {"vocab": 32000, "rank": 16, "batch": 4, "prefix": 1865, "suffix": 1625}
    defaults |= {"spread": 0, "supervised": 88, "repeats": 3, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    sizes = parser.parse_args()
    torch.set_num_threads(sizes.threads)
    print(json.dumps(measure(sizes), indent=2))


if __name__ == "__main__":
    main()
