"""After a fine-tune, the attention layers look again where they looked before it: W_q and W_k are put back.

QK-Restore, arXiv 2606.11052: fine-tuning on short-range text disturbs the queries and keys of the few attention layers
of a hybrid, and with them its long-range recall, while values, outputs and all else learn what they should.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hypenet_jax import hub
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.card import card, described, source_of, tags_of, usage
from hypenet_jax.model.config import ModelConfig

METHODS = ("copy", "procrustes")
_DTYPE = "float32"
_GUARD = 1e-6
# What decides where an attention layer looks; the norms of queries and keys are part of its scores.
_RESTORED = ("q", "k", "q_norm", "k_norm")
# What the scores of an attention layer depend on besides its parameters.
_SAME = ("num_layers", "mixers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "qk_norm", "norm_eps")
_SAME_ROPE = ("attention_rope", "rope_theta", "rope_scaling")


def restore_directory(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str = "copy",
    layers: str = "attention",
) -> tuple[int, ...]:
    """Write AFTER with the queries and keys of BEFORE as a Hugging Face directory, float32; returns the layers.

    before, after: anything that `hub.load` reads. layers: "attention", or numbers joined by commas. Config, scaling and
    tokenizer are AFTER's; a tokenizer that AFTER lacks (a stage's directory has none) is taken from BEFORE.
    Raises HypenetError where OUT exists or the two are not the same network.
    """
    if pathlib.Path(out).exists():
        raise HypenetError(f"{out} exists; name a new directory")
    (old, old_params), (new, new_params) = hub.load(before), hub.load(after)
    check_same(old.config, new.config)
    chosen = _chosen(layers, new.config)
    params = restore(old_params, new_params, chosen, method)
    card = _card(new.config, os.fspath(before), os.fspath(after), os.fspath(out), method, chosen)
    hub.save(dataclasses.replace(new, tokenizer=new.tokenizer or old.tokenizer), params, out, _DTYPE, card=card)
    return chosen


def _card(config: ModelConfig, before: str, after: str, out: str, method: str, layers: Sequence[int]) -> str:
    """The model card of what was restored: which of two models each part is of, and the command."""
    source, numbers = source_of(after), [str(layer) for layer in layers]
    origin = (
        f"The model `{after}`, fine-tuned from `{before}`, after QK-Restore (arXiv 2606.11052) with hypenet_jax: the "
        f"queries and keys of the attention layers {', '.join(numbers)} are those of `{before}`, by the method "
        f"`{method}`; all else is `{after}`'s."
    )
    words = ["hypenet", "qk-restore", before, after, out, "--method", method, "--layers", ",".join(numbers)]
    command = f"## Reproduce\n\n```bash\n{shlex.join(words)}\n```"
    title = f"{source.name} with the queries and keys of before its fine-tune"
    return card(title, [origin, described(config, _DTYPE), usage(), command], source, tags_of(config))


def restore(
    before: Mapping[str, Any], after: Mapping[str, Any], layers: Sequence[int], method: str = "copy"
) -> dict[str, Any]:
    """The parameters `after` with the queries and keys of `before` in these attention layers; all else is shared.

    before, after: parameter trees of one network. In the named layers `k` and, where there are any, `q_norm` and
    `k_norm` become those of `before`; `q` [D, H, d] becomes, by method,
      "copy": that of `before`, so that the layers score as before the fine-tune wherever their inputs are the same;
      "procrustes": see `procrustes_queries`.
    Raises HypenetError for an unknown method and for arrays of different shapes.
    """
    if method not in METHODS:
        raise HypenetError(f"method is {method!r}; use one of {', '.join(METHODS)}")
    restored = dict(after)
    for layer in layers:
        name = f"layer_{layer}"
        old, new = before[name]["mixer"], after[name]["mixer"]
        kept = {part: old[part] for part in _RESTORED if part in old}
        for part in kept:
            if part not in new or np.shape(old[part]) != np.shape(new[part]):
                raise HypenetError(
                    f"{part} of layer {layer} has the shape {np.shape(old[part])} before the fine-tune and "
                    f"{np.shape(new.get(part))} after it; give two checkpoints of one network"
                )
        if method == "procrustes":
            kept["q"] = procrustes_queries(old["q"], new["q"], old["k"])
        restored[name] = {**after[name], "mixer": {**new, **kept}}
    return restored


def procrustes_queries(before_DHK: Any, after_DHK: Any, keys_DGK: Any) -> np.ndarray:
    """W_q nearest to that of after the fine-tune among those with W_q W_k^T as before it, W_k being restored.

    Per head, with q = W_q x, k = W_k x, both [d, D], and W_k the keys of the head's group before the fine-tune:

        argmin_W ||W - W_q_after||^2 subject to W W_k^T = W_q_before W_k^T
        = W_q_after + (W_q_before - W_q_after) W_k^T (W_k W_k^T + lambda)^-1 W_k

    So the part of x that the keys read is asked with the queries of before, the rest with those of after. This is the
    variant "QK-Pro" of arXiv 2606.11052 with W_k_new = W_k_before, as two public summaries of the paper give it; the
    paper's own text and code were not at hand. They give neither lambda, which here only guards the inverse (1e-6 of
    W_k W_k^T's mean eigenvalue), nor whether heads are taken one by one, as here. Norms between the projections and
    the scores are not taken into account.

    before_DHK, after_DHK: [D, H, d]; keys_DGK: [D, K, d] of before. Computed in float64, returned in after's dtype.
    """
    old, new, keys = (np.asarray(array, np.float64) for array in (before_DHK, after_DHK, keys_DGK))
    groups, width = keys.shape[1:]
    gram_GKK = np.einsum("dgk,dgl->gkl", keys, keys)
    guard_G = _GUARD * np.trace(gram_GKK, axis1=1, axis2=2) / width
    inverse_GKK = np.linalg.pinv(gram_GKK + guard_G[:, None, None] * np.eye(width), hermitian=True)
    change = (old - new).reshape(len(old), groups, -1, width)
    read_GKRL = np.einsum("gkl,dgl,dgrm->gkrm", inverse_GKK, keys, change, optimize=True)
    moved = new + np.einsum("dgk,gkrm->dgrm", keys, read_GKRL).reshape(new.shape)
    return moved.astype(np.asarray(after_DHK).dtype)


def check_same(before: ModelConfig, after: ModelConfig) -> None:
    """Raise HypenetError, naming the first difference, unless the attention layers of both score alike."""
    rope = _SAME_ROPE if before.attention_rope or after.attention_rope else ()
    for name in (*_SAME, *rope):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise HypenetError(
                f"{name} is {old} before the fine-tune and {new} after it; give two checkpoints of one network"
            )


def _chosen(layers: str, config: ModelConfig) -> tuple[int, ...]:
    if layers == "attention":
        if not config.attention_layers:
            raise HypenetError("the model has no attention layer; there is nothing to restore")
        return config.attention_layers
    numbers = layers.split(",")
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise HypenetError(f"layers is {layers!r}; write 'attention' or numbers joined by commas")
    chosen = tuple(sorted({int(number) for number in numbers}))
    for layer in chosen:
        if layer not in config.attention_layers:
            there = ", ".join(map(str, config.attention_layers)) or "none"
            raise HypenetError(f"layer {layer} is no attention layer; these are {there}")
    return chosen
