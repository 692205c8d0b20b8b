"""The processes that work on one command together, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from hyperadam.errors import HyperAdamError

T = TypeVar("T")


class Ranks:
    """One process alone; :class:`GroupRanks` is one of several.

    Attributes:
        rank: the number of this process, from 0. The first one writes files and talks.
        count: how many there are.
    """

    rank = 0
    count = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, vector: Tensor) -> Tensor:
        """Mean of a vector over all processes, the same bits in each."""
        return vector

    def gather(self, share_B: Tensor) -> Tensor:
        """All processes' shares of a tensor, joined along the first dimension in their order, on
        the CPU of the first one; the others have their own share back."""
        return share_B.cpu()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether any process says so, for each question."""
        return flags

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides. Its error is raised in all."""
        return decide()


ALONE = Ranks()

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: those that die are seen by ``torchrun``, and those that
work on an evaluation may take long."""


class GroupRanks(Ranks):
    """One of the processes of torch.distributed's default group."""

    def __init__(self) -> None:
        from torch import distributed

        self.rank = distributed.get_rank()
        self.count = distributed.get_world_size()

    def mean(self, vector: Tensor) -> Tensor:
        from torch import distributed

        total = vector.clone()
        distributed.all_reduce(total)
        return total / self.count

    def gather(self, share_B: Tensor) -> Tensor:
        from torch import distributed

        share_B = share_B.cpu().contiguous()
        shares = [torch.empty_like(share_B) for _ in range(self.count)] if self.first else None
        distributed.gather(share_B, shares)
        return share_B if shares is None else torch.cat(shares)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        from torch import distributed

        answers = torch.tensor(flags, dtype=torch.int32)
        distributed.all_reduce(answers, distributed.ReduceOp.MAX)
        return tuple(bool(answer) for answer in answers.tolist())

    def agree(self, decide: Callable[[], T]) -> T:
        from torch import distributed

        decided: list[Any] = [None, None]  # the value and the error
        if self.first:
            try:
                decided[0] = decide()
            except (HyperAdamError, OSError) as error:
                decided[1] = error
        distributed.broadcast_object_list(decided, src=0, device=torch.device("cpu"))
        value: T
        value, failure = decided
        if failure is not None:
            raise failure
        return value


@contextlib.contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, one of which this is; else this one alone.

    Numbers are sent by gloo on the CPU and by NCCL on GPUs, where there are some: each process
    then takes the one of its number on its machine as ``"cuda"``.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sets it
        yield ALONE
        return
    from torch import distributed

    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group(timeout=PATIENCE)
    try:
        yield GroupRanks()
    finally:
        distributed.destroy_process_group()
