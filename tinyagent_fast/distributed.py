"""The processes of one launch, by torchrun or accelerate: who works, who waits, what is summed.

One process is the ordinary case, and then nothing here does anything. With several, the first one
alone builds, writes and prints; all must call these methods in the same order.
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
"""Time for the first process to report an error that all have; then the launcher ends the rest."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process's place in its launch."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """Place among the processes of this machine; the number of its GPU."""
    local_count: int = 1
    group: Any = None
    """Where processes talk to each other, apart from gradients; none before they have joined."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that builds, writes and prints."""
        return self.rank == 0

    def on_main_process(self, work: Callable[[], T]) -> T:
        """Let the first process work and give its result to all.

        Args:
            work: Its result must be picklable where there are several processes.

        Returns:
            The first process's result.

        Raises:
            SystemExit: In the others, when the first one failed; it reports the error itself.
        """
        if self.count == 1:
            return work()
        import torch.distributed as dist

        outcome: list[Any] = [None, None]
        if self.is_main_process:
            try:
                outcome[0] = work()
            except BaseException as error:
                code = getattr(error, "code", 3) or 0  # of a SystemExit, where None is success
                failed = [None, getattr(error, "exit_code", code)]
                dist.broadcast_object_list(failed, src=0, group=self.group)
                raise
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise SystemExit(outcome[1])
        result: T = outcome[0]
        return result

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Let the first process work, then the others, who find the files that it has left.

        Args:
            work: What every process does.

        Returns:
            Each process's own result.
        """
        done: list[T] = []
        self.on_main_process(lambda: done.append(work()))
        return done[0] if done else work()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Add up figures of all processes.

        Args:
            values: This process's figures.

        Returns:
            The sums, the same in every process.
        """
        return self._reduced(values, "SUM")

    def all_reduce_min(self, value: float) -> float:
        """Give the smallest of all processes' figures.

        Args:
            value: This process's figure.

        Returns:
            The smallest, the same in every process.
        """
        return self._reduced((value,), "MIN")[0]

    def any(self, flag: bool) -> bool:
        """Say whether something holds in any process.

        Args:
            flag: Whether it holds in this one.

        Returns:
            The same in every process.
        """
        return self.all_reduce_sum(float(flag))[0] > 0

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if self.count == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how), group=self.group)
        reduced: list[float] = tensor.tolist()
        return reduced

    def shard(self, items: Sequence[T]) -> list[T]:
        """Take this process's part of some work.

        Args:
            items: All of it, in the same order in every process.

        Returns:
            Every `count`-th item, so that neighbours of similar length are spread.
        """
        return list(items[self.rank :: self.count])

    @contextmanager
    def main_process_reports(self) -> Iterator[None]:
        """Hold back an error in a later process until the first one has had time to report it.

        Yields:
            Nothing; a launcher ends all processes as soon as one has failed.
        """
        try:
            yield
        except UserError:
            if not self.is_main_process:
                time.sleep(_HEAD_START_S)
            raise

    def leave(self) -> None:
        """Take leave of the others at the end of the program."""
        if self.group is not None:
            import torch.distributed as dist

            self.wait()
            dist.destroy_process_group()


def launch_environment() -> Processes:
    """Read what a launcher has set; needs no torch.

    Returns:
        This process's place; without a launcher the only one.

    Raises:
        ConfigError: A launcher's variable is missing or is no number.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count <= 1:
            return Processes()
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
    """Join the other processes of the launch, and take this process's GPU.

    Returns:
        This process's place; the same object at every call.

    Raises:
        ConfigError: There are more processes than GPUs.
    """
    return _join(launch_environment())


@cache
def _join(here: Processes) -> Processes:
    if here.count == 1:
        return here
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        cards = torch.cuda.device_count()
        if here.local_rank >= cards:
            raise ConfigError(
                f"{here.local_count} processes on a machine with {cards} GPU(s)",
                "each process needs a GPU of its own",
                f"--nproc-per-node={cards}",
            )
        torch.cuda.set_device(here.local_rank)
    else:
        # accelerate calls it cpu:0, with which torch.load cannot restore an optimizer.
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return replace(here, group=dist.new_group(backend="gloo", timeout=_PATIENCE))
