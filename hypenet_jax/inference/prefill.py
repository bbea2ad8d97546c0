"""Reading prompts into a cache, chunk by chunk, so that memory is bounded by the chunk and not by the prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.inference.batching import align_left, cache_size, check_token_ids
from hypenet_jax.model import LanguageModel
from hypenet_jax.parallel.activations import mesh_of

# Narrower last chunks cost a compilation and save next to nothing.
NARROWEST = 16


def prefill(
    model: LanguageModel,
    params: dict,
    tokens_BT: np.ndarray,
    valid_BT: np.ndarray | None = None,
    *,
    max_len: int | None = None,
    chunk: int = 512,
    narrow_last: bool = True,
) -> tuple[dict, jax.Array]:
    """Read one prompt a row; returns (cache, logits of each row's next token, float32 [B, V]).

    tokens_BT: int [B, T] on the host. valid_BT: bool [B, T], or int segment ids where negative is padding; None is
    no padding. Padding may stand anywhere: rows are first moved to the left, so that the result is that of the
    unpadded prompts. A row of padding alone keeps an empty cache and its logits mean nothing.
    max_len: slots of the cache (default: the longest prompt's, rounded up). chunk: most tokens a step. narrow_last:
    the last chunk may be narrower; False keeps one shape for all.
    Raises HypenetError for ids outside the vocabulary, several documents in a row, or prompts longer than max_len.
    """
    if chunk < 1:
        raise HypenetError(f"prefill_chunk is {chunk}; it must be at least 1")
    tokens_BT, valid_BT = _aligned(model, np.asarray(tokens_BT), valid_BT)
    batch, length = tokens_BT.shape
    if max_len is None:
        max_len = cache_size(length)
    if length > max_len:
        raise HypenetError(f"the longest prompt has {length} tokens and max_len is {max_len}; raise max_len")
    with mesh_of(params):
        cache = _empty_cache(model, batch, max_len)
    last_BD = jnp.zeros((batch, model.config.hidden_size), model.dtype)
    for start, width in chunks(length, chunk, narrow_last):
        piece = (_columns(array, start, width) for array in (tokens_BT, valid_BT))
        with mesh_of(params):
            cache, last_BD = _read_chunk(model, params, *piece, cache, last_BD)
    with mesh_of(params):
        return cache, _project(model, params, last_BD)


def chunks(length: int, chunk: int, narrow_last: bool = True) -> Iterator[tuple[int, int]]:
    """(start, width) of the chunks that cover `length` tokens: full ones, the last the narrowest of chunk / 4^n."""
    for start in range(0, length, chunk):
        width = chunk
        while narrow_last and width // 4 >= max(NARROWEST, length - start):
            width //= 4
        yield start, width


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty_cache(model, batch, max_len):
    # Made where it will lie: no device could hold the cache of a whole mesh.
    return model.init_cache(batch, max_len)


@functools.partial(jax.jit, static_argnames="model", donate_argnames=("cache", "last_BD"))
def _read_chunk(model, params, tokens_BT, valid_BT, cache, last_BD):
    hidden_BTD, cache = model.step(params, tokens_BT, cache, valid_BT)
    count_B = jnp.sum(valid_BT, axis=1)
    newest_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where(count_B[:, None] > 0, newest_BD, last_BD)


@functools.partial(jax.jit, static_argnames="model")
def _project(model, params, last_BD):
    return model.project(params, last_BD)


def _columns(array_BT: np.ndarray, start: int, width: int) -> np.ndarray:
    piece = array_BT[:, start : start + width]
    return np.pad(piece, ((0, 0), (0, width - piece.shape[1])))


def _aligned(model: LanguageModel, tokens_BT: np.ndarray, valid_BT: np.ndarray | None):
    if tokens_BT.ndim != 2 or tokens_BT.size == 0:
        raise HypenetError(f"tokens has shape {tokens_BT.shape}; give a matrix [batch, length] that is not empty")
    if not np.issubdtype(tokens_BT.dtype, np.integer):
        raise HypenetError(f"tokens is an array of {tokens_BT.dtype}; give integer token ids")
    ids_BT = np.zeros(tokens_BT.shape, np.int32) if valid_BT is None else np.asarray(valid_BT)
    if ids_BT.shape != tokens_BT.shape:
        raise HypenetError(f"valid has shape {ids_BT.shape} but tokens has {tokens_BT.shape}; give them the same shape")
    mask_BT = ids_BT if ids_BT.dtype == bool else ids_BT >= 0
    for row in range(len(ids_BT)):
        documents = np.unique(ids_BT[row][mask_BT[row]])
        if len(documents) > 1:
            raise HypenetError(f"row {row} holds documents {documents[0]} and {documents[1]}; give one prompt a row")
    check_token_ids(tokens_BT[mask_BT], model.config.vocab_size, "tokens")
    return align_left(tokens_BT.astype(np.int32), mask_BT)
