"""The Lightning recurrence as cases of `aot`: forward, or outputs and all gradients."""

import jax
import jax.numpy as jnp

from kernels_pallas.lightning import lightning_attention


def lightning(length, width=128, heads=16, batch=1, dtype="bfloat16", backend="auto", segments=False, backward=False):
    tokens = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    state = jax.ShapeDtypeStruct((batch, heads, width, width), jnp.float32)
    rates, ids = jax.ShapeDtypeStruct((heads,), jnp.float32), jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def forward(q, k, v, state, rates, ids):
        ids = ids if segments else None
        return lightning_attention(q, k, v, rates, initial_state=state, segment_ids=ids, backend=backend)

    def both(q, k, v, state, do, dstate, rates, ids):
        outputs, pull = jax.vjp(lambda *x: forward(*x, rates, ids), q, k, v, state)
        return outputs, pull((do, dstate))

    arguments = [tokens, tokens, tokens, state, *([tokens, state] if backward else []), rates, ids]
    return both if backward else forward, arguments, list(range(len(arguments) - 2))


def layer(length, width=128, heads=16, hidden=2048):
    """Projections, the recurrence and the output projection, all in bfloat16, their arrays laid out as usual."""
    x = jax.ShapeDtypeStruct((1, length, hidden), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((hidden, heads, width), jnp.bfloat16)
    out = jax.ShapeDtypeStruct((heads, width, hidden), jnp.bfloat16)

    def function(x, q, k, v, out, rates):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, w) for w in (q, k, v))
        o, _ = lightning_attention(q, k, v, rates, backend="tpu")
        return jnp.einsum("bthk,hkd->btd", o, out)

    return function, [x, weight, weight, weight, out, jax.ShapeDtypeStruct((heads,), jnp.float32)]
