"""A model in torch: the one greedy loop, in batches or for one prompt that is watched.

Prompts that begin alike are run over one prefix (`grouping`, `prefix_cache`), and so is a prompt
that begins like the last one. Every other model than those that `shared_prefix` can run is left to
its own `generate`, padded on the left. All ways write the same plans.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tinyagent_fast.inference.constraint import Constraint, Constraints
from tinyagent_fast.inference.engine import (
    Completion,
    Limits,
    OnToken,
    Prompt,
    StopReason,
    check_room,
)
from tinyagent_fast.inference.grouping import common_tokens, group_prompts
from tinyagent_fast.inference.lookup import PromptLookup
from tinyagent_fast.inference.prefix_cache import RowBatch, best_of
from tinyagent_fast.prompts.builder import encode_prompts
from tinyagent_fast.shared_prefix.forward import DecoderForward, unsupported
from tinyagent_fast.shared_prefix.prefix import NO_PREFIX, Prefix, compute_prefix

if TYPE_CHECKING:
    from tinyagent_fast.models.loading import LoadedModel
    from tinyagent_fast.prompts.tokens import PromptTokenizer

_CHUNK_TOKENS = 256
"""Tokens of a single prompt that are computed between two chances to break off."""
_STEP_COST_TOKENS = {"cpu": 24}
"""Prompt tokens that take as long as one step of a batch, by device; a rough figure is enough."""
_STEP_COST_TOKENS_ELSEWHERE = 256
_PLAN_TOKENS = 150
"""About what a plan of the published data takes with Llama's tokenizer."""


@contextmanager
def generating(loaded: LoadedModel) -> Iterator[None]:
    """Switch a model to generation and put everything back, so training goes on as if untouched.

    Inside, it is in evaluation mode with its KV cache on, without gradients, and computes in its
    own 16 bits where it has them.
    """
    model, unsloth = loaded.model, loaded.backend == "unsloth"
    was_training = model.training
    use_cache = model.config.use_cache
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if unsloth:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad(), loaded.autocast():
            yield
    finally:
        if unsloth and was_training:
            FastLanguageModel.for_training(model)
        model.train(was_training)
        model.config.use_cache = use_cache
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


