"""What a CPU computes in, and with how many threads: timed once, on the way that training takes.

bf16 halves the time of a step where the processor has instructions for it, and takes several times
longer where it has none; one thread is often faster than all on a shared machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tinyagent_fast.config import Config
from tinyagent_fast.errors import count_of
from tinyagent_fast.models.loading import LoadedModel, in_bf16, may_take_bf16
from tinyagent_fast.models.threads import usable_cores
from tinyagent_fast.prompts.tokens import IGNORED

if TYPE_CHECKING:
    import torch

Rows = Sequence[dict[str, Any]]

_ROW_TOKENS, _SUPERVISED_TOKENS = 128, 32
"""Rows are cut to their last tokens for the timing, of which the very last carry the loss."""
_STEP_S = 0.4
"""Rows are added until a step takes about so long: six steps are made in all."""
_CLEARLY_FASTER = 1.15
"""More threads suffer most when another program runs, so they must win by this; so must bf16."""
_ALLOWED_LOSS_DIFFERENCE = 0.02
"""Relative. On real rows of SmolLM2-135M it was 0.0015: 0.7310 in fp32, 0.7321 in bf16."""


def choose_compute(
    loaded: LoadedModel,
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    step: Callable[[LoadedModel, Rows], torch.Tensor],
    say: Callable[[str], None],
) -> LoadedModel:
    """Time a short step with all threads and one, then in bf16; set and say what is fastest.

    Args:
        loaded: A model in fp32 on the CPU with an adapter to be trained.
        config: Its `model.cpu_compute` and `train.threads` may have decided already.
        rows: Training rows with input_ids.
        step: Makes forward and backward pass of a micro-batch as training does; gives the loss.
        say: Prints one line for the user.

    Returns:
        The model; its frozen weights are in bf16 from now on if that was chosen.
    """
    import torch

    cores, threads = usable_cores(), config.train.threads
    frozen = [parameter for parameter in loaded.model.parameters() if not parameter.requires_grad]
    torch.set_num_threads(threads or cores)
    half_possible = may_take_bf16(loaded, config)
    if half_possible and config.model.cpu_compute == "bf16":
        loaded, half_possible = in_bf16(loaded), False
    if not half_possible and (threads is not None or cores == 1):
        return loaded
    batch = [_cut(rows[at]) for at in range(min(len(rows), config.train.rows_per_batch))]
    one_row_s, _ = _timed(loaded, batch[:1], step)
    # Each thread may have rows of its own.
    batch = batch[: max(threads or cores, int(_STEP_S / one_row_s))]
    best_s, plain_loss = _timed(loaded, batch, step)
    said = [f"{best_s:.2f} s in {loaded.compute_dtype}"]
    if threads is None and cores != 1:
        torch.set_num_threads(1)
        alone_s, _ = _timed(loaded, batch, step)
        said.append(f"{alone_s:.2f} s with one thread")
        if best_s * _CLEARLY_FASTER < alone_s:
            torch.set_num_threads(cores)
        else:
            best_s = alone_s
    if half_possible:
        stored = [parameter.data for parameter in frozen]
        half = in_bf16(loaded)
        half_s, half_loss = _timed(half, batch, step)
        said.append(f"{half_s:.2f} s in bfloat16 (loss {plain_loss:.4f} and {half_loss:.4f})")
        near = abs(half_loss - plain_loss) <= _ALLOWED_LOSS_DIFFERENCE * abs(plain_loss)
        if near and half_s * _CLEARLY_FASTER < best_s:
            loaded, best_s = half, half_s
        else:
            for parameter, data in zip(frozen, stored, strict=True):
                parameter.data = data
    count = torch.get_num_threads()
    say(
        f"computing in {loaded.compute_dtype} with {count_of(count, 'thread')}: a short step "
        f"takes {', '.join(said)} (--model.cpu-compute and --train.threads set others)"
    )
    return loaded


def _cut(row: Mapping[str, Any]) -> dict[str, Any]:
    """Take the last tokens of a row, which differ from those of other rows."""
    ids = list(row["input_ids"])[-_ROW_TOKENS:]
    prompt = max(1, len(ids) - _SUPERVISED_TOKENS)
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def _timed(
    loaded: LoadedModel, batch: Rows, step: Callable[[LoadedModel, Rows], torch.Tensor]
) -> tuple[float, float]:
    """Make a step twice, without its optimizer; give the shorter time in seconds, and the loss."""
    import torch

    times, value = [], 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.random.fork_rng([]):
            result = step(loaded, batch)
        times.append(time.perf_counter() - started)
        value = float(result.detach())
        loaded.model.zero_grad(set_to_none=True)
        if times[0] > 2 * _STEP_S:
            break
    return min(times), value
