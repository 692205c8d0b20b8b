"""Data sets by name. All but folders of images are held in memory, as uint8 tensors."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hyperadam.errors import DataError, missing_extra, unknown_name
from hyperadam.tasks.base import make_generator
from hyperadam.tasks.image_folder import ImageFolder, load_image_folder
from hyperadam.tasks.text import (
    SHAKESPEARE,
    UNICODE_NAMES,
    TextData,
    load_pydoc,
    load_shakespeare,
    load_unicode_names,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassificationData:
    """Images with labels.

    Attributes:
        name: of the data set.
        train_images, val_images: uint8, one row an example, then height and width, with 3 channels
            before them where images have colours.
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


Data = ClassificationData | ImageFolder | TextData
"""A data set, in the form of its kind."""


@dataclasses.dataclass(frozen=True)
class _Source:
    """A data set of the hub, or its parquet files in a folder.

    Attributes:
        hub_name: of its page.
        image, label: its columns.
        colours: whether its images have them.
        num_classes: how many labels there are.
    """

    hub_name: str
    image: str
    label: str
    colours: bool
    num_classes: int


SOURCES = {
    "mnist": _Source("ylecun/mnist", "image", "label", colours=False, num_classes=10),
    "cifar10": _Source("uoft-cs/cifar10", "img", "label", colours=True, num_classes=10),
    "cifar100": _Source("uoft-cs/cifar100", "img", "fine_label", colours=True, num_classes=100),
}

SMALL_MNIST = "mnist8"
SMALL_SIZE = 8
CLUTTER = "clutter16"
CLUTTER_SIZE = 16

DATA_SETS = {
    "digits": "comes with hyperadam",
    **{
        name: f"{name}-{{train,test}}.parquet, or the hub's {source.hub_name}"
        for name, source in SOURCES.items()
    },
    SMALL_MNIST: "mnist-{train,test}.parquet, or the hub's ylecun/mnist",
    CLUTTER: "mnist-{train,test}.parquet, or the hub's ylecun/mnist",
    "imagenet": "imagenet/{train,val}/CLASS/*.JPEG",
    "pydoc": "comes with Python",
    UNICODE_NAMES: "comes with Python",
    "shakespeare": f"shakespeare.txt, or the hub's {SHAKESPEARE}",
}
"""What each data set is read from, in words; files lie in the folder that is given."""


@functools.lru_cache(maxsize=4)
def load_data(name: str, data_dir: Path | None = None) -> Data:
    """Load a data set.

    Args:
        name: of :data:`DATA_SETS`. Images other than ``digits``, and the hub, need the extra
            ``data``.
        data_dir: a folder with the files of :data:`DATA_SETS`, parquet files in the column layout
            of the data set's hub page; None fetches the data set from the hub, but for ImageNet.

    Raises:
        DataError: unknown name, missing or malformed files, or the hub can't be reached.
        MissingDependencyError: the extra ``data`` is not installed.
    """
    if name == "digits":
        return _load_digits()
    if name in SOURCES:
        return _load_images(name, data_dir)
    if name == SMALL_MNIST:
        return _load_small_mnist(data_dir)
    if name == CLUTTER:
        return _load_clutter(data_dir)
    if name == "imagenet":
        return _load_imagenet(data_dir)
    if name == "pydoc":
        return load_pydoc()
    if name == UNICODE_NAMES:
        return load_unicode_names()
    if name == "shakespeare":
        return load_shakespeare(data_dir)
    raise DataError(unknown_name("data set", name, DATA_SETS))


def _load_imagenet(data_dir: Path | None) -> ImageFolder:
    layout = (
        "images of ILSVRC 2012 (image-net.org, behind a registration) go into "
        "imagenet/train/CLASS and imagenet/val/CLASS of the folder --data-dir"
    )
    if data_dir is None:
        raise DataError(f"imagenet can't be fetched; give --data-dir: {layout}")
    return load_image_folder("imagenet", data_dir / "imagenet", layout)


def _load_digits() -> ClassificationData:
    """8x8 images of handwritten digits with 17 grey levels; every fifth example is held out.

    They are the test set of Alpaydin and Kaynak, 1998, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, doi:10.24432/C50P49, under CC BY 4.0, in the order
    that scikit-learn has them in.
    """
    import numpy as np

    with np.load(Path(__file__).with_name("digits.npz")) as file:
        images = torch.from_numpy(file["images"])
        labels = torch.from_numpy(file["labels"]).to(torch.int64)
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


def _load_small_mnist(data_dir: Path | None) -> ClassificationData:
    """MNIST in 8x8 pixels, each the mean of those that it covers."""
    whole = load_data("mnist", data_dir)
    assert isinstance(whole, ClassificationData)
    return dataclasses.replace(
        whole,
        name=SMALL_MNIST,
        train_images=_shrunk(whole.train_images, SMALL_SIZE),
        val_images=_shrunk(whole.val_images, SMALL_SIZE),
    )


