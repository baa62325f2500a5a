"""What the trained model itself says: losses, greedy plans and next-token distributions.

Export compares every file it makes with these answers; they come from transformers in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyagent_fast.config import Config, Weights
from tinyagent_fast.data.schema import Example
from tinyagent_fast.inference.decoding import complete, generating
from tinyagent_fast.models.loading import LoadedModel, load_for_generation
from tinyagent_fast.plans.grammar import END_OF_PLAN
from tinyagent_fast.prompts.templates import render
from tinyagent_fast.prompts.tokens import IGNORED, EncodedRow, PromptTokenizer


@dataclass(frozen=True)
class Answers:
    """Loss on rows and greedy plans for their prompts."""

    loss: float
    plans: tuple[str, ...]


def encode(tokenizer: PromptTokenizer, examples: Sequence[Example]) -> list[EncodedRow]:
    """Encode examples as training does.

    Args:
        tokenizer: Of the run.
        examples: Plans.

    Returns:
        Their rows.
    """
    chat = tokenizer.chat if tokenizer.prompt_format == "chat" else None
    return tokenizer.encode_rows(
        [(e.key, render(e, tokenizer.prompt_format, chat)) for e in examples]
    )


@contextmanager
def reference_model(
    config: Config, base: str, adapter: Path | None, *, weights: Weights = "fp32"
) -> Iterator[LoadedModel]:
    """Load a model for comparison and free it afterwards.

    Args:
        config: The run's config.
        base: Folder of the base or of the merged model.
        adapter: Put on it, or none.
        weights: `fp32`, or what the run was trained on.

    Yields:
        The model, by plain transformers.
    """
    import gc

    import torch

    model = replace(config.model, backend="transformers", weights=weights, base=base)
    loaded = load_for_generation(replace(config, model=model), base, adapter)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def answers(
    loaded: LoadedModel,
    rows: Sequence[EncodedRow],
    *,
    batch: int,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Answers:
    """Measure the loss of rows, and complete their prompts greedily.

    Args:
        loaded: The model.
        rows: With labels.
        batch: Prompts generated together.
        max_new_tokens: Where a plan is broken off.
        on_progress: Called with plans done and in all.

    Returns:
        Loss in nats per supervised token, and the plans in the rows' order.
    """
    plans = [""] * len(rows)
    done = 0
    with generating(loaded.model, loaded.backend):
        loss = _loss(loaded, rows)
        for pairs in complete(
            loaded.model,
            loaded.tokenizer,
            [row.input_ids[: row.prompt_tokens] for row in rows],
            batch=batch,
            max_new_tokens=max_new_tokens,
            stop=END_OF_PLAN,
        ):
            for index, completion in pairs:
                plans[index] = completion.text
            done += len(pairs)
            on_progress(done, len(rows))
    return Answers(loss, tuple(plans))


def _loss(loaded: LoadedModel, rows: Sequence[EncodedRow]) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    total, tokens = 0.0, 0
    for row in rows:
        ids_1T = torch.tensor([row.input_ids], device=loaded.device)
        spots = [at for at, label in enumerate(row.labels[1:]) if label != IGNORED]
        labels_N = torch.tensor([row.labels[at + 1] for at in spots], device=loaded.device)
        total += float(cross_entropy(_logits(loaded, ids_1T, spots), labels_N, reduction="sum"))
        tokens += len(spots)
    return total / tokens


def _logits(loaded: LoadedModel, ids_1T: Any, spots: list[int]) -> Any:
    """Give the logits after some positions only, because all of them would not fit in memory."""
    import torch

    keep_N = torch.tensor(spots, device=ids_1T.device)
    output = loaded.model(input_ids=ids_1T, use_cache=False, logits_to_keep=keep_N)
    return output.logits[0].float()


def spread_positions(rows: Sequence[EncodedRow], count: int) -> list[tuple[int, int]]:
    """Choose positions at which distributions are compared: all over the rows, ends included.

    Args:
        rows: Encoded rows; mistakes of RoPE show only far from their beginnings.
        count: How many positions in all.

    Returns:
        Pairs of row and position; the position's token is the last one read.
    """
    each = max(2, count // len(rows))
    chosen = []
    for index, row in enumerate(rows):
        last = len(row.input_ids) - 2
        # Half of them in the completion, which is what the model was trained to write.
        first = row.prompt_tokens - 1
        spots = {round(first * k / (each - each // 2)) for k in range(each - each // 2)}
        spots |= {first + round((last - first) * k / (each // 2)) for k in range(each // 2)}
        chosen += [(index, spot) for spot in sorted(spots)]
    return chosen


def next_logprobs(
    loaded: LoadedModel, rows: Sequence[EncodedRow], positions: Sequence[tuple[int, int]]
) -> NDArray[np.float32]:
    """Give the distributions of the next token at positions of rows.

    Args:
        loaded: The model.
        rows: Encoded rows.
        positions: Pairs of row and position.

    Returns:
        Natural log-probabilities, positions x vocabulary.
    """
    import torch

    found: list[Any] = []
    with generating(loaded.model, loaded.backend):
        for index, row in enumerate(rows):
            spots = [spot for at, spot in positions if at == index]
            ids_1T = torch.tensor([row.input_ids[: max(spots) + 1]], device=loaded.device)
            logits_NV = _logits(loaded, ids_1T, spots)
            found.append(torch.log_softmax(logits_NV, dim=-1).cpu().numpy())
    stacked: NDArray[np.float32] = np.concatenate(found).astype(np.float32)
    return stacked
