"""Models loaded plainly, and their completions as plain values that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinyagent_fast.inference.engine import Limits
from tinyagent_fast.inference.torch_engine import TorchEngine
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.prompts.loading import load_tokenizer
from tinyagent_fast.prompts.tokens import PromptTokenizer


class Written(NamedTuple):
    """What was written, without what it cost."""

    text: str
    stop_reason: str
    new_tokens: int


def load_plainly(folder: Path) -> LoadedModel:
    """Load a model for generation, in fp32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loaded: LoadedModel = loaded_with(model, PromptTokenizer(load_tokenizer(folder)))
    return loaded


def loaded_with(model: Any, tokenizer: PromptTokenizer, backend: str = "transformers") -> Any:
    """Stand for a loaded model."""
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        backend=backend,
        device=model.device.type,
        compute_dtype=str(model.dtype).removeprefix("torch."),
    )


def complete(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Sequence[list[int]],
    *,
    shared_prefix: bool = True,
    lookup_tokens: int = 0,
    **options: Any,
) -> list[Written]:
    """Complete prompts; each must come once."""
    engine = TorchEngine(
        loaded_with(model, tokenizer), shared_prefix=shared_prefix, lookup_tokens=lookup_tokens
    )
    found: dict[int, Written] = {}
    for index, one in engine.complete_tokens(prompts, Limits(**options)):
        assert index not in found
        assert one.prompt_tokens == len(prompts[index]) > one.cached_tokens
        found[index] = Written(one.text, one.stop_reason, one.new_tokens)
    return [found[index] for index in range(len(prompts))]
