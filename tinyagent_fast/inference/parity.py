"""Does a batch give the same plans as one prompt at a time? Asked before every sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinyagent_fast.inference.engine import Engine, Limits, Prompt
from tinyagent_fast.plans.grammar import canonical_plan

_SIXTEEN_BITS = ("bfloat16", "float16")
_NEAR_TIE_SHARE = 0.5
"""Most plans that may differ in 16 bits. There the sums of a batch are rounded otherwise than those
of one prompt, which decides near-ties; a fault, such as wrong padding, changes most plans."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What the comparison found, and the batch to use."""

    prompts: int
    asked_batch: int
    safe_batch: int
    tried: tuple[tuple[int, int], ...]
    """Each batch size tried and how many plans differed from those at batch 1."""
    near_ties: int = 0
    """Plans that differ at the batch to use, taken for near-ties of 16-bit arithmetic."""
    compute_dtype: str = "float32"

    @property
    def agrees(self) -> bool:
        """Whether the batch asked for may be used."""
        return self.safe_batch == self.asked_batch

    def sentence(self) -> str:
        """Say the outcome in one line."""
        if not self.prompts:
            return f"batch {self.asked_batch}: not compared with batch 1"
        kept = f"batch {self.safe_batch}"
        ties = (
            f": {self.near_ties} of {self.prompts} plans differ from batch 1, as near-ties in "
            f"{self.compute_dtype} can fall either way; {kept} is kept"
        )
        if self.agrees:
            return kept + (ties if self.near_ties else f" = batch 1 on {self.prompts} prompts")
        seen = ", ".join(f"{wrong} of {self.prompts} at batch {size}" for size, wrong in self.tried)
        return f"plans differ from batch 1 ({seen}); falling back to {kept}" + (
            ties if self.near_ties else ""
        )


def compare_batches(
    engine: Engine,
    prompts: Sequence[Prompt],
    limits: Limits,
    *,
    sample: int = 8,
) -> ParityReport:
    """Generate a few prompts singly and together, and halve the batch until the plans agree.

    An engine that computes in 16 bits may differ in few plans; see `ParityReport.near_ties`. Of
    the prompts a sample is compared, spread over their lengths; 0 skips.
    """
    dtype, batch = engine.compute_dtype, limits.batch
    if not sample or batch == 1 or not prompts:
        return ParityReport(
            prompts=0, asked_batch=batch, safe_batch=batch, tried=(), compute_dtype=dtype
        )
    by_length = sorted(prompts, key=lambda prompt: len(prompt.system or "") + len(prompt.user))
    count = min(sample, len(prompts))
    chosen = [by_length[i * (len(by_length) - 1) // max(1, count - 1)] for i in range(count)]
    allowed = int(_NEAR_TIE_SHARE * count) if dtype in _SIXTEEN_BITS else 0

    def plans(size: int) -> list[set[str]]:
        """Give each prompt's plans; prompts are repeated until they fill a batch."""
        rows = [chosen[i % count] for i in range(max(size, count))]
        found: list[set[str]] = [set() for _ in range(count)]
        for index, completion in engine.generate(rows, replace(limits, batch=size)):
            found[index % count].add(canonical_plan(completion.text))
        return found

    single = plans(1)
    tried: list[tuple[int, int]] = []
    first = size = min(batch, len(prompts))
    differing = 0
    while size > 1:
        differing = sum(a != b for a, b in zip(single, plans(size), strict=True))
        tried.append((size, differing))
        if differing <= allowed:
            break
        size //= 2
    return ParityReport(
        prompts=count,
        asked_batch=batch,
        safe_batch=batch if size == first else size,
        tried=tuple(tried),
        near_ties=differing if size > 1 else 0,
        compute_dtype=dtype,
    )
