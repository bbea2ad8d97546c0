"""Step 0: the official transfer to the bit, the calibrated start, and what cannot be converted."""

import dataclasses
import pathlib
import pydoc_data.topics

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import hypenet_jax as hn
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.align import alignment_loss, mixers_of
from hypenet_jax.model import LightningConfig, LogitsScaling, ModelConfig, mixers
from hypenet_jax.model.config import POSITIONS
from hypenet_jax.model.context import Context

TOKENS = np.random.default_rng(0).integers(0, 31, (2, 19), dtype=np.int32)


def test_the_official_transfer_to_the_bit(shared):
    golden = load_file(shared / "golden" / "d_weight_transfer.safetensors")
    width, heads, head_dim = 64, 4, 32
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    teacher, wanted = {}, {}
    for tree, whose, kv_heads in ((teacher, "teacher", 2), (wanted, "student", heads)):
        for name, theirs in names.items():
            count = heads if name == "q" else kv_heads
            tree[name] = golden[f"{whose}.{theirs}.weight"].T.reshape(width, count, head_dim)
        tree["o"] = golden[f"{whose}.o_proj.weight"].T.reshape(heads, head_dim, width)
        tree |= {name: golden[f"{whose}.{name}.weight"] for name in ("q_norm", "k_norm")}
    wanted["o_norm"] = golden["student.o_norm.weight"].reshape(heads, head_dim)
    config = ModelConfig(
        vocab_size=257, hidden_size=width, intermediate_size=160, num_layers=1, num_heads=heads, num_kv_heads=2,
        head_dim=head_dim, mixers=("lightning",), family="hypenet", lightning=LightningConfig(4, 4, 32),
    )  # fmt: skip
    student = mixers.lightning.from_attention(teacher, config, jax.random.key(0), "official")
    gate = np.asarray(student.pop("gate"))
    assert student.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(student[name], array, err_msg=name)
    # The gate is torch's default for a linear layer: uniform within 1 / sqrt(width).
    official = golden["student.z_proj.weight"]
    assert gate.size == official.size
    assert 0.99 * width**-0.5 < np.abs(gate).max() <= width**-0.5
    assert np.std(gate) == pytest.approx(np.std(official), rel=0.05)


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_variant(tiny, position):
    model, params = tiny
    student, sparams = hn.convert(model, params, [1], position=position)
    in_attention, in_lightning = POSITIONS[position]
    config = student.config
    assert config.mixers == ("lightning", "attention")
    assert (config.attention_rope, config.lightning.rope) == (in_attention, in_lightning)
    assert config.attention_gate and config.lightning.output_gate and config.lightning.output_norm
    assert config.lightning.num_kv_heads == 4 and config.family == "hypenet" and config.logits_scaling is None
    shapes = jax.tree.map(lambda leaf: leaf.shape, student.param_shapes())
    assert jax.tree.map(lambda leaf: tuple(leaf.shape), sparams) == shapes
    assert np.isfinite(student.logits(sparams, TOKENS)).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_the_calibrated_attention_is_the_teacher_with_or_without_its_rope(tiny, position):
    model, params = tiny
    student, sparams = hn.convert(model, params, range(2), position=position, start="calibrated")
    config = dataclasses.replace(model.config, family="hypenet", attention_rope=POSITIONS[position][0])
    wanted = dataclasses.replace(model, config=config).logits(params, TOKENS)
    # Half a doubled product is the product, to the bit.
    np.testing.assert_array_equal(student.logits(sparams, TOKENS), wanted)
    official, oparams = hn.convert(model, params, range(2), position=position)
    assert np.abs(np.asarray(official.logits(oparams, TOKENS)) - np.asarray(wanted)).max() > 0.1


