"""The processes of one launch, by torchrun or accelerate: who works, who waits, what is summed.

One process is the ordinary case, and then nothing here does anything. With several, the main one
alone builds, writes and prints; all must call these methods in the same order. accelerate joins
them. Its own ways of waiting are not used: they tell no process that the main one has failed, and
with NCCL they keep a GPU busy and end after ten minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from tinyagent_fast.errors import ConfigError, UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
"""How long processes wait for one that builds, reads or generates."""
_HEAD_START_S = 5.0
"""Time for the main process to report an error that all have; then the launcher ends the rest."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process's place in its launch."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Place among the processes of this machine; the number of its GPU."""
    local_count: int = 1
    group: Any = None
    """Where processes talk to each other, apart from gradients; None before they have joined."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that builds, writes and prints."""
        return self.rank == 0

    def on_main_process(self, work: Callable[[], T]) -> T:
        """Let the main process work and give its result, which must be picklable, to all.

        Raises:
            SystemExit: In the others, when the main one failed; it reports the error itself.
        """
        if self.count == 1:
            return work()
        from torch.distributed import broadcast_object_list

        outcome: list[Any] = [None, None]  # result, exit code
        if self.is_main_process:
            try:
                outcome[0] = work()
            except BaseException as error:
                code = 130 if isinstance(error, KeyboardInterrupt) else 3
                code = getattr(error, "code", code) or 0  # of a SystemExit, where None is success
                failed = [None, getattr(error, "exit_code", code)]
                broadcast_object_list(failed, src=0, group=self.group)
                raise
        broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise SystemExit(outcome[1])
        result: T = outcome[0]
        return result

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Let the main process work, then the others, who find what it left; each has a result."""
        done: list[T] = []
        self.on_main_process(lambda: done.append(work()))
        return done[0] if done else work()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            from torch.distributed import barrier

            barrier(group=self.group)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Add up figures of all processes; each gets the sums."""
        return self._reduced(values, "SUM")

    def all_reduce_min(self, value: float) -> float:
        """Give the smallest of all processes' figures to each."""
        return self._reduced((value,), "MIN")[0]

    def any(self, flag: bool) -> bool:
        """Say whether something holds in any process."""
        return self.all_reduce_sum(float(flag))[0] > 0

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if self.count == 1:
            return list(values)
        import torch
        from torch.distributed import ReduceOp, all_reduce

        tensor = torch.tensor(values, dtype=torch.float64)
        all_reduce(tensor, op=getattr(ReduceOp, how), group=self.group)
        reduced: list[float] = tensor.tolist()
        return reduced

    def sum_tensors(self, tensors: Sequence[Any]) -> None:
        """Add up tensors of all processes, in place; all must have the same ones."""
        if self.count == 1 or not tensors:
            return
        import torch

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def shard(self, items: Sequence[T]) -> list[T]:
        """Take every `count`-th item, so that neighbours of similar length are spread."""
        return list(items[self.rank :: self.count])

    @contextmanager
    def main_process_reports(self) -> Iterator[None]:
        """Let the main process report an error first: one that fails makes a launcher end all."""
        try:
            yield
        except UserError:
            if not self.is_main_process:
                time.sleep(_HEAD_START_S)
            raise

    def leave(self) -> None:
        """Take leave of the others at the end of the program."""
        if self.group is not None:
            from accelerate import PartialState

            self.wait()
            PartialState().destroy_process_group()


ALONE = Processes()
"""The one process of an ordinary run."""


def launch_environment() -> Processes:
    """Read this process's place from what a launcher has set; needs no torch.

    Raises:
        ConfigError: A launcher's variable is missing or is no number.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count <= 1:
            return ALONE
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} in the environment",
            f"WORLD_SIZE, RANK and LOCAL_RANK must be numbers, as a launcher sets them ({error})",
            "start with torchrun or accelerate launch, or unset WORLD_SIZE",
        ) from error
    return Processes(rank=rank, count=count, local_rank=local_rank, local_count=local_count)


def init_processes() -> Processes:
    """Join the other processes of the launch, and take this process's GPU; once only.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    return _join(launch_environment())


@cache
def _join(here: Processes) -> Processes:
    if here.count == 1:
        return here
    import torch
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    if cuda and here.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{here.local_count} processes on a machine with {torch.cuda.device_count()} GPU(s)",
            "each process needs a GPU of its own",
            f"--nproc-per-node={torch.cuda.device_count()}",
        )
    if not cuda:
        # accelerate calls it cpu:0, with which torch.load cannot restore an optimizer.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    PartialState(cpu=not cuda)
    return replace(here, group=torch.distributed.new_group(backend="gloo", timeout=_PATIENCE))
