"""Weights files to the Hugging Face Hub, each with a page that says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hyperadam.errors import WeightsError
from hyperadam.weights.hub import DEFAULT_FILE, PREFIX, HubAddress, library, plain
from hyperadam.weights.store import Weights, load_weights

# The hub's identifiers of licences; others are "other", by their name.
_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "mpl-2.0", "unknown"),
    *("gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
)

_CARD = """\
---
{licence_lines}
library_name: hyperadam
tags:
- learned-optimizer
- meta-learning
- pytorch
---

# {title}

Weights of {rule}, a meta-trained optimizer for PyTorch, made with
hyperadam.

| | |
|---|---|
{rows}

```python
from hyperadam.optim import {optimizer}

optimizer = {optimizer}(model.named_parameters(), weights="{address}")
```

```bash
pip install '.[hub]'   # in hyperadam's folder
hyperadam weights show {address}
hyperadam evaluate --suite digits --optimizers adam,{rule}@{address} --out results
```

`{address}@COMMIT` keeps these very numbers, whatever comes later; loading without a commit
tells which one it is. The file holds a digest of its content, so damage is noticed.

The rule's configuration:

```json
{configuration}
```
"""


def push_weights(path: str | Path, repo: str, *, private: bool = False) -> str:
    """Put a weights file on the hub, as ``weights.safetensors``, with a page (README.md) about it.

    Args:
        path: of the file; it is checked as by :func:`load_weights`.
        repo: ``org/name``; made if it isn't there.
        private: make sure that only the organisation sees it; otherwise a new repository is as the
            organisation has them by default, mostly public.

    Returns:
        Its address with the commit.

    Raises:
        WeightsError: not a usable weights file; an impossible name; not logged in, no right to
            write, or no answer from the hub; ``private`` and the repository is public.
        MissingDependencyError: ``huggingface_hub`` is not installed.
    """
    weights = load_weights(Path(path))
    address = HubAddress.parse(f"{PREFIX}{repo}")
    if repo != address.repo:
        raise WeightsError(f"{repo} is no name of a repository; they are of the form org/name")
    hub = library()
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.model_info(repo).private
        if not public:
            commit = api.create_commit(
                repo,
                [
                    hub.CommitOperationAdd(DEFAULT_FILE, Path(path).read_bytes()),
                    hub.CommitOperationAdd("README.md", model_card(weights, repo).encode()),
                ],
                commit_message=f"Weights of {weights.rule.name}, digest {weights.digest()[:12]}",
            )
    except Exception as error:  # what the network raises depends on the library's version
        raise WeightsError(
            f"{path} can't be pushed to {repo} on {api.endpoint}: {plain(error)} (to log in: "
            f"`hf auth login`, or HF_TOKEN with a token that may write)"
        ) from None
    if public:
        raise WeightsError(f"{repo} is there and public; nothing was pushed to it")
    return f"{address}@{commit.oid}"


def model_card(weights: Weights, repo: str) -> str:
    """The page of weights on the hub: Markdown with the hub's metadata in front.

    Args:
        weights: what it is about.
        repo: ``org/name`` of their repository.
    """
    rule = weights.rule
    rows = {
        "rule": f"{rule.name}, {rule.num_theta()} numbers",
        "learning rate": f"{weights.lr:g}",
        "recommended schedule": weights.schedule,
        "recipe": weights.preset,
        "meta-trained on": weights.data,
        "inner steps of meta-training": f"{weights.steps:,}",
        "date": weights.date,
        "program": weights.commit,
        "licence": weights.licence,
        "digest": weights.digest(),
    }
    return _CARD.format(
        licence_lines=_licence_lines(weights.licence),
        title=repo.partition("/")[2],
        rule=rule.name,
        rows="\n".join(f"| {name} | {_escaped(value)} |" for name, value in rows.items()),
        optimizer=type(rule).__name__.removesuffix("Rule"),
        address=f"{PREFIX}{repo}",
        configuration=json.dumps(rule.to_dict(), indent=2, sort_keys=True),
    )


def _licence_lines(licence: str) -> str:
    name = licence.lower()
    if name in _LICENCES:
        return f"license: {name}"
    return f"license: other\nlicense_name: {json.dumps(licence)}"


def _escaped(text: str) -> str:
    """Text in one line, of which Markdown makes nothing else."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
