"""What writes text: the one interface to a model, whatever runs it.

Behind it stand torch (`torch_engine`), llama.cpp (`llama_cpp`) and vLLM (`vllm`). Evaluation,
validation during training, export gates, chat, the local page and the Python API all ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tinyagent_fast.errors import ModelError

EngineName = Literal["torch", "gguf", "vllm"]
StopReason = Literal["stop", "eos", "length"]
OnToken = Callable[[int, str], None]
"""Called with a prompt's index and the text that was added; an empty text says that the prompt is
still being read. Whatever it raises ends the generation and reaches the caller."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked: the two texts that a client sends to a chat endpoint."""

    system: str | None
    user: str
    grammar: str | None = None
    """GBNF that the completion follows, as `plans.gbnf` writes it; None leaves it free. A
    completion that is broken off is the beginning of a text that follows it."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote for one prompt, without the stop string and EOS."""

    text: str
    stop_reason: StopReason
    new_tokens: int
    prompt_tokens: int
    cached_tokens: int = 0
    """Tokens of the prompt that had been computed before, for this or another prompt."""
    seconds: float = 0.0
    """Its share of the time in which it was written beside others; shares add up to the whole."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far completions go, and how many are written together."""

    stop: str
    """Text that ends a completion and is no part of it."""
    max_new_tokens: int
    """Where a completion is broken off."""
    batch: int = 1
    """Prompts completed together."""


class Engine(Protocol):
    """A model that completes prompts greedily."""

    @property
    def compute_dtype(self) -> str:
        """What it computes in, such as `float32`; in 16 bits near-ties can fall either way."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Name what completions depend on, as plain values."""
        ...

    def notes(self, prompts: Sequence[Prompt]) -> list[str]:
        """Say what a user should know before these prompts are completed, a line each."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts greedily.

        Yields:
            Each prompt's index and completion, in any order, as soon as it is there. Closing the
            iterator ends the generation.

        Raises:
            ModelError: A prompt does not fit into the model's context.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; a second call does nothing."""
        ...


def check_room(longest_tokens: int, room_tokens: int) -> None:
    """Raise ModelError if the longest prompt leaves no room for a completion."""
    if longest_tokens >= room_tokens:
        raise ModelError(
            f"a prompt of {longest_tokens} tokens",
            f"the model has a context of {room_tokens} tokens for the prompt and what it writes",
            "shorten the request or the system text, or take a base model with a longer context",
        )
