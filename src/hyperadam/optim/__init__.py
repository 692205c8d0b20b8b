"""The rules as torch optimizers."""

from hyperadam.optim.learned_optimizer import LearnedOptimizer
from hyperadam.optim.variational_hyperadam import VariationalHyperAdam

__all__ = ["LearnedOptimizer", "VariationalHyperAdam"]
