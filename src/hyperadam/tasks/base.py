"""What a task is, and how its random choices are made."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
"""A network's parameters by name."""

Batch = Any
"""What a task's loss needs beside the parameters: tensors, in tuples, lists or dictionaries.

Each task has its own form. All that two tasks of one structure differ in (examples, targets,
scales) is in their batches, so the loss of one, with ``torch.func.vmap``, serves many side by side.
"""


def map_batches(function: Callable[..., Tensor], *batches: Batch) -> Batch:
    """``function`` of the tensors in the same place of batches of one form, as one such batch."""
    first = batches[0]
    if isinstance(first, Tensor):
        return function(*batches)
    if isinstance(first, dict):
        return {key: map_batches(function, *(batch[key] for batch in batches)) for key in first}
    return type(first)(map_batches(function, *parts) for parts in zip(*batches, strict=True))


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of one form as one batch, whose tensors have a new first dimension."""
    return map_batches(lambda *tensors: torch.stack(tensors), *batches)


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """A batch on a device."""
    return map_batches(lambda tensor: tensor.to(device, non_blocking=True), batch)


class Task(Protocol):
    """A training problem. Everything about it is a pure function of its arguments: two runs with
    the same seeds see the same numbers, and a run can be taken up at any step.
    """

    @property
    def name(self) -> str:
        """Says everything: data, network, variant."""

    def init_params(self, generator: torch.Generator) -> Params:
        """Fresh parameters, float32."""

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of step 0, 1, ... of a run whose data order has this seed."""

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """The mean loss, of shape (), in the parameters' dtype."""

    def validate(self, params: Params) -> dict[str, float]:
        """Metrics on held-out data by name; empty where there is none."""


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose of a run; different purposes are independent.

    Args:
        seed: the run's.
        purpose: words and numbers that name the use.

    Returns:
        An integer from 0 to 2^63 - 1.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed` of ``seed`` and ``purpose``."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@functools.lru_cache(maxsize=64)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_examples, generator=make_generator(seed, "epoch", epoch))


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of a step's examples: every epoch in a fresh random order, the last, incomplete
    batch of it left out.
    """
    size = min(batch_size, num_examples)
    epoch, position = divmod(step, num_examples // size)
    return _epoch_order(num_examples, seed, epoch)[position * size : (position + 1) * size]
