"""Meta-training as a resumable sequence of meta-steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from hyperadam.errors import ConfigError
from hyperadam.kernels import differentiable_rule
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.task_group import TaskGroup
from hyperadam.metatrain.unroll import InnerState, unroll
from hyperadam.ranks import ALONE, Ranks
from hyperadam.rule import RuleState
from hyperadam.tasks import (
    ConvexTask,
    RandomScaling,
    SumOfTasks,
    Task,
    derive_seed,
    make_generator,
    make_task,
)
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


def _existing_device(name: str) -> torch.device:
    """The device of a name, if it is there.

    Raises:
        ConfigError: it is not.
    """
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"device {name!r} is not there: PyTorch sees {count} CUDA devices")
    return device


def _initial_theta(config: MetaTrainConfig) -> dict[str, Tensor]:
    """What a run begins with.

    Raises:
        ConfigError, WeightsError: the weights to begin with are of another rule, or can't be read.
    """
    if config.init is None:
        return config.rule.init_theta(make_generator(config.seed, "theta"))
    weights = load_weights(config.init)
    if weights.rule != config.rule:
        begun, asked = weights.rule.to_dict(), config.rule.to_dict()
        differing = [name for name in begun | asked if begun.get(name) != asked.get(name)]
        raise ConfigError(
            f"the weights {config.init!r} are of another rule: "
            + ", ".join(f"{name} is {begun.get(name)}, not {asked.get(name)}" for name in differing)
        )
    return weights.theta


class MetaTrainer:
    """Truncated backpropagation through inner runs, one meta-step at a time.

    B = ``tasks_per_step`` inner runs are unrolled side by side. All that is random in inner run r
    is a pure function of the seed and r, so the state between two meta-steps is what :meth:`state`
    returns and nothing else. Several processes take equal shares of the B runs, and step with the
    mean of their meta-gradients; they all hold the same theta.

    Args:
        config: the recipe.
        data_dir: where the inner tasks' data are; see :func:`hyperadam.tasks.load_data`.
        ranks: the processes.

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
        self.base_tasks = {name: make_task(name, data_dir) for name in config.task_names}
        self.device = _existing_device(config.device)
        self.rule = differentiable_rule(config.rule, config.backend, self.device)
        theta = _initial_theta(config)
        self.theta = {name: value.to(self.device).requires_grad_() for name, value in theta.items()}
        self.meta_optimizer = torch.optim.Adam(
            self.theta.values(), lr=config.meta_lr, weight_decay=config.meta_weight_decay
        )
        self.history: list[MetaStep] = []
        self.run = 0
        self.unroll_in_run = 0
        self._begin_runs(self.run)

    @property
    def finished(self) -> bool:
        return self.run >= self.config.inner_runs

    def inner_task(self, name: str, run_seed: int) -> Task:
        """The inner task of a run: the task of this name with its random scales and convex term."""
        config = self.config
        task: Task = self.base_tasks[name]
        if (scaling := config.scaling_of(run_seed)) > 0:
            task = RandomScaling(task, scaling, derive_seed(run_seed, "task"))
        if config.convex_dim == 0:
            return task
        convex_seed = derive_seed(run_seed, "convex")
        convex: Task = ConvexTask(config.convex_dim, convex_seed)
        if config.convex_scaling > 0:
            convex = RandomScaling(convex, config.convex_scaling, convex_seed)
        return SumOfTasks(task, convex)

    def _begin_runs(self, run: int) -> None:
        """Begin the inner runs of the meta-steps that begin with this one."""
        share = self.config.tasks_per_step // self.ranks.count
        first = run + self.ranks.rank * share
        runs = range(first, first + share)
        self.run_seeds = [derive_seed(self.config.seed, "inner run", run) for run in runs]
        name = self.config.task_of(run)
        tasks = [self.inner_task(name, seed) for seed in self.run_seeds]
        self.group = TaskGroup(tasks, self.run_seeds, self.device)
        self._lr_scales = self.group.lr_scales(self.config.rule)
        params_BN = self.group.initial_BN
        self.carry = InnerState(params_BN, self.rule.init_state(*params_BN.shape))

    def _noise(self, steps: range) -> Tensor:
        """Standard normal numbers (T, B, N) for inner steps, which count from 1 here."""
        seeds = [derive_seed(seed, "noise") for seed in self.run_seeds]
        return self.rule.noise(seeds, torch.tensor(steps) + 1, self.carry.params_BN.shape[1])

    def meta_step(self) -> MetaStep:
        """One unroll and one step of the meta-optimizer."""
        config = self.config
        start = self.unroll_in_run * config.unroll_length
        steps = range(start, start + config.unroll_length)
        weight = config.next_batch_weight
        ahead = {offset: own for offset, own in ((0, 1 - weight), (1, weight)) if own > 0}
        batches = [self.group.batch(step) for step in range(steps.start, steps.stop + max(ahead))]
        result = unroll(
            self.rule,
            self.theta,
            self.carry,
            self.group.loss,
            batches[: len(steps)],
            self._noise(steps),
            lrs=[config.lr_at(self.run, step) * self._lr_scales for step in steps],
            kl_weight=config.kl_weight,
            objective=config.meta_objective,
            meta_batches=[
                [batches[number + offset] for offset in ahead] for number in range(len(steps))
            ],
            batch_weights=list(ahead.values()),
        )
        self.meta_optimizer.zero_grad()
        result.meta_loss.backward()
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
            run=self.run,
            inner_step=steps.stop,
            meta_loss=meta_loss,
            inner_loss=inner_loss,
            kl=kl,
            grad_norm=float(grad_norm),
            applied=applied,
        )
        self.history.append(record)
        self.carry = result.carry
        self.unroll_in_run += 1
        if not applied or self.unroll_in_run == config.unrolls_of(self.run):
            self.run += config.tasks_per_step
            self.unroll_in_run = 0
            if not self.finished:
                self._begin_runs(self.run)
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
            "position": torch.tensor([self.run, self.unroll_in_run]),
            "history": torch.tensor(
                [dataclasses.astuple(record) for record in self.history], dtype=torch.float64
            ).reshape(-1, len(HISTORY_COLUMNS)),
            "inner.params": self.ranks.gather(self.carry.params_BN),
        }
        for name, value in self.carry.rule_state.unpack().tensors().items():
            tensors[f"inner.rule.{name}"] = value if name == "step" else self.ranks.gather(value)
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
        self.run, self.unroll_in_run = (int(value) for value in tensors["position"])
        if not (
            0 <= self.run <= config.inner_runs
            and self.run % config.tasks_per_step == 0
            and 0 <= self.unroll_in_run < config.unrolls_of(self.run)
        ):
            raise ValueError("the position is outside the run")
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
                value.copy_(_of_form(tensors[f"theta.{name}"], value))
            if f"meta_optimizer.step.{name}" in tensors:
                moments = {"step": torch.tensor(0.0), "exp_avg": value, "exp_avg_sq": value}
                saved[index] = {
                    key: _of_form(tensors[f"meta_optimizer.{key}.{name}"], like).clone()
                    for key, like in moments.items()
                }
                if not bool(saved[index]["step"] >= 1):
                    raise ValueError("the meta-optimizer's step is no count")
        self.meta_optimizer.load_state_dict(self.meta_optimizer.state_dict() | {"state": saved})
        # A finished run holds the last inner runs, whose task the first ones need not have had.
        self._begin_runs(min(self.run, config.inner_runs - config.tasks_per_step))
        shaped = {
            name: self._own_share(tensors[f"inner.rule.{name}"], value)
            for name, value in self.carry.rule_state.unpack().tensors().items()
        }
        if not 0 <= int(shaped["step"]) <= config.trajectory_length:
            raise ValueError("the inner step is outside the run")
        params_BN = self._own_share(tensors["inner.params"], self.carry.params_BN)
        self.carry = InnerState(params_BN, self.rule.pack(RuleState(**shaped)))

    def _own_share(self, saved: Tensor, like: Tensor) -> Tensor:
        """This process's inner runs of a saved tensor."""
        if like.dim() > 0:
            # Checkpoints from before there were several tasks have no dimension for them.
            saved = saved.reshape(self.config.tasks_per_step, *like.shape[1:])
            saved = saved.narrow(0, self.ranks.rank * len(like), len(like))
        return _of_form(saved.reshape(like.shape), like).to(self.device)


def _of_form(saved: Tensor, like: Tensor) -> Tensor:
    """``saved``, if it has the shape and dtype of ``like``."""
    if saved.shape != like.shape or saved.dtype != like.dtype:
        raise ValueError(f"{tuple(saved.shape)} of {saved.dtype} is not {tuple(like.shape)}")
    return saved
