"""B inner tasks of one structure as one task on stacked tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hyperadam.rule import Rule, attention_projections, in_rows_with_gradient
from hyperadam.tasks import Batch, Task, derive_seed, make_generator, move_batch, stack_batches


class TaskGroup:
    """B inner runs side by side, each of N coordinates.

    The tasks differ in their batches only (:data:`hyperadam.tasks.Batch`), so one task's loss
    serves them all: B = 1 calls it as it is, B > 1 under ``torch.func.vmap``. All that is random
    is drawn on the CPU, so that it is the same for every device.

    Args:
        tasks: one a run.
        run_seeds: likewise; initial parameters and data order are functions of them.
        device: where losses are computed.
    """

    def __init__(
        self, tasks: Sequence[Task], run_seeds: Sequence[int], device: torch.device
    ) -> None:
        self.tasks = tasks
        self.device = device
        self._data_seeds = [derive_seed(seed, "data") for seed in run_seeds]
        inits = [
            task.init_params(make_generator(seed, "params"))
            for task, seed in zip(tasks, run_seeds, strict=True)
        ]
        self.initial_BN = torch.stack(
            [torch.cat([value.flatten() for value in params.values()]) for params in inits]
        ).to(device)
        self._shapes = {name: value.shape for name, value in inits[0].items()}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._projections = attention_projections(self._shapes)

    @property
    def has_attention(self) -> bool:
        """Whether the networks have attention, as far as their parameters' names tell."""
        return bool(self._projections)

    def lr_scales(self, rule: Rule) -> Tensor:
        """What a rule multiplies each coordinate's learning rate by, (N,)."""
        scales = [
            torch.full((shape.numel(),), rule.lr_scale(shape, attention=name in self._projections))
            for name, shape in self._shapes.items()
        ]
        return torch.cat(scales).to(self.device)

    def scale_row_means(self, rule: Rule, direction_BN: Tensor) -> Tensor:
        """Directions, with their row means as the rule would have them in these networks."""
        scales = [rule.row_mean_scale(shape) for shape in self._shapes.values()]
        if min(scales) == 1:
            return direction_BN
        pieces = direction_BN.split(self._sizes, dim=1)
        scaled = []
        for piece, shape, scale in zip(pieces, self._shapes.values(), scales, strict=True):
            if scale < 1:
                rows = piece.unflatten(1, (shape[0], -1))
                piece = (rows - (1 - scale) * rows.mean(2, keepdim=True)).flatten(1)
            scaled.append(piece)
        return torch.cat(scaled, dim=1)

    def in_rows_with_gradient(self, grad_BN: Tensor) -> Tensor:
        """Which coordinates lie in a row of their network's parameters that has a gradient."""
        pieces = zip(grad_BN.split(self._sizes, dim=1), self._shapes.values(), strict=True)
        of_each = torch.func.vmap(in_rows_with_gradient)
        return torch.cat(
            [of_each(piece.unflatten(1, shape)).flatten(1) for piece, shape in pieces], dim=1
        )

    def batch(self, step: int) -> Batch:
        """What :meth:`loss` needs at a step, on the device: the task's own batch, or B stacked."""
        batches = [
            task.batch(seed, step) for task, seed in zip(self.tasks, self._data_seeds, strict=True)
        ]
        together = batches[0] if len(batches) == 1 else stack_batches(batches)
        return move_batch(together, self.device)

    def loss(self, params_BN: Tensor, batch: Batch) -> Tensor:
        """Each task's loss, (B,)."""
        if len(self.tasks) == 1:
            return self._loss(params_BN[0], batch).unsqueeze(0)
        return torch.func.vmap(self._loss)(params_BN, batch)

    def _loss(self, params_N: Tensor, batch: Batch) -> Tensor:
        pieces = params_N.split(self._sizes)
        params = {
            name: piece.view(shape)
            for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)
        }
        return self.tasks[0].loss(params, batch)
