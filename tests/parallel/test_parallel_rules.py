import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hypenet_jax.errors import HypenetError
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import RULES, batch_sharding, changed_rules, param_shardings


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


AXES = {
    "embedding": ("vocab", "embed"),
    "final_norm": ("norm",),
    "layer_0": {"mixer": {"q": ("embed", "heads", "head_dim"), "k": ("embed", "kv_heads", "head_dim")}},
}
SHAPES = {
    "embedding": shape(32, 16),
    "final_norm": shape(16),
    "layer_0": {"mixer": {"q": shape(16, 4, 8), "k": shape(16, 2, 8)}},
}


def test_the_table_is_applied():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = param_shardings(AXES, SHAPES, mesh)
    assert shardings["embedding"] == NamedSharding(mesh, P("tensor", "fsdp"))
    assert shardings["final_norm"] == NamedSharding(mesh, P(None))
    assert shardings["layer_0"]["mixer"]["q"] == NamedSharding(mesh, P("fsdp", "tensor", None))
    q = jax.device_put(jnp.zeros((16, 4, 8)), shardings["layer_0"]["mixer"]["q"])
    assert q.addressable_shards[0].data.shape == (4, 2, 8)


def test_batch_rows_over_data_and_fsdp():
    mesh = make_mesh({"data": 2, "fsdp": 2, "seq": 2})
    assert batch_sharding(mesh).shard_shape((8, 6)) == (2, 3)


def refuse(axes, shapes, mesh, *words, rules=RULES):
    with pytest.raises(HypenetError) as caught:
        param_shardings(axes, shapes, mesh, rules)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_mistakes_name_parameter_axis_and_sizes():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    refuse({"w": ("embed", "heads")}, {"w": shape(4, 6)}, mesh, "parameter w", "6 entries", "'heads'", "tensor=4")
    refuse(AXES, SHAPES, mesh, "'experts'", "embed, head_dim", rules={**RULES, "experts": ("data",)})
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    refuse({"w": ("embed", "experts")}, {"w": shape(4, 4)}, mesh, "parameter w", "'experts'")
    refuse({"w": ("heads", "mlp")}, {"w": shape(4, 4)}, mesh, "parameter w", "'heads'", "'mlp'", "'tensor'")
    refuse({"w": ("embed",)}, {"w": shape(4, 4)}, mesh, "parameter w", "(4, 4)")
    refuse({"w": ("embed",)}, {"w": shape(4), "v": shape(4)}, mesh, "parameter v")
    refuse({"w": ("embed",)}, {"w": shape(4)}, mesh, "'expert'", rules={"embed": ("expert",)})


def test_vocabulary_and_key_heads_that_do_not_divide_are_whole():
    shapes = {**SHAPES, "embedding": shape(31, 16)}
    shardings = param_shardings(AXES, shapes, make_mesh({"fsdp": 2, "tensor": 4}))
    assert shardings["embedding"].spec == P(None, "fsdp")
    assert shardings["layer_0"]["mixer"]["k"].spec == P("fsdp", None, None)


def test_a_model_may_have_rules_of_its_own():
    shardings = param_shardings(AXES, SHAPES, make_mesh({"fsdp": 4, "tensor": 2}), changed_rules(embed=()))
    assert shardings["embedding"].spec == P("tensor", None)
    with pytest.raises(HypenetError, match="'experts' is used by nobody"):
        changed_rules(experts=("data",))


def test_rows_lie_over_slices_too():
    assert batch_sharding(make_mesh({"dcn": 2, "fsdp": 4})).spec == P(("dcn", "data", "fsdp"), "seq")
