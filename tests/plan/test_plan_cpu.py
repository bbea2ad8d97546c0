"""`hypenet plan` for this host's devices, its mistakes in one sentence, and what it says when a step does not fit."""

import dataclasses
import json
import math
import signal

import jax
import pytest

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.published import config_of
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.plan import machines, planning, remedies
from hypenet_jax.plan.compile import Compiled, _too_large, compile_work
from hypenet_jax.plan.machines import machine
from hypenet_jax.plan.stages import work_of

CONFIG = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = "{teacher}"
    config.data = dict(sources=("stdlib",))
    config.dtype = "float32"
    config.student = dict(attention_layers=(0,))
    stage = dict(steps=10, batch_size=16, seq_len=32, peak_lr=1e-3, end_lr=1e-5, warmup_steps=2)
    config.align = dict(**stage)
    config.distill = dict(**stage)
    config.finetune = dict(**stage)
    config.evaluate = dict(lengths=(64,))
    return config
"""


@pytest.fixture(scope="module")
def config_file(byte_teacher, tmp_path_factory):
    """A config whose teacher is a directory with a config.json and no weights."""
    directory = tmp_path_factory.mktemp("plan")
    (directory / "teacher").mkdir()
    (directory / "teacher/config.json").write_text((byte_teacher / "config.json").read_text())
    (directory / "config.py").write_text(CONFIG.format(teacher=directory / "teacher"))
    return directory / "config.py"


def test_plan_of_this_hosts_devices(config_file, tmp_path, capsys):
    words = ["plan", "--config", str(config_file), "--topology", "cpu8", "--stages", "distill", "decode"]
    words += ["--mesh", "fsdp=8", "--mesh", "fsdp=4,tensor=2", "--json", str(tmp_path / "plan.json")]
    assert main([*words, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "mesh fsdp=4,tensor=2" in said and "all-gather over fsdp" in said and "compile s" in said
    records = json.loads((tmp_path / "plan.json").read_text())
    assert [(r["stage"], r["mesh"].get("tensor", 1)) for r in records] == [
        ("distill", 1), ("decode", 1), ("distill", 2), ("decode", 2),
    ]  # fmt: skip
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 1 and page.count("<tr>") == 5  # no times without a CPU's rates
    distill = records[0]
    assert distill["fits"] and distill["tokens_per_step"] == 512 and distill["flops"] > 0
    # Parameters are float32, moments twice that; the teacher as many bytes but for the student's gates and norms.
    parts = distill["parts_bytes"]
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-2)
    assert 0.5 < parts["teacher"] / parts["parameters"] < 1


def test_weights_travel_one_by_one_and_gradients_return_divided(config_file):
    config, axes = load_config(config_file), {"fsdp": 8}
    mesh = make_mesh(axes)
    work = work_of("finetune", config, config_of(config.teacher), mesh)
    compiled = compile_work(work, mesh)
    parameters = jax.tree.leaves(work.parts["parameters"])
    whole = 4 * sum(leaf.size for leaf in parameters)
    gathers = [c for c in compiled.collectives if c.kind == "all-gather"]
    largest = 4 * max(leaf.size for leaf in parameters)
    assert max(c.size for c in gathers) <= largest < whole / 2
    matrices = [leaf for name in ("layer_0", "layer_1") for leaf in jax.tree.leaves(work.parts["parameters"][name])]
    once = 4 * sum(leaf.size for leaf in matrices if leaf.ndim > 1 and leaf.sharding.spec and any(leaf.sharding.spec))
    # Forward, and again for the second forward pass of `remat`.
    assert sum(c.size * c.count for c in gathers) >= 1.8 * once
    assert all(c.axes == ("fsdp",) for c in compiled.collectives)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--topology", "v9-3"], "topology 'v9-3' is no machine we know; give v5e-N"),
        (["--topology", "cpu8,h100x3"], "topology 'h100x3' is no machine.*1, 2 or 4 GPUs"),
        (["--topology", "cpu8", "--mesh", "fsdp=--8"], "mesh 'fsdp=--8' is not of the form"),
        (["--topology", "cpu8", "--mesh", "fsdp=\u00b2"], "is not of the form"),
        (["--topology", "cpu8", "--mesh", "fsdp=2,fsdp=8"], "mesh 'fsdp=2,fsdp=8' gives fsdp twice"),
        (["--topology", "cpu8", "--json", "/proc/no/plan.json"], "/proc/no cannot be a directory.*another place"),
        (["--topology", "cpu8", "--json", "/"], "/ is a directory; name a file"),
        (["--topology", "cpu8", "--json", ""], "--json is empty; name a file"),
        (["--topology", "cpu8", "--out", ""], "--out is empty; name a directory"),
        (["--topology", "v5p-33"], "topology 'v5p-33' is no machine"),
        (["--topology", "cpu" + "8" * 5000], "topology 'cpu8.*' is no machine"),
        (["--topology", "cpu8", "--mesh", "fsdp=8", "--mesh", "data=3"], "^hypenet: cpu8, mesh data=3: mesh data=3 x"),
        (["--topology", "cpu8,cpu4", "--mesh", "fsdp=8"], "^hypenet: cpu4, mesh fsdp=8: mesh data=1 x fsdp=8"),
        (["--topology", "cpu8", "--mesh", "fsdp=8", "--mesh", "foo=8"], "^hypenet: cpu8, mesh foo=8: .*'foo' is unkn"),
        (["--topology", "cpu8", "--mesh", "fsdp=8,data=0"], "^hypenet: cpu8, mesh fsdp=8,data=0: .*has size 0"),
        (["--topology", "65xv5e-16"], "topology '65xv5e-16' is no machine we know.*2 to 64 slices"),
        (["--topology", "2xcpu8"], "topology '2xcpu8' is no machine"),
        (["--topology", "v5p-3"], "topology 'v5p-3' is no machine"),
        (["--topology", "cpu8", "--set", "mesh.fsdp=0"], "mesh axis 'fsdp' has size 0"),
        (["--topology", "cpu8", "--set", "mesh.foo=3"], "mesh axis 'foo' is unknown"),
        (["--topology", "cpu8", "--mesh", "fsdp=3"], "fsdp=3 x seq=1 x tensor=1 does not multiply to the 8 devices"),
        (["--topology", "cpu8", "--mesh", "fsdp"], "mesh 'fsdp' is not of the form axis=size"),
        (
            ["--topology", "cpu4,cpu8", "--mesh", "fsdp=-1", "--set", "distill.batch_size=6"],
            "distill on cpu4, mesh fsdp=4: .*do not divide over",
        ),
        (["--topology", "cpu8", "--set", "teacher=nowhere"], "no model at nowhere.*qwen3-1.7b.*config.json"),
    ],
)
def test_mistakes_are_one_sentence(config_file, capsys, words, sentence):
    assert main(["plan", "--config", str(config_file), "--stages", "distill", *words]) == 2
    told = capsys.readouterr()
    said = told.err.strip().splitlines()
    # Of several machines and meshes not one is compiled before all are known to be right.
    assert len(said) == 1 and not told.out
    with pytest.raises(HypenetError, match=sentence):
        raise HypenetError(said[0])


def test_what_is_not_a_plan_is_not_overwritten(config_file, tmp_path, capsys):
    notes, page = tmp_path / "notes.md", tmp_path / "plan.html"
    notes.write_text("mine")
    page.write_text("<html>mine")
    words = ["plan", "--config", str(config_file), "--topology", "cpu8", "--stages", "distill"]
    for more, sentence in (
        (["--json", str(notes)], f"{notes} exists and holds something else than such records; name another file"),
        (["--out", str(tmp_path)], f"{page} exists and is not a page of this command; name another directory"),
    ):
        assert main([*words, *more]) == 2
        assert capsys.readouterr().err == f"hypenet: {sentence}\n"
    assert notes.read_text() == "mine" and page.read_text() == "<html>mine"


def test_a_missing_compiler_has_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "APART", tmp_path)
    monkeypatch.setattr(machines.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HypenetError, match="v5e-16 needs the TPU compiler libtpu.*make aot"):
        machines.open_devices(machine("v5e-16"))


def test_a_compiler_does_not_keep_sigterm(monkeypatch):
    """libtpu takes the signal as it is loaded, and would print the stack of a plan that is stopped."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(machines.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(machines, "open_topology", lambda *_, **__: [signal.signal(signal.SIGTERM, signal.SIG_IGN)])
    machines.open_devices(machine("v5e-16"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_named_twice_is_compiled_once(config_file, monkeypatch):
    compiled = []
    monkeypatch.setattr(planning, "_record", lambda stage, cell, *_: compiled.append((stage, cell)) or {"stage": stage})
    monkeypatch.setattr(planning, "describe", str)
    monkeypatch.setattr(planning, "describe_total", lambda _: "")
    monkeypatch.setattr(planning, "overview", str)
    words = ["--topology", "cpu8,cpu8", "--topology", "cpu8", "--mesh", "fsdp=8", "--mesh", "fsdp=8,seq=1"]
    assert main(["plan", "--config", str(config_file), *words, "--stages", "align", "decode", "align"]) == 0
    assert [stage for stage, _ in compiled] == ["align", "decode"]


def test_training_from_scratch_and_its_model_are_planned(config_file, tmp_path, capsys):
    words = ["plan", "--topology", "cpu8", "--mesh", "fsdp=4,tensor=2", "--json", str(tmp_path / "plan.json")]
    sizes = ["hidden_size=32", "intermediate_size=64", "num_layers=2", "num_heads=4", "num_kv_heads=2", "head_dim=8"]
    sizes = [f"model.{size}" for size in sizes] + ["train.batch_size=16", "train.seq_len=32", "train.token_chunk=None"]
    sizes += ["evaluate.lengths=(32,)", "train.steps=10", "train.warmup_steps=2", "rules.mlp=()"]
    changes = [word for size in sizes for word in ("--set", size)]
    assert main([*words, "--config", "configs/demo_teacher.py", *changes]) == 0
    said = capsys.readouterr().out
    assert "train: " in said and "decode: " in said
    train, prefill, decode = json.loads((tmp_path / "plan.json").read_text())
    assert (train["stage"], prefill["stage"], decode["stage"]) == ("train", "prefill", "decode")
    # Embedding (tied, 257 bytes do not divide over tensor), two layers, norms: float32, its moments twice that. Every
    # matrix is divided by fsdp, heads by tensor, and the MLP, by the config's rule, not.
    attention, mlp = 32 * 8 * (4 + 2 + 2 + 4), 3 * 32 * 64
    held = 4 * (257 * 32 / 4 + 2 * (attention / 8 + mlp / 4 + 2 * 32 + 2 * 8) + 32)
    assert train["parts_bytes"]["parameters"] == held
    assert train["parts_bytes"]["optimizer"] == pytest.approx(2 * held, rel=0.01)
    assert train["tokens_per_step"] == 512 and train["steps"] == 10
    # 6 operations a parameter's multiplication forward and backward, scores, and three products with the vocabulary.
    each = 2 * (6 * (attention + mlp) + 3.5 * 2 * 32 * 4 * 8) + 3 * 2 * 32 * 257
    assert train["flops"] == pytest.approx(each * 512 / 8)
    assert prefill["tokens_per_step"] == 4 * 32 and decode["tokens_per_step"] == 4
    assert prefill["parts_bytes"]["parameters"] == decode["parts_bytes"]["parameters"] == held


@pytest.mark.parametrize(
    ("config", "stage", "sentence"),
    [
        (None, "train", "a conversion has no stage 'train'; its stages are align, distill, finetune, prefill, decode"),
        ("configs/demo_teacher.py", "distill", "training from scratch has no stage 'distill'; its stages are train, "),
    ],
)
def test_a_stage_of_the_other_kind_of_config(config_file, capsys, config, stage, sentence):
    words = ["--config", str(config or config_file), "--topology", "cpu8", "--stages", stage]
    assert main(["plan", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and sentence in said[0]


def test_the_rules_of_teacher_and_student_are_the_configs(config_file):
    config = load_config(config_file, ["rules.mlp=()", "teacher_rules.embed=()"])
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    work = work_of("distill", config, config_of(config.teacher), mesh)
    student, teacher = (work.parts[name]["layer_0"]["mlp"]["gate"] for name in ("parameters", "teacher"))
    assert (tuple(student.sharding.spec), tuple(teacher.sharding.spec)) == (("fsdp", None), (None, "tensor"))
    # A run's evaluation holds the student as its training does.
    weight = work_of("decode", config, config_of(config.teacher), mesh).parts["parameters"]["layer_0"]["mlp"]["gate"]
    assert tuple(weight.sharding.spec) == ("fsdp", None)
    config = load_config(config_file, ["rules.mpl=()"])
    for stage in ("distill", "decode"):
        with pytest.raises(
            HypenetError, match="in config section 'rules': the sharding rule 'mpl' is used by no parameter"
        ):
            work_of(stage, config, config_of(config.teacher), mesh)


def test_what_the_compiler_says_of_too_large_a_program():
    said = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    assert _too_large(said + "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 7.0) == 4.75 * 2**30
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    assert _too_large(said + "(46.01G) exceeds available HBM (15.75G).", 7.0) == pytest.approx(30.26 * 2**30 + 7)
    assert _too_large("INTERNAL: something else", 7.0) is None
    with pytest.raises(HypenetError, match="not by how much"):
        _too_large("RESOURCE_EXHAUSTED: full", 7.0)


def test_the_remedy_is_one_that_compiles(config_file):
    config, axes, tried = load_config(config_file), {"data": 2, "fsdp": 4}, []

    def compile_with(changed, mesh_axes):
        tried.append((changed.finetune.gradient_accumulation, mesh_axes))
        return Compiled({}, short=0.0 if mesh_axes["fsdp"] == 8 else 1.0)

    said = []
    found = remedies.remedy("finetune", config, axes, compile_with, said.append)
    assert found.startswith("--set mesh.fsdp=8 fits")
    # 16 rows over 8 devices: two microbatches at most.
    assert tried == [(2, axes), (1, {"data": 1, "fsdp": 8})] and len(said) == 1
    nothing = remedies.remedy("finetune", config, axes, lambda *_: Compiled({}, short=2.0), said.append)
    assert "none suffices" in nothing and "larger chips" in nothing


@pytest.mark.parametrize(
    ("mesh", "topology", "given"),
    [
        ("{}", "v5e-16", None),
        ("{'data': 2, 'fsdp': 4, 'seq': 1}", "cpu8", None),
        ("{'fsdp': -1, 'tensor': 2}", "v5p-32", None),
        ("'v5e-256'", "v5e-256", None),
        ("{'tensor': 8}", "cpu8", {"data": 4, "fsdp": 2}),
        ("{}", "h100x16", None),
        ("'2xv5e-16'", "2xv5e-16", None),
    ],
)
@pytest.mark.parametrize("stage", ["align", "finetune", "decode"])
def test_a_remedy_given_to_a_run_makes_what_was_compiled(config_file, tmp_path, mesh, topology, given, stage):
    program = tmp_path / "named.py"
    program.write_text(config_file.read_text().replace("return config", f"config.mesh = {mesh}\n    return config"))
    config, one = load_config(program, ["remat=False", "finetune.batch_size=512"]), machine(topology)
    axes = given or planning._default_mesh(config, one)
    rest = one.chips // abs(math.prod(axes.values()))
    axes = {name: rest if size == -1 else size for name, size in axes.items()}
    found = list(remedies.candidates(stage, config, axes))
    assert found
    for remedy in found:
        again = load_config(program, ["remat=False", "finetune.batch_size=512", *remedy.change.split(" --set ")])
        assert (again.remat, again.finetune) == (remedy.config.remat, remedy.config.finetune)
        if given is None or remedy.axes != axes:
            held = {name: size for name, size in remedy.axes.items() if size != 1}
            run = planning._default_mesh(again, one)
            rest = one.chips // abs(math.prod(run.values()))
            assert {n: rest if size == -1 else size for n, size in run.items() if size != 1} == held, remedy.change
    assert stage != "finetune" or len(found) >= 4  # and not sixteen microbatches one after the other


def test_what_fits_in_no_way_is_not_compiled_to_be_told_so(config_file, monkeypatch, capsys):
    """Arguments that alone are larger than the chip: no number of microbatches helps, and none is tried."""
    tried, small = [], dataclasses.replace(machines.CPU, memory=1e-5)

    def compiled(work, mesh, effort, one):
        tried.append(dict(mesh.shape))
        return Compiled({}, short=5.0)

    monkeypatch.setattr(machines, "CPU", small)
    monkeypatch.setattr(planning, "compile_work", compiled)
    words = ["plan", "--config", str(config_file), "--topology", "cpu4", "--stages", "finetune"]
    assert main([*words, "--set", "finetune.batch_size=64"]) == 0
    assert len(tried) == 1 and "take more or larger chips" in capsys.readouterr().out


def test_a_mesh_is_the_configs_where_it_fits_the_machine(config_file):
    config = load_config(config_file, ["mesh.fsdp=16"])
    assert planning._default_mesh(config, machine("v5e-16")) == {"fsdp": 16}
    assert planning._default_mesh(config, machine("v5e-256")) == {"fsdp": 32, "tensor": 8}
    assert planning._default_mesh(config, machine("v5e-8")) == {"fsdp": 8}
    rest = load_config(config_file, ["mesh.fsdp=-1", "mesh.tensor=2"])
    assert planning._default_mesh(rest, machine("v5e-8")) == {"fsdp": -1, "tensor": 2}
    # Slices are an axis of the mesh: the config's where it has them, else the machine's.
    assert planning._default_mesh(load_config(config_file, ["mesh.fsdp=32"]), machine("2xv5e-16")) == {
        "dcn": 2, "fsdp": 16,
    }  # fmt: skip
    slices = load_config(config_file, ["mesh.dcn=-1", "mesh.tensor=8"])
    assert planning._default_mesh(slices, machine("2xv5e-8")) == {"dcn": -1, "tensor": 8}
    assert planning._default_mesh(slices, machine("4xv6e-4")) == {"dcn": 4, "fsdp": 4}
    assert planning._default_mesh(load_config(config_file, ["mesh=2xv5p-64"]), machine("2xv5p-64")) == {
        "dcn": 2, "fsdp": 32,
    }  # fmt: skip
    # Rows of the stages divide over every machine's own mesh.
    for name in ("v5e-64", "v6e-256", "v5p-1024", "h100x64", "h200x256", "cpu64"):
        axes = planning._default_mesh(config, machine(name))
        rows = axes.get("dcn", 1) * axes["fsdp"]
        assert rows <= 32 and math.prod(axes.values()) == machine(name).chips


def test_a_teacher_that_every_device_holds_whole_is_not_gathered(config_file):
    """Its matrices are not, and neither are the tokens, which all devices look up in a divided embedding."""

    def gathered(*overrides):
        config = load_config(config_file, overrides)
        teacher, mesh = config_of(config.teacher), make_mesh({"fsdp": 4}, jax.devices()[:4])
        work = work_of("distill", config, teacher, mesh)
        matrices = sum(x.size * 4 for x in jax.tree.leaves(work.parts["teacher"]) if len(x.shape) > 1)
        found = compile_work(work, mesh).collectives
        return sum(one.size * one.count for one in found if one.kind == "all-gather"), matrices

    (divided, matrices), (whole, _) = gathered(), gathered("teacher_rules.embed=()")
    assert divided - whole == matrices + 16 * 32 * 4
