from __future__ import annotations

import pytest

COLOURS = {"n01": (200, 0, 0), "n02": (0, 200, 0), "n03": (0, 0, 200)}


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory):
    """A folder with ``imagenet``: three classes of one colour each, files of many kinds."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("data")
    for number, (name, colour) in enumerate(COLOURS.items()):
        for split, count in (("train", 4), ("val", 2)):
            folder = root / "imagenet" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                plain = image.new("RGB", (60 + 20 * index, 80 + 10 * number), colour)
                plain.save(folder / f"{name}_{index}.JPEG", quality=95)
            (folder / "notes.txt").write_text("no image")
            (folder / "._a.JPEG").write_text("no image")
    train = root / "imagenet" / "train"
    image.new("CMYK", (90, 70), (0, 255, 255, 55)).save(train / "n01" / "ink.jpg")
    image.new("RGBA", (70, 90), (0, 200, 0, 255)).save(train / "n02" / "clear.png")
    (train / "list.txt").write_text("no class")
    (train / ".cache").mkdir()
    return root
