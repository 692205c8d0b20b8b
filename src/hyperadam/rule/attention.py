"""Which parameters are the matrices of attention, as their names tell.

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

# out_proj, o_proj, proj, c_proj, wo, to_out, dense, ...; where there are projections of inputs too.
_OUTPUT = re.compile(
    r"(?:to_|w_?|c_|linear_|attn_)?(?:o|out|output|proj|dense)(?:_?proj|_lin|_linear)?",
    re.IGNORECASE,
)

# What compiling, checkpointing, sharding, parametrising and adapting put into a name.
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer|parametrizations)"
    r"(?=\.)|(\.weight)?(_orig|\.original\d?)?$"
)


def attention_projections(names: Iterable[str]) -> frozenset[str]:
    """Those of attention's projections among the names of a model's parameters.

    Of its inputs: the name of a parameter, or of its layer, has to say ``q``, ``k``, ``v``,
    ``query``, ``key``, ``value``, their plural, or several of these at once, alone or with other
    words beside it (``q_proj``, ``to_kv``, ``query_key_value``, ``Wqkv``), and among the names
    there has to be one for a query and one for a key of the same module, with the same words before
    it: a ``value`` alone may be anything. ``in_proj_weight`` (``torch.nn.MultiheadAttention``),
    ``c_attn`` and ``q_attn`` (GPT-2), and ``W_pack`` need no other. And of its outputs: what is
    called so (``out_proj``, ``o_proj``, ``proj``, ``to_out``, ``dense``) in a module with such
    inputs, or in ``output`` beside it (BERT).

    Args:
        names: of all of them, as ``named_parameters()`` gives them.

    Returns:
        Some of the names, as they were given.
    """
    return _projections(tuple(names))


@functools.lru_cache(maxsize=32)  # an optimizer asks in every step
def _projections(names: tuple[str, ...]) -> frozenset[str]:
    found: set[str] = set()
    modules: set[str] = set()
    inputs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    outputs: list[tuple[str, str]] = []
    for name in names:
        module, _, own = _WRAPPERS.sub("", name).rpartition(".")
        if own in _WHOLE:
            found.add(name)
            modules.add(module)
        elif _OUTPUT.fullmatch(own):
            outputs.append((module, name))
        elif own == "0" and _OUTPUT.fullmatch(module.rpartition(".")[2]):  # diffusers' to_out.0
            outputs.append((module.rpartition(".")[0], name))
        elif match := _PROJECTION.fullmatch(own):
            before, word, after = match.groups()
            if not (_OTHERS.search(before) or _OTHERS.search(after)):
                inputs[module, before].append((name, _PARTS[word.lower()]))
    for (module, _), siblings in inputs.items():
        if {"q", "k"} <= set("".join(parts for _, parts in siblings)):
            found.update(name for name, _ in siblings)
            modules.add(module)
    modules |= {f"{module.rpartition('.')[0]}.output" for module in modules}
    found.update(name for module, name in outputs if module in modules)
    return frozenset(found)
