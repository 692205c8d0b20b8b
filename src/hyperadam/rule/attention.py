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
    **dict.fromkeys(("q", "qs", "query", "queries"), "q"),
    **dict.fromkeys(("k", "ks", "key", "keys"), "k"),
    **dict.fromkeys(("v", "vs", "value", "values"), "v"),
    **dict.fromkeys(("qk", "query_key"), "qk"),
    "kv": "kv",
    **dict.fromkeys(("qkv", "query_key_value"), "qkv"),
}
"""What a projection makes, by the word for it in its name."""

_WORDS = "|".join(sorted(_PARTS, key=len, reverse=True))

# q_proj, to_q, query, Wqkv, linear_k, queryProj, q_proj_weight, ...
_PROJECTION = re.compile(rf"((?:.*?_)??|w)({_WORDS})((?:_.*|proj)?)", re.IGNORECASE)

# What stands beside such a word in the name of something that is no projection's matrix.
_OTHERS = re.compile(r"norm|bias|embed|conv|mlp|^b_$", re.IGNORECASE)

# torch.nn.MultiheadAttention's, GPT-2's two, Baichuan's: no word of them tells what they make.
_WHOLE = ("in_proj_weight", "c_attn", "q_attn", "W_pack")

# What compiling, checkpointing, sharding, parametrising and adapting put into a name.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer|parametrizations)"
    r"(?=\.)|(\.weight)?(_orig|\.original\d?)?$"
)


def attention_projections(names: Iterable[str]) -> frozenset[str]:
    """Those of attention's input projections among the names of a model's parameters.

    The name of a parameter, or of its layer, has to say ``q``, ``k``, ``v``, ``query``, ``key``,
    ``value``, their plural, or several of these at once, alone or with other words beside it
    (``q_proj``, ``to_kv``, ``query_key_value``, ``Wqkv``), and among the names there has to be one
    for a query and one for a key of the same module, with the same words before it: a ``value``
    alone may be anything. ``in_proj_weight`` (``torch.nn.MultiheadAttention``), ``c_attn`` and
    ``q_attn`` (GPT-2), and ``W_pack`` need no other.

    Args:
        names: of all of them, as ``named_parameters()`` gives them.

    Returns:
        Some of the names, as they were given.
    """
    return _projections(tuple(names))


@functools.lru_cache(maxsize=32)  # an optimizer asks in every step
def _projections(names: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    candidates: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for name in names:
        module, _, own = _WRAPPERS.sub("", name).rpartition(".")
        if own in _WHOLE:
            found.add(name)
        elif match := _PROJECTION.fullmatch(own):
            before, word, after = match.groups()
            if not (_OTHERS.search(before) or _OTHERS.search(after)):
                candidates[module, before].append((name, _PARTS[word.lower()]))
    for siblings in candidates.values():
        if {"q", "k"} <= set("".join(parts for _, parts in siblings)):
            found.update(name for name, _ in siblings)
    return frozenset(found)
