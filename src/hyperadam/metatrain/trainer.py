"""Meta-training as a resumable sequence of meta-steps."""

from __future__ import annotations

import dataclasses
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from hyperadam.device import existing_device
from hyperadam.errors import ConfigError
from hyperadam.kernels import differentiable_rule
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.inner_runs import InnerRuns, of_form
from hyperadam.ranks import ALONE, Ranks
from hyperadam.rule import APART_FROM_THETA
from hyperadam.tasks import make_generator, make_task
from hyperadam.weights import load_weights


@dataclasses.dataclass(frozen=True)
class MetaStep:
    """What one meta-step showed.

    Attributes:
        index: of the meta-step, from 1.
        run: of the inner run, from 0; of the first, where several are side by side.
        inner_step: inner steps that each run has taken.
        meta_loss: of the unroll.
        inner_loss: mean inner loss of the unroll after its updates.
        kl: mean KL term of the unroll.
        grad_norm: Euclidean norm of the meta-gradient, before clipping.
        applied: False where the meta-gradient was not finite; theta then stays as it is and the
            next inner runs begin.
    """

    index: int
    run: int
    inner_step: int
    meta_loss: float
    inner_loss: float
    kl: float
    grad_norm: float
    applied: bool


HISTORY_COLUMNS = tuple(field.name for field in dataclasses.fields(MetaStep))


def _initial_theta(config: MetaTrainConfig) -> dict[str, Tensor]:
    """What a run begins with.

    Weights to begin with may differ in how their rule scales steps: theta serves both.

    Raises:
        ConfigError, WeightsError: the weights to begin with are of another rule, or can't be read.
    """
    if config.init is None:
        return config.rule.init_theta(make_generator(config.seed, "theta"))
    weights = load_weights(config.init)
    ours, theirs = config.rule, weights.rule
    apart = [name for name in APART_FROM_THETA if hasattr(ours, name) and hasattr(theirs, name)]
    rule = dataclasses.replace(theirs, **{name: getattr(ours, name) for name in apart})
    if rule != config.rule:
        begun, asked = rule.to_dict(), config.rule.to_dict()
        differing = [name for name in begun | asked if begun.get(name) != asked.get(name)]
        raise ConfigError(
            f"the weights {config.init!r} are of another rule: "
            + ", ".join(f"{name} is {begun.get(name)}, not {asked.get(name)}" for name in differing)
        )
    return weights.theta


