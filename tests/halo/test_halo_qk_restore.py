"""What a fine-tune did to queries and keys is undone, and to nothing else."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.qk_restore import check_same, procrustes_queries, restore
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.model.config import LightningConfig
from hypenet_jax.model.mixers import attention

CONFIG = ModelConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mixers=("attention", "lightning", "attention"), family="hypenet", attention_rope=False, attention_gate=True,
    lightning=LightningConfig(num_heads=4, num_kv_heads=4, head_dim=8), max_position=64,
)  # fmt: skip


def drawn(config, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), LanguageModel(config).param_shapes()
    )


BEFORE, AFTER = drawn(CONFIG, 0), drawn(CONFIG, 1)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def scores(mixer, config, x_BTD):
    """What the softmax sees, by the layer's own queries and keys: [B, T, S, H]."""
    positions = jnp.arange(x_BTD.shape[1])[None]
    q, k, _ = attention._queries_keys_values(mixer, config, x_BTD, positions)
    return np.asarray(jnp.einsum("bthd,bshd->btsh", q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)))


@pytest.mark.parametrize("qk_norm", [True, False])
@given(st.integers(0, 100))
def test_copy_scores_as_before(qk_norm, seed):
    config = dataclasses.replace(CONFIG, qk_norm=qk_norm)
    before, after = drawn(config, seed), drawn(config, seed + 1)
    restored = restore(before, after, config.attention_layers)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 5, 16)), jnp.float32)
    for name in ("layer_0", "layer_2"):
        was, tuned, now = (scores(tree[name]["mixer"], config, x) for tree in (before, after, restored))
        np.testing.assert_array_equal(now, was)
        assert np.abs(tuned - was).max() > 0.1


@pytest.mark.parametrize("method", ["copy", "procrustes"])
@pytest.mark.parametrize("layers", [(0, 2), (2,), ()])
def test_nothing_else_changes(method, layers):
    after = jax.tree.map(np.copy, AFTER)
    restored = leaves(restore(BEFORE, after, layers, method))
    assert restored.keys() == leaves(AFTER).keys()
    touched = {f"['layer_{i}']['mixer']['{part}']" for i in layers for part in ("q", "k", "q_norm", "k_norm")}
    assert touched <= restored.keys()
    for name, leaf in restored.items():
        assert leaf.dtype == np.float32
        if name not in touched:
            np.testing.assert_array_equal(leaf, leaves(AFTER)[name])
        elif method == "copy" or "['q']" not in name:
            np.testing.assert_array_equal(leaf, leaves(BEFORE)[name])
    jax.tree.map(np.testing.assert_array_equal, after, AFTER)


@given(st.integers(0, 50), st.sampled_from([(1, 1), (4, 2), (6, 3)]))
def test_procrustes_is_the_nearest_with_the_products_of_before(seed, heads):
    rng, (query_heads, key_heads), width, head = np.random.default_rng(seed), heads, 12, 4
    old, new = (rng.standard_normal((width, query_heads, head)) for _ in range(2))
    keys = rng.standard_normal((width, key_heads, head))
    found = procrustes_queries(old, new, keys)
    for h in range(query_heads):
        before, after, now, k = old[:, h].T, new[:, h].T, found[:, h].T, keys[:, h // (query_heads // key_heads)].T
        np.testing.assert_allclose(now @ k.T, before @ k.T, atol=1e-4)
        # The nearest point of an affine space: the way there is orthogonal to every direction in it.
        free = np.eye(width) - np.linalg.pinv(k) @ k
        np.testing.assert_allclose((now - after) @ free, 0, atol=1e-6)
        assert np.linalg.norm(now - after) < np.linalg.norm(before - after)
    np.testing.assert_allclose(procrustes_queries(old, old, keys), old, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 4}, "head_dim is 8 before"),
        ({"mixers": ("lightning", "attention", "attention")}, "mixers is"),
        ({"qk_norm": False}, "qk_norm is True"),
        ({"attention_rope": True}, "attention_rope is False"),
        ({"num_layers": 2, "mixers": ("attention", "lightning")}, "num_layers is 3 before the fine-tune and 2 after"),
    ],
)
def test_another_network_is_refused(changes, words):
    with pytest.raises(HypenetError, match=words):
        check_same(CONFIG, dataclasses.replace(CONFIG, **changes))
    # RoPE's settings, the vocabulary and the length have no part in the scores here.
    check_same(CONFIG, dataclasses.replace(CONFIG, rope_theta=1e4, vocab_size=40, max_position=9))


def test_arrays_of_other_shapes_and_unknown_methods_are_refused():
    other = drawn(dataclasses.replace(CONFIG, num_kv_heads=4), 2)
    with pytest.raises(HypenetError, match="k of layer 0 has the shape"):
        restore(BEFORE, other, (0,))
    with pytest.raises(HypenetError, match="use one of copy, procrustes"):
        restore(BEFORE, AFTER, (0,), "rotate")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    for name, params in (("before", BEFORE), ("after", AFTER)):
        hn.save(LanguageModel(CONFIG), params, directory / name)
    hn.save(
        LanguageModel(dataclasses.replace(CONFIG, hidden_size=8)),
        drawn(dataclasses.replace(CONFIG, hidden_size=8), 0),
        directory / "narrow",
    )
    return directory


def test_command(saved, tmp_path, capsys):
    command = ["qk-restore", str(saved / "before"), str(saved / "after")]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert "in layers 0, 2 (copy)" in capsys.readouterr().out
    model, params = hn.load(tmp_path / "out")
    assert model == hn.load(saved / "after")[0]
    jax.tree.map(np.testing.assert_array_equal, params, restore(BEFORE, AFTER, (0, 2)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{saved / 'after'}`" in card and f"layers 0, 2 are those of `{saved / 'before'}`" in card
    assert "method `copy`" in card and 'base_model: "after"' in card and "2606.11052" in card
    assert (
        f"hypenet qk-restore {saved / 'before'} {saved / 'after'} {tmp_path / 'out'} --method copy --layers 0,2\n"
        in card
    )
    assert main([*command, str(tmp_path / "one"), "--layers", "2", "--method", "procrustes"]) == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "layers 2 are" in card and "method `procrustes`" in card and "--method procrustes --layers 2\n" in card
    jax.tree.map(
        np.testing.assert_array_equal, hn.load(tmp_path / "one")[1], restore(BEFORE, AFTER, (2,), "procrustes")
    )


@pytest.mark.parametrize(
    ("after", "flags", "words"),
    [
        ("narrow", [], "hidden_size is 16 before the fine-tune and 8 after it"),
        ("nothing", [], "there is no model"),
        ("after", ["--layers", "1"], "layer 1 is no attention layer; these are 0, 2"),
        ("after", ["--layers", "all"], "layers is 'all'"),
    ],
)
def test_mistakes_write_nothing(saved, tmp_path, capsys, after, flags, words):
    command = ["qk-restore", str(saved / "before"), str(saved / after), str(tmp_path / "out"), *flags]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_left_alone(saved, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["qk-restore", str(saved / "before"), str(saved / "after"), str(tmp_path / "out")]) == 2
    assert "exists; name a new directory" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
