"""How a backend is chosen, and what a refusal says."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import compat
from kernels_pallas.dispatch import Backend, Refused, choose, table
from kernels_pallas.selfcheck import selfcheck


def _table():
    fast = Backend("fast", lambda size: "fast", lambda size: None if size % 8 == 0 else f"size {size} is odd to it")
    picky = Backend("picky", lambda size: "picky", lambda size: "it likes nothing")
    return table(picky, fast, Backend("plain", lambda size: "plain", lambda size: None if size < 100 else "too large"))


def test_auto_takes_the_first_that_does_not_refuse():
    assert choose("toy", _table(), "auto", {"size": 16}).name == "fast"
    assert choose("toy", _table(), "auto", {"size": 7}).name == "plain"
    with pytest.raises(Refused, match="no backend of toy .*picky: it likes nothing; fast: size 101 .*plain: too large"):
        choose("toy", _table(), "auto", {"size": 101})


def test_a_named_backend_is_taken_or_says_why_not():
    assert choose("toy", _table(), "plain", {"size": 16}).name == "plain"
    with pytest.raises(ValueError, match="backend 'fast' of toy refuses this call: size 7"):
        choose("toy", _table(), "fast", {"size": 7})
    with pytest.raises(ValueError, match="toy has no backend 'gpu'; known: auto, picky, fast, plain"):
        choose("toy", _table(), "gpu", {"size": 7})


def test_selfcheck_passes_and_covers_every_kernel():
    rows = selfcheck()
    assert not [row for row in rows if not row.ok]
    losses = {"linear_kl", "linear_cross_entropy"}
    kernels = {"lightning_attention", "simple_gla", "attention", "attention, whole rows", "cached_attention"} | losses
    assert {row.kernel for row in rows if row.error <= row.tolerance} == kernels
    assert any(row.check == "float32: d initial_state" for row in rows)


def test_selfcheck_reports_a_wrong_backend(monkeypatch):
    from kernels_pallas.lightning import api

    def wrong(q, k, v, **options):
        o, state = right(q, k, v, **options)
        return o * 1.001, state

    right = api.BACKENDS["xla"].function
    monkeypatch.setitem(api.BACKENDS, "xla", Backend("xla", wrong, lambda **call: None))
    failed = {(row.kernel, row.check) for row in selfcheck(["lightning_attention"]) if not row.ok}
    assert ("lightning_attention", "float32: output 0") in failed


def test_a_mesh_that_xla_would_divide_is_refused():
    mesh = jax.make_mesh((2, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert compat.undivided() is None
    with jax.set_mesh(mesh):
        assert "call it within shard_map" in compat.undivided()
        split = jax.P("data")
        jax.shard_map(lambda x: x if compat.undivided() is None else 1 / 0, in_specs=split, out_specs=split)(
            jnp.ones(2)
        )
