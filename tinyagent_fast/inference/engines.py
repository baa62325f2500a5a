"""Whatever writes plans for examples: a model in torch, or a GGUF file in llama.cpp's server.

Evaluation asks an engine for completions and need not know which one it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinyagent_fast.data.schema import Example
from tinyagent_fast.inference.decoding import (
    Completion,
    complete,
    decoding_path,
    generating,
)
from tinyagent_fast.inference.llama_cpp import LlamaServer
from tinyagent_fast.inference.parity import ParityReport, compare_batches, find_safe_batch
from tinyagent_fast.prompts.templates import prompt_messages, render_prompt
from tinyagent_fast.prompts.tokens import PromptTokenizer

if TYPE_CHECKING:
    from tinyagent_fast.models.loading import LoadedModel

Completions = Generator[list[tuple[int, Completion]], None, None]
"""Indices of examples with their completions, a batch at a time, in any order."""


class Engine(Protocol):
    """What evaluation needs of whatever writes plans."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """Name what completions depend on, as plain values."""
        ...

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Say what a user should know before these examples are completed."""
        ...

    def compare_batches(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        max_new_tokens: int,
        stop: str,
        sample: int,
    ) -> ParityReport:
        """Complete a sample singly and together, and find the largest batch that agrees."""
        ...

    def complete(
        self, examples: Sequence[Example], *, batch: int, max_new_tokens: int, stop: str
    ) -> Completions:
        """Complete the prompts of examples greedily; close the generator when stopping early."""
        ...


def encode_prompts(tokenizer: PromptTokenizer, examples: Sequence[Example]) -> list[list[int]]:
    """Encode the prompts of examples, exactly as training rows begin.

    Args:
        tokenizer: It holds the prompt format.
        examples: What to answer.

    Returns:
        Token ids of each prompt.
    """
    chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
    return tokenizer.encode_prompts(
        [render_prompt(e.system, e.user, tokenizer.prompt_format, chat) for e in examples]
    )