class TorchEngine:
    """A model in torch, left in its mode whenever the caller has control."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        lookup_tokens: int = 0,
        shared_prefix: bool = True,
        threads: int | None = None,
    ) -> None:
        """Use a loaded model, whose weights stay as they are while the engine is used.

        Args:
            loaded: The model, also one in training.
            lookup_tokens: Guesses from the prompt that each step checks at once; plans stay the
                same. The model's own `generate` goes without them.
            shared_prefix: False lets every model use its own `generate`, to compare with.
            threads: CPU threads of torch, in the whole process; None leaves them.
        """
        self.loaded = loaded
        self.lookup_tokens = lookup_tokens
        self.shared_prefix = shared_prefix
        self._kept: tuple[Sequence[int], Prefix] = ((), NO_PREFIX)
        """The tokens of the last single prompt and its answer, with their keys and values."""
        self._constraints: Constraints | None = None
        """Made for the first prompt that has a grammar."""
        if threads is not None:
            torch.set_num_threads(threads)

    @property
    def compute_dtype(self) -> str:
        """What the model computes in."""
        return self.loaded.compute_dtype

    def identity(self) -> Mapping[str, Any]:
        """Name backend and precision; weights and settings are known to who loaded the model."""
        return {"backend": self.loaded.backend, "compute_dtype": self.compute_dtype}

    def notes(self, prompts: Sequence[Prompt] = ()) -> list[str]:
        """Say which way the model runs; prompts are encoded as in training."""
        reason = self._why_padded()
        if reason is not None:
            without = ", without guesses from the prompt" if self.lookup_tokens else ""
            return [f"decoding: left padding: {reason}{without}"]
        guesses = f", {self.lookup_tokens} guesses a step" if self.lookup_tokens else ""
        return [f"decoding: shared prefix{guesses}"]

    def _why_padded(self) -> str | None:
        """Say why prefixes are not shared; None where they are."""
        if not self.shared_prefix:
            return "asked for"
        return unsupported(self.loaded.model, "decoding")

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        on_token: OnToken | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts greedily, as `Engine.generate` says.

        Keys and values of a single prompt are kept for the next one, and `on_token` gets an empty
        text after each chunk of it.
        """
        yield from self.complete_tokens(
            encode_prompts(self.loaded.tokenizer, prompts),
            limits,
            on_token,
            grammars=[prompt.grammar for prompt in prompts],
        )

    def complete_tokens(
        self,
        prompts: Sequence[list[int]],
        limits: Limits,
        on_token: OnToken | None = None,
        *,
        grammars: Sequence[str | None] = (),
    ) -> Iterator[tuple[int, Completion]]:
        """Complete prompts that are token ids already; otherwise as `generate`.

        `grammars` has one for each prompt, or is empty.
        """
        room = self._room_tokens(prompts)
        all_answers = [
            _Answer(
                tokenizer=self.loaded.tokenizer,
                index=index,
                prompt=prompt,
                stop=limits.stop,
                most_tokens=min(limits.max_new_tokens, room - len(prompt)),
                on_token=on_token,
                constraint=self._constraint(grammar),
            )
            for index, (prompt, grammar) in enumerate(
                zip(prompts, grammars or [None] * len(prompts), strict=True)
            )
        ]
        if self._why_padded() is not None:
            batches = self._padded(all_answers, limits.batch)
        elif len(prompts) == 1:
            batches = self._single(all_answers[0])
        else:
            batches = self._grouped(all_answers, limits.batch)
        started = time.perf_counter()
        for answers in batches:
            seconds = (time.perf_counter() - started) / len(answers)
            yield from ((one.index, one.completion(seconds)) for one in answers)
            started = time.perf_counter()

    def close(self) -> None:
        """Forget the last prompt."""
        self._kept = ((), NO_PREFIX)

    def _constraint(self, grammar: str | None) -> Constraint | None:
        if grammar is None:
            return None
        if self._constraints is None:
            self._constraints = Constraints(self.loaded.tokenizer)
        return self._constraints.begin(grammar)

    def _room_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tell how many tokens prompt and completion may have."""
        room: int = getattr(self.loaded.model.config, "max_position_embeddings", sys.maxsize)
        check_room(max(map(len, prompts), default=0), room)
        return room

    def _grouped(self, answers: Sequence[_Answer], batch: int) -> Iterator[Sequence[_Answer]]:
        """Run each group of prompts over its prefix, which is computed once."""
        forward = DecoderForward(self.loaded.model)
        step_cost = _STEP_COST_TOKENS.get(forward.device.type, _STEP_COST_TOKENS_ELSEWHERE)
        longest = max((answer.most_tokens for answer in answers), default=0)
        prompts = [answer.prompt for answer in answers]
        cost = step_cost * min(longest, _PLAN_TOKENS)
        for group in group_prompts(prompts, batch=batch, batch_cost_tokens=cost):
            prefix: Prefix | None = None
            for start in range(0, len(group.indices), batch):
                together = [answers[index] for index in group.indices[start : start + batch]]
                with generating(self.loaded):
                    for answer in together[prefix is None :]:
                        answer.cached_tokens = group.prefix_tokens
                    if prefix is None:
                        prefix = compute_prefix(forward, together[0].prompt[: group.prefix_tokens])
                    self._write_together(self._rows(forward, prefix, together), together)
                yield together

    def _single(self, answer: _Answer) -> Iterator[Sequence[_Answer]]:
        """Run one prompt over what is kept of the last one, in chunks; keep what was computed."""
        forward, prompt = DecoderForward(self.loaded.model), answer.prompt
        with generating(self.loaded):
            kept_ids, kept = self._kept
            answer.cached_tokens = min(common_tokens(kept_ids, prompt), len(prompt) - 1)
            prefix = kept.first(answer.cached_tokens)
            while len(prompt) - prefix.tokens > _CHUNK_TOKENS:
                chunk = prompt[prefix.tokens : prefix.tokens + _CHUNK_TOKENS]
                prefix = compute_prefix(forward, chunk, behind=prefix)
                self._kept = (prompt[: prefix.tokens], prefix)
                if answer.on_token is not None:
                    answer.on_token(answer.index, "")
            rows = self._rows(forward, prefix, [answer])
            try:
                self._write_together(rows, [answer])
            finally:
                # Guesses that the model agreed with may stand behind the end of the answer.
                written = prompt + answer.ids
                prefix = rows.as_prefix(0).first(len(written))
                self._kept = (written[: prefix.tokens], prefix)
        yield [answer]

    def _rows(
        self, forward: DecoderForward, prefix: Prefix, answers: Sequence[_Answer]
    ) -> RowBatch:
        suffixes = [answer.prompt[prefix.tokens :] for answer in answers]
        most = max(answer.most_tokens for answer in answers)
        return RowBatch(forward, prefix, suffixes, room_tokens=most + self.lookup_tokens)

    def _write_together(self, rows: RowBatch, answers: Sequence[_Answer]) -> None:
        """Let all answers be written to their ends; those that are there make room."""
        live = list(answers)
        guesses = [PromptLookup(one.prompt if self.lookup_tokens else ()) for one in answers]
        written = [
            one.agreed([], [token], partial(rows.best_of, row))
            for row, (one, token) in enumerate(zip(live, rows.next_ids, strict=True))
        ]
        while True:
            for row in reversed(range(len(live))):
                live[row].write(written[row])
                guesses[row].extend(written[row] if self.lookup_tokens else ())
                if live[row].reason is not None:
                    if len(live) == 1:
                        return
                    rows.drop(row)
                    live[row], guesses[row] = live[-1], guesses[-1]
                    live.pop()
                    guesses.pop()
            drafts = [
                lookup.draft(min(self.lookup_tokens, one.left_tokens - 1))
                for one, lookup in zip(live, guesses, strict=True)
            ]
            found = rows.step([[one.ids[-1], *d] for one, d in zip(live, drafts, strict=True)])
            written = [
                one.agreed(draft, following, partial(rows.best_of, row))
                for row, (one, draft, following) in enumerate(zip(live, drafts, found, strict=True))
            ]
            for row, tokens in enumerate(written):
                rows.keep(row, len(tokens))

    def _padded(self, answers: Sequence[_Answer], batch: int) -> Iterator[Sequence[_Answer]]:
        """Let the model's own `generate` complete the longest prompts first."""
        answers = sorted(answers, key=lambda answer: -len(answer.prompt))
        for start in range(0, len(answers), batch):
            together = answers[start : start + batch]
            with generating(self.loaded):
                self._generate_padded(together)
            yield together

    def _generate_padded(self, answers: Sequence[_Answer]) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        prompts = [answer.prompt for answer in answers]
        input_ids_BT, mask_BT = left_padded(prompts, tokenizer.pad_id, model.device)

        def written(ids_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            for answer, token in zip(answers, ids_BT[:, -1].tolist(), strict=True):
                if answer.reason is None:
                    answer.write([token])
            done = [answer.reason is not None for answer in answers]
            return torch.tensor(done, device=ids_BT.device)

        def held(_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
            for answer, scores_V in zip(answers, scores_BV, strict=True):
                if answer.reason is None and answer.constraint is not None:
                    most_likely = int(scores_V.argmax())
                    token = answer.constraint.choose(most_likely, partial(best_of, scores_V))
                    scores_V.fill_(float("-inf"))[token] = 0.0
            return scores_BV

        model.generate(
            input_ids=input_ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=max(answer.most_tokens for answer in answers),
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_id,
            eos_token_id=sorted(tokenizer.end_ids),
            logits_processor=LogitsProcessorList([held]),
            stopping_criteria=StoppingCriteriaList([written]),
        )


@dataclass(kw_only=True)
class _Answer:
    """What is written behind one prompt, until it ends."""

    tokenizer: PromptTokenizer
    index: int
    prompt: list[int]
    stop: str
    most_tokens: int
    on_token: OnToken | None
    constraint: Constraint | None
    cached_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    reason: StopReason | None = None
    _shown: int = 0

    @property
    def left_tokens(self) -> int:
        """Tokens that may still be written."""
        return self.most_tokens - len(self.ids)

    def agreed(
        self, draft: Sequence[int], following: Sequence[int], best_of: Callable[..., int]
    ) -> list[int]:
        """Take the model's tokens as far as it was guessed rightly what stands before them.

        Args:
            draft: The guesses.
            following: The most likely token behind the last one written and behind each guess.
            best_of: Gives the most likely token behind one of these, by its number, of a mask.
        """
        taken: list[int] = []
        for at, most_likely in enumerate(following):
            held = self.constraint
            taken.append(held.choose(most_likely, partial(best_of, at)) if held else most_likely)
            if draft[at : at + 1] != taken[at:] or (held and held.ended):
                break
        return taken

    def write(self, ids: Sequence[int]) -> None:
        """Add tokens, up to the first that ends the answer, and show what is certain."""
        # Every token holds a byte or more, so these hold the stop string and what precedes it.
        window_tokens = len(self.stop.encode()) + 4
        for token in ids:
            if token in self.tokenizer.end_ids:
                self.reason = "eos"
                break
            self.ids.append(token)
            if self.stop in self.tokenizer.decode(self.ids[-window_tokens:]):
                self.reason = "stop"
                break
            if not self.left_tokens:
                self.reason = "length"
                break
        if self.on_token is not None:
            text = self._text()
            certain = len(text) if self.reason is not None else certain_length(text, self.stop)
            if certain > self._shown:
                shown, self._shown = self._shown, certain
                self.on_token(self.index, text[shown:certain])

    def _text(self) -> str:
        return self.tokenizer.decode_continuation(self.prompt, self.ids).partition(self.stop)[0]

    def completion(self, seconds: float) -> Completion:
        """Give the text before its end."""
        assert self.reason is not None
        return Completion(
            text=self._text(),
            stop_reason=self.reason,
            new_tokens=len(self.ids),
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached_tokens,
            seconds=seconds,
        )


def certain_length(text: str, stop: str) -> int:
    """Count the characters that can be shown: no part of a stop string, no part of a character."""
    text = text.rstrip("\ufffd")
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)


def left_padded(
    rows: Sequence[list[int]], pad_id: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left, so that all end where generation begins: ids BT and mask BT."""
    longest = max(len(row) for row in rows)
    ids = [[pad_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
