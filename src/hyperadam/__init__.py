"""Variational HyperAdam for PyTorch: an optimizer that was itself meta-trained."""

from importlib.metadata import version

from hyperadam.optim import VariationalHyperAdam, recommended_scheduler
from hyperadam.weights import Weights, import_official, load_weights, save_weights

__version__ = version("hyperadam")

__all__ = [
    "VariationalHyperAdam",
    "Weights",
    "import_official",
    "load_weights",
    "recommended_scheduler",
    "save_weights",
]
