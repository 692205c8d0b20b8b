"""Evaluation: training runs of tasks under optimizers, and what is said of them."""

from hyperadam.evaluation.evaluate import (
    Cell,
    EvaluationConfig,
    Outcome,
    Progress,
    evaluate,
)
from hyperadam.evaluation.harness import OptimizerFactory, TrainingRun, train
from hyperadam.evaluation.records import Record, RunKey, RunStore, read_records
from hyperadam.evaluation.report import ReportPaths, write_report
from hyperadam.evaluation.suites import SUITES, Suite, find_suite
from hyperadam.evaluation.trace import Tracer, trace_steps
from hyperadam.evaluation.tuning import best_lr, grid_lr, tune

__all__ = [
    "SUITES",
    "Cell",
    "EvaluationConfig",
    "OptimizerFactory",
    "Outcome",
    "Progress",
    "Record",
    "ReportPaths",
    "RunKey",
    "RunStore",
    "Suite",
    "Tracer",
    "TrainingRun",
    "best_lr",
    "evaluate",
    "find_suite",
    "grid_lr",
    "read_records",
    "trace_steps",
    "train",
    "tune",
    "write_report",
]
