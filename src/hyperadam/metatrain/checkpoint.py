"""The checkpoint that resumes a meta-training run; it is not the file that is used."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from hyperadam import tensor_file
from hyperadam.errors import RunError
from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.trainer import MetaTrainer

FORMAT = "hyperadam-checkpoint"
FORMAT_VERSION = 2


def save_checkpoint(path: Path, trainer: MetaTrainer) -> None:
    """Write all that the next meta-step depends on, whole or not at all. Several processes call
    this together, and the first one writes."""
    notes = {"config": json.dumps(trainer.config.to_dict(), sort_keys=True)}
    tensors: dict[str, Tensor] = trainer.state()
    if not trainer.ranks.first:
        return
    tensor_file.write(path, tensors, notes, format_=FORMAT, version=FORMAT_VERSION)


def load_checkpoint(path: Path, trainer: MetaTrainer) -> None:
    """Put ``trainer`` where the checkpoint was made.

    Raises:
        RunError: the file is missing, damaged, or of a run with another configuration.
    """
    tensors, notes = tensor_file.read(path, format_=FORMAT, version=FORMAT_VERSION, error=RunError)
    try:
        same = MetaTrainConfig.from_dict(json.loads(notes["config"])) == trainer.config
        if same:
            trainer.load_state(tensors)
    except (KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise RunError(f"{path} does not hold this run's state: {error}") from None
    if not same:
        raise RunError(f"{path} is the checkpoint of a run with another configuration")
