"""Other people's kernels for the same mathematics, measured where they are installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def fla(shapes: Sequence[tuple[int, int, int]], width: int) -> dict[str, float | str]:
    """Milliseconds of fla's simple_gla with fixed decays by kernel and shape, as the table names them; {} without fla.

    A text in place of a time says why there is none. In a process of its own: torch and JAX would fight for the
    device's memory. Its first call tunes for minutes.
    """
    if not shapes or importlib.util.find_spec("fla") is None or jax.default_backend() != "gpu":
        return {}
    command = [sys.executable, "-m", "kernels_pallas.bench.fla_times", json.dumps([[*s, width] for s in shapes])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fla is installed but fails: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def jax_linear_attention(slopes: np.ndarray) -> dict[str, Callable[..., Any]]:
    """jax-linear-attention's simple GLA, where it is installed."""
    if importlib.util.find_spec("jla") is None or jax.default_backend() != "gpu":
        return {}
    from jla.ops import linear_attention

    def call(q, k, v, ids):
        # Never positive, but not known to XLA: it would compute for minutes with a constant.
        nothing = jnp.minimum(ids, 0).astype(jnp.float32)[..., None]
        log_decay = jnp.broadcast_to(nothing - jnp.asarray(slopes), q.shape[:3])
        return linear_attention("simple_gla", q, k, v, g=log_decay)[0]

    return {"jax-linear-attention": call}


def tokamax_attention() -> dict[str, Callable[..., Any]]:
    """tokamax's causal attention, where it is installed."""
    if importlib.util.find_spec("tokamax") is None or jax.default_backend() == "cpu":
        return {}
    import tokamax

    return {"tokamax": lambda q, k, v, ids: tokamax.dot_product_attention(q, k, v, is_causal=True)}