class MetaTrainer:
    """Truncated backpropagation through inner runs, one meta-step at a time.

    K = ``interleaved_runs`` times B = ``tasks_per_step`` inner runs are in flight: B are unrolled
    side by side in a meta-step, and the K groups take turns. All that is random in inner run r is a
    pure function of the seed and r, so the state between two meta-steps is what :meth:`state`
    returns and nothing else. Several processes take equal shares of the B runs, and step with the
    mean of their meta-gradients; they all hold the same theta.

    Args:
        config: the recipe.
        data_dir: where the inner tasks' data are; see :func:`hyperadam.tasks.load_data`.
        ranks: the processes.

    Attributes:
        in_flight: the groups of inner runs, the next meta-step's first; none when all is done.
        next_run: the first inner run that has not begun.

    Raises:
        ConfigError: the device is not there, the backend can't serve, the inner runs of a
            meta-step can't be shared equally, or the weights to begin with are of another rule.
        WeightsError: the weights to begin with can't be read.
    """

    def __init__(
        self, config: MetaTrainConfig, data_dir: Path | None = None, ranks: Ranks = ALONE
    ) -> None:
        if config.tasks_per_step % ranks.count:
            raise ConfigError(
                f"{ranks.count} processes can't share the inner runs of a meta-step equally: set "
                f"tasks_per_step, {config.tasks_per_step}, to a multiple of {ranks.count}"
            )
        self.ranks = ranks
        self.config = config
        self._base_tasks = {name: make_task(name, data_dir) for name in config.task_names}
        self.device = existing_device(config.device)
        self.rule = differentiable_rule(config.rule, config.backend, self.device)
        theta = _initial_theta(config)
        self.theta = {name: value.to(self.device).requires_grad_() for name, value in theta.items()}
        trained = config.trained_parameters
        self._frozen = [value for name, value in self.theta.items() if name not in trained]
        self.meta_optimizer = torch.optim.Adam(
            self.theta.values(), lr=config.meta_lr, weight_decay=config.meta_weight_decay
        )
        self.history: list[MetaStep] = []
        self.in_flight: deque[InnerRuns] = deque()
        self.next_run = 0
        self._begin_runs()

    @property
    def finished(self) -> bool:
        return not self.in_flight

    def _begin(self, run: int) -> InnerRuns:
        return InnerRuns(self.config, run, self._base_tasks, self.rule, self.ranks, self.theta)

    def _begin_runs(self) -> None:
        """Have as many in flight as there should be, or all that are left."""
        config = self.config
        while len(self.in_flight) < config.interleaved_runs and self.next_run < config.inner_runs:
            self.in_flight.append(self._begin(self.next_run))
            self.next_run += config.tasks_per_step

    def meta_step(self) -> MetaStep:
        """One unroll of the runs whose turn it is, and one step of the meta-optimizer."""
        config = self.config
        runs = self.in_flight.popleft()
        reached = runs.steps.stop
        result = runs.unroll(self.theta)
        self.meta_optimizer.zero_grad()
        result.meta_loss.backward()
        for value in self._frozen:  # what has no gradient, the meta-optimizer leaves alone
            value.grad = None
        meta_loss, inner_loss, kl = self._mean_over_ranks(
            result.meta_loss.detach(), result.loss_TB.mean(), result.kl_TB.mean()
        )
        grad_norm = torch.nn.utils.get_total_norm(
            [value.grad for value in self.theta.values() if value.grad is not None]
        )
        applied = bool(torch.isfinite(grad_norm))
        if applied:
            if config.meta_grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self.theta.values(), config.meta_grad_clip, grad_norm
                )
            for group in self.meta_optimizer.param_groups:
                group["lr"] = config.meta_lr_at(len(self.history))
            self.meta_optimizer.step()
        record = MetaStep(
            index=len(self.history) + 1,
            run=runs.run,
            inner_step=reached,
            meta_loss=meta_loss,
            inner_loss=inner_loss,
            kl=kl,
            grad_norm=float(grad_norm),
            applied=applied,
        )
        self.history.append(record)
        if applied and not runs.finished:
            self.in_flight.append(runs)
        self._begin_runs()
        return record

    def _mean_over_ranks(self, *losses: Tensor) -> list[float]:
        """Means of the losses over all processes, and of the meta-gradient, in its place."""
        if self.ranks.count == 1:
            return [float(loss) for loss in losses]
        grads = [value.grad for value in self.theta.values() if value.grad is not None]
        mean = self.ranks.mean(
            torch.cat([grad.flatten() for grad in grads] + [torch.stack(losses)])
        )
        sizes = [grad.numel() for grad in grads]
        for grad, piece in zip(grads, mean[: sum(sizes)].split(sizes), strict=True):
            grad.copy_(piece.view_as(grad))
        return mean[sum(sizes) :].tolist()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next meta-step depends on, and the history; on the CPU.

        Several processes call this together. The first one's has the inner runs of all, and any
        number of processes can go on from it; that of the others has their own share.
        """
        tensors = {
            "next_run": torch.tensor(self.next_run),
            "position": torch.tensor(
                [(runs.run, runs.unrolls) for runs in self.in_flight], dtype=torch.int64
            ).reshape(-1, 2),
            "history": torch.tensor(
                [dataclasses.astuple(record) for record in self.history], dtype=torch.float64
            ).reshape(-1, len(HISTORY_COLUMNS)),
        }
        for number, runs in enumerate(self.in_flight):
            for name, value in runs.state().items():
                tensors[f"inner.{number}.{name}"] = value
        for name, value in self.theta.items():
            tensors[f"theta.{name}"] = value.detach()
            for key, moment in self.meta_optimizer.state[value].items():
                tensors[f"meta_optimizer.{key}.{name}"] = moment
        return {name: value.cpu() for name, value in tensors.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up the run where :meth:`state` left it.

        Raises:
            KeyError, ValueError, OverflowError, RuntimeError: the tensors are not those of a run
                with this configuration.
        """
        config = self.config
        position = tensors["position"]
        if position.shape[1:] != (2,) or len(position) > config.interleaved_runs:
            raise ValueError(f"positions of shape {tuple(position.shape)}")
        next_run = int(tensors["next_run"])
        in_flight = position[:, 0].tolist()
        for run in [next_run, *in_flight]:
            if not 0 <= run <= config.inner_runs or run % config.tasks_per_step != 0:
                raise ValueError("the position is outside the run")
        missing = len(in_flight) < config.interleaved_runs and next_run < config.inner_runs
        twice = len(set(in_flight)) < len(in_flight)
        if missing or twice or any(run >= next_run for run in in_flight):
            raise ValueError("the inner runs in flight are not those that should be")
        history = tensors["history"]
        if history.shape[1:] != (len(HISTORY_COLUMNS),):
            raise ValueError(f"the history has shape {tuple(history.shape)}")
        self.history = [
            MetaStep(
                index=int(row[0]),
                run=int(row[1]),
                inner_step=int(row[2]),
                meta_loss=row[3],
                inner_loss=row[4],
                kl=row[5],
                grad_norm=row[6],
                applied=bool(row[7]),
            )
            for row in history.tolist()
        ]
        saved: dict[int, dict[str, Tensor]] = {}
        for index, (name, value) in enumerate(self.theta.items()):
            with torch.no_grad():
                value.copy_(of_form(tensors[f"theta.{name}"], value))
            if f"meta_optimizer.step.{name}" in tensors:
                moments = {"step": torch.tensor(0.0), "exp_avg": value, "exp_avg_sq": value}
                saved[index] = {
                    key: of_form(tensors[f"meta_optimizer.{key}.{name}"], like).clone()
                    for key, like in moments.items()
                }
                if not bool(saved[index]["step"] >= 1):
                    raise ValueError("the meta-optimizer's step is no count")
        self.meta_optimizer.load_state_dict(self.meta_optimizer.state_dict() | {"state": saved})
        self.next_run = next_run
        self.in_flight.clear()
        for number, (run, unrolls) in enumerate(position.tolist()):
            prefix = f"inner.{number}."
            own = {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
            runs = self._begin(run)
            runs.load_state(unrolls, own)
            self.in_flight.append(runs)
