"""Text by characters."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyperadam.errors import DataError, missing_extra
from hyperadam.tasks.base import make_generator

VOCABULARY = 97
"""The newline, ASCII's 95 printable characters, and one for all others.

The same for every text: so are a network's parameters, whatever the text is that a Python version
or a folder brings.
"""

CONTEXT = 64
VALIDATION_BATCH = 64

SHAKESPEARE = "karpathy/tiny_shakespeare"

UNICODE_NAMES = "unicode-names"


@dataclasses.dataclass(frozen=True, eq=False)
class TextData:
    """A text, whose last tenth is held out.

    Attributes:
        name: of the data set.
        train, val: its characters, from 0 to :data:`VOCABULARY` - 1, uint8.
    """

    name: str
    train: Tensor
    val: Tensor


def encode_text(text: str) -> Tensor:
    """Characters as numbers from 0 to :data:`VOCABULARY` - 1, uint8."""
    codes = torch.tensor(list(map(ord, text)), dtype=torch.int32)
    printable = (codes >= 32) & (codes < 127)
    numbers = torch.where(printable, codes - 31, torch.where(codes == 10, 0, VOCABULARY - 1))
    return numbers.to(torch.uint8)


def _divided(name: str, text: str, source: str) -> TextData:
    numbers = encode_text(text)
    held_out = len(numbers) // 10
    if held_out <= CONTEXT:
        raise DataError(
            f"{source}: a text of {len(numbers)} characters is too short; give one of "
            f"{10 * (CONTEXT + 1)} or more"
        )
    return TextData(name, numbers[:-held_out], numbers[-held_out:])


def load_pydoc() -> TextData:
    """The English text of Python's own documentation, which comes with every Python.

    Each paragraph comes once: topics repeat each other's, and what is held out must be new. The
    text differs a little from one Python version to the next, and so do losses.
    """
    from pydoc_data.topics import topics

    paragraphs = [part for name in sorted(topics) for part in topics[name].split("\n\n")]
    return _divided("pydoc", "\n\n".join(dict.fromkeys(paragraphs)), "pydoc")


def load_unicode_names() -> TextData:
    """The names of Unicode's characters, a line each, in a random order: 0.3 million characters.

    Those of version 3.2, which every Python has, so that the text is the same everywhere; without
    ideographs and Hangul syllables, whose names are numbered or spelled by rule.
    """
    named = unicodedata.ucd_3_2_0
    names = [named.name(chr(code), "") for code in range(0x20000)]
    spelled = [
        name
        for name in names
        if name and not name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY I", "HANGUL SYLLABLE"))
    ]
    order = torch.randperm(len(spelled), generator=make_generator(0, UNICODE_NAMES))
    text = "\n".join(spelled[place] for place in order.tolist())
    return _divided(UNICODE_NAMES, text, UNICODE_NAMES)


def load_shakespeare(data_dir: Path | None) -> TextData:
    """Scenes of Shakespeare, 1.1 million characters (A. Karpathy, "The unreasonable effectiveness
    of recurrent neural networks", 2015).

    Args:
        data_dir: a folder with ``shakespeare.txt``; None fetches it from the hub.

    Raises:
        DataError: the file is missing, no text or short, or the hub can't be reached.
        MissingDependencyError: the hub is asked without the extra ``data``.
    """
    if data_dir is None:
        return _divided("shakespeare", _from_hub(), SHAKESPEARE)
    path = data_dir / "shakespeare.txt"
    if not path.is_file():
        raise DataError(f"no file {path}; save the text of the hub's {SHAKESPEARE} there")
    try:
        return _divided("shakespeare", path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text in UTF-8: {error}; convert it") from None


def _from_hub() -> str:
    try:
        import datasets
    except ImportError:
        raise missing_extra("shakespeare is fetched with the library datasets", "data") from None
    try:
        # The page itself holds a program, which the library no longer runs; this branch has what it
        # makes. Its splits are the text in three pieces.
        splits: Any = datasets.load_dataset(SHAKESPEARE, revision="refs/convert/parquet")
        pieces = [splits[name]["text"] for name in ("train", "validation", "test")]
    except Exception as error:  # whatever the network or the hub answers
        raise DataError(
            f"can't load {SHAKESPEARE} from the hub ({type(error).__name__}); with a folder that "
            f"holds shakespeare.txt, give --data-dir"
        ) from error
    return "".join(text for piece in pieces for text in piece)


@dataclasses.dataclass(frozen=True, eq=False)
class TextExamples:
    """Pieces of text, and the character that follows each of theirs: both int64, (batch, context).

    Attributes:
        data: the text.
        batch_size: pieces of a batch.
        context: characters of a piece.
    """

    data: TextData
    batch_size: int = 32
    context: int = CONTEXT

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Pieces from places drawn at random."""
        generator = make_generator(seed, "text", step)
        places = len(self.data.train) - self.context
        starts = torch.randint(places, (self.batch_size,), generator=generator)
        return self._pieces(self.data.train, starts)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out text piece by piece, without the incomplete last."""
        starts = torch.arange(0, len(self.data.val) - self.context, self.context)
        for own in starts.split(VALIDATION_BATCH):
            yield self._pieces(self.data.val, own)

    def _pieces(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        pieces = text[starts[:, None] + torch.arange(self.context + 1)].to(torch.int64)
        return pieces[:, :-1], pieces[:, 1:]
