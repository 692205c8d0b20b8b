"""Data sets by name, held in memory as uint8 tensors."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperadam.errors import DataError, MissingDependencyError, unknown_name


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationData:
    """Images with labels.

    Attributes:
        name: of the data set.
        train_images, val_images: uint8, one row an example, then height and width.
        train_labels, val_labels: int64, from 0.
        max_value: the pixel value that stands for 1.
        num_classes: how many labels there are.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    max_value: int
    num_classes: int


DATA_SETS = ("digits", "mnist")
_MNIST_HUB_NAME = "ylecun/mnist"


@functools.lru_cache(maxsize=4)
def load_data(name: str, data_dir: Path | None = None) -> ClassificationData:
    """Load a data set.

    Args:
        name: ``digits`` (comes with scikit-learn) or ``mnist`` (needs the extra ``data``).
        data_dir: a folder with ``mnist-train.parquet`` and ``mnist-test.parquet``, in the column
            layout of the data set's hub page; None fetches it from the hub.

    Raises:
        DataError: unknown name, missing or malformed files, or the hub can't be reached.
        MissingDependencyError: the extra ``data`` is not installed.
    """
    if name == "digits":
        return _load_digits()
    if name == "mnist":
        return _load_mnist(data_dir)
    raise DataError(unknown_name("data set", name, DATA_SETS))


def _load_digits() -> ClassificationData:
    """8x8 images of handwritten digits with 17 grey levels; every fifth example is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    held_out = torch.arange(len(labels)) % 5 == 4
    return ClassificationData(
        name="digits",
        train_images=images[~held_out],
        train_labels=labels[~held_out],
        val_images=images[held_out],
        val_labels=labels[held_out],
        max_value=16,
        num_classes=10,
    )


def _load_mnist(data_dir: Path | None) -> ClassificationData:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(
            "mnist is read with the library datasets: pip install 'hyperadam[data]'"
        ) from None
    images, labels = {}, {}
    for split in ("train", "test"):
        if data_dir is None:
            try:
                table = datasets.load_dataset(_MNIST_HUB_NAME, split=split)
            except Exception as error:  # whatever the network or the hub answers
                raise DataError(
                    f"can't load {_MNIST_HUB_NAME} from the hub ({type(error).__name__}); with a "
                    f"folder that holds mnist-train.parquet and mnist-test.parquet, give --data-dir"
                ) from error
        else:
            path = data_dir / f"mnist-{split}.parquet"
            if not path.is_file():
                raise DataError(
                    f"no file {path}; save the parquet file of the split {split} of the hub's "
                    f"{_MNIST_HUB_NAME} there"
                )
            table = _read_parquet(path, datasets)
        images[split], labels[split] = _decode(table, f"mnist, split {split}")
    return ClassificationData(
        name="mnist",
        train_images=images["train"],
        train_labels=labels["train"],
        val_images=images["test"],
        val_labels=labels["test"],
        max_value=255,
        num_classes=10,
    )


def _read_parquet(path: Path, datasets: Any) -> Any:
    """A parquet file as a data set, without copies in the library's cache."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a parquet file of image and label: {reason}") from None
    return datasets.Dataset(table).cast_column("image", datasets.Image())


def _decode(table: Any, what: str) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        images = np.stack([np.asarray(image) for image in table["image"]])
        labels = np.asarray(table["label"], dtype=np.int64)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise DataError(f"{what}: can't be read as images with labels: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 3:
        raise DataError(
            f"{what}: expected grey images of 8 bits; got {images.dtype}, {images.ndim}-dimensional"
        )
    return torch.from_numpy(images), torch.from_numpy(labels)
