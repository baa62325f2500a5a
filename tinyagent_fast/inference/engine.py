"""What writes text: the one interface to a model, whatever runs it.

Behind it stand torch (`torch_engine`), llama.cpp (`llama_cpp`) and vLLM (`vllm`). Evaluation,
validation during training, export gates, chat, the local page and the Python API all ask it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

StopReason = Literal["stop", "eos", "length"]
OnToken = Callable[[int, str], None]
"""Called with a prompt's index and the text that was added; an empty text says that the prompt is
still being read. Whatever it raises ends the generation and reaches the caller."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked: the two texts that a client sends to a chat endpoint."""

    system: str | None
    user: str


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
    """Time of its batch, divided by the prompts in it."""


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
        *,
        stop: str,
        max_new_tokens: int,
        batch: int = 1,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts greedily.

        Args:
            prompts: What to answer.
            stop: Text that ends a completion and is no part of it.
            max_new_tokens: Where a completion is broken off.
            batch: Prompts completed together.
            on_token: Called while text is being written.

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
