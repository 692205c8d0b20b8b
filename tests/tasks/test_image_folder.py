"""The real loading code of ImageNet, on a small folder."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hyperadam.errors import DataError, MissingDependencyError
from hyperadam.tasks import ImageFolderExamples, load_data, make_generator, make_task
from hyperadam.tasks import image_folder as module
from hyperadam.tasks.imagenet_resnet import ImageNetResNet

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def examples(image_dir):
    return ImageFolderExamples(load_data("imagenet", image_dir), batch_size=14, size=32)


@pytest.fixture
def copied(image_dir, tmp_path):
    """A folder to spoil."""
    shutil.copytree(image_dir, tmp_path, dirs_exist_ok=True)
    return tmp_path


def pixels(normalised):
    """From 0 to 1 again."""
    means, deviations = (torch.tensor(x).view(3, 1, 1) for x in (module.MEANS, module.DEVIATIONS))
    return normalised * deviations + means


def gradient(width, height):
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).round().astype(np.uint8))


def test_classes_and_files(image_dir):
    data = load_data("imagenet", image_dir)
    assert data.classes == ("n01", "n02", "n03")
    assert data.train_labels.tolist() == [0] * 5 + [1] * 5 + [2] * 4
    assert data.val_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.train_files[4:6] == ("train/n01/n01_3.JPEG", "train/n02/clear.png")
    assert data.val_files[-1] == "val/n03/n03_1.JPEG"


def test_a_class_may_have_no_validation_images(copied):
    shutil.rmtree(copied / "imagenet" / "val" / "n02")
    data = load_data("imagenet", copied)
    assert data.val_labels.tolist() == [0, 0, 2, 2]
    assert data.num_classes == 3


def test_images_are_those_of_their_labels(examples):
    images, labels = examples.batch(0, 0)
    assert images.shape == (14, 3, 32, 32)
    assert images.dtype == torch.float32
    assert sorted(labels.tolist()) == sorted(examples.data.train_labels.tolist())
    seen = pixels(images)
    assert torch.equal(seen.mean(dim=(2, 3)).argmax(dim=1), labels)
    expected = 200 / 255 * torch.nn.functional.one_hot(labels, 3).double()
    assert float((seen - expected[:, :, None, None]).abs().max()) < 0.03
    (images, labels), *more = examples.validation()
    assert not more
    assert torch.equal(pixels(images).mean(dim=(2, 3)).argmax(dim=1), labels)


def test_the_networks_outputs_are_the_folders_classes(image_dir):
    task = make_task("imagenet-resnet18", image_dir)
    assert task.init_params(make_generator(0))["output.weight"].shape == (3, 512)
    assert task.weight_decay == 1e-4
    assert (task.examples.batch_size, task.examples.size) == (128, 224)


def test_validation_cuts_the_centre(examples, tmp_path):
    """As if the shorter side were made 256 and the central 224 taken."""
    gradient(640, 512).save(tmp_path / "a.png")
    data = dataclasses.replace(
        examples.data, root=tmp_path, val_files=("a.png",), val_labels=torch.tensor([1])
    )
    ((images, _),) = ImageFolderExamples(data).validation()
    scaled = gradient(640, 512).resize((320, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(scaled.crop((48, 16, 272, 240))).transpose(2, 0, 1)
    assert images.shape == (1, 3, 224, 224)
    assert np.abs(255 * pixels(images)[0].numpy() - expected).max() < 1.01


def test_validation_comes_in_batches(examples, monkeypatch):
    (whole,) = examples.validation()
    monkeypatch.setattr(module, "VALIDATION_BATCH", 4)
    parts = list(examples.validation())
    assert [len(labels) for _, labels in parts] == [4, 2]
    for both, own in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(both, torch.cat(own))


def test_training_images_are_random_parts_half_of_them_mirrored(examples, tmp_path):
    gradient(160, 120).save(tmp_path / "a.png")
    count = 200
    data = dataclasses.replace(
        examples.data,
        root=tmp_path,
        train_files=("a.png",) * count,
        train_labels=torch.zeros(count, dtype=torch.int64),
    )
    own = ImageFolderExamples(data, batch_size=count, size=16)
    images, _ = own.batch(0, 0)
    assert torch.equal(own.batch(0, 0)[0], images)
    assert not torch.equal(own.batch(0, 1)[0], images)
    assert not torch.equal(own.batch(1, 0)[0], images)
    red, green = pixels(images)[:, 0].mean(dim=1), pixels(images)[:, 1].mean(dim=2)
    mirrored = red[:, 0] > red[:, -1]
    assert 0.4 < float(mirrored.double().mean()) < 0.6
    assert bool((green[:, 0] < green[:, -1]).all())
    # The outermost two of 16 pixels are 15/16 of a side apart.
    wide, high = ((own[:, -1] - own[:, 0]).abs() * 16 / 15 for own in (red, green))
    area = wide * high
    assert 0.07 < float(area.min()) < 0.15
    assert 0.9 < float(area.max()) < 1.02
    left = torch.minimum(red[:, 0], red[:, -1])
    assert float(left.min()) < 0.05
    assert float(left.max()) > 0.4


def test_parts_of_an_image():
    draws = torch.rand(500, module.CROP_TRIES, 4, generator=make_generator(0)).tolist()
    for width, height in ((500, 375), (375, 500), (8, 8)):
        for own in draws:
            left, top, right, bottom = module._random_box(own)(width, height)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert all(float(side).is_integer() for side in (left, top, right, bottom))
            if width > 8:
                assert 0.078 < (right - left) * (bottom - top) / (width * height) <= 1
                assert 0.73 < (right - left) / (bottom - top) < 1.36
    edges = [module._random_box(own)(375, 500) for own in draws]
    assert {0, 375} <= {x for box in edges for x in (box[0], box[2])}
    assert {0, 500} <= {y for box in edges for y in (box[1], box[3])}


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 30), (480, 0, 520, 30)), ((30, 1000), (0, 480, 30, 520))]
)
def test_where_no_part_fits_the_centre_is_taken(size, box):
    assert module._random_box([[0.99, 0.5, 0.5, 0.5]] * 10)(*size) == pytest.approx(box)
    assert module._random_box([[0.99, 0.5, 0.5, 0.5], [0, 0.5, 0, 0]])(40, 10) == (0, 0, 6, 6)


# -- bad input -----------------------------------------------------------------------------------


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"give --data-dir: images of ILSVRC 2012 \(image-net"):
        load_data("imagenet")
    with pytest.raises(DataError, match=r"no folder .*imagenet/train; images of ILSVRC 2012"):
        load_data("imagenet", tmp_path)


def test_classes_that_are_not_there(copied):
    val = copied / "imagenet" / "val"
    (val / "n01").rename(val / "n09")
    with pytest.raises(DataError, match=r"val/n09 is no class of .*train; give both the same"):
        load_data("imagenet", copied)
    shutil.rmtree(val)
    val.mkdir()
    (val / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DataError, match=r"no folders of classes in .*val; images of .* go into"):
        load_data("imagenet", copied)


def test_folders_without_images(copied):
    for name in ("n01", "n02", "n03"):
        for path in (copied / "imagenet" / "val" / name).glob("n*.JPEG"):
            path.unlink()
    with pytest.raises(DataError, match=r"no images in .*val; images of ILSVRC"):
        load_data("imagenet", copied)
    (copied / "imagenet" / "train" / "n04").mkdir()
    with pytest.raises(DataError, match=r"no images in .*n04; put some there, or remove"):
        load_data("imagenet", copied)


@pytest.mark.parametrize("spoil", [lambda content: content[:-200], lambda _: b"no image"])
def test_a_broken_image_is_named(copied, spoil):
    path = copied / "imagenet" / "train" / "n02" / "n02_3.JPEG"
    path.write_bytes(spoil(path.read_bytes()))
    examples = ImageFolderExamples(load_data("imagenet", copied), batch_size=14, size=8)
    with pytest.raises(DataError, match=r"n02_3\.JPEG is not a whole image \(.*\); replace or"):
        examples.batch(0, 0)


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[data\]'"):
        load_data("imagenet", tmp_path)


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "giga"), [(18, 1.814), (50, 4.089)])
def test_products_of_a_forward_pass(depth, giga):
    """As torchvision states them: so sizes within the network are the field's too."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        logits = ImageNetResNet(depth, 1000).eval()(torch.empty(1, 3, 224, 224))
    assert logits.shape == (1, 1000)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=6e-4)


def test_a_resnet_begins_as_a_resnet_does():
    network = ImageNetResNet(18, 10)
    weight = network.blocks[2].layers[0].weight
    assert weight.shape == (128, 64, 3, 3)
    assert float(weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.01)
    assert network.stem[1].weight.unique().tolist() == [1]
