"""Layer selection: which layers keep softmax attention. Rules over scores a layer, published ones and ours."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import SELECTION_METHODS, check_choice

# What each rule reads; the others go by position alone.
NEEDS = {
    "halo": ("csr", "recall"),
    "jet-nemotron": ("recall",),
    "kl-ls": ("kl",),
    "kl-ls-restored": ("restored_kl",),
    "gate-search": ("gate",),
}

# With these the published scores of Qwen3-1.7B give the published layers; without the clip the layer with the best
# common-sense score always ranks first by a factor of 1e8.
EPS = 1e-10
CLIP = 50.0


def rank(
    csr: Sequence[float] | np.ndarray,
    recall: Sequence[float] | np.ndarray,
    method: str = "halo",
    *,
    kl: Sequence[float] | np.ndarray | None = None,
    restored_kl: Sequence[float] | np.ndarray | None = None,
    gate: Sequence[float] | np.ndarray | None = None,
    eps: float = EPS,
    clip: float = CLIP,
) -> list[int]:
    """Layer indices, the one that most needs its attention first; equal scores by index (see `_ordered`).

    csr, recall, kl: [L] common-sense score, recall score and KL(teacher || variant) of the model whose layer i alone
    is replaced by its stage-1 Lightning student. restored_kl: [L] the same KL where layer i alone is not. gate: [L]
    what `gate_search` learned. Methods: see `importance`. "evenly" and "latter-half" need the number of layers alone
    and put their layers, in order, before the rest; for a given number of kept layers use `choose`. Raises HypenetError
    for unknown methods and arrays of different or no length.
    """
    scores = importance(csr, recall, method, kl=kl, restored_kl=restored_kl, gate=gate, eps=eps, clip=clip)
    return _ordered(scores, recall, method)


def _ordered(scores: np.ndarray, recall: Sequence[float] | np.ndarray, method: str) -> list[int]:
    """Layer indices by falling score, equal ones by index; under "halo" the larger drop in recall first.

    A choice probe that few layers fail leaves many at the clip, where index alone would keep the first layers.
    """
    ties = np.asarray(recall, np.float64) if method == "halo" else np.zeros(scores.size)
    return [int(i) for i in np.lexsort((ties, -scores))]


def importance(
    csr, recall, method: str = "halo", *, kl=None, restored_kl=None, gate=None, eps: float = EPS, clip: float = CLIP
) -> np.ndarray:
    """float64 [L], larger where attention matters more.

    "halo": (max_j R_j - R_i) / (max_j C_j - C_i + eps), clipped (arXiv 2601.22156); "jet-nemotron": the drop in
    recall alone; "kl-ls": the KL to the teacher without the layer's attention; "kl-ls-restored": how far the KL of the
    all-Lightning model falls with it (the direction of arXiv 2512.20569), up to a constant; "gate-search": the learned
    scalar. "evenly", "latter-half" and "none" measure nothing: see `choose`.
    """
    check_choice("method", method, SELECTION_METHODS)
    csr, recall = np.asarray(csr, np.float64), np.asarray(recall, np.float64)
    if csr.ndim != 1 or csr.shape != recall.shape or not csr.size:
        raise HypenetError(f"csr has shape {csr.shape} and recall {recall.shape}; both must be [layers], at least one")
    optional = {"kl": kl, "restored_kl": restored_kl, "gate": gate}
    given = {name: np.asarray(value, np.float64) for name, value in optional.items() if value is not None}
    given |= {"csr": csr, "recall": recall}
    for name in NEEDS.get(method, ()):
        if name not in given or given[name].shape != csr.shape:
            raise HypenetError(
                f"{method} ranks by the {name} of each of {csr.size} layers; give {name}, one value a layer"
            )
        if not np.all(np.isfinite(given[name])):
            raise HypenetError(f"the {name} scores hold a value that is not finite; measure that layer again")
    if method == "halo":
        return np.minimum((recall.max() - recall) / (csr.max() - csr + eps), clip)
    if method == "jet-nemotron":
        return recall.max() - recall
    if method == "kl-ls-restored":
        return given["restored_kl"].max() - given["restored_kl"]
    if method in NEEDS:
        return given[NEEDS[method][0]]
    chosen = by_position(csr.size, csr.size // 4, method)
    return np.isin(np.arange(csr.size), chosen).astype(np.float64)


def importance_of(scores: dict, method: str) -> np.ndarray:
    """`importance` from a dict of scores, as far as the method needs them."""
    zeros = np.zeros(len(scores[NEEDS[method][0]]))
    csr, recall = scores.get("csr", zeros), scores.get("recall", zeros)
    kl, restored_kl, gate = (scores.get(name) for name in ("kl", "restored_kl", "gate"))
    return importance(csr, recall, method, kl=kl, restored_kl=restored_kl, gate=gate)


def by_position(num_layers: int, keep: int, method: str) -> tuple[int, ...]:
    """Layers chosen without any score: "evenly" over all, evenly in the "latter-half", or "none" at all.

    Each of `keep` equal stretches gives its last layer.
    """
    if method == "none":
        return ()
    first = num_layers // 2 if method == "latter-half" else 0
    if keep > num_layers - first:
        raise HypenetError(f"keep is {keep} but {method!r} has {num_layers - first} layers to choose from; keep fewer")
    return tuple(first + (i + 1) * (num_layers - first) // keep - 1 for i in range(keep))


def choose(scores: dict, num_layers: int, method: str, keep: int | None = None) -> tuple[int, ...]:
    """The layers that keep attention, ascending: the top `keep` (default floor(L/4)) of the rule.

    scores: {"csr": [L], "recall": [L], ..}, as far as the method needs them ("none" keeps no layer). Raises
    HypenetError for scores that the method needs and lacks, or that do not fit the model, and for too large a keep.
    """
    check_choice("method", method, SELECTION_METHODS)
    keep = kept(num_layers, keep)
    if method not in NEEDS:
        return by_position(num_layers, keep, method)
    for name in NEEDS[method]:
        if name not in scores:
            raise HypenetError(f"the method {method!r} needs the {name} score of every layer; give them")
        if len(scores[name]) != num_layers:
            covered = len(scores[name])
            raise HypenetError(f"the scores cover {covered} layers but the model has {num_layers}; give one a layer")
    ranked = _ordered(importance_of(scores, method), scores.get("recall", ()), method)
    return tuple(sorted(ranked[:keep]))


def kept(num_layers: int, keep: int | None) -> int:
    """How many layers keep attention: `keep`, or floor(L/4) where None; HypenetError for more than there are."""
    keep = num_layers // 4 if keep is None else keep
    if not 0 <= keep <= num_layers:
        raise HypenetError(f"keep is {keep} but the model has {num_layers} layers; keep between 0 and all of them")
    return keep


def read_scores(path: str | pathlib.Path, num_layers: int | None = None) -> dict:
    """Scores a layer from a JSON table: {"layers": [{"layer", "csr", "recall"[, "kl", "restored_kl", "gate"]}, ...]}.

    csr and recall are numbers or {task: score}, which are averaged. num_layers: of the model they are of; None: any.
    Raises HypenetError for a missing file, broken JSON, missing fields, what is no score, layers that are not 0, 1, 2,
    ..., of other tasks each, or of another model's number.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise HypenetError(f"the table of scores {path} is not a file; give a JSON file")
    try:
        rows = sorted(json.loads(path.read_text(encoding="utf-8"))["layers"], key=lambda row: row["layer"])
        layers = [row["layer"] for row in rows]
        optional = [name for name in ("kl", "restored_kl", "gate") if any(name in row for row in rows)]
        scores = {name: [_mean(row[name]) for row in rows] for name in ("csr", "recall", *optional)}
        tasks = {name: [_tasks(row[name]) for row in rows] for name in scores}
    # An integer of too many digits is an ArithmeticError, brackets too deep are a RecursionError.
    except (UnicodeDecodeError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise HypenetError(
            f"the table of scores {path} does not read ({type(error).__name__}: {error}); "
            'it must be {"layers": [{"layer": 0, "csr": .., "recall": ..}, ..]}'
        ) from None
    if layers != list(range(len(layers))) or not layers:
        raise HypenetError(f"the table of scores {path} has layers {layers}; they must be 0, 1, 2, ... without gaps")
    for name, of in tasks.items():
        other = next((layer for layer in layers if of[layer] != of[0]), None)
        if other is not None:
            raise HypenetError(
                f"in the table of scores {path} the {name} of layer {other} is of {of[other]} and that of layer 0 of "
                f"{of[0]}; score every layer by the same tasks"
            )
    if num_layers is not None and len(layers) != num_layers:
        raise HypenetError(
            f"the table of scores {path} covers {len(layers)} layers but the model has {num_layers}; give one of this "
            "model"
        )
    return scores


def _mean(value: float | dict) -> float:
    scores = list(value.values()) if isinstance(value, dict) else [value]
    numbers = all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores)
    if not scores or not numbers or not all(abs(score) < float("inf") for score in scores):
        raise ValueError(f"{value} is no score")
    return float(np.mean([float(score) for score in scores]))


def _tasks(value: float | dict) -> str:
    """What a score is the mean of, in words."""
    return f"the tasks {', '.join(sorted(value))}" if isinstance(value, dict) else "no task by name"
