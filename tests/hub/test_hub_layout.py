"""Layouts: every row of every family reads what it writes, and means what the mathematics says."""

import numpy as np
import pytest
from hub_models import CONFIGS
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.hub import gguf_names
from hypenet_jax.hub.families import FAMILIES
from hypenet_jax.hub.layout import rearrange, shape
from hypenet_jax.model import LanguageModel

LAYOUTS = [
    ("(H d) D", "D H d"), ("D (H d)", "H d D"), ("V D", "D V"), ("(H d)", "H d"), ("D", "D"),
    ("(H half pair) D", "D H (pair half)"),
]  # fmt: skip


@given(st.sampled_from(LAYOUTS), st.tuples(*[st.integers(1, 4)] * 5))
def test_writing_undoes_reading(layout, numbers):
    theirs, ours = layout
    heads, half, width, vocabulary, _ = numbers
    sizes = {"H": heads, "half": half, "pair": 2, "d": 2 * half, "D": width, "V": vocabulary}
    stored = np.random.default_rng(0).standard_normal(shape(theirs, sizes))
    parameter = rearrange(stored, theirs, ours, sizes)
    assert parameter.shape == shape(ours, sizes)
    np.testing.assert_array_equal(rearrange(parameter, ours, theirs, sizes), stored)


def test_projections_mean_the_same_product():
    rng = np.random.default_rng(1)
    sizes = {"H": 3, "d": 4, "D": 5}
    x_D, stored, out = rng.standard_normal(5), rng.standard_normal((12, 5)), rng.standard_normal((5, 12))
    q = rearrange(stored, "(H d) D", "D H d", sizes)
    np.testing.assert_allclose(np.einsum("D,DHd->Hd", x_D, q), (stored @ x_D).reshape(3, 4), rtol=1e-12)
    o = rearrange(out, "D (H d)", "H d D", sizes)
    y_Hd = rng.standard_normal((3, 4))
    np.testing.assert_allclose(np.einsum("Hd,HdD->D", y_Hd, o), out @ y_Hd.reshape(-1), rtol=1e-12)


def test_llama_cpp_order_is_undone():
    # Two heads of width 6: llama.cpp's converter stores row 0, 3, 1, 4, 2, 5 of every head.
    rows = np.arange(12.0)[:, None]
    interleaved = rows[[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]
    sizes = {"H": 2, "half": 3, "pair": 2, "D": 1}
    ours = rearrange(interleaved, "(H half pair) D", "D H (pair half)", sizes)
    np.testing.assert_array_equal(ours, rows.reshape(2, 6)[None])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tables_have_the_parameters_of_the_model(name):
    config = CONFIGS[name]
    wanted = {}

    def walk(entry, path):
        for key, value in entry.items():
            if isinstance(value, dict):
                walk(value, (*path, key))
            else:
                wanted[(*path, key)] = value.shape

    walk(LanguageModel(config=config).param_shapes(), ())
    tables = [FAMILIES[config.family].tensors(config)]
    tables += [gguf_names.tensors(config)] if config.family != "hypenet" else []
    for table in tables:
        assert {tensor.path: tensor.shape for tensor in table} == wanted
        assert len({tensor.name for tensor in table}) == len(table)
