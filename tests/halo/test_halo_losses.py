"""The three stages' losses against slow float64 computations, document by document, and where their gradients go."""

import jax
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.halo.align import alignment_loss, mixers_of
from hypenet_jax.halo.distill import EXACT_KL, distillation_loss
from hypenet_jax.halo.finetune import next_token_loss

EPS, THETA = 1e-6, 1e4


def norm(x, scale):
    axes = tuple(range(-np.ndim(scale), 0))
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + EPS) * scale


def rotate(x_THd):
    half = x_THd.shape[-1] // 2
    angles = np.arange(len(x_THd))[:, None] * THETA ** (-np.arange(half) / half)
    turn = np.exp(1j * angles)[:, None]
    turned = (x_THd[..., :half] + 1j * x_THd[..., half:]) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def projections(mixer, x_TD, rope):
    q, k, v = (np.einsum("td,dhk->thk", x_TD, mixer[name]) for name in "qkv")
    q, k = norm(q, mixer["q_norm"]), norm(k, mixer["k_norm"])
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    return (rotate(q), rotate(k), v) if rope else (q, k, v)


def gated(mixer, x_TD, o_THd):
    if "gate" in mixer:
        o_THd = o_THd / (1 + np.exp(-np.einsum("td,dhk->thk", x_TD, mixer["gate"])))
    return np.einsum("thk,hkd->td", o_THd, mixer["o"])


def attention(mixer, x_TD, rope):
    q, k, v = projections(mixer, x_TD, rope)
    scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf))
    return gated(mixer, x_TD, np.einsum("hts,shk->thk", weights / weights.sum(-1, keepdims=True), v))


def lightning(mixer, x_TD):
    q, k, v = projections(mixer, x_TD, True)
    heads, width = q.shape[1:]
    decay = np.exp(-(2.0 ** (-8 * np.arange(1, heads + 1) / heads)))[:, None, None]
    state, o = np.zeros((heads, width, width)), []
    for t in range(len(x_TD)):
        state = decay * state + k[t][:, :, None] * v[t][:, None]
        o.append(np.einsum("hk,hkv->hv", q[t], state) / np.sqrt(width))
    return gated(mixer, x_TD, norm(np.stack(o), mixer["o_norm"]))


def run(params, tokens_T, mix):
    """Logits of one document; mix(layer, normed_TD) is the mixer's output."""
    x_TD = params["embedding"][tokens_T]
    for layer in range(2):
        weights = params[f"layer_{layer}"]
        x_TD = x_TD + mix(layer, norm(x_TD, weights["input_norm"]))
        h = norm(x_TD, weights["post_norm"])
        gate = h @ weights["mlp"]["gate"]
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * (h @ weights["mlp"]["up"])) @ weights["mlp"]["down"]
    return norm(x_TD, params["final_norm"]) @ params["lm_head"]


def teacher_logits(params, tokens_T):
    return run(params, tokens_T, lambda i, x: attention(params[f"layer_{i}"]["mixer"], x, rope=True))


def student_logits(params, tokens_T):
    """Layer 0 keeps attention, without RoPE, layer 1 is a Lightning layer."""

    def mix(layer, x_TD):
        mixer = params[f"layer_{layer}"]["mixer"]
        return attention(mixer, x_TD, rope=False) if layer == 0 else lightning(mixer, x_TD)

    return run(params, tokens_T, mix)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def documents(batch):
    """(row, positions) of every document of a batch."""
    for row, ids in enumerate(batch["segment_ids"]):
        for number in np.unique(ids[ids >= 0]):
            yield row, np.flatnonzero(ids == number)


def direct_alignment(mixer_params, params, batch):
    squares = []
    for row, at in documents(batch):

        def mix(layer, x_TD):
            wanted = attention(params[f"layer_{layer}"]["mixer"], x_TD, rope=True)
            squares.append((lightning(mixer_params[f"layer_{layer}"], x_TD) - wanted) ** 2)
            return wanted

        run(params, batch["tokens"][row, at], mix)
    return np.concatenate(squares).mean()


def direct_kl(sparams, params, batch):
    kls = []
    for row, at in documents(batch):
        wanted = log_softmax(teacher_logits(params, batch["tokens"][row, at]))
        got = log_softmax(student_logits(sparams, batch["tokens"][row, at]))
        kls.append((np.exp(wanted) * (wanted - got)).sum(-1))
    return np.concatenate(kls).mean()


def direct_cross_entropy(sparams, _, batch):
    losses = []
    for row, at in documents(batch):
        got = log_softmax(student_logits(sparams, batch["tokens"][row, at]))
        losses.append(-got[np.arange(len(at) - 1), batch["tokens"][row, at[1:]]])
    return np.concatenate(losses).mean()


@pytest.fixture(scope="module")
def batch(packed_batch):
    """The packed batch with targets where the loss mask says that they follow."""
    targets = np.where(packed_batch["loss_mask"], np.roll(packed_batch["tokens"], -1, axis=1), 30)
    return packed_batch | {"targets": targets}


