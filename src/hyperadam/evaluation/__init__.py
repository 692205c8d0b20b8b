"""Evaluation: training runs, and what is said of them."""

from hyperadam.evaluation.harness import OptimizerFactory, TrainingRun, train

__all__ = ["OptimizerFactory", "TrainingRun", "train"]
