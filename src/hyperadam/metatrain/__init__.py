"""Meta-training: tasks to unroll to meta-loss to meta-optimizer to checkpoint to weights."""

from hyperadam.metatrain.config import MetaTrainConfig
from hyperadam.metatrain.run import RunLabel, run_meta_training
from hyperadam.metatrain.trainer import MetaStep, MetaTrainer
from hyperadam.metatrain.unroll import InnerState, Unroll, unroll

__all__ = [
    "InnerState",
    "MetaStep",
    "MetaTrainConfig",
    "MetaTrainer",
    "RunLabel",
    "Unroll",
    "run_meta_training",
    "unroll",
]
