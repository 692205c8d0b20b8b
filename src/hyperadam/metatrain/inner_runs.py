"""The inner runs of a meta-step, from their first unroll to their last."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from hyperadam.kernels import DifferentiableRule
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.evolution import Perturbations, PerturbedRule
from hyperadam.metatrain.task_group import TaskGroup
from hyperadam.metatrain.unroll import InnerState, Unroll, unroll
from hyperadam.ranks import Ranks
from hyperadam.rule import Theta
from hyperadam.tasks import Batch, ConvexTask, RandomScaling, SumOfTasks, Task, derive_seed


def inner_task(config: MetaTrainConfig, base: Task, run_seed: int) -> Task:
    """The inner task of a run: the base task with its random scales and convex term."""
    task = base
    if (scaling := config.scaling_of(run_seed)) > 0:
        task = RandomScaling(task, scaling, derive_seed(run_seed, "task"))
    if config.convex_dim == 0:
        return task
    convex_seed = derive_seed(run_seed, "convex")
    convex: Task = ConvexTask(config.convex_dim, convex_seed)
    if config.convex_scaling > 0:
        convex = RandomScaling(convex, config.convex_scaling, convex_seed)
    return SumOfTasks(task, convex)


class InnerRuns:
    """B = ``tasks_per_step`` inner runs side by side; with several processes, one's share of them.

    All that is random in inner run r is a pure function of the seed and r.

    Args:
        config: the recipe.
        run: the first of them; the others follow it.
        base_tasks: inner tasks by name, of which they draw one.
        rule: what trains their networks.
        ranks: the processes.
        theta: what is perturbed, where the recipe has perturbations.

    Attributes:
        run: as above.
        unrolls: how many are behind them.
        group: their tasks.
        copies: of each run, which differ in theta; 1 without perturbations.
        carry: the parameters of all copies' networks and the rule's state.
    """

    def __init__(
        self,
        config: MetaTrainConfig,
        run: int,
        base_tasks: Mapping[str, Task],
        rule: DifferentiableRule,
        ranks: Ranks,
        theta: Theta,
    ) -> None:
        self.config, self.run, self.rule, self.ranks = config, run, rule, ranks
        self.unrolls = 0
        share = config.tasks_per_step // ranks.count
        first = run + ranks.rank * share
        self._seeds = [
            derive_seed(config.seed, "inner run", own) for own in range(first, first + share)
        ]
        base = base_tasks[config.task_of(run)]
        tasks = [inner_task(config, base, seed) for seed in self._seeds]
        self.group = TaskGroup(tasks, self._seeds, rule.device)
        self._lr_scales = self.group.lr_scales(config.rule)
        self.copies = 1
        self.perturbations: Perturbations | None = None
        if (pairs := config.perturbations) > 0:
            scale = config.perturbation_scale
            trained = {name: theta[name] for name in config.trained_parameters}
            self.perturbations = Perturbations(trained, self._seeds, pairs, scale)
            self.rule = PerturbedRule(rule, self.perturbations)
            self.copies = self.perturbations.copies
        params_BN = self.group.initial_BN.repeat_interleave(self.copies, dim=0)
        coherence_B = None
        if config.rule.calibrated and not self.group.has_attention:
            coherence_B = torch.zeros(len(params_BN), dtype=torch.float64, device=rule.device)
        state = self.rule.init_state(*params_BN.shape)
        self.carry = InnerState(params_BN, state, coherence_B)

    @property
    def steps(self) -> range:
        """The inner steps of the next unroll, from 0."""
        start = self.unrolls * self.config.unroll_length
        return range(start, start + self.config.unroll_length)

    @property
    def finished(self) -> bool:
        return self.unrolls >= self.config.unrolls_of(self.run)

    def noise(self) -> Tensor:
        """Standard normal numbers (T, B, N) for the next unroll."""
        seeds = [derive_seed(seed, "noise") for seed in self._seeds]
        steps_T = torch.tensor(self.steps) + 1
        return self.rule.noise(seeds, steps_T, self.carry.params_BN.shape[1])

    def _loss(self, params_BN: Tensor, batch: Batch) -> Tensor:
        """Losses of all copies, whose batches are those of their run."""
        if self.copies == 1:
            return self.group.loss(params_BN, batch)
        params_BCN = params_BN.unflatten(0, (-1, self.copies))
        of_copy = torch.func.vmap(self.group.loss, in_dims=(1, None), out_dims=1)
        return of_copy(params_BCN, batch).flatten()

    def unroll(self, theta: Theta) -> Unroll:
        """The next unroll, after which they stand behind it."""
        if self.perturbations is None:
            return self._unroll(theta)
        with torch.no_grad():
            unrolled = self._unroll(theta)
        meta_loss = self.perturbations.meta_loss(theta, unrolled.meta_loss_B)
        return dataclasses.replace(unrolled, meta_loss=meta_loss)

    def _unroll(self, theta: Theta) -> Unroll:
        config, steps = self.config, self.steps
        weight = config.next_batch_weight
        ahead = {offset: own for offset, own in ((0, 1 - weight), (1, weight)) if own > 0}
        batches = [self.group.batch(step) for step in range(steps.start, steps.stop + max(ahead))]
        result = unroll(
            self.rule,
            theta,
            self.carry,
            self._loss,
            batches[: len(steps)],
            self.noise(),
            lrs=[config.lr_at(self.run, step) * self._lr_scales for step in steps],
            first_step=steps.start + 1,
            redirect=functools.partial(self.group.scale_row_means, config.rule),
            counted=self.group.in_rows_with_gradient,
            kl_weight=config.kl_weight,
            objective=config.meta_objective,
            meta_batches=[
                [batches[number + offset] for offset in ahead] for number in range(len(steps))
            ],
            batch_weights=list(ahead.values()),
        )
        self.carry = result.carry
        self.unrolls += 1
        return result

    def state(self) -> dict[str, Tensor]:
        """Parameters, rule state and coherence, if it counts, by name. Several processes call this
        together; the first one's has the inner runs of all."""
        state = self._rule_tensors()
        own = {"params": self.carry.params_BN}
        if self.carry.coherence_B is not None:
            own["coherence"] = self.carry.coherence_B
        return {name: self.ranks.gather(value) for name, value in own.items()} | {
            f"rule.{name}": value if name == "step" else self.ranks.gather(value)
            for name, value in state.items()
        }

    def load_state(self, unrolls: int, tensors: Mapping[str, Tensor]) -> None:
        """Go on behind so many unrolls, from :meth:`state`.

        Raises:
            KeyError, ValueError: that is not these runs' state.
        """
        if not 0 <= unrolls < self.config.unrolls_of(self.run):
            raise ValueError("the position is outside the run")
        shaped = {
            name: self._own_share(tensors[f"rule.{name}"], value)
            for name, value in self._rule_tensors().items()
        }
        if not 0 <= int(shaped["step"]) <= self.config.trajectory_length:
            raise ValueError("the inner step is outside the run")
        params_BN = self._own_share(tensors["params"], self.carry.params_BN)
        coherence_B = self.carry.coherence_B
        if coherence_B is not None:
            coherence_B = self._own_share(tensors["coherence"], coherence_B)
        before = self.carry.rule_state.unpack()
        state = self.rule.pack(dataclasses.replace(before, **shaped))
        self.carry = InnerState(params_BN, state, coherence_B)
        self.unrolls = unrolls

    def _rule_tensors(self) -> dict[str, Tensor]:
        """What is to be saved of the rule's state: ``peak_1`` if it is used."""
        tensors = self.carry.rule_state.unpack().tensors()
        if not self.config.rule.has_peak:
            del tensors["peak_1"]
        return tensors

    def _own_share(self, saved: Tensor, like: Tensor) -> Tensor:
        """This process's inner runs of a saved tensor."""
        if like.dim() > 0 and len(saved) == self.config.tasks_per_step * self.copies:
            saved = saved.narrow(0, self.ranks.rank * len(like), len(like))
        return of_form(saved, like).to(self.rule.device)


def of_form(saved: Tensor, like: Tensor) -> Tensor:
    """``saved``, if it has the shape and dtype of ``like``.

    Raises:
        ValueError: it has not.
    """
    if saved.shape != like.shape or saved.dtype != like.dtype:
        raise ValueError(f"{tuple(saved.shape)} of {saved.dtype} is not {tuple(like.shape)}")
    return saved