def _shrunk(images: Tensor, size: int) -> Tensor:
    """Grey images with so many pixels a side."""
    means = [
        F.interpolate(some.unsqueeze(1).float(), size=size, mode="area")
        for some in images.split(1000)
    ]
    return torch.cat(means).squeeze(1).round().to(torch.uint8)


def _load_clutter(data_dir: Path | None) -> ClassificationData:
    """MNIST's digits in colours before pieces of other digits in colours: 3 channels, 16x16 pixels.

    Far harder than MNIST itself, as photographs are: what is there besides the digit, and all
    colours, say nothing of the label. After the cluttered MNIST of Mnih et al., "Recurrent models
    of visual attention", NeurIPS 2014, section 4.
    """
    whole = load_data("mnist", data_dir)
    assert isinstance(whole, ClassificationData)
    return dataclasses.replace(
        whole,
        name=CLUTTER,
        train_images=_cluttered(whole.train_images, make_generator(0, CLUTTER, "train")),
        val_images=_cluttered(whole.val_images, make_generator(0, CLUTTER, "val")),
    )


CLUTTER_PIECES = 2


def _cluttered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each digit, 14x14 pixels, at a random place over a ground, pieces of others behind it."""
    digits = _shrunk(images, CLUTTER_SIZE - 2)
    count = len(digits)

    def colours(low: float, high: float) -> Tensor:
        drawn = low + (high - low) * torch.rand(count, 3, 1, 1, generator=generator)
        return drawn.expand(count, 3, CLUTTER_SIZE, CLUTTER_SIZE)

    def placed(shapes: Tensor, low: int, high: int) -> Tensor:
        """At offsets from low to high, what is outside cut off: (count, 1, 16, 16), from 0 to 1."""
        margin = CLUTTER_SIZE
        padded = F.pad(shapes, (margin,) * 4)
        top, left = margin - torch.randint(low, high + 1, (2, count, 1), generator=generator)
        across = torch.arange(CLUTTER_SIZE)
        rows, columns = (top + across)[:, :, None], (left + across)[:, None, :]
        return padded[torch.arange(count)[:, None, None], rows, columns].unsqueeze(1) / 255

    scene = colours(0, 0.6)
    for _ in range(CLUTTER_PIECES):
        others = digits[torch.randint(count, (count,), generator=generator)]
        scene = torch.lerp(scene, colours(0, 0.6), placed(others, -10, 12))
    scene = torch.lerp(scene, colours(0.3, 1), placed(digits, 0, 2))
    return (scene * 255).round().to(torch.uint8)


def _load_images(name: str, data_dir: Path | None) -> ClassificationData:
    try:
        import datasets
    except ImportError:
        raise missing_extra(f"{name} is read with the library datasets", "data") from None
    source = SOURCES[name]
    images, labels = {}, {}
    for split in ("train", "test"):
        if data_dir is None:
            try:
                table = datasets.load_dataset(source.hub_name, split=split)
            except Exception as error:  # whatever the network or the hub answers
                raise DataError(
                    f"can't load {source.hub_name} from the hub ({type(error).__name__}); with a "
                    f"folder that holds {name}-train.parquet and {name}-test.parquet, give "
                    f"--data-dir"
                ) from error
        else:
            path = data_dir / f"{name}-{split}.parquet"
            if not path.is_file():
                raise DataError(
                    f"no file {path}; save the parquet file of the split {split} of the hub's "
                    f"{source.hub_name} there, or leave out --data-dir to have it fetched"
                )
            table = _read_parquet(path, source, datasets)
        images[split], labels[split] = _decode(table, source, f"{name}, split {split}")
    return ClassificationData(
        name=name,
        train_images=images["train"],
        train_labels=labels["train"],
        val_images=images["test"],
        val_labels=labels["test"],
        max_value=255,
        num_classes=source.num_classes,
    )


def _read_parquet(path: Path, source: _Source, datasets: Any) -> Any:
    """A parquet file as a data set, without copies in the library's cache."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=[source.image, source.label])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path} is not a parquet file of {source.image} and {source.label}: {reason}"
        ) from None
    return datasets.Dataset(table).cast_column(source.image, datasets.Image())


def _decode(table: Any, source: _Source, what: str) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        images = np.stack([np.asarray(image) for image in table[source.image]])
        labels = np.asarray(table[source.label], dtype=np.int64)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise DataError(f"{what}: can't be read as images with labels: {error}") from None
    expected = images.ndim == 4 and images.shape[3] == 3 if source.colours else images.ndim == 3
    if images.dtype != np.uint8 or not expected:
        kind = "images with 3 colours" if source.colours else "grey images"
        raise DataError(
            f"{what}: expected {kind} of 8 bits; got {images.dtype} of shape {images.shape}"
        )
    if source.colours:
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(labels)