@dataclass(frozen=True)
class TransformersEngine:
    """A model in torch, left in its mode after every method."""

    loaded: LoadedModel
    lookup_tokens: int = 0
    """Guesses from the prompt that each step checks at once; plans stay the same."""

    @property
    def name(self) -> str:
        """The backend that built the model."""
        return self.loaded.backend

    def identity(self) -> Mapping[str, Any]:
        """Name the backend; weights and settings are known to who loaded the model.

        Returns:
            Plain values.
        """
        return {"backend": self.loaded.backend}

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Say which way the model runs; prompts are encoded as in training.

        Args:
            examples: What will be completed.

        Returns:
            One line.
        """
        path = decoding_path(self.loaded.model, self.loaded.backend)
        guesses = self.lookup_tokens if path == "shared prefix" else 0
        return [f"decoding: {path}" + (f", {guesses} guesses a step" if guesses else "")]

    def compare_batches(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        max_new_tokens: int,
        stop: str,
        sample: int,
    ) -> ParityReport:
        """Complete a sample at batch 1 and at the batch asked for.

        Args:
            examples: All that will be completed.
            batch: The batch asked for.
            max_new_tokens: As in the sweep.
            stop: As in the sweep.
            sample: How many to compare; 0 skips.

        Returns:
            The largest batch that gives the same plans.
        """
        with generating(self.loaded.model, self.loaded.backend):
            return compare_batches(
                self.loaded.model,
                self.loaded.tokenizer,
                encode_prompts(self.loaded.tokenizer, examples),
                batch=batch,
                max_new_tokens=max_new_tokens,
                stop=stop,
                sample=sample,
            )

    def complete(
        self, examples: Sequence[Example], *, batch: int, max_new_tokens: int, stop: str
    ) -> Completions:
        """Complete prompts in batches.

        Args:
            examples: What to answer.
            batch: Prompts generated together.
            max_new_tokens: Where a completion is broken off.
            stop: Text that ends a completion.

        Yields:
            For each batch the examples' indices and completions.
        """
        prompts = encode_prompts(self.loaded.tokenizer, examples)
        with generating(self.loaded.model, self.loaded.backend):
            yield from complete(
                self.loaded.model,
                self.loaded.tokenizer,
                prompts,
                batch=batch,
                max_new_tokens=max_new_tokens,
                stop=stop,
                backend=self.loaded.backend,
                lookup_tokens=self.lookup_tokens,
            )


class LlamaCppEngine:
    """A GGUF file, asked through the chat endpoint with its own template, as when it is served."""

    name = "llama.cpp"

    def __init__(self, server: LlamaServer, tokenizer: PromptTokenizer | None = None) -> None:
        """Use a running server.

        Args:
            server: It serves the file.
            tokenizer: The run's; if given, prompts are compared with those of training.
        """
        self.server = server
        self.tokenizer = tokenizer

    def identity(self) -> Mapping[str, Any]:
        """Name the file by its content, and the llama.cpp that runs it.

        Returns:
            Plain values.
        """
        settings = self.server.settings
        return {
            "engine": self.name,
            "xllamacpp": version("xllamacpp"),
            "model_sha256": _sha256(settings.model),
            "cache_type": settings.cache_type,
        }

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Count prompts that the file's template and vocabulary turn into other ids than training.

        Args:
            examples: What will be completed.

        Returns:
            One line; none without a tokenizer to compare with.
        """
        if self.tokenizer is None:
            return []
        trained = encode_prompts(self.tokenizer, examples)
        different = [
            example.key
            for example, ids in zip(examples, trained, strict=True)
            if self._prompt_ids(example) != ids
        ]
        if not different:
            return [f"all {len(examples)} prompts have the token ids of training"]
        return [
            f"{len(different)} of {len(examples)} prompts have other token ids than in training, "
            f"such as {different[0]}; a query with special tokens in it can be the reason, and so "
            "can a wrong template or vocabulary in the file"
        ]

    def _prompt_ids(self, example: Example) -> list[int]:
        """Encode a prompt as the chat endpoint does."""
        text = self.server.apply_template(prompt_messages(example.system, example.user))
        return self.server.tokenize(text, special=True, bos=True)

    def compare_batches(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        max_new_tokens: int,
        stop: str,
        sample: int,
    ) -> ParityReport:
        """Complete a sample one after the other and together, in halving numbers.

        Args:
            examples: All that will be completed.
            batch: The batch asked for; there are no more than the server has slots.
            max_new_tokens: As in the sweep.
            stop: As in the sweep.
            sample: How many to compare; 0 skips.

        Returns:
            The largest batch that gives the same texts.
        """
        batch = min(batch, self.server.settings.slots)
        if not sample or batch == 1 or not examples:
            return ParityReport(0, batch, batch, ())
        by_length = sorted(examples, key=lambda e: len(e.system or "") + len(e.user))
        count = min(max(sample, batch), len(examples))
        chosen = [by_length[i * (len(by_length) - 1) // max(1, count - 1)] for i in range(count)]

        def texts(size: int) -> list[str]:
            """Complete the sample, so many at a time."""
            found = [""] * count
            for pairs in self.complete(
                chosen, batch=size, max_new_tokens=max_new_tokens, stop=stop
            ):
                for index, completion in pairs:
                    found[index] = completion.text
            return found

        return find_safe_batch(texts, batch, count)

    def complete(
        self, examples: Sequence[Example], *, batch: int, max_new_tokens: int, stop: str
    ) -> Completions:
        """Complete prompts on the server's slots, those with the same beginning after one another.

        Args:
            examples: What to answer.
            batch: Prompts answered at once; there are no more than the server has slots.
            max_new_tokens: Where a completion is broken off.
            stop: Text that ends a completion.

        Yields:
            Each example's index and completion, as soon as it is there.
        """

        def answer(index: int) -> Completion:
            example = examples[index]
            messages = prompt_messages(example.system, example.user)
            return self.server.chat(messages, max_new_tokens=max_new_tokens, stop=stop).completion

        # A slot evaluates only what differs from its last prompt: equal beginnings are neighbours.
        order = sorted(
            range(len(examples)), key=lambda i: (examples[i].system or "", examples[i].user)
        )
        pool = ThreadPoolExecutor(min(batch, self.server.settings.slots))
        try:
            indices = {pool.submit(answer, index): index for index in order}
            for future in as_completed(indices):
                yield [(indices[future], future.result())]
        finally:
            # Requests under way are not waited for: they end with the server.
            pool.shutdown(wait=False, cancel_futures=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
