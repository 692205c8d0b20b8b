"""What the optimizer will cost for a number of parameters, before anyone allocates."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from decimal import Decimal

import torch

from hyperadam.errors import ConfigError, unknown_name
from hyperadam.kernels import TileLayout, choose_backend
from hyperadam.optim import VariationalHyperAdam
from hyperadam.optim.learned_optimizer import StateDtype
from hyperadam.optim.memory import free_memory
from hyperadam.weights import Weights

STATE_DTYPES: dict[StateDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAM_STATE_BYTES = 8
BUFFER_ITEM_BYTES = 4
REFERENCE_STEP_BYTES = 17
"""That the reference takes while it steps, for each number of the state: the state before and
after it, and what is between (measured at H = 20: 13 to 17)."""

MAX_PARAMS = 10**15
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}

MEASURED_PARAMS = 1_000_000
MEASURED_PARAMS_REFERENCE = 100_000
"""Fewer: the reference is slow and needs much memory while it runs."""
MEASURED_PARAMS_ADAM = 16_000_000
"""More: a step of Adam has to leave the caches, as that of a large network does."""
ADAM_BYTES = 16
"""That a parameter takes in the measurement of Adam: itself, gradient and state."""
BUDGET_SECONDS = 0.5
MAX_STEPS = 50


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that an optimizer of some parameters takes.

    Attributes:
        numbers: of the state, for each parameter.
        bytes_a_param: of the state.
        state: of all parameters.
        buffers: what a step works in: gradient (and direction), mean and log-variance.
        step: what the reference backend takes beyond that while it steps, about; 0 for kernels.
        adam: the state of Adam for the same parameters, without buffers.
    """

    numbers: int
    bytes_a_param: int
    state: int
    buffers: int
    adam: int
    step: int = 0

    @property
    def total(self) -> int:
        """State and buffers, which stay."""
        return self.state + self.buffers

    @property
    def peak(self) -> int:
        """With what a step takes beyond them."""
        return self.total + self.step


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the optimizer will cost.

    Attributes:
        num_params: N.
        state_dtype: of the state.
        device: where it would be.
        backend: that computes the step there.
        memory: in bytes.
        free_bytes: memory that the device has free; None where it does not tell.
        step_seconds: of one step, scaled linearly from ``measured_params``.
        adam_step_seconds: of a step of torch's Adam, from ``adam_measured_params``.
        measured_params: parameters of the problem that our time was measured with.
        adam_measured_params: likewise, of Adam's: more, since its time a parameter grows once
            the caches no longer hold them.
        threads: of PyTorch, in the measurement.
    """

    num_params: int
    state_dtype: StateDtype
    device: str
    backend: str
    memory: Memory
    free_bytes: int | None
    step_seconds: float
    adam_step_seconds: float
    measured_params: int
    adam_measured_params: int
    threads: int

    @property
    def fits(self) -> bool | None:
        """Whether :attr:`Memory.peak` fits into the free memory; None where that is not known."""
        return None if self.free_bytes is None else self.memory.peak <= self.free_bytes


def parse_count(text: str) -> int:
    """A number of parameters: ``11200000``, ``11.2M``, ``270k``, ``1.5B``.

    Raises:
        ConfigError: no such number, or one below 1 or above 10^15.

    Example:
        >>> parse_count("11.2M")
        11200000
    """
    match = re.fullmatch(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)([kmbg]?)", text.strip(), re.IGNORECASE)
    value = Decimal(0)
    if match is not None:
        value = Decimal(match[1]) * SUFFIXES[match[2].lower()]
    if value < 1 or value > MAX_PARAMS or value != int(value):
        raise ConfigError(
            f"a number of parameters is a whole number from 1 to 10^15, such as 11200000, 11.2M, "
            f"270k or 1.5B; got {text!r}"
        )
    return int(value)


def memory_estimate(
    weights: Weights, num_params: int, state_dtype: StateDtype, backend: str = "cpu"
) -> Memory:
    """The memory of the optimizer's state and buffers, in bytes.

    Padding to whole tiles is left out: at most 31 coordinates for each parameter tensor.

    Args:
        weights: of the optimizer.
        num_params: N.
        state_dtype: a name of :data:`STATE_DTYPES`.
        backend: that computes the step.

    Raises:
        ConfigError: an unknown ``state_dtype``.
    """
    if state_dtype not in STATE_DTYPES:
        raise ConfigError(unknown_name("state_dtype", state_dtype, STATE_DTYPES))
    numbers = TileLayout.of(weights.rule).num_rows
    bytes_a_param = numbers * STATE_DTYPES[state_dtype].itemsize
    buffers = 2 + weights.rule.has_variance
    return Memory(
        numbers=numbers,
        bytes_a_param=bytes_a_param,
        state=num_params * bytes_a_param,
        buffers=num_params * buffers * BUFFER_ITEM_BYTES,
        adam=num_params * ADAM_STATE_BYTES,
        step=num_params * numbers * REFERENCE_STEP_BYTES * (backend == "reference"),
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"the device must be cpu or cuda; got {name!r}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch built without CUDA
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"the device {name!r} can't be used: {reason}") from None
    return device


def _step_seconds(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    num_params: int,
    device: torch.device,
) -> float:
    """Median time of an optimizer's step on a problem of this size, the first one left out."""
    param = torch.nn.Parameter(torch.zeros(num_params, device=device))
    generator = torch.Generator(device).manual_seed(0)
    param.grad = torch.randn(num_params, generator=generator, device=device)
    optimizer = make([param])
    optimizer.step()
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (time.perf_counter() - begin < BUDGET_SECONDS and len(times) < MAX_STEPS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def estimate(
    weights: Weights,
    num_params: int,
    *,
    state_dtype: StateDtype = "float32",
    device: str = "cpu",
    measured_params: int | None = None,
) -> Estimate:
    """Memory by arithmetic, step times by a measurement of about two seconds, scaled linearly.

    Args:
        weights: of the optimizer.
        num_params: N.
        state_dtype: ``"float32"`` or ``"bfloat16"``.
        device: ``"cpu"`` or ``"cuda"``.
        measured_params: parameters to measure with, if N is not smaller; None: for Adam 16
            million, or what a quarter of the free memory holds; for ours a million, or a hundred
            thousand where only the reference backend serves.

    Raises:
        ConfigError: an unknown ``state_dtype``, or a device that can't be used.
        WeightsError: weights of another rule.
    """
    where = _device(device)
    free = free_memory(where)
    backend = choose_backend("auto", weights.rule, torch.float32, where)
    memory = memory_estimate(weights, num_params, state_dtype, backend)
    adam_params = measured_params or MEASURED_PARAMS_ADAM
    if measured_params is None and free is not None:
        adam_params = max(1, min(adam_params, free // 4 // ADAM_BYTES))
    adam_params = min(adam_params, num_params)
    if measured_params is None:
        slow = backend == "reference"
        measured_params = MEASURED_PARAMS_REFERENCE if slow else MEASURED_PARAMS
    measured_params = min(measured_params, num_params)
    ours = _step_seconds(
        lambda params: VariationalHyperAdam(params, weights=weights, state_dtype=state_dtype),
        measured_params,
        where,
    )
    adam = _step_seconds(torch.optim.Adam, adam_params, where)
    return Estimate(
        num_params=num_params,
        state_dtype=state_dtype,
        device=device,
        backend=backend,
        memory=memory,
        free_bytes=free,
        step_seconds=ours * num_params / measured_params,
        adam_step_seconds=adam * num_params / adam_params,
        measured_params=measured_params,
        adam_measured_params=adam_params,
        threads=torch.get_num_threads(),
    )