@pytest.fixture(scope="module")
def cases(tiny):
    """name -> (loss, what it trains, what it is compared with, the direct computation)."""
    teacher, params = tiny
    rnn, rnn_params = hn.convert(teacher, params, (), seed=1)
    student, sparams = hn.convert(teacher, params, [0], seed=2)
    return {
        "align": (alignment_loss(teacher, rnn), mixers_of(rnn_params, 2), params, direct_alignment),
        "distill": (distillation_loss(teacher, student, 8), sparams, params, direct_kl),
        "finetune": (next_token_loss(student, 8), sparams, None, direct_cross_entropy),
    }


def doubles(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("name", ["align", "distill", "finetune"])
def test_loss_and_gradient(cases, batch, name):
    loss, trained, frozen, direct = cases[name]
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, frozen, batch)
    trained64, frozen64 = doubles(trained), doubles(frozen)
    assert value == pytest.approx(direct(trained64, frozen64, batch), rel=1e-5)
    counted = batch["loss_mask"] if name == "finetune" else batch["segment_ids"] >= 0
    assert metrics["count"] == counted.sum()

    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), trained64)
    step = 1e-5
    sides = [
        direct(jax.tree.map(lambda p, d: p + s * step * d, trained64, direction), frozen64, batch)  # noqa: B023
        for s in (1, -1)
    ]
    wanted = (sides[0] - sides[1]) / (2 * step)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), gradient, direction)))
    assert along == pytest.approx(wanted, rel=2e-4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).max() > 0, f"nothing reaches {jax.tree_util.keystr(path)}"


def test_the_terms_of_the_objective(tiny, cases, batch):
    """Numbers and traced scalars alike, each term a sum over its tokens divided by the number of real tokens."""
    teacher, params = tiny
    student, sparams = hn.convert(teacher, params, [0], seed=2)
    exact, kl = distillation_loss(teacher, student, 8), float(cases["distill"][0](sparams, params, batch)[0])
    real = batch["segment_ids"] >= 0
    ce = float(next_token_loss(student, 8)(sparams, None, batch)[0]) * batch["loss_mask"].sum() / real.sum()
    first = batch | {"segment_ids": np.where(np.arange(2)[:, None] == 0, batch["segment_ids"], -1)}
    one_in_two = float(exact(sparams, params, first)[0]) * real[0].sum() / real.sum()
    ids = batch["segment_ids"]
    t, s = (np.asarray(m.hidden(p, batch["tokens"], ids)) for m, p in ((teacher, params), (student, sparams)))
    hidden = np.mean((np.sum((s - t) ** 2, -1) / np.sum(t**2, -1))[real])
    for changes, wanted in (
        ({}, kl),
        ({"ce_weight": 0.3}, 0.7 * kl + 0.3 * ce),
        ({"ce_weight": 1.0}, ce),
        ({"hidden_weight": 2.0}, kl + 2 * hidden),
        ({"kl_one_in": 2}, one_in_two),
        ({"kl_one_in": 2, "ce_weight": 0.5, "hidden_weight": 0.5}, 0.5 * (one_in_two + ce + hidden)),
    ):
        objective = EXACT_KL | changes
        value, metrics = distillation_loss(teacher, student, 8, objective)(sparams, params, batch)
        assert float(value) == pytest.approx(wanted, rel=1e-5), changes
        assert metrics["count"] == real.sum()
        traced = {name: np.asarray(weight) for name, weight in objective.items()}
        value, metrics = distillation_loss(teacher, student, 8, traced)(sparams, params, batch)
        assert float(value) == pytest.approx(wanted, rel=1e-5) and metrics.keys() == {"count", "kl", "ce", "hidden"}


@pytest.mark.parametrize("name", ["align", "distill"])
def test_the_teacher_gets_no_gradient(cases, batch, name):
    loss, trained, frozen, _ = cases[name]
    gradient = jax.jit(jax.grad(lambda f: loss(trained, f, batch)[0]))(frozen)
    for leaf in jax.tree.leaves(gradient):
        assert not np.any(leaf)


def test_a_layers_alignment_does_not_see_the_others(cases, batch):
    loss, trained, params, _ = cases["align"]
    gradient_of = jax.jit(jax.grad(lambda m: loss(m, params, batch)[0]))
    moved = trained | {"layer_1": jax.tree.map(lambda leaf: 1.5 * leaf, trained["layer_1"])}
    before, after = gradient_of(trained), gradient_of(moved)
    jax.tree.map(np.testing.assert_array_equal, before["layer_0"], after["layer_0"])
    assert not np.array_equal(before["layer_1"]["q"], after["layer_1"]["q"])


@pytest.mark.parametrize("name", ["align", "distill", "finetune"])
def test_what_padding_holds_does_not_matter(cases, batch, name):
    loss, trained, frozen, _ = cases[name]
    padding = batch["segment_ids"] < 0
    other = batch | {"tokens": np.where(padding, 7, batch["tokens"]), "targets": np.where(padding, 9, batch["targets"])}
    value_and_grad = jax.jit(jax.value_and_grad(lambda p, b: loss(p, frozen, b)[0]))
    jax.tree.map(np.testing.assert_array_equal, value_and_grad(trained, batch), value_and_grad(trained, other))
