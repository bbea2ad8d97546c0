"""The recurrence by jax-triton: its refusals, its kernels in Triton's interpreter, and (marked `gpu`) the contract."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import triton_interpreted
from lightning_contract import BFLOAT16, FLOAT32, check, inputs, run, segments

from kernels_pallas import dispatch
from kernels_pallas.lightning import api, gpu, jax_triton, lightning_attention, slopes
from kernels_pallas.selfcheck import relative_error

HERE = pathlib.Path(__file__).resolve().parent


def _refusal(width=32, dtype=jnp.bfloat16):
    x = jax.ShapeDtypeStruct((1, 64, 2, width), dtype)
    return jax_triton.BACKEND.refuses(q_BTHK=x, k_BTHK=x, v_BTHV=x)


def test_it_is_the_second_choice_on_a_gpu():
    names = list(api.BACKENDS)
    assert names.index("gpu") < names.index("jax-triton") < names.index("xla")


def test_refuses_a_cpu():
    (q, k, v, _, _), _ = inputs((1, 64, 2, 32, 32))
    with pytest.raises(dispatch.Refused, match="'jax-triton' of lightning_attention .*: it runs on a GPU and this is"):
        lightning_attention(q, k, v, slopes(2), backend="jax-triton")


def test_refuses_what_is_missing_or_not_taken(monkeypatch):
    monkeypatch.setattr(gpu, "platform", lambda: "gpu")
    assert _refusal(width=48) == "q has width 48, and it takes 16, 32, 64, 128, 256"
    assert _refusal(dtype=jnp.float16) == "q is float16, and it takes float32 and bfloat16"
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax_triton" else object())
    assert _refusal() == "jax_triton is not installed (pip install 'hypenet_jax[triton]')"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    jax_triton.import_jax_triton.cache_clear()
    assert _refusal().startswith("jax_triton cannot be imported (import of jax_triton halted")


def test_the_import_leaves_tritons_cache_alone(monkeypatch, tmp_path):
    (tmp_path / "jax_triton.py").write_text('import os\nos.environ["TRITON_CACHE_DIR"] = ""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    for before in ("/somewhere", None):
        if before is None:
            monkeypatch.delenv("TRITON_CACHE_DIR")
        else:
            monkeypatch.setenv("TRITON_CACHE_DIR", before)
        sys.modules.pop("jax_triton", None)
        jax_triton.import_jax_triton.cache_clear()
        jax_triton.import_jax_triton()
        assert os.environ.get("TRITON_CACHE_DIR") == before
    sys.modules.pop("jax_triton")
    jax_triton.import_jax_triton.cache_clear()


def test_importing_the_package_imports_no_triton():
    code = "import sys, kernels_pallas.lightning; assert not {'triton', 'jax_triton', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])


def test_in_tritons_interpreter():
    if missing := [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: Triton's interpreter runs on torch's tensors")
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    path = [str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(x for x in path if x)
    command = [sys.executable, triton_interpreted.__file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.split() == triton_interpreted.CASES.split()


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_on_a_gpu(width, segmented, gated):
    _skip_if_refused(width)
    shape = (2, 777, 3, width, width)
    ids = segments(shape, runs=0.01) if segmented else None
    function = jax_triton.BACKEND.function
    check(function, shape, dtype=jnp.bfloat16, segment_ids=ids, gated=gated, tolerance=BFLOAT16 if not gated else 8e-3)
    check(function, shape, precision="high", segment_ids=ids, gated=gated, tolerance=FLOAT32)


@pytest.mark.gpu
def test_long_rows_on_a_gpu_match_pallas():
    _skip_if_refused(128)
    values, cotangents = inputs((1, 32768, 16, 128, 128), dtype=jnp.bfloat16)
    ours, pallas = (
        run(b.function, "default", False, values, cotangents, None) for b in (jax_triton.BACKEND, gpu.BACKEND)
    )
    for x, right in zip(ours[:6], pallas, strict=False):
        assert relative_error(x, right) <= 1e-3


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements():
    _skip_if_refused(128)
    length, heads, window = 2**20 + 64, 16, 16384
    q, k, v = (jax.random.normal(jax.random.key(i), (1, length, heads, 128), jnp.bfloat16) for i in range(3))
    whole, state = lightning_attention(q, k, v, slopes(heads), backend="jax-triton")
    # What lies further back than the window has decayed to exp(-64).
    last, end = lightning_attention(*(x[:, -window:] for x in (q, k, v)), slopes(heads), backend="jax-triton")
    assert relative_error(whole[:, -64:], last[:, -64:]) <= BFLOAT16
    assert relative_error(state, end) <= BFLOAT16


def _skip_if_refused(width):
    if reason := _refusal(width):
        pytest.skip(reason)
