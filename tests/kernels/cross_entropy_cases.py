"""The distillation loss as cases of `aot`: the loss, its count and both gradients."""

import jax
import jax.numpy as jnp

from kernels_pallas.cross_entropy import linear_kl


def kl(tokens=16_384, width=2048, vocabulary=151_936, weight="bfloat16", backend="xla", **options):
    hidden = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((width, vocabulary), weight)
    mask = jax.ShapeDtypeStruct((tokens,), jnp.bool_)

    def both(hidden, head, far, far_head, mask):
        def loss(hidden, head):
            return linear_kl(hidden, head, far, far_head, mask, backend=backend, **options)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    return both, [hidden, head, hidden, head, mask]
