"""Does a batch give the same plans as one prompt at a time? Asked before every sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinyagent_fast.inference.decoding import complete
from tinyagent_fast.plans.grammar import PlanError, parse_plan, render_plan
from tinyagent_fast.prompts.tokens import PromptTokenizer


@dataclass(frozen=True)
class ParityReport:
    """What the comparison found, and the batch that is safe to use."""

    prompts: int
    asked_batch: int
    safe_batch: int
    tried: tuple[tuple[int, int], ...]
    """Each batch size tried and how many plans differed from those at batch 1."""

    @property
    def agrees(self) -> bool:
        """Whether the batch asked for may be used."""
        return self.safe_batch == self.asked_batch

    def sentence(self) -> str:
        """Say the outcome in one line.

        Returns:
            For the terminal and the report.
        """
        if not self.prompts:
            return f"batch {self.asked_batch}: not compared with batch 1"
        if self.agrees:
            return f"batch {self.asked_batch} = batch 1 on {self.prompts} prompts"
        seen = ", ".join(f"{wrong} of {self.prompts} at batch {size}" for size, wrong in self.tried)
        return f"plans differ from batch 1 ({seen}); falling back to batch {self.safe_batch}"

    def to_json(self) -> dict[str, Any]:
        """Give plain values for a JSON report."""
        return asdict(self)


def compare_batches(
    model: Any,
    tokenizer: PromptTokenizer,
    prompts: Sequence[list[int]],
    *,
    batch: int,
    max_new_tokens: int,
    stop: str,
    sample: int = 8,
) -> ParityReport:
    """Generate a few prompts singly and together and find the largest batch that agrees.

    Args:
        model: The model, inside `generating`.
        tokenizer: Encoded the prompts.
        prompts: All prompts; a sample spread over their lengths is compared.
        batch: The batch asked for.
        max_new_tokens: As in the sweep.
        stop: As in the sweep.
        sample: How many prompts to compare; 0 skips.

    Returns:
        The report; `safe_batch` is `batch` when all plans agree.
    """
    if not sample or batch == 1 or not prompts:
        return ParityReport(0, batch, batch, ())
    by_length = sorted(prompts, key=len)
    count = min(sample, len(prompts))
    chosen = [by_length[i * (len(by_length) - 1) // max(1, count - 1)] for i in range(count)]

    def plans(size: int) -> list[set[str]]:
        """Give each prompt's plans; prompts are repeated until they fill a batch."""
        rows = [chosen[i % count] for i in range(max(size, count))]
        found: list[set[str]] = [set() for _ in range(count)]
        for pairs in complete(
            model, tokenizer, rows, batch=size, max_new_tokens=max_new_tokens, stop=stop
        ):
            for index, completion in pairs:
                found[index % count].add(_canonical(completion.text))
        return found

    return find_safe_batch(plans, batch, count)


def find_safe_batch(
    answers: Callable[[int], Sequence[object]], batch: int, prompts: int
) -> ParityReport:
    """Halve a batch until its answers are those of one prompt at a time.

    Args:
        answers: Gives the answers to the sample at a batch size, in the same order every time.
        batch: The batch asked for.
        prompts: Prompts of the sample.

    Returns:
        The report; `safe_batch` is 1 if no batch agrees.
    """
    single = answers(1)
    tried: list[tuple[int, int]] = []
    size = batch
    while size > 1:
        differing = sum(a != b for a, b in zip(single, answers(size), strict=True))
        tried.append((size, differing))
        if not differing:
            break
        size //= 2
    return ParityReport(prompts, batch, size, tuple(tried))


def _canonical(text: str) -> str:
    """Reduce a text to its plan, so that only what matters is compared."""
    try:
        return render_plan(parse_plan(text))
    except PlanError:
        return text
