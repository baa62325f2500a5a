"""Names that callers of the time before `TorchEngine` still use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from tinyagent_fast.inference.engine import StopReason
from tinyagent_fast.models.loading import LoadedModel
from tinyagent_fast.prompts.tokens import PromptTokenizer


@dataclass(frozen=True)
class Completion:
    """What a model wrote for one prompt, without the stop string and EOS."""

    text: str
    stop_reason: StopReason
    new_tokens: int


def _loaded(model: Any, backend: str, tokenizer: Any = None) -> LoadedModel:
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        backend=backend,
        device=model.device.type,
        compute_dtype=str(model.config.dtype or model.dtype).removeprefix("torch."),
    )


def generating(model: Any, backend: str = "transformers") -> AbstractContextManager[None]:
    """Switch a model to generation and put everything back.

    Args:
        model: The model.
        backend: What loaded it.

    Returns:
        The context.
    """
    from tinyagent_fast.inference import torch_engine

    return torch_engine.generating(_loaded(model, backend))


def decoding_path(model: Any, backend: str = "transformers") -> str:
    """Say which way a model is run.

    Args:
        model: A causal language model.
        backend: What loaded it.

    Returns:
        `shared prefix`, or `left padding` with the reason.
    """
    from tinyagent_fast.inference.torch_engine import TorchEngine

    reason = TorchEngine(_loaded(model, backend)).why_padded()
    return "shared prefix" if reason is None else f"left padding: {reason}"


def complete(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    max_new_tokens: int,
    stop: str,
    backend: str = "transformers",
    shared_prefix: bool = True,
    lookup_tokens: int = 0,
) -> Iterator[list[tuple[int, Completion]]]:
    """Complete prompts greedily.

    Args:
        model: A causal language model.
        tokenizer: Encoded the prompts.
        prompts: Token ids of each prompt.
        batch: Prompts generated together.
        max_new_tokens: Where a completion is broken off.
        stop: Text that ends a completion.
        backend: What loaded the model.
        shared_prefix: False lets the model's own `generate` do it.
        lookup_tokens: Guesses from the prompt that each step may check at once.

    Yields:
        Indices and completions.
    """
    from tinyagent_fast.inference.torch_engine import TorchEngine

    engine = TorchEngine(
        _loaded(model, backend, tokenizer), lookup_tokens=lookup_tokens, shared_prefix=shared_prefix
    )
    found = engine.complete_tokens(prompts, stop=stop, max_new_tokens=max_new_tokens, batch=batch)
    for index, one in found:
        yield [(index, Completion(one.text, one.stop_reason, one.new_tokens))]
