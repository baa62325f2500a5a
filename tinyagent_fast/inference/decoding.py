"""Batched greedy generation, stopped by text or EOS: shared prefixes once, or left padding.

A plain Llama is run by `shared_llama` over prefixes that `grouping` chooses; every other model by
its own `generate`. Both write the same plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tinyagent_fast.errors import ModelError
from tinyagent_fast.inference.grouping import group_prompts
from tinyagent_fast.inference.lookup import PromptLookup, agreeing_tokens
from tinyagent_fast.inference.prefix_cache import Prefix, RowBatch, compute_prefix
from tinyagent_fast.prompts.tokens import PromptTokenizer
from tinyagent_fast.shared_prefix.shared_llama import LayerRunner, unsupported

if TYPE_CHECKING:
    import torch

StopReason = Literal["stop", "eos", "length"]

_STEP_COST_TOKENS = {"cpu": 24}
"""Prompt tokens that take as long as one step of a batch, by device; a rough figure is enough."""
_STEP_COST_TOKENS_ELSEWHERE = 256
_PLAN_TOKENS = 150
"""About what a plan of the published data takes with Llama's tokenizer."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote for one prompt, without the stop string and EOS."""

    text: str
    stop_reason: StopReason
    new_tokens: int


@contextmanager
def generating(model: Any, backend: str = "transformers") -> Iterator[None]:
    """Switch a model to generation and put everything back, so training goes on as if untouched.

    Args:
        model: The model, in training or not.
        backend: `unsloth` models have switches of their own.

    Yields:
        Nothing; inside, the model is in evaluation mode with its KV cache on, without gradients.
    """
    import torch

    was_training = model.training
    use_cache = model.config.use_cache
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    if backend == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad(), _autocast(model):
            yield
    finally:
        if backend == "unsloth" and was_training:
            FastLanguageModel.for_training(model)
        model.train(was_training)
        model.config.use_cache = use_cache
        torch.set_rng_state(cpu_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def _autocast(model: Any) -> AbstractContextManager[Any]:
    """Compute in the model's own 16 bits, as training does, even where parts are kept in fp32."""
    import torch

    dtype = getattr(model.config, "dtype", None)
    if torch.cuda.is_available() and dtype in (torch.bfloat16, torch.float16):
        return torch.autocast("cuda", dtype=dtype)
    return nullcontext()


def decoding_path(model: Any, backend: str = "transformers") -> str:
    """Say which way `complete` runs a model.

    Args:
        model: A causal language model.
        backend: What loaded it.

    Returns:
        `shared prefix`, or `left padding` with the reason.
    """
    if backend == "unsloth":
        return "left padding: Unsloth generates with kernels of its own"
    reason = unsupported(model)
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
    """Complete prompts greedily, one batch after the other; call it inside `generating`.

    Args:
        model: A causal language model with `generate`.
        tokenizer: Encoded the prompts.
        prompts: Token ids of each prompt.
        batch: Prompts generated together.
        max_new_tokens: Where a completion is broken off.
        stop: Text that ends a completion.
        backend: What loaded the model.
        shared_prefix: Whether prefixes are computed once where `decoding_path` says so.
        lookup_tokens: Guesses from the prompt that each step may check at once; completions stay
            the same. Left padding goes without them.

    Yields:
        For each batch the prompts' indices and completions, longest prompts first among those that
        share a prefix.
    """
    if shared_prefix and decoding_path(model, backend) == "shared prefix":
        yield from _complete_shared(
            model, tokenizer, prompts, batch, _Limits(max_new_tokens, stop, lookup_tokens)
        )
        return
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        rows = [prompts[index] for index in indices]
        completions = _complete_batch(model, tokenizer, rows, max_new_tokens, stop)
        yield list(zip(indices, completions, strict=True))


@dataclass(frozen=True)
class _Limits:
    max_new_tokens: int
    stop: str
    lookup_tokens: int


def _complete_shared(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Sequence[list[int]],
    batch: int,
    limits: _Limits,
) -> Iterator[list[tuple[int, Completion]]]:
    import torch

    llama = LayerRunner(model)
    step_cost = _STEP_COST_TOKENS.get(llama.device.type, _STEP_COST_TOKENS_ELSEWHERE)
    cost = step_cost * min(limits.max_new_tokens, _PLAN_TOKENS)
    for group in group_prompts(prompts, batch=batch, batch_cost_tokens=cost):
        with torch.no_grad():
            prefix = compute_prefix(llama, prompts[group.indices[0]][: group.prefix_tokens])
        for start in range(0, len(group.indices), batch):
            indices = group.indices[start : start + batch]
            answers = [_Answer(tokenizer, prompts[index], limits) for index in indices]
            with torch.no_grad():
                _write_together(llama, prefix, answers, limits)
            yield [(i, answer.completion()) for i, answer in zip(indices, answers, strict=True)]


def _write_together(
    llama: LayerRunner, prefix: Prefix, answers: Sequence[_Answer], limits: _Limits
) -> None:
    """Let all answers be written to their ends; those that are there make room."""
    suffixes = [answer.prompt[prefix.tokens :] for answer in answers]
    room_tokens = limits.max_new_tokens + limits.lookup_tokens
    rows = RowBatch(llama, prefix, suffixes, room_tokens=room_tokens)
    live = list(answers)
    written = [[token] for token in rows.next_ids]
    while True:
        for row in reversed(range(len(live))):
            live[row].write(written[row])
            if live[row].reason is not None:
                rows.drop(row)
                live[row] = live[-1]
                live.pop()
        if not live:
            return
        fed = [[answer.ids[-1], *answer.draft()] for answer in live]
        found = rows.step(fed)
        for row, (tokens, following) in enumerate(zip(fed, found, strict=True)):
            kept = 1 + agreeing_tokens(tokens[1:], following)
            rows.keep(row, kept)
            found[row] = following[:kept]
        written = found


class _Answer:
    """What is written behind one prompt, until it ends."""

    def __init__(self, tokenizer: PromptTokenizer, prompt: list[int], limits: _Limits) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.limits = limits
        self.ids: list[int] = []
        self.reason: StopReason | None = None
        self.lookup = PromptLookup(prompt) if limits.lookup_tokens else None

    def write(self, ids: Sequence[int]) -> None:
        """Add tokens, up to the first that ends the answer."""
        window = _window_tokens(self.limits.stop)
        for token in ids:
            if token == self.tokenizer.eos_id:
                self.reason = "eos"
                return
            self.ids.append(token)
            if self.limits.stop in self.tokenizer.decode(self.ids[-window:]):
                self.reason = "stop"
                return
            if len(self.ids) == self.limits.max_new_tokens:
                self.reason = "length"
                return
        if self.lookup is not None:
            self.lookup.extend(ids)

    def draft(self) -> list[int]:
        """Guess tokens, never more than may still be written behind the one that comes anyway."""
        if self.lookup is None:
            return []
        left = self.limits.max_new_tokens - len(self.ids) - 1
        return self.lookup.draft(min(self.limits.lookup_tokens, left))

    def completion(self) -> Completion:
        """Give the text before its end."""
        assert self.reason is not None
        text = self.tokenizer.decode_continuation(self.prompt, self.ids).split(self.limits.stop)[0]
        return Completion(text, self.reason, len(self.ids))


def _window_tokens(stop: str) -> int:
    """Give a number of last tokens that hold the stop string and what precedes it.

    Every token holds a byte or more.
    """
    return len(stop.encode()) + 4


def left_padded(
    rows: Sequence[list[int]], pad_id: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left, so that all end where generation begins.

    Args:
        rows: Token ids.
        pad_id: The id that fills up.
        device: Where the tensors go.

    Returns:
        input_ids_BT and attention_mask_BT.
    """
    import torch

    longest = max(len(row) for row in rows)
    ids = [[pad_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _complete_batch(
    model: Any, tokenizer: PromptTokenizer, rows: list[list[int]], max_new_tokens: int, stop: str
) -> list[Completion]:
    from transformers import StoppingCriteriaList

    input_ids_BT, mask_BT = left_padded(rows, tokenizer.pad_id, model.device)
    prompt_tokens = input_ids_BT.shape[1]
    limit = getattr(model, "max_seq_length", None)
    if limit is not None and prompt_tokens > limit:
        raise ModelError(
            f"a prompt of {prompt_tokens} tokens",
            f"the model was loaded for {limit} tokens, and Unsloth would cut the prompt",
            "raise --model.max-length-tokens",
        )
    stopper = _StopOnText(tokenizer, stop, prompt_tokens, len(rows))
    output_BT = model.generate(
        input_ids=input_ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_id,
        eos_token_id=tokenizer.eos_id,
        stopping_criteria=StoppingCriteriaList([stopper]),
    )
    return [
        _finish(tokenizer, row, new_ids, stopper.finished_at[index], stop)
        for index, (row, new_ids) in enumerate(
            zip(rows, output_BT[:, prompt_tokens:].tolist(), strict=True)
        )
    ]


def _finish(
    tokenizer: PromptTokenizer,
    prompt: list[int],
    new_ids: list[int],
    stopped: int | None,
    stop: str,
) -> Completion:
    ids, reason = new_ids, "length"
    if stopped is not None:
        ids, reason = new_ids[:stopped], "stop"
    elif tokenizer.eos_id in new_ids:
        ids, reason = new_ids[: new_ids.index(tokenizer.eos_id)], "eos"
    text = tokenizer.decode_continuation(prompt, ids).split(stop)[0]
    return Completion(text, reason, len(ids))  # type: ignore[arg-type]


class _StopOnText:
    """Marks a row as done when its new text holds the stop string, however that was tokenised."""

    def __init__(
        self, tokenizer: PromptTokenizer, stop: str, prompt_tokens: int, rows: int
    ) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_tokens = prompt_tokens
        self.finished_at: list[int | None] = [None] * rows
        self.window_tokens = _window_tokens(stop)

    def __call__(self, input_ids_BT: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        import torch

        new_tokens = input_ids_BT.shape[1] - self.prompt_tokens
        window = min(self.window_tokens, new_tokens)
        for index, ids in enumerate(input_ids_BT[:, -window:].tolist()):
            if self.finished_at[index] is not None:
                continue
            ended = self.tokenizer.eos_id in ids
            if not ended and self.stop in self.tokenizer.decode(ids):
                self.finished_at[index] = new_tokens
        return torch.tensor(
            [done is not None for done in self.finished_at], device=input_ids_BT.device
        )
