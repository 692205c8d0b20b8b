"""Meta-training as a resumable sequence of meta-steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from hyperadam.kernels import step_function
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.unroll import InnerState, LossFunction, unroll
from hyperadam.rule import RuleState, standard_normal
from hyperadam.tasks import (
    Batch,
    ConvexTask,
    Params,
    RandomScaling,
    SumOfTasks,
    Task,
    derive_seed,
    make_generator,
    make_task,
)


@dataclasses.dataclass(frozen=True)
class MetaStep:
    """What one meta-step showed.

    Attributes:
        index: of the meta-step, from 1.
        run: of the inner run, from 0.
        inner_step: inner steps that the run has taken.
        meta_loss: of the unroll.
        inner_loss: mean post-update inner loss of the unroll.
        kl: mean KL term of the unroll.
        grad_norm: Euclidean norm of the meta-gradient, before clipping.
        applied: False where the meta-gradient was not finite; theta then stays as it is and the
            next inner run begins.
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


class _Coordinates:
    """A task's parameters as one vector, and back."""

    def __init__(self, params: Params) -> None:
        self.shapes = {name: value.shape for name, value in params.items()}
        self.sizes = [value.numel() for value in params.values()]

    @staticmethod
    def flatten(params: Params) -> Tensor:
        return torch.cat([value.flatten() for value in params.values()])

    def loss(self, task: Task) -> LossFunction:
        """The task's loss as a function of the vector."""

        def loss(params_N: Tensor, batch: Batch) -> Tensor:
            pieces = params_N.split(self.sizes)
            params = {
                name: piece.view(shape)
                for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
            }
            return task.loss(params, batch)

        return loss


class MetaTrainer:
    """Truncated backpropagation through inner runs, one meta-step at a time.

    All that is random in inner run r is a pure function of the seed and r, so the state between
    two meta-steps is what :meth:`state` returns and nothing else.

    Args:
        config: the recipe.
        data_dir: where the inner task's data are; see :func:`hyperadam.tasks.load_data`.
    """

    def __init__(self, config: MetaTrainConfig, data_dir: Path | None = None) -> None:
        self.config = config
        self.base_task = make_task(config.task, data_dir)
        self.step_function = step_function(config.rule, "reference")  # it is differentiable
        theta = config.rule.init_theta(make_generator(config.seed, "theta"))
        self.theta = {name: value.requires_grad_() for name, value in theta.items()}
        self.meta_optimizer = torch.optim.Adam(
            self.theta.values(), lr=config.meta_lr, weight_decay=config.meta_weight_decay
        )
        self.history: list[MetaStep] = []
        self.run = 0
        self.unroll_in_run = 0
        self._begin_run()

    @property
    def finished(self) -> bool:
        return self.run >= self.config.inner_runs

    def inner_task(self, run_seed: int) -> Task:
        """The inner task of a run: the base task with its random scales and convex term."""
        config = self.config
        task: Task = self.base_task
        if config.random_scaling > 0:
            task = RandomScaling(task, config.random_scaling, derive_seed(run_seed, "task"))
        if config.convex_dim == 0:
            return task
        convex_seed = derive_seed(run_seed, "convex")
        convex: Task = ConvexTask(config.convex_dim, convex_seed)
        if config.convex_scaling > 0:
            convex = RandomScaling(convex, config.convex_scaling, convex_seed)
        return SumOfTasks(task, convex)

    def _begin_run(self) -> None:
        self.run_seed = derive_seed(self.config.seed, "inner run", self.run)
        self.task = self.inner_task(self.run_seed)
        params = self.task.init_params(make_generator(self.run_seed, "params"))
        coordinates = _Coordinates(params)
        self.loss = coordinates.loss(self.task)
        params_N = coordinates.flatten(params)
        self.carry = InnerState(params_N, self.config.rule.init_state(params_N.numel()))

    def meta_step(self) -> MetaStep:
        """One unroll and one step of the meta-optimizer."""
        config = self.config
        start = self.unroll_in_run * config.unroll_length
        steps = range(start, start + config.unroll_length)
        count = self.carry.params_N.numel()
        data_seed, noise_seed = (derive_seed(self.run_seed, use) for use in ("data", "noise"))
        result = unroll(
            config.rule,
            self.step_function,
            self.theta,
            self.carry,
            self.loss,
            [self.task.batch(data_seed, step) for step in steps],
            standard_normal(noise_seed, torch.tensor(steps) + 1, 0, count),
            lr=config.lr,
            kl_weight=config.kl_weight,
        )
        self.meta_optimizer.zero_grad()
        result.meta_loss.backward()
        grad_norm = torch.nn.utils.get_total_norm(
            [value.grad for value in self.theta.values() if value.grad is not None]
        )
        applied = bool(torch.isfinite(grad_norm))
        if applied:
            if config.meta_grad_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self.theta.values(), config.meta_grad_clip, grad_norm
                )
            self.meta_optimizer.step()
        record = MetaStep(
            index=len(self.history) + 1,
            run=self.run,
            inner_step=steps.stop,
            meta_loss=float(result.meta_loss.detach()),
            inner_loss=float(result.loss_T.mean()),
            kl=float(result.kl_T.mean()),
            grad_norm=float(grad_norm),
            applied=applied,
        )
        self.history.append(record)
        self.carry = result.carry
        self.unroll_in_run += 1
        if not applied or self.unroll_in_run == config.unrolls_per_run:
            self.run += 1
            self.unroll_in_run = 0
            if not self.finished:
                self._begin_run()
        return record

    def state(self) -> dict[str, Tensor]:
        """Everything that the next meta-step depends on, and the history."""
        tensors = {
            "position": torch.tensor([self.run, self.unroll_in_run]),
            "history": torch.tensor(
                [dataclasses.astuple(record) for record in self.history], dtype=torch.float64
            ).reshape(-1, len(HISTORY_COLUMNS)),
            "inner.params": self.carry.params_N,
        }
        for name, value in self.carry.rule_state.tensors().items():
            tensors[f"inner.rule.{name}"] = value
        for name, value in self.theta.items():
            tensors[f"theta.{name}"] = value.detach()
            for key, moment in self.meta_optimizer.state[value].items():
                tensors[f"meta_optimizer.{key}.{name}"] = moment
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up the run where :meth:`state` left it.

        Raises:
            KeyError, RuntimeError: the tensors are not those of a run with this configuration.
        """
        self.run, self.unroll_in_run = (int(value) for value in tensors["position"])
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
            for row in tensors["history"].tolist()
        ]
        with torch.no_grad():
            for name, value in self.theta.items():
                value.copy_(tensors[f"theta.{name}"])
        saved: dict[Tensor, dict[str, Tensor]] = {}
        for name, value in self.theta.items():
            suffix = f".{name}"
            saved[value] = {
                key.removeprefix("meta_optimizer.").removesuffix(suffix): moment.clone()
                for key, moment in tensors.items()
                if key.startswith("meta_optimizer.") and key.endswith(suffix)
            }
        self.meta_optimizer.state.clear()
        self.meta_optimizer.state.update({value: state for value, state in saved.items() if state})
        if not self.finished:
            self._begin_run()
        names = [field.name for field in dataclasses.fields(RuleState)]
        self.carry = InnerState(
            tensors["inner.params"],
            RuleState(**{name: tensors[f"inner.rule.{name}"] for name in names}),
        )
