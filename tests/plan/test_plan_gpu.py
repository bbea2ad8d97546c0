"""XLA's CUDA compiler on a 4-layer HypeNet for GPUs that are not here; and what of GPUs needs no compiler."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from absent_machines import D, V, check_one_layer_of_alignment, layer_matrices, run, write_conversion, write_pretraining

from hypenet_jax.config import load_config
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.published import config_of
from hypenet_jax.plan import machines
from hypenet_jax.plan.collectives import Collective, collectives
from hypenet_jax.plan.compile import FULL, QUICK, Compiled
from hypenet_jax.plan.hlo import Program
from hypenet_jax.plan.machines import APART, GIB, H100, compiler_options, machine
from hypenet_jax.plan.planning import _default_mesh
from hypenet_jax.plan.roofline import axis_rate, roofline
from hypenet_jax.plan.stages import Work, models
from hypenet_jax.plan.traffic import memory_traffic

compiled = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None and not (APART / "jax_cuda13_plugin").is_dir(),
    reason="jax_cuda13_plugin is not installed (make aot)",
)


@compiled
def test_four_layers_of_distillation_on_h100x8(tmp_path):
    file, config_file = tmp_path / "plan.json", write_conversion(tmp_path)
    done = run("--config", str(config_file), "--topology", "h100x8", "--stages", "distill", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    [record] = json.loads(file.read_text())
    assert record["fits"] and record["memory_bytes"] == 79.1 * GIB
    config = load_config(config_file)
    teacher, student = models(config, config_of(config.teacher))
    count = sum(x.size for x in jax.tree.leaves(student.param_shapes()))
    assert record["parts_bytes"]["parameters"] == pytest.approx(4 * count / 8, rel=0.01)

    # Matrices travel in bfloat16: the teacher's once, the student's for both forward passes; so do both heads and, for
    # the embedding, the tokens (int32, once forward and once backward).
    matrices = {name: sum(layer_matrices(model)) for name, model in (("teacher", teacher), ("student", student))}
    sent = {}
    for one in record["collectives"]:
        assert one["axes"] == ["fsdp"] and one["devices"] == 8
        sent[one["kind"]] = sent.get(one["kind"], 0) + one["size"] * one["count"]
    heads, tokens = 2 * 2 * V * D, 4 * 32 * 2048
    layers = 2 * (matrices["teacher"] + 2 * matrices["student"])
    assert sent["all-gather"] == pytest.approx(layers + heads + 2 * tokens, rel=1e-3)
    # Gradients of the layers go back divided; the head's, in float32, is summed.
    assert sent["reduce-scatter"] == pytest.approx(2 * matrices["student"], rel=0.01)
    assert sent["all-reduce"] == pytest.approx(4 * V * D, rel=0.01)

    # No [B, T, V]: the largest is the gradient of 2048 tokens' logits, of the 8192 that a GPU has.
    assert max(record["largest"].values()) == 2048 * V * 2
    known = (4 + 2 + 2 + 4 + 4) * V * D + 2 * 512 * V * 4 + 2048 * V * 2
    assert record["temporary_bytes"] < known + 96 * 2**20
    assert (
        set(record["seconds"]["network"]) == {"fsdp"} and 0 < record["seconds"]["apart"] < record["seconds"]["memory"]
    )
    least, most = record["step_seconds"]
    assert 0 < least < most and record["chip_hours"][0] > 0


@compiled
def test_alignment_holds_one_layer_at_a_time(tmp_path):
    file = tmp_path / "plan.json"
    done = run(
        "--config", str(write_conversion(tmp_path)), "--topology", "h100x8", "--stages", "align", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [record] = json.loads(file.read_text())
    check_one_layer_of_alignment(record, 32 * 2048 // 8)


@compiled
def test_what_does_not_fit_a_gpu_is_said_with_what_to_change(tmp_path):
    words = ["--topology", "h100x1", "--stages", "train", "--set", "train.batch_size=5120"]
    done = run("--config", str(write_pretraining(tmp_path)), *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train: does not fit, by" in done.stdout and "of 79.10 GiB" in done.stdout
    assert "what to change: --set remat=True fits (" in done.stdout


@compiled
def test_training_from_scratch_on_two_hosts(tmp_path):
    file = tmp_path / "plan.json"
    done = run("--config", str(write_pretraining(tmp_path)), "--topology", "h200x16", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(file.read_text())
    assert [r["stage"] for r in records] == ["train", "prefill", "decode"]
    assert all(r["mesh"] == {"dcn": 2, "fsdp": 8} and r["fits"] and r["memory_bytes"] == 139.8 * GIB for r in records)
    train = records[0]
    # Parameters are gathered within a host; between hosts goes the gradients' sum.
    assert {tuple(c["axes"]) for c in train["collectives"] if c["kind"] == "all-gather" and c["size"] > 1e6} == {
        ("fsdp",)
    }
    between = [c for c in train["collectives"] if "dcn" in c["axes"]]
    assert between and all(c["kind"] == "all-reduce" for c in between if c["size"] > 1e5)


def test_names_of_gpus():
    assert machine("h100x8") == dataclasses.replace(machine("h100x8"), chips=8, hosts=1, topology="h100:1x8")
    two = machine("h200x16")
    assert (two.chips, two.hosts, two.topology, two.chip) == (16, 2, "h200:2x8", machines.H200)
    for name in ("h100x3", "h100x12", "h100x0", "h100x2048", "b200x8"):
        with pytest.raises(HypenetError, match=f"topology '{name}' is no machine we know"):
            machine(name)


def test_a_missing_cuda_compiler_has_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "APART", tmp_path)
    monkeypatch.setattr(machines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HypenetError, match="h100x8 needs the CUDA compiler jax_cuda13_plugin.*make aot"):
        machines.open_devices(machine("h100x8"))


def test_options_of_the_cuda_compiler(monkeypatch, tmp_path):
    (tmp_path / "nvidia/cu13").mkdir(parents=True)
    monkeypatch.setattr(machines, "APART", tmp_path)
    quick, full = (compiler_options(machine("h100x1"), how) for how in (True, False))
    assert quick.pop("xla_disable_hlo_passes") == "rematerialization" and quick == full
    assert full["xla_gpu_cuda_data_dir"] == str(tmp_path / "nvidia/cu13")
    # 80% of the memory by so many per cent is 95% of it, to XLA's whole numbers.
    assert 0.8 * int(full["xla_gpu_memory_limit_slop_factor"]) / 100 == pytest.approx(0.95, abs=0.01)
    assert compiler_options(machine("v5e-16"), True) == {} == compiler_options(machine("cpu8"), False)
    assert QUICK != FULL


@dataclasses.dataclass(frozen=True)
class Gpu:
    id: int
    process_index: int


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the roofline reads of a mesh."""

    devices: np.ndarray
    shape: dict
    axis_names: tuple = ("dcn", "data", "fsdp", "seq", "tensor")
    size: int = 16


