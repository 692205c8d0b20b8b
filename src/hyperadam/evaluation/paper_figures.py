"""Figures that the papers print, to be shown beside ours.

Of "HyperAdam: A Learnable Task-Adaptive Adam for Network Training" (Wang, Sun and Xu, AAAI 2019,
arXiv:1811.08996): final training losses, means over random initialisations.
"""

from __future__ import annotations

import dataclasses

AAAI_2019 = "Wang, Sun and Xu, AAAI 2019 (arXiv:1811.08996)"


@dataclasses.dataclass(frozen=True)
class PaperFigure:
    """One printed figure.

    Attributes:
        task: our name of the task.
        steps: of a run.
        optimizer: our name of the optimizer.
        loss: final training loss.
        accuracy: top-1 on the test set, between 0 and 1; None where none is printed.
    """

    task: str
    steps: int
    optimizer: str
    loss: float
    accuracy: float | None = None


_OPTIMIZERS = ("adam", "dmoptimizer", "rnnprop", "hyperadam")

_LOSSES_100 = {
    "mnist-mlp1-sigmoid": (0.35, 0.38, 0.34, 0.33),
    "mnist-mlp1-relu": (0.32, 1.42, 0.31, 0.29),
    "mnist-mlp1-elu": (0.31, 2.02, 0.31, 0.28),
    "mnist-mlp1-tanh": (0.34, 0.83, 0.33, 0.36),
    "sine-lstm1": (0.65, 3.10, 0.49, 0.42),
    "sine-lstm1-smallnoise": (0.39, 3.06, 0.32, 0.19),
    "sine-lstm2": (0.51, 2.05, 0.27, 0.26),
}

_LOSSES_10000 = {
    "mnist-cnn1": ((0.10, 0.9850), (2.30, 0.1010), (0.36, 0.9646), (0.05, 0.9848)),
    "mnist-cnn2": ((0.09, 0.9898), (2.30, 0.1135), (2.30, 0.1137), (0.07, 0.9902)),
}

PAPER_FIGURES: tuple[PaperFigure, ...] = (
    *(
        PaperFigure(task, 100, optimizer, loss)
        for task, losses in _LOSSES_100.items()
        for optimizer, loss in zip(_OPTIMIZERS, losses, strict=True)
    ),
    *(
        PaperFigure(task, 10_000, optimizer, loss, accuracy)
        for task, pairs in _LOSSES_10000.items()
        for optimizer, (loss, accuracy) in zip(_OPTIMIZERS, pairs, strict=True)
    ),
)
"""Every figure, by task and then by optimizer."""


def paper_figures(task: str, steps: int) -> dict[str, PaperFigure]:
    """What is printed of a task, by optimizer; empty where nothing is.

    Args:
        task: its name.
        steps: of a run.
    """
    return {
        figure.optimizer: figure
        for figure in PAPER_FIGURES
        if (figure.task, figure.steps) == (task, steps)
    }
