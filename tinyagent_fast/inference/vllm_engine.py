"""Plans from vLLM, on CUDA machines that have it: paged, with automatic prefix cache.

It runs a merged folder, so what it measures is what a vLLM server of that folder would answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinyagent_fast.data.schema import Example
from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.decoding import Completion
from tinyagent_fast.inference.engine import StopReason
from tinyagent_fast.inference.engines import Completions, encode_prompts
from tinyagent_fast.inference.parity import ParityReport
from tinyagent_fast.prompts.tokens import PromptTokenizer


class VllmEngine:
    """A merged model in vLLM; prompts go in as the token ids of training."""

    name = "vllm"

    def __init__(
        self, folder: Path, tokenizer: PromptTokenizer, *, context_tokens: int, seed: int = 0
    ) -> None:
        """Load the model.

        Args:
            folder: A merged folder of `export`.
            tokenizer: Of the run.
            context_tokens: Room for prompt and plan together.
            seed: Plans are greedy; vLLM asks for one anyway.

        Raises:
            ModelError: vLLM is not installed, or cannot load the folder.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise ModelError(
                "engine vllm",
                f"the package vllm cannot be used: {error}",
                "pip install 'tinyagent-fast[vllm]' into an environment of its own, with CUDA; or "
                "leave --engine out",
            ) from error
        self.folder, self.tokenizer = folder, tokenizer
        try:
            self._model = LLM(
                model=str(folder),
                tokenizer=str(folder),
                max_model_len=context_tokens,
                enable_prefix_caching=True,
                seed=seed,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(
                f"merged folder {folder}",
                f"vLLM cannot load it: {error}",
                "make it with `tinyagent-fast export --to merged`, on a machine with CUDA",
            ) from error

    def identity(self) -> Mapping[str, Any]:
        """Name vLLM's version; the folder's hash is known to who exported it.

        Returns:
            Plain values.
        """
        from importlib.metadata import version

        return {"engine": self.name, "vllm": version("vllm")}

    def notes(self, examples: Sequence[Example]) -> list[str]:
        """Say that batches are vLLM's own.

        Args:
            examples: What will be completed.

        Returns:
            One line.
        """
        return ["decoding: vLLM with automatic prefix caching; it batches as it sees fit"]

    def compare_batches(
        self,
        examples: Sequence[Example],
        *,
        batch: int,
        max_new_tokens: int,
        stop: str,
        sample: int,
    ) -> ParityReport:
        """Skip the comparison: vLLM puts batches together by itself, whatever is asked for.

        Args:
            examples: All that will be completed.
            batch: Taken as it is.
            max_new_tokens: Not used.
            stop: Not used.
            sample: Not used.

        Returns:
            A report that says nothing was compared.
        """
        return ParityReport(0, batch, batch, ())

    def complete(
        self, examples: Sequence[Example], *, batch: int, max_new_tokens: int, stop: str
    ) -> Completions:
        """Complete prompts greedily, many at a time.

        Args:
            examples: What to answer.
            batch: Prompts handed over at once, times 16, so that progress shows.
            max_new_tokens: Where a completion is broken off.
            stop: Text that ends a completion.

        Yields:
            Examples' indices and completions.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_new_tokens,
            stop=[stop],
            stop_token_ids=[self.tokenizer.eos_id],
            skip_special_tokens=False,
        )
        prompts = encode_prompts(self.tokenizer, examples)
        for start in range(0, len(prompts), 16 * batch):
            part = prompts[start : start + 16 * batch]
            requests = [{"prompt_token_ids": ids} for ids in part]
            answers = self._model.generate(requests, sampling, use_tqdm=False)
            yield [
                (start + at, _completion(answer.outputs[0], stop))
                for at, answer in enumerate(answers)
            ]


def _completion(output: Any, stop: str) -> Completion:
    reason: StopReason = "length"
    if output.finish_reason == "stop":
        reason = "stop" if output.stop_reason == stop else "eos"
    return Completion(output.text.split(stop)[0], reason, len(output.token_ids))
