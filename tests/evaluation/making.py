"""Made-up records."""

from __future__ import annotations

import dataclasses

import numpy as np

from hyperadam.evaluation import Record


def make_record(seed=0, losses=(2.0, 1.5, 1.0), **changes):
    losses = np.array(losses)
    record = Record(
        task="digits-mlp1-sigmoid", optimizer="adam", weights=None, lr=1e-3, seed=seed,
        steps=len(losses), schedule="none", learned=False, default_lr=1e-3, train_loss=losses,
        train_loss_post=losses / 2, val_loss=0.5, val_accuracy=None, wall_s=1.0, optimizer_s=0.5,
        peak_mb=100.0, diverged=False, suite="digits", version="0.1.0", machine="test",
    )  # fmt: skip
    return dataclasses.replace(record, **changes)
