"""The processes that work on one command together, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hyperadam.errors import HyperAdamError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

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

ASSEMBLY = timedelta(minutes=10)
"""How long the processes wait for each other at their start."""


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


def fresh_store(store: Store, rank: int, count: int) -> Store:
    """A part of the processes' store that no earlier start of them has written to.

    ``torchrun`` serves one store to all its restarts (PyTorch issue 135712), where the addresses of
    processes that have died would be taken for those of the living. So the first process names the
    part, and tells it each other one under a ticket that this process has drawn anew.

    Raises:
        HyperAdamError: not all processes came within ten minutes.
    """
    if count == 1:
        return store
    from torch.distributed.distributed_c10d import PrefixStore

    if rank == 0:
        part = uuid.uuid4().hex
        deadline = time.monotonic() + ASSEMBLY.total_seconds()
        while (here := 1 + store.add(f"{part}/joined", 0)) < count:
            if time.monotonic() > deadline:
                raise HyperAdamError(f"only {here} of {count} processes have come to the start")
            for other in range(1, count):
                if store.check([f"ticket/{other}"]):
                    store.set(f"part/{store.get(f'ticket/{other}').decode()}", part)
            time.sleep(0.05)
    else:
        ticket = uuid.uuid4().hex
        store.set(f"ticket/{rank}", ticket)
        part = store.get(f"part/{ticket}").decode()
        store.add(f"{part}/joined", 1)
    return PrefixStore(part, store)


@contextlib.contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, one of which this is; else this one alone.

    Numbers are sent by gloo on the CPU and by NCCL on GPUs, where there are some: each process
    then takes the one of its number on its machine as ``"cuda"``.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sets it
        yield ALONE
        return
    # Imported later, by what is used then, the first one's functions would have the group as their
    # default argument and keep it from ending: its threads then abort the process at its exit.
    import torch.distributed.nn.functional
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    store, rank, count = next(rendezvous("env://", timeout=ASSEMBLY))
    store = fresh_store(store, rank, count)
    distributed.init_process_group(store=store, rank=rank, world_size=count, timeout=PATIENCE)
    try:
        yield GroupRanks()
    finally:
        distributed.destroy_process_group()
