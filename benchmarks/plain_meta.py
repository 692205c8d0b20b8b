"""Meta-training as one would write it plainly: an unroll under autograd, one task after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import textbook
from hyperadam.metatrain import MetaTrainConfig
from hyperadam.tasks import (
    ConvexTask,
    Params,
    RandomScaling,
    SumOfTasks,
    Task,
    derive_seed,
    make_generator,
    make_task,
)


class PlainRule(Protocol):
    """An update rule for the unroll; ``state`` is its own affair."""

    def init(self, theta: textbook.Theta, n: int) -> Any:
        """The state before the first step."""

    def step(
        self, theta: textbook.Theta, state: Any, g: Tensor
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Mean and log-variance (None: none) of the update, and the new state."""

    def detach(self, state: Any) -> Any:
        """The state without a graph."""


class TextbookRule:
    """:mod:`benchmarks.textbook`."""

    def init(self, theta: textbook.Theta, n: int) -> textbook.State:
        return textbook.init(theta, n)

    def step(
        self, theta: textbook.Theta, state: textbook.State, g: Tensor
    ) -> tuple[Tensor, Tensor, textbook.State]:
        return textbook.update(theta, state, g)

    def detach(self, state: textbook.State) -> textbook.State:
        return state.detach()


class TrivialRule:
    """``d = scale g``: what remains of the inner training when the rule costs nothing."""

    def init(self, theta: textbook.Theta, n: int) -> None:
        return None

    def step(self, theta: textbook.Theta, state: None, g: Tensor) -> tuple[Tensor, None, None]:
        return theta["scale"] * g, None, None

    def detach(self, state: None) -> None:
        return None


def trivial_theta() -> dict[str, Tensor]:
    return {"scale": torch.ones(())}


class Inner:
    """An inner run: its task, its parameters in one vector, its rule's state.

    Args:
        task: what is trained.
        seed: of parameters and batches.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.data_seed = task, derive_seed(seed, "data")
        params = task.init_params(make_generator(seed, "params"))
        self.shapes = {name: value.shape for name, value in params.items()}
        self.sizes = [value.numel() for value in params.values()]
        self.w = torch.cat([value.flatten() for value in params.values()])
        self.state: Any = None
        self.steps = 0

    def loss(self, w: Tensor, batch: Any) -> Tensor:
        pieces = zip(self.shapes.items(), w.split(self.sizes), strict=True)
        params: Params = {name: piece.view(shape) for (name, shape), piece in pieces}
        return self.task.loss(params, batch)


def inner_task(base: Task, config: MetaTrainConfig, seed: int) -> Task:
    """The task with the random scaling and the convex term of the recipe."""
    scaled = RandomScaling(base, config.random_scaling, derive_seed(seed, "task"))
    convex = ConvexTask(config.convex_dim, derive_seed(seed, "convex"))
    return SumOfTasks(
        scaled, RandomScaling(convex, config.convex_scaling, derive_seed(seed, "convex"))
    )


class PlainMetaTrainer:
    """Truncated backpropagation through inner runs, with the paper's recipe.

    Args:
        config: the recipe.
        rule: the update rule.
        theta: its initial meta-parameters.
        tasks: inner runs whose meta-losses are averaged in a meta-step.
        data_dir: where the data are.
    """

    def __init__(
        self,
        config: MetaTrainConfig,
        rule: PlainRule,
        theta: dict[str, Tensor],
        tasks: int = 1,
        data_dir: Path | None = None,
    ) -> None:
        self.config, self.rule, self.tasks = config, rule, tasks
        self.base = make_task(config.task, data_dir)
        self.theta = {name: value.requires_grad_() for name, value in theta.items()}
        self.meta_optimizer = torch.optim.Adam(
            self.theta.values(), lr=config.meta_lr, weight_decay=config.meta_weight_decay
        )
        self.run = 0
        self.begin()

    def begin(self) -> None:
        """Fresh inner runs."""
        seeds = [derive_seed(self.config.seed, self.run, index) for index in range(self.tasks)]
        self.inner = [Inner(inner_task(self.base, self.config, seed), seed) for seed in seeds]
        for inner in self.inner:
            inner.state = self.rule.init(self.theta, len(inner.w))

    def unroll(self, inner: Inner) -> Tensor:
        """The meta-loss of an inner run's next steps; the run goes on behind them."""
        config, losses = self.config, []
        w, state = inner.w, inner.state
        for _ in range(config.unroll_length):
            batch = inner.task.batch(inner.data_seed, inner.steps)
            point = w.detach().requires_grad_()
            (g,) = torch.autograd.grad(inner.loss(point, batch), point)
            d, log_var, state = self.rule.step(self.theta, state, g)
            if log_var is not None:
                d = textbook.sample(d, log_var, torch.randn_like(d))
            w = w - config.lr * d
            loss = inner.loss(w, batch)
            if log_var is not None:
                loss = loss + config.kl_weight * textbook.kl(log_var)
            losses.append(loss)
            inner.steps += 1
        inner.w, inner.state = w.detach(), self.rule.detach(state)
        return torch.stack(losses).mean()

    def meta_step(self) -> float:
        """One unroll of every inner run and one step of the meta-optimizer; the meta-loss."""
        meta_loss = torch.stack([self.unroll(inner) for inner in self.inner]).mean()
        self.meta_optimizer.zero_grad()
        meta_loss.backward()
        self.meta_optimizer.step()
        if self.inner[0].steps >= self.config.trajectory_length:
            self.run += 1
            self.begin()
        return float(meta_loss.detach())
