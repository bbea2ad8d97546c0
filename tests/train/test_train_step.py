import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toy_training import AXES, Stream, init_params, loss_fn, make_stage, one_device

from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import param_shardings, replicated
from hypenet_jax.train.optim import learning_rate
from hypenet_jax.train.step import abstract_state, create_state, loss_and_gradients, make_step, update


def batch_of(mesh=None):
    return {key: jnp.asarray(value) for key, value in next(Stream()).items()}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulated_microbatches_equal_one_batch(parts):
    params, batch, mesh = init_params(), batch_of(), one_device()
    counts = np.asarray(batch["loss_mask"]).sum(1)
    assert len(set(counts)) > 3, "the parts must differ in their counts for this test to mean anything"
    whole = loss_and_gradients(loss_fn, params, 0.5, batch, 1, mesh)
    split = jax.jit(lambda p, b: loss_and_gradients(loss_fn, p, 0.5, b, parts, mesh))(params, batch)
    assert whole[1].keys() == split[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7), whole, split)


def test_without_count_the_parts_weigh_equally():
    def mean_only(params, frozen, batch):
        return loss_fn(params, frozen, batch)[0], {}

    params, batch, mesh = init_params(), batch_of(), one_device()
    loss, metrics, _ = loss_and_gradients(mean_only, params, 0.5, batch, 2, mesh)
    halves = [mean_only(params, 0.5, {key: x[i::2] for key, x in batch.items()})[0] for i in range(2)]
    assert metrics == {}
    assert float(loss) == pytest.approx(float(sum(halves)) / 2, rel=1e-6)


def test_a_microbatch_without_items_changes_nothing():
    params, batch, mesh = init_params(), batch_of(), one_device()
    batch["loss_mask"] = batch["loss_mask"].at[1::2].set(False)
    whole = loss_and_gradients(loss_fn, params, 0.5, batch, 1, mesh)
    split = loss_and_gradients(loss_fn, params, 0.5, batch, 2, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-7), whole, split)


@pytest.mark.parametrize("axes", [{"data": 8}, {"seq": 8}, {"dcn": 2, "data": 4}])
def test_the_arrays_that_a_training_starts_from_outlive_it(axes):
    """Where every device holds the whole, the first could share the caller's buffer, which the update gives away."""
    mesh, stage, params = make_mesh(axes), make_stage(), jax.tree.map(jnp.array, init_params())
    abstract = abstract_state(params, stage, param_shardings(AXES, params, mesh), mesh)
    for _ in range(2):
        state = create_state(params, stage, abstract)
        jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state["params"])
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_state_is_created_where_it_lives(decay):
    mesh, stage = make_mesh({"fsdp": 4, "tensor": 2}), make_stage(weight_decay=decay)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), init_params())
    abstract = abstract_state(params, stage, param_shardings(AXES, params, mesh), mesh)
    state = create_state(params, stage, abstract)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    adam = state["opt_state"][1]
    for tree in (state["params"], adam.mu, adam.nu):
        assert tree["mlp"]["up"].sharding.spec == P("fsdp", "tensor")
        assert tree["mlp"]["up"].addressable_shards[0].data.shape == (2, 6)
        assert tree["mlp"]["up"].dtype == jnp.float32
    assert adam.count.sharding.is_equivalent_to(replicated(mesh), 0)


def test_the_update_keeps_the_shardings_and_spares_the_callers_arrays():
    mesh, stage = make_mesh({"fsdp": 4, "tensor": 2}), make_stage(gradient_accumulation=2)
    shardings = param_shardings(AXES, init_params(), mesh)
    params = jax.device_put(init_params(), shardings)
    abstract = abstract_state(params, stage, shardings, mesh)
    before = create_state(params, stage, abstract)
    update = make_step(loss_fn, stage, abstract, mesh)
    state, metrics = update(before, jnp.float32(0.5), batch_of())
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    assert before["params"]["mlp"]["up"].is_deleted(), "the state should have been donated"
    jax.tree.map(np.testing.assert_array_equal, params, init_params())
    assert set(metrics) == {"loss", "lr", "grad_norm", "count", "accuracy"}
    assert int(state["step"]) == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_and_moments_kept_in_bfloat16(parts):
    """Small updates round away beside a weight, where float32 weights creep on."""
    mesh, params, found = one_device(), init_params(), {}
    for weights in ("float32", "bfloat16"):
        stage = make_stage(weights=weights, gradient_accumulation=parts, peak_lr=1e-5, schedule="constant")
        abstract = abstract_state(params, stage, param_shardings(AXES, params, mesh), mesh)
        state = create_state(params, stage, abstract)
        step = make_step(loss_fn, stage, abstract, mesh)
        for _ in range(4):
            state, metrics = step(state, jnp.float32(0.5), batch_of())
        for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
            assert leaf.dtype == wanted.dtype
        adam = state["opt_state"][1]
        for tree in (state["params"], adam.mu, adam.nu):
            assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(weights)}
        found[weights] = state["params"], float(metrics["loss"])
    assert np.all(np.asarray(found["float32"][0]["final_norm"]) != 1)
    assert np.all(np.asarray(found["bfloat16"][0]["final_norm"], np.float32) == 1)
    assert found["bfloat16"][1] == pytest.approx(found["float32"][1], rel=0.02)


def test_a_schedule_that_is_an_argument():
    """The study's way: rates as an array, one program for all, the same update as the stage's own."""
    mesh, params = one_device(), init_params()
    stage = make_stage()
    abstract = abstract_state(params, stage, param_shardings(AXES, params, mesh), mesh)
    rates = jnp.asarray([learning_rate(stage)(n) for n in range(1, stage.steps + 1)], jnp.float32)
    given = jax.jit(lambda s, r, b: update(loss_fn, stage, mesh, s, 0.5, b, schedule=lambda n: r[n - 1]))
    own = make_step(loss_fn, stage, abstract, mesh, donate=False)
    left = right = create_state(params, stage, abstract)
    for _ in range(3):
        left, metrics = given(left, rates, batch_of())
        right, wanted = own(right, 0.5, batch_of())
        assert float(metrics["lr"]) == pytest.approx(float(wanted["lr"]), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), left["params"], right["params"])
