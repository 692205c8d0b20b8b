"""Which parameters make attention's queries, keys and values, as their names tell.

A layer's logits are products of what two of its projections make, so that steps which other weights
bear well let them grow until the softmax picks one token: Zhai et al., "Stabilizing Transformer
Training by Preventing Attention Entropy Collapse", ICML 2023; Wortsman et al., "Small-scale proxies
for large-scale Transformer training instabilities", ICLR 2024. No shape tells them from others.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable

_PARTS = {
    **dict.fromkeys(("q", "query"), "q"),
    **dict.fromkeys(("k", "key"), "k"),
    **dict.fromkeys(("v", "value"), "v"),
    "qk": "qk",
    "kv": "kv",
    **dict.fromkeys(("qkv", "query_key_value"), "qkv"),
}
"""What a projection makes, by the word for it in its name."""

_WORDS = "|".join(sorted(_PARTS, key=len, reverse=True))

# q_proj, to_q, query, Wqkv, linear_k, q_proj_weight, ...
_PROJECTION = re.compile(rf"((?:.*?_)??|w)({_WORDS})((?:_.*)?)", re.IGNORECASE)

# torch.nn.MultiheadAttention's, of which nothing but a dimension tells what it makes, and GPT-2's.
_WHOLE = ("in_proj_weight", "c_attn")


def attention_projections(names: Iterable[str]) -> frozenset[str]:
    """The names, among those of a model's parameters, of attention's input projections.

    The name of a parameter, or of its layer, has to say ``q``, ``k``, ``v``, ``query``, ``key``,
    ``value`` or several of these at once, alone or beside other words (``q_proj``, ``to_kv``,
    ``query_key_value``, ``Wqkv``), and there has to be a query for a key in the same module: a
    ``value`` alone may be anything. ``in_proj_weight`` (``torch.nn.MultiheadAttention``) and
    ``c_attn`` (GPT-2) make all three.

    Args:
        names: of all of them, as ``named_parameters()`` gives them.
    """
    return _projections(tuple(names))


@functools.lru_cache(maxsize=32)  # an optimizer asks in every step
def _projections(names: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    candidates: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        module, _, own = name.removesuffix(".weight").rpartition(".")
        if own in _WHOLE:
            found.add(name)
        elif match := _PROJECTION.fullmatch(own):
            before, word, after = match.groups()
            candidates[module, before, after].append((name, _PARTS[word.lower()]))
    for siblings in candidates.values():
        if {"q", "k"} <= set("".join(parts for _, parts in siblings)):
            found.update(name for name, _ in siblings)
    return frozenset(found)
