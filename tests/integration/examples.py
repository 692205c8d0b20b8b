"""The examples of docs/trainers.md, and the loop that a trainer's run is compared with."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def run_example(heading, seed=0):
    """Run the first example below a heading, as it stands there: the names that it leaves."""
    text = PAGE.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {"__name__": "example"}
    torch.manual_seed(seed)
    exec(compile(block, f"{PAGE.name}: {heading}", "exec"), names)
    return names


def train_plainly(model, losses, optimizer, *, scheduler=None, accumulate=1, max_norm=None):
    """The loop without a trainer: a step after every ``accumulate`` losses of their mean."""
    for number, loss in enumerate(losses, start=1):
        (loss() / accumulate).backward()
        if number % accumulate == 0:
            if max_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()


def values(model):
    return [param.detach().clone() for param in model.parameters()]


def are_equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