def grid(*sizes):
    devices = np.asarray([Gpu(i, i // 8) for i in range(16)], object).reshape(sizes)
    return Grid(devices, dict(zip(Grid.axis_names, sizes, strict=True)))


def test_rates_within_and_between_hosts():
    one = machine("h100x16")
    over_hosts = grid(1, 1, 16, 1, 1)
    assert axis_rate(("fsdp",), one, over_hosts) == H100.dcn_rate == 50e9
    by_host = grid(1, 2, 4, 1, 2)
    assert axis_rate(("fsdp",), one, by_host) == axis_rate(("fsdp", "tensor"), one, by_host) == H100.link_rate == 450e9
    assert axis_rate(("data",), one, by_host) == axis_rate(("data", "fsdp"), one, by_host) == 50e9


def test_a_gpu_moves_what_no_product_needs_after_the_product():
    mesh = Grid(np.asarray([[[[[Gpu(0, 0)]]]]], object), {}, size=1)
    work = Work("distill", None, (), {}, 989e12, 1000, 0)
    step = Compiled({}, traffic=3350e9, apart=0.75 * 3350e9)
    bounds = roofline(work, step, machine("h100x1"), mesh)
    assert (bounds.least, bounds.one_by_one) == (1.0, 1.75)
    assert roofline(work, step, machine("v5e-4"), mesh).one_by_one == pytest.approx(989 / 197)


def test_a_gpu_keeps_a_twentieth_to_itself():
    assert machine("h100x1").usable == pytest.approx(0.95 * 79.1 * GIB)
    assert machine("v5e-16").usable is None is machine("cpu1").usable


def test_hosts_are_the_first_axis_of_the_default_mesh(tmp_path):
    config = load_config(write_pretraining(tmp_path))
    assert _default_mesh(config, machine("h100x32")) == {"dcn": 4, "fsdp": 8}
    assert _default_mesh(config, machine("h200x2")) == {"fsdp": 2}


GPU = """
%gemm (p.0: bf16[8,64], p.1: bf16[64,16]) -> f32[8,16] {
  %p.0 = bf16[8,64]{1,0} parameter(0)
  %p.1 = bf16[64,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[8,64], b: bf16[8,16], c: f32[8,16]) -> f32[8,16] {
  %a = bf16[8,64]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %c = f32[8,16]{1,0} parameter(2)
  %all-gather-start = ((bf16[8,16]{1,0}, bf16[8,64]{1,0}), (bf16[64,16]{1,0}, bf16[64,64]{1,0})) all-gather-start(%b, %a), channel_id=1, replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = (bf16[64,16]{1,0}, bf16[64,64]{1,0}) all-gather-done(%all-gather-start)
  %get-tuple-element.1 = bf16[64,16]{1,0} get-tuple-element(%all-gather-done), index=0
  %gemm_fusion = f32[8,16]{1,0} fusion(%a, %get-tuple-element.1), kind=kCustom, calls=%gemm
  %reduce-scatter-start = ((f32[8,16]{1,0}, f32[8,16]{1,0}), (f32[1,16]{1,0}, /*index=1*/f32[1,16]{1,0})) reduce-scatter-start(%gemm_fusion, /*index=1*/%c), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  %reduce-scatter-done = (f32[1,16]{1,0}, f32[1,16]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %all-to-all-start = ((f32[8,16]{1,0}), f32[8,16]{1,0}) all-to-all-start(%c), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %all-to-all-done = f32[8,16]{1,0} all-to-all-done(%all-to-all-start)
  %all-reduce-start = f32[8,16]{1,0} all-reduce-start(%c), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %all-reduce-done = f32[8,16]{1,0} all-reduce-done(%all-reduce-start)
}
"""  # noqa: E501


def test_the_gpu_compilers_ways_of_writing():
    found = collectives(Program(GPU), {"data": 1, "fsdp": 8, "seq": 1, "tensor": 1})
    assert set(found) == {
        Collective("all-gather", ("fsdp",), 8, 2.0 * 64 * (16 + 64), 1.0),
        Collective("reduce-scatter", ("fsdp",), 8, 2 * 4.0 * 8 * 16, 1.0),
        Collective("all-to-all", ("fsdp",), 8, 4.0 * 8 * 16, 1.0),
        Collective("all-reduce", ("fsdp",), 8, 4.0 * 8 * 16, 1.0),
    }


def test_traffic_of_a_gpus_program():
    total, apart = memory_traffic(Program(GPU))
    small, weight = 8 * 16 * 4, 64 * 16 * 2
    product = 8 * 64 * 2 + weight + small
    gather = 9 * (8 * 16 + 8 * 64) * 2
    scatter, others = 2 * small * 9 / 8, 4 * small
    assert apart == gather + scatter + others and total == apart + product
