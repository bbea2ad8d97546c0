"""The joint gate search: the pressure, the mixed network, and a network whose right answer is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hypenet_jax as hn
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.halo.align import mixers_of
from hypenet_jax.halo.gate_batches import GateBatches, packed_retrieval, retrieval_rows
from hypenet_jax.halo.gates import gate_loss, gate_stage, gated_hidden, open_share, pressed, sampled_gates
from hypenet_jax.halo.settings import GateSearchConfig
from hypenet_jax.model import LanguageModel, ModelConfig
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import replicated
from hypenet_jax.train.step import abstract_state, create_state, make_step


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=12), st.floats(0.02, 0.98))
def test_the_pressure_opens_as_much_as_asked(scalars, share):
    gates = np.asarray(jax.nn.sigmoid(pressed(jnp.asarray(scalars), share)))
    assert gates.mean() == pytest.approx(share, abs=2e-5)
    order = np.argsort(scalars, kind="stable")
    assert np.all(np.diff(gates[order]) >= 0)


def test_what_opens_one_gate_closes_the_others():
    def open_gates(scalars, share):
        return jax.nn.sigmoid(pressed(scalars, share))

    scalars, share, step = jnp.asarray([0.3, -1.0, 2.0, 0.0]), 0.4, 1e-2
    jacobian = np.asarray(jax.jacobian(open_gates)(scalars, share))
    np.testing.assert_allclose(jacobian.sum(0), 0, atol=1e-6)
    for layer in range(4):
        more, less = (open_gates(scalars.at[layer].add(d), share) for d in (step, -step))
        np.testing.assert_allclose(jacobian[:, layer], (more - less) / (2 * step), atol=1e-4)


def test_the_share_falls_to_the_kept_layers():
    settings = GateSearchConfig(start_share=0.9, pressed_by=0.5)
    shares = [float(open_share(settings, 8, 2, jnp.float32(p))) for p in (0, 0.25, 0.5, 1)]
    np.testing.assert_allclose(shares, [0.9, 0.575, 0.25, 0.25], rtol=1e-6)
    # Nowhere 0 or 1, which no gate reaches.
    assert 0 < float(open_share(settings, 8, 0, jnp.float32(1))) < float(open_share(settings, 8, 8, jnp.float32(1))) < 1


def test_open_and_closed_gates_are_teacher_and_student(tiny, packed_batch):
    teacher, params = tiny
    rnn, rnn_params = hn.convert(teacher, params, (), seed=4)
    tokens, ids = packed_batch["tokens"], packed_batch["segment_ids"]
    hidden = jax.jit(gated_hidden(teacher, rnn))
    for gate, (model, weights) in ((1.0, tiny), (0.0, (rnn, rnn_params))):
        got = hidden(params, mixers_of(rnn_params, 2), jnp.full((2, 2), gate), tokens, ids)
        wanted = model.hidden(weights, tokens, ids)
        np.testing.assert_allclose(got[ids >= 0], wanted[ids >= 0], rtol=0, atol=2e-5)


def test_drawn_gates_are_open_as_often_as_the_pressed_scalars_say():
    scalars = jnp.asarray([-2.0, 0.0, 1.0])
    uniform = np.random.default_rng(0).random((4000, 3), np.float32)
    drawn = np.asarray(sampled_gates(scalars, uniform, GateSearchConfig(temperature=0.05)))
    np.testing.assert_allclose(drawn.mean(0), jax.nn.sigmoid(scalars), atol=0.02)
    assert np.mean((drawn > 0.05) & (drawn < 0.95)) < 0.1
    plain = sampled_gates(scalars, uniform, GateSearchConfig(noise=0.0, temperature=1.0))
    np.testing.assert_allclose(plain, np.tile(jax.nn.sigmoid(scalars), (4000, 1)), rtol=1e-6)


def test_batches_are_retrieval_and_text_and_go_on_where_they_were(tmp_path):
    settings = GateSearchConfig(steps=6, batch_size=4, seq_len=32, retrieval="retrieval:20:max_chars=256:styles=pairs")
    tokenizer, mesh = byte_tokenizer(), make_mesh(None, jax.devices()[:1])
    pack([Document("x", "words " * 200)], tokenizer, tmp_path / "text", seed=0, sources=("x",))
    text, retrieval = PackedTokens(tmp_path / "text"), packed_retrieval(settings, tokenizer, tmp_path / "retrieval")

    def batches(seed=3):
        return GateBatches(retrieval, text, settings, 8, seed, mesh)

    whole = list(itertools.islice(batches(), 6))
    assert retrieval_rows(settings) == 3
    words = {tuple(np.roll(list(b"words "), -i)) for i in range(6)}
    for step, batch in enumerate(whole, 1):
        assert batch["tokens"].shape == batch["uniform"].shape == (4, 32)
        assert np.all(batch["progress"] == np.float32(step / 6))
        assert tuple(batch["tokens"][3][:6]) in words and not words & {tuple(row[:6]) for row in batch["tokens"][:3]}
    stopped, again = batches(), batches()
    next(stopped), next(stopped)
    again.set_state(stopped.get_state())
    for wanted, got in zip(whole[2:], again, strict=False):
        for name in wanted:
            np.testing.assert_array_equal(got[name], wanted[name])
    other = next(batches(seed=4))
    assert np.any(other["tokens"] != whole[0]["tokens"]) and np.any(other["uniform"] != whole[0]["uniform"])


WIDTH, VOCAB, LAYERS, COPIERS, DECOY = 32, 24, 4, (1, 2), 0


@pytest.fixture(scope="module")
def copying():
    """A teacher whose layers 1 and 2 each copy, from the same token as the query and long ago, what followed it.

    The stream is split: the first half holds what attention reads, the second what it writes and the head reads. Either
    copier alone fills the second half, so without one of them nothing is lost, and without both everything: rules that
    replace one layer at a time see nothing in either. Layer 0 writes a little that its replacement does not; layer 3
    writes nothing.
    """
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=8, num_layers=LAYERS, num_heads=1, num_kv_heads=1,
        head_dim=WIDTH, mixers=("attention",) * LAYERS, rope_theta=1e4, tie_embeddings=False,
    )  # fmt: skip
    teacher, rng, half = LanguageModel(config), np.random.default_rng(3), WIDTH // 2
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), teacher.param_shapes())
    code = np.linalg.qr(rng.standard_normal((VOCAB, VOCAB)))[0][:, :half].astype(np.float32)
    params["embedding"][:, :half] = code
    params["final_norm"][:] = 1
    params["lm_head"][half:] = code.T
    for layer in range(LAYERS):
        weights = params[f"layer_{layer}"]
        weights["input_norm"][:] = weights["post_norm"][:] = 1
        mixer = weights["mixer"]
        eye = np.eye(WIDTH, half, dtype=np.float32)
        mixer["q"][:, 0, :half] = mixer["k"][:, 0, :half] = eye
        mixer["q_norm"][:] = mixer["k_norm"][:] = 1.5
        mixer["v"][:, 0, :half] = eye
        strength = {1: 3.0, 2: 3.0, DECOY: 0.4}.get(layer, 0.0)
        turn = (
            np.eye(half, dtype=np.float32) if layer in COPIERS else np.linalg.qr(rng.standard_normal((half, half)))[0]
        )
        mixer["o"][0, :half, half:] = strength * turn
    return teacher, params


def silent(teacher, params):
    """Lightning mixers that write nothing."""
    rnn, rnn_params = hn.convert(teacher, params, (), seed=0)
    silenced = mixers_of(rnn_params, LAYERS)
    return rnn, {name: mixer | {"o": jnp.zeros_like(mixer["o"])} for name, mixer in silenced.items()}


def batches(steps, seed):
    rng = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        tokens = rng.integers(0, VOCAB, (4, 24), dtype=np.int32)
        yield {
            "tokens": tokens,
            "segment_ids": np.zeros_like(tokens),
            "progress": np.full(tokens.shape, step / steps, np.float32),
            "uniform": rng.random(tokens.shape, np.float32),
        }


def searched(teacher, params, seed, steps=60, keep=1, **changes):
    """The learned order of the layers, the one that needs attention most first."""
    rnn, mixer_params = silent(teacher, params)
    settings = GateSearchConfig(steps=steps, batch_size=4, seq_len=24, **changes)
    stage, mesh = gate_stage(settings), make_mesh(None, jax.devices()[:1])
    state = {"scalars": jnp.zeros(LAYERS)}
    shardings = {"scalars": replicated(mesh)}
    abstract = abstract_state(state, stage, shardings, mesh)
    state = create_state(state, stage, abstract)
    update = make_step(gate_loss(teacher, rnn, settings, keep, None), stage, abstract, mesh)
    frozen = jax.device_put({"teacher": params, "mixers": mixer_params}, replicated(mesh))
    for batch in batches(steps, seed):
        state, metrics = update(state, frozen, batch)
    assert float(metrics["open"]) == pytest.approx(keep / LAYERS, abs=1e-4)
    return np.argsort(-np.asarray(state["params"]["scalars"])).tolist()


def test_one_of_two_layers_that_can_stand_in_for_each_other_is_kept(copying):
    teacher, params = copying
    rnn, mixer_params = silent(teacher, params)
    tokens = next(batches(1, 9))["tokens"]

    def kl(gate_L):
        hidden = gated_hidden(teacher, rnn)(
            params, mixer_params, jnp.tile(jnp.asarray(gate_L), (4, 1)), tokens, np.zeros_like(tokens)
        )
        wanted = jax.nn.log_softmax(teacher.logits(params, tokens))
        got = jax.nn.log_softmax(hidden @ teacher.head(params))
        return float(jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - got), -1)))

    alone = [kl([float(i != layer) for i in range(LAYERS)]) for layer in range(LAYERS)]
    both = kl([float(layer not in COPIERS) for layer in range(LAYERS)])
    # What the case is made for: one at a time, the decoy looks like the layer to keep.
    assert int(np.argmax(alone)) == DECOY and both > 3 * alone[DECOY], (alone, both)
    assert searched(teacher, params, seed=0)[0] in COPIERS
