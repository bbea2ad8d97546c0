"""What the parser reads of compiled programs is what was written: bytes, axes, turns of loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.plan.collectives import Collective, collectives, total_sent
from hypenet_jax.plan.hlo import Program
from hypenet_jax.plan.traffic import memory_traffic

SIZES = {"fsdp": 4, "tensor": 2}


def compiled(function, specs, shapes, sizes=SIZES):
    mesh = make_mesh(sizes)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return Program(text), dict(mesh.shape)


def on(mesh_sizes, specs, out):
    def wrap(function):
        return jax.shard_map(function, mesh=make_mesh(mesh_sizes), in_specs=specs, out_specs=out, check_vma=False)

    return wrap


def test_a_gather_of_the_parameters_counts_exactly_their_bytes():
    shapes = [(64, 24), (128, 8)]

    def gather(a, b):
        whole = NamedSharding(make_mesh({"fsdp": 8}), P())
        return [jax.lax.with_sharding_constraint(x, whole) for x in (a, b)]

    found = collectives(*compiled(gather, [P("fsdp"), P("fsdp")], shapes, {"fsdp": 8}))
    assert {(c.kind, c.axes, c.devices) for c in found} == {("all-gather", ("fsdp",), 8)}
    parameters = 4 * sum(math.prod(shape) for shape in shapes)
    assert sum(c.size * c.count for c in found) == parameters
    assert sum(c.sent for c in found) == parameters * 7 / 8


@pytest.mark.parametrize(
    ("axes", "devices"), [(("fsdp",), 4), (("tensor",), 2), (("fsdp", "tensor"), 8)], ids=["fsdp", "tensor", "both"]
)
def test_sums_are_found_on_their_axes(axes, devices):
    sums = on(SIZES, P("fsdp", "tensor"), P())(lambda x: jax.lax.psum(x, axes))
    [found] = collectives(*compiled(sums, [P("fsdp", "tensor")], [(8, 32)]))
    # The part that a device holds is [2, 16] float32; a sum crosses each ring twice.
    assert found == Collective("all-reduce", axes, devices, 128.0, 1.0)
    assert found.sent == pytest.approx(2 * (devices - 1) / devices * 128)


def test_a_collective_in_a_loop_counts_as_often_as_it_turns():
    def loop(x):
        def turn(carry, _):
            return jnp.sin(jax.lax.ppermute(carry, "fsdp", [(i, (i + 1) % 4) for i in range(4)])), None

        return jax.lax.scan(lambda c, _: (jax.lax.scan(turn, c, None, length=5)[0] + 1, None), x, None, length=3)[0]

    ring = on(SIZES, P("fsdp"), P("fsdp"))(loop)
    found = collectives(*compiled(ring, [P("fsdp")], [(8, 16)]))
    assert [(c.kind, c.axes, c.devices, c.size, c.count) for c in found] == [
        ("collective-permute", ("fsdp",), 4, 128.0, 15.0)
    ]
    assert total_sent(found) == {"fsdp": 15 * 128.0}


# As the TPU compiler writes: groups named by axes, a gather split into parts, a loop without a noted trip count.
TPU = """HloModule jit_update, is_scheduled=true

%start (param_0: bf16[4,8]) -> (bf16[4,8], bf16[64,8]) {
  %param_0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=5, replica_groups=mesh['a'=1,'b'=16] {'b'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle (param_0.1: bf16[4,8]) -> bf16[64,8] {
  %param_0.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=5, replica_groups=mesh['a'=1,'b'=16] {'b'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%turn (p: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%i, %two)
  %part = bf16[64,8]{1,0} fusion(%x), kind=kLoop, calls=%middle
  %collective-permute-start.1 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,8},{8,9},{9,10},{10,11},{11,12},{12,13},{13,14},{14,15},{15,0}}
  %collective-permute-done.1 = bf16[4,8]{1,0} collective-permute-done(%collective-permute-start.1)
  ROOT %out = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%next, %collective-permute-done.1)
}

%more (p.1: (u32[], bf16[4,8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p.1 = (u32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (arg: bf16[4,8]) -> bf16[4,8] {
  %arg = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) fusion(%arg), kind=kCustom, calls=%start
  %zero = u32[]{:T(128)} constant(0)
  %state = (u32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%zero, %arg)
  %while.1 = (u32[]{:T(128)}, bf16[4,8]{1,0}) while(%state), condition=%more, body=%turn
  ROOT %last = bf16[4,8]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_the_tpu_compilers_ways_of_writing():
    found = collectives(Program(TPU), {"data": 1, "fsdp": 16, "seq": 1, "tensor": 1})
    assert set(found) == {
        Collective("all-gather", ("fsdp",), 16, 1024.0, 1.0),  # one, though each of its parts shows it
        Collective("collective-permute", ("fsdp",), 16, 64.0, 4.0),  # 0 to 8 by twos
    }


# Two slices of four: the program is that of one slice, and its host carries what crosses between them.
SLICES = """HloModule jit_update, is_scheduled=true, num_partitions=4, frontend_attributes={x="0"}

ENTRY %main (arg: f32[8,128]) -> f32[8,128] {
  %arg = f32[8,128]{1,0:T(8,128)} parameter(0)
  %after-all = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce_0"}
  %all-reduce.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%arg), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  %all-reduce.2 = f32[8,128]{1,0:T(8,128)} all-reduce(%all-reduce.1), channel_id=10, replica_groups={}, to_apply=%add
  %send = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%all-reduce.2, %after-all), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[8,128]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %sum = f32[8,128]{1,0:T(8,128)} get-tuple-element(%recv-done), index=0
  %send.1 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%sum, %after-all), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.1 = (f32[16,128]{1,0:T(8,128)}, u32[], token[]) recv(%after-all), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
  %send.2 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%sum, %after-all), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_megascale_target={{100000->200000},{200000->100000}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %send.3 = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%sum, %after-all), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="a callback"}
}
"""  # noqa: E501


def test_what_crosses_slices_is_sent_over_dcn():
    program, size = Program(SLICES), 4.0 * 8 * 128
    found = collectives(program, {"dcn": 2, "data": 1, "fsdp": 4, "seq": 1, "tensor": 1})
    assert set(found) == {
        Collective("all-reduce", ("fsdp",), 4, size, 2.0),
        Collective("all-reduce", ("dcn",), 2, size, 1.0),
        Collective("all-gather", ("dcn",), 2, 2 * size, 1.0),
        Collective("collective-permute", ("dcn",), 2, size, 1.0),
    }
    assert total_sent(found)["dcn"] == 3 * size
    # Two sums within the slice, four arrays handed over, an array and a gathered one that come back.
    assert memory_traffic(program)[0] == (2 * 2 + 4 + 1 + 2) * size


def test_memory_traffic_counts_operands_results_and_turns():
    def double(x):
        return jax.lax.fori_loop(0, 7, lambda _, y: jnp.cos(y), x)

    text = jax.jit(double).lower(jax.ShapeDtypeStruct((64, 64), np.float32)).compile().as_text()
    once = 64 * 64 * 4
    assert 7 * 2 * once <= memory_traffic(Program(text))[0] <= (7 * 2 + 4) * once + 4096
