"""The contract of the jax-triton backend in Triton's interpreter, as a program: TRITON_INTERPRET=1 python THIS.

Triton is told at import whether to interpret, so this is a process of its own. It prints a word for each case passed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CASES = "constant narrow documents gated float16 one-token"


def _call(
    kernel: str, grid, results, operands, name: str, warps: int, stages: int, **constants: Any
) -> list[jax.Array]:
    """`jax_triton.call` by way of torch's tensors; what a kernel does not write stays NaN."""
    del name, warps, stages
    import torch

    from kernels_pallas.lightning import triton_kernels

    def on_host(*arrays):
        outputs = [np.full(shape, np.nan, dtype) for shape, dtype in results]
        tensors = [torch.from_numpy(np.array(x)) for x in arrays] + [torch.from_numpy(x) for x in outputs]
        getattr(triton_kernels, kernel)[grid](*tensors, **constants)
        return outputs

    return list(jax.pure_callback(on_host, [jax.ShapeDtypeStruct(*x) for x in results], *operands))


def _mend_interpreter() -> None:
    """Triton 3.6 makes loop bounds of arrays with one element by int(), which NumPy 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index_too


def _main() -> None:
    from lightning_contract import BFLOAT16, FLOAT32, check, segments

    from kernels_pallas.lightning import gpu, jax_triton
    from kernels_pallas.lightning.gpu_kernels import Tiles
    from kernels_pallas.lightning.recurrence import Passes, backend_function

    _mend_interpreter()
    jax_triton.call = _call
    # Rows of few chunks are cut into segments and pieces all the same.
    gpu.multiprocessors, gpu.MIN_CHUNKS, gpu.PIECE_CHUNKS = lambda: 6, 1, 1
    tiles = gpu.Plan(Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 2))
    passes = Passes(
        functools.partial(jax_triton.forward, tiles=tiles), functools.partial(jax_triton.backward, tiles=tiles)
    )
    function = backend_function(passes)

    def passed(word, shape, segmented=False, **options):
        check(function, shape, segment_ids=segments(shape) if segmented else None, **options)
        print(word, flush=True)

    passed("constant", (1, 48, 1, 16, 32), tolerance=FLOAT32)
    passed("narrow", (1, 48, 2, 32, 16), tolerance=FLOAT32)
    passed("documents", (2, 37, 1, 16, 16), segmented=True, tolerance=FLOAT32)
    passed("gated", (1, 37, 2, 16, 16), segmented=True, gated=True, tolerance=FLOAT32)
    # The interpreter cannot multiply bfloat16; float16 takes the same way through the kernels.
    passed("float16", (1, 37, 1, 16, 16), segmented=True, dtype=jnp.float16, tolerance=BFLOAT16)
    passed("one-token", (1, 1, 1, 16, 16), gated=True, tolerance=FLOAT32)


if __name__ == "__main__":
    _main()
