"""The real loading code, on small parquet files of the hub's layout, and on MNIST itself."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from hyperadam.errors import DataError, MissingDependencyError
from hyperadam.tasks import load_data, make_task

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path, images=IMAGES, **columns):
    import pyarrow.parquet

    content = {
        "image": [{"bytes": png(image), "path": None} for image in images],
        "label": [index % 10 for index in range(len(images))],
    } | columns
    table = pyarrow.table({key: value for key, value in content.items() if value is not None})
    pyarrow.parquet.write_table(table, path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "mnist-train.parquet")
    write(tmp_path / "mnist-test.parquet", IMAGES[:10])
    return tmp_path


def test_parquet_files(folder):
    data = load_data("mnist", folder)
    assert torch.equal(data.train_images, torch.from_numpy(IMAGES))
    assert data.train_labels.tolist() == [index % 10 for index in range(30)]
    assert len(data.val_labels) == 10
    assert data.max_value == 255
    assert make_task("mnist-mlp2-relu", folder).name == "mnist-mlp2-relu"


@pytest.mark.parametrize(
    ("name", "label", "classes"), [("cifar10", "label", 10), ("cifar100", "fine_label", 100)]
)
def test_images_with_colours(tmp_path, name, label, classes):
    images = np.random.default_rng(1).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = [classes - 1 - index for index in range(10)] * 2
    for split in ("train", "test"):
        own = images[: 12 if split == "train" else 5]
        write(
            tmp_path / f"{name}-{split}.parquet",
            image=None,
            img=[{"bytes": png(image), "path": None} for image in own],
            **{"label": None, label: labels[: len(own)]},
        )
    data = load_data(name, tmp_path)
    assert torch.equal(data.train_images, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    assert data.train_labels.tolist() == labels[:12]
    assert (len(data.val_labels), data.num_classes) == (5, classes)
    grey = [{"bytes": png(IMAGES[0]), "path": None}]
    path = tmp_path / f"{name}-test.parquet"
    write(path, image=None, img=grey, **{"label": None, label: [1]})
    load_data.cache_clear()
    with pytest.raises(DataError, match="expected images with 3 colours of 8 bits"):
        load_data(name, tmp_path)


def test_a_missing_file_is_named(folder):
    (folder / "mnist-test.parquet").unlink()
    with pytest.raises(DataError, match=r"no file .*mnist-test\.parquet; save the parquet file"):
        load_data("mnist", folder)


def test_damaged_files(folder):
    path = folder / "mnist-train.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="not a parquet file"):
        load_data("mnist", folder)
    write(path, label=None)
    with pytest.raises(DataError, match="not a parquet file of image and label"):
        load_data("mnist", folder)
    write(path, image=[{"bytes": b"no image", "path": None}] * 30)
    with pytest.raises(DataError, match="can't be read as images"):
        load_data("mnist", folder)
    write(path, np.zeros((30, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(DataError, match="expected grey images"):
        load_data("mnist", folder)


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    def refuse(name, split):
        assert name == "ylecun/mnist"
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="give --data-dir"):
        load_data("mnist", None)


def test_from_the_hub(monkeypatch, folder):
    import datasets

    def load_dataset(name, split):
        table = pyarrow.parquet.read_table(folder / f"mnist-{split}.parquet")
        return datasets.Dataset(table).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_data.cache_clear()
    data = load_data("mnist", None)
    load_data.cache_clear()
    assert torch.equal(data.train_images, torch.from_numpy(IMAGES))


def test_without_the_extra(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[data\]'"):
        load_data("mnist", folder)


def test_mnist_itself(data_dir):
    data = load_data("mnist", data_dir)
    assert data.train_images.shape == (60_000, 28, 28)
    assert data.val_images.shape == (10_000, 28, 28)
    assert torch.bincount(data.train_labels).tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert float(data.train_images.double().mean() / 255) == pytest.approx(0.1307, abs=1e-4)