def test_what_is_copied_cloned_and_new(tiny):
    model, params = tiny
    student, sparams = hn.convert(model, params, [0], seed=3)
    lightning, attention = sparams["layer_1"]["mixer"], sparams["layer_0"]["mixer"]
    theirs = params["layer_1"]["mixer"]
    for name in ("q", "o", "q_norm", "k_norm"):
        np.testing.assert_array_equal(lightning[name], theirs[name])
    for head in range(4):
        np.testing.assert_array_equal(lightning["k"][:, head], theirs["k"][:, head // 2])
        np.testing.assert_array_equal(lightning["v"][:, head], theirs["v"][:, head // 2])
    assert {*attention} == {*params["layer_0"]["mixer"], "gate"}
    for name in params["layer_0"]["mixer"]:
        np.testing.assert_array_equal(attention[name], params["layer_0"]["mixer"][name])
    for name in ("embedding", "final_norm", "lm_head"):
        assert sparams[name] is params[name]
    assert "gate" not in theirs, "the teacher's parameters stay as they are"


def test_the_seed_draws_the_gates_alone(tiny):
    model, params = tiny
    one, again, other = (hn.convert(model, params, [0], seed=seed)[1] for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    for layer in ("layer_0", "layer_1"):
        different = [
            n for n in one[layer]["mixer"] if not np.array_equal(one[layer]["mixer"][n], other[layer]["mixer"][n])
        ]
        assert different == ["gate"]
    gates = [np.asarray(one[layer]["mixer"]["gate"]) for layer in ("layer_0", "layer_1")]
    assert not np.array_equal(*gates), "every layer draws its own"


def test_a_llama_without_qk_norm_converts(tiny):
    model, params = tiny
    config = dataclasses.replace(model.config, family="llama", qk_norm=False)
    bare = {
        name: value if not name.startswith("layer_") else value | {"mixer": {n: value["mixer"][n] for n in "qkvo"}}
        for name, value in params.items()
    }
    student, sparams = hn.convert(hn.LanguageModel(config), bare, [0], start="calibrated")
    assert not student.config.lightning.qk_norm and "q_norm" not in sparams["layer_1"]["mixer"]
    assert np.isfinite(student.logits(sparams, TOKENS)).all()


def test_calibrated_output_norms_have_the_teachers_rms(tiny):
    model, params = tiny
    student, sparams = hn.convert(model, params, (), start="calibrated", calibration_tokens=TOKENS)
    x_BTD = params["embedding"][TOKENS]
    x_BTD = x_BTD / np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + 1e-6) * params["layer_0"]["input_norm"]
    context = Context(np.arange(19)[None], None)
    wanted = np.asarray(mixers.attention.heads(params["layer_0"]["mixer"], model.config, x_BTD, context))
    own = sparams["layer_0"]["mixer"]
    raw = np.asarray(mixers.lightning.heads(own, student.config, x_BTD, context))
    normed = raw / np.sqrt(np.mean(raw**2, axis=(-2, -1), keepdims=True) + 1e-6) * np.asarray(own["o_norm"])

    def rms(o_BTHD):
        return np.sqrt(np.mean(o_BTHD**2, axis=(0, 1)))

    np.testing.assert_allclose(rms(normed), rms(wanted), rtol=1e-4)


def test_the_first_alignment_loss_of_both_starts():
    """On the trained teacher that the repository carries, against predicting nothing at all."""
    directory = pathlib.Path(hn.__file__).parents[1] / "configs" / "demo_teacher"
    model, params = hn.load(directory)
    text = pydoc_data.topics.topics["function"] + pydoc_data.topics.topics["operator-summary"]
    tokens = np.array(model.tokenizer.encode(text)[: 4 * 256], np.int32).reshape(4, 256)
    batch = {"tokens": tokens, "segment_ids": np.zeros_like(tokens)}
    losses = {}
    for start in ("official", "calibrated"):
        student, sparams = hn.convert(model, params, (), start=start, calibration_tokens=tokens)
        loss = jax.jit(alignment_loss(model, student))
        trained = mixers_of(sparams, model.config.num_layers)
        losses[start] = float(loss(trained, params, batch)[0])
    zero = jax.tree.map(np.zeros_like, trained)
    losses["zero"] = float(loss(zero, params, batch)[0])
    assert losses["calibrated"] < 0.8 * losses["zero"], losses
    assert losses["calibrated"] < 0.8 * losses["official"], losses


def test_what_of_the_calibrated_start_can_be_left_out(tiny):
    model, params = tiny
    made = {
        start: hn.convert(model, params, [0], start=start, seed=5, calibration_tokens=TOKENS)[1]
        for start in ("official", "calibrated", "random-gates", "unit-norms")
    }

    def mixer(start, layer):
        return made[start][f"layer_{layer}"]["mixer"]

    for layer in range(2):
        for like, start in (("official", "random-gates"), ("calibrated", "unit-norms")):
            np.testing.assert_array_equal(mixer(start, layer)["gate"], mixer(like, layer)["gate"])
        for start in ("calibrated", "random-gates", "unit-norms"):
            np.testing.assert_array_equal(mixer(start, layer)["o"], 2 * mixer("official", layer)["o"])
    for like, start in (("official", "unit-norms"), ("calibrated", "random-gates")):
        np.testing.assert_array_equal(mixer(start, 1)["o_norm"], mixer(like, 1)["o_norm"])
    assert np.any(mixer("calibrated", 1)["o_norm"] != 1) and not np.any(mixer("calibrated", 0)["gate"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_layers": [2]}, "attention layer 2 is outside the model's layers 0 to 1"),
        ({"attention_layers": [-1]}, "attention layer -1"),
        ({"position": "yarn"}, "position is 'yarn'; use one of hype, rope, nope, attention_rope"),
        ({"start": "warm"}, "start is 'warm'; use one of official, calibrated"),
    ],
)
def test_wrong_choices(tiny, changes, words):
    with pytest.raises(HypenetError, match=words):
        hn.convert(*tiny, **({"attention_layers": [0]} | changes))


def test_a_hybrid_is_no_teacher(tiny):
    student, sparams = hn.convert(*tiny, [0])
    with pytest.raises(HypenetError, match="only an all-attention model"):
        hn.convert(student, sparams, [0])


def test_logits_scaling_is_set_and_taken_off(tiny):
    student, sparams = hn.convert(*tiny, [0], start="calibrated")
    plain = np.asarray(student.logits(sparams, TOKENS))
    for a in (500, 500.0, np.float32(500), LogitsScaling("hype", 500.0)):
        scaled = student.with_logits_scaling(a)
        assert scaled.config.logits_scaling == LogitsScaling("hype", 500.0)
    assert np.abs(np.asarray(scaled.logits(sparams, TOKENS)) - plain).max() > 0
    np.testing.assert_array_equal(scaled.with_logits_scaling(None).logits(sparams, TOKENS), plain)
    with pytest.raises(HypenetError, match="value is 1.0"):
        student.with_logits_scaling(1)


def test_lightning_layers_may_norm_queries_and_keys_that_the_teacher_does_not(tiny):
    model, params = tiny
    plain = dataclasses.replace(model, config=dataclasses.replace(model.config, family="llama", qk_norm=False))
    bare = {
        name: value | {"mixer": {key: w for key, w in value["mixer"].items() if not key.endswith("_norm")}}
        if name.startswith("layer_")
        else value
        for name, value in params.items()
    }
    as_teacher, _ = hn.convert(plain, bare, [1])
    assert not as_teacher.config.lightning.qk_norm
    student, sparams = hn.convert(plain, bare, [1], qk_norm=True, start="calibrated")
    assert student.config.lightning.qk_norm and not student.config.qk_norm
    assert set(sparams["layer_0"]["mixer"]) - set(sparams["layer_1"]["mixer"]) == {"q_norm", "k_norm", "o_norm"}
    for name in ("q_norm", "k_norm"):
        np.testing.assert_array_equal(sparams["layer_0"]["mixer"][name], np.ones(8, np.float32))
    shapes = jax.tree.map(lambda leaf: leaf.shape, student.param_shapes())
    assert jax.tree.map(lambda leaf: tuple(leaf.shape), sparams) == shapes
    # The norm takes the size of queries away: ten times as large, they give the same.
    larger = jax.tree.map(lambda x: x, sparams)
    larger["layer_0"]["mixer"] = larger["layer_0"]["mixer"] | {"q": 10 * sparams["layer_0"]["mixer"]["q"]}
    np.testing.assert_allclose(student.logits(larger, TOKENS), student.logits(sparams, TOKENS), atol=2e-4)
