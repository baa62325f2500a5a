"""Plans from vLLM, on CUDA machines that have it: paged, with automatic prefix cache.

It runs a merged folder, so what it measures is what a vLLM server of that folder would answer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyagent_fast.errors import ModelError, reading
from tinyagent_fast.inference.engine import (
    Completion,
    Limits,
    OnToken,
    Prompt,
    StopReason,
    check_room,
)
from tinyagent_fast.plans.gbnf import without_surrogates
from tinyagent_fast.prompts.builder import encode_prompts
from tinyagent_fast.prompts.tokens import PromptTokenizer

_HANDED_OVER = 256
"""Prompts given to vLLM in one call, so that progress shows."""


class VllmEngine:
    """A merged model in vLLM; prompts go in as the token ids of training."""

    def __init__(self, folder: Path, tokenizer: PromptTokenizer, *, context_tokens: int) -> None:
        """Load the model.

        Args:
            folder: A merged folder of `export`.
            tokenizer: Of the run.
            context_tokens: Room for prompt and plan together, at most; the model may have less.

        Raises:
            ModelError: vLLM is not installed, or cannot load the folder.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise ModelError(
                "engine vllm",
                f"the package vllm cannot be used: {error}",
                "pip install -e '.[vllm]' in the project's folder, into an environment of its own, "
                "with CUDA; or leave --engine out",
            ) from error
        self.folder, self.tokenizer = folder, tokenizer
        fix = "make it with `tinyagent-fast export --to merged`, on a machine with CUDA"
        with reading(f"merged folder {folder} in vLLM", fix):
            self.context_tokens = min(context_tokens, _model_tokens(folder))
            self._model: Any = LLM(
                model=str(folder),
                tokenizer=str(folder),
                max_model_len=self.context_tokens,
                enable_prefix_caching=True,
                seed=0,
            )

    @property
    def compute_dtype(self) -> str:
        """What vLLM computes in, which it chooses by the folder's config.json."""
        dtype = self._model.llm_engine.model_config.dtype
        return str(dtype).removeprefix("torch.")

    def identity(self) -> Mapping[str, Any]:
        """Name vLLM's version; the folder's hash is known to who exported it."""
        from importlib.metadata import version

        return {"engine": "vllm", "vllm": version("vllm")}

    def notes(self, prompts: Sequence[Prompt]) -> list[str]:
        """Say that batches are vLLM's own."""
        return ["decoding: vLLM with automatic prefix caching; it batches as it sees fit"]

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts greedily, as `Engine` says.

        vLLM decides itself how many prompts it decodes together; `on_token` is called once a
        prompt, with its whole text.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        def sampling(prompt: Prompt) -> Any:
            held = None
            if prompt.grammar is not None:
                held = StructuredOutputsParams(grammar=without_surrogates(prompt.grammar))
            return SamplingParams(
                temperature=0.0,
                max_tokens=limits.max_new_tokens,
                stop=[limits.stop],
                stop_token_ids=sorted(self.tokenizer.end_ids),
                skip_special_tokens=False,
                structured_outputs=held,
            )

        rows = encode_prompts(self.tokenizer, prompts)
        check_room(max(map(len, rows), default=0), self.context_tokens)
        for start in range(0, len(rows), _HANDED_OVER):
            started = time.perf_counter()
            part = rows[start : start + _HANDED_OVER]
            requests = [{"prompt_token_ids": ids} for ids in part]
            held = [sampling(prompt) for prompt in prompts[start : start + _HANDED_OVER]]
            answers = self._model.generate(requests, held, use_tqdm=False)
            seconds = (time.perf_counter() - started) / len(part)
            for at, (ids, answer) in enumerate(zip(part, answers, strict=True), start):
                completion = _completion(answer, limits.stop, len(ids), seconds)
                if on_token is not None:
                    on_token(at, completion.text)
                yield at, completion

    def close(self) -> None:
        """Let the model go; vLLM frees its memory with it."""
        self._model = None


def _model_tokens(folder: Path) -> int:
    """Read how many tokens a model was made for; one that does not say so sets no limit."""
    path = folder / "config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return int(known.get("max_position_embeddings", sys.maxsize))


def _completion(answer: Any, stop: str, prompt_tokens: int, seconds: float) -> Completion:
    output = answer.outputs[0]
    reason: StopReason = "length"
    if output.finish_reason == "stop":
        reason = "stop" if output.stop_reason == stop else "eos"
    return Completion(
        text=output.text.split(stop)[0],
        stop_reason=reason,
        new_tokens=len(output.token_ids),
        prompt_tokens=prompt_tokens,
        cached_tokens=answer.num_cached_tokens or 0,
        seconds=seconds,
    )
