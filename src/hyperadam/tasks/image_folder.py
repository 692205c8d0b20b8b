"""Images in folders by class, which are decoded when a batch asks for them."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from hyperadam.errors import DataError, missing_extra
from hyperadam.tasks.base import batch_indices, make_generator

EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Of files that are taken for images, in capitals or not; other files are left alone."""

MEANS, DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue, from 0 to 1."""

VALIDATION_BATCH = 100
CENTRE = 224 / 256
"""Side of the square that validation cuts from an image's centre, in the image's shorter sides."""

CROP_TRIES = 10
MIN_CROP_AREA = 0.08
MAX_CROP_ASPECT = 4 / 3

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images in ``root/train/CLASS`` and ``root/val/CLASS``.

    Attributes:
        name: of the data set.
        root: the folder.
        classes: the folders' names, in order; a label is a place among them.
        train_files, val_files: paths of images, from ``root``.
        train_labels, val_labels: int64, from 0.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train_files: tuple[str, ...]
    train_labels: Tensor
    val_files: tuple[str, ...]
    val_labels: Tensor

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.classes)


def load_image_folder(name: str, root: Path, advice: str) -> ImageFolder:
    """Find classes and images; none is opened.

    Args:
        name: of the data set.
        root: the folder with ``train`` and ``val``.
        advice: what to put there, for the message that it is missing.

    Raises:
        DataError: a folder is missing or holds no images, or classes differ.
        MissingDependencyError: the extra ``data`` is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise missing_extra(f"{name} is read with the library pillow", "data") from None
    classes, held_out = (_classes(root / split, advice) for split in ("train", "val"))
    if unknown := sorted(set(held_out) - set(classes)):
        raise DataError(
            f"{root / 'val' / unknown[0]} is no class of {root / 'train'}; give both the same names"
        )
    train = {own: _images(root, f"train/{own}") for own in classes}
    val = {own: _images(root, f"val/{own}") for own in held_out}
    for folder, files in ((root / "train" / own, train[own]) for own in classes):
        if not files:
            raise DataError(f"no images in {folder}; put some there, or remove the folder")
    if not any(val.values()):
        raise DataError(f"no images in {root / 'val'}; {advice}")
    (train_files, train_labels), (val_files, val_labels) = (
        _labelled(classes, files) for files in (train, val)
    )
    return ImageFolder(name, root, tuple(classes), train_files, train_labels, val_files, val_labels)


def _classes(folder: Path, advice: str) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; {advice}")
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    if not names:
        raise DataError(f"no folders of classes in {folder}; {advice}")
    return sorted(names)


def _images(root: Path, folder: str) -> list[str]:
    return [
        f"{folder}/{name}"
        for name in sorted(os.listdir(root / folder))
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
    ]


def _labelled(
    classes: Sequence[str], files: dict[str, list[str]]
) -> tuple[tuple[str, ...], Tensor]:
    """All files in the order of classes, and their labels."""
    counts = torch.tensor([len(files.get(own, ())) for own in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return tuple(file for own in classes for file in files.get(own, ())), labels


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolderExamples:
    """Normalised square images, float32, of shape (batch, 3, size, size), and their labels.

    In training a random part of each image is scaled to the square, and half of them are mirrored
    (C. Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6); in validation it is
    the centre (K. He et al., "Deep residual learning", CVPR 2016, section 3.4).

    Attributes:
        data: where the images lie.
        batch_size: images of a batch, fewer where the data set has fewer.
        size: height and width of the square.

    Raises:
        DataError: a file that is no image, or a damaged one, when it is read.
    """

    data: ImageFolder
    batch_size: int = 128
    size: int = 224

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        labels = self.data.train_labels
        indices = batch_indices(len(labels), self.batch_size, seed, step)
        generator = make_generator(seed, "augment", step)
        draws = torch.rand(len(indices), CROP_TRIES, 4, generator=generator)
        mirrored = torch.rand(len(indices), 1, 1, 1, generator=generator) < 0.5
        files = [self.data.train_files[index] for index in indices.tolist()]
        images = self._decoded(files, [_random_box(own) for own in draws.tolist()])
        return torch.where(mirrored, images.flip(3), images), labels[indices]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.data.val_files), VALIDATION_BATCH):
            here = slice(start, start + VALIDATION_BATCH)
            files = self.data.val_files[here]
            yield self._decoded(files, [_central_box] * len(files)), self.data.val_labels[here]

    def _decoded(self, files: Sequence[str], boxes: Sequence[Callable[[int, int], Box]]) -> Tensor:
        # Pillow lets go of Python's lock while it decodes and scales.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            paths = [self.data.root / file for file in files]
            pixels = torch.stack(list(pool.map(_pixels, paths, boxes, [self.size] * len(files))))
        means, deviations = (torch.tensor(own).view(3, 1, 1) for own in (MEANS, DEVIATIONS))
        return (pixels.permute(0, 3, 1, 2) / 255 - means) / deviations


def _pixels(path: Path, box: Callable[[int, int], Box], size: int) -> Tensor:
    """Part of an image at a size: uint8 of shape (size, size, 3)."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            part = box(*image.size)
            scaled = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, part)
    except Exception as error:  # whatever a decoder raises
        raise DataError(
            f"{path} is not a whole image ({type(error).__name__}); replace or remove it"
        ) from error
    return torch.from_numpy(np.array(scaled))


def _central_box(width: int, height: int) -> Box:
    side = CENTRE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(draws: Sequence[Sequence[float]]) -> Callable[[int, int], Box]:
    """A random part of an image: 8 to 100 % of its area, 3:4 to 4:3.

    Args:
        draws: four numbers from 0 to 1 for each try. The first part that lies within the image is
            taken; if there is none, the largest central one of at most 4:3.
    """

    def box(width: int, height: int) -> Box:
        for area, aspect, across, down in draws:
            pixels = (MIN_CROP_AREA + (1 - MIN_CROP_AREA) * area) * width * height
            ratio = MAX_CROP_ASPECT ** (2 * aspect - 1)
            wide, high = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < wide <= width and 0 < high <= height:
                left, top = int(across * (width - wide + 1)), int(down * (height - high + 1))
                return left, top, left + wide, top + high
        wide_most, high_most = (
            min(a, MAX_CROP_ASPECT * b) for a, b in ((width, height), (height, width))
        )
        left_most, top_most = (width - wide_most) / 2, (height - high_most) / 2
        return left_most, top_most, left_most + wide_most, top_most + high_most

    return box
