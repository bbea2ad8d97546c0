"""Stage 2 from a kept teacher output: the losses of the live teacher, and nothing that belongs to another run."""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pytest

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.data import teacher_rows
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.teacher_rows import TeacherRows, read_output, write_file
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo import teacher_cache
from hypenet_jax.halo.corpus import stage_batches
from hypenet_jax.halo.distill import cached_distillation_loss, distillation_loss
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.parallel.rules import param_shardings
from hypenet_jax.train.loop import place_batch
from hypenet_jax.train.stage import StageConfig

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture
def aligned(finished, tmp_path):
    """The finished run as it stood before stage 2."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=lambda _, names: {*names} & {"distill", "finetune", "export", "eval.json"})
    return copy


def cache(config, directory, *flags):
    return main(["cache-teacher", "--config", str(config), "--workdir", str(directory), *flags])


def distill(config, directory, *flags):
    given = ["--set", f"teacher_output={directory / 'teacher_output'}"]
    return main(["distill", "--config", str(config), "--workdir", str(directory), *given, *flags])


@pytest.mark.parametrize("form", [(), ("--form", "top-k", "--k", "257")], ids=["hidden", "all of top-k"])
def test_the_losses_are_those_of_the_live_teacher(finished, aligned, convert_config, stage_records, capsys, form):
    assert cache(convert_config, aligned, *form) == 0
    assert f"1,280 tokens x {257 * 8 + 4 if form else 32 * 4:,} bytes" in capsys.readouterr().err
    assert distill(convert_config, aligned) == 0
    for got, wanted in zip(stage_records(aligned / "distill"), stage_records(finished / "distill"), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-6 if not form else 1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


def test_few_tokens_give_a_lower_bound_and_another_run(finished, aligned, convert_config, stage_records, capsys):
    assert cache(convert_config, aligned, "--form", "top-k", "--k", "8") == 0
    assert distill(convert_config, aligned) == 0
    got, wanted = (stage_records(run / "distill")[0]["loss"] for run in (aligned, finished))
    assert 0.1 * wanted < got < wanted
    # What began with the likeliest tokens does not go on with the whole distribution.
    state = json.loads((aligned / "distill/checkpoints/5/data/hypenet_checkpoint.json").read_text())
    assert state["data"]["stream"]["teacher"] == "top-k of 8"
    shutil.rmtree(aligned / "distill" / "checkpoints" / "5")
    capsys.readouterr()
    assert main(["distill", "--config", str(convert_config), "--workdir", str(aligned)]) == 2
    assert "has teacher 'top-k of 8' but this run has None" in capsys.readouterr().err


def test_a_cut_off_cache_goes_on_and_is_not_read_before_its_end(aligned, convert_config, monkeypatch, capsys):
    directory, write, left = aligned / "teacher_output", teacher_cache.write_file, [2]
    monkeypatch.setattr(teacher_cache, "FILE_BYTES", 1)  # a file a batch

    def stops(path, output, rows):
        if not left[0]:
            next(iter(rows))
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, output, rows)

    monkeypatch.setattr(teacher_cache, "write_file", stops)
    assert cache(convert_config, aligned) == 130
    there = {path.name: path.read_bytes() for path in directory.glob("*.array_record")}
    assert len(there) == 2 and not (directory / "meta.json").exists()
    assert distill(convert_config, aligned) == 2
    assert "no complete teacher output" in capsys.readouterr().err
    left[0] = 10
    assert cache(convert_config, aligned) == 0
    assert left[0] == 7 and "8 of 20 rows are there" in capsys.readouterr().err
    assert {name: (directory / name).read_bytes() for name in there} == there
    assert not list(directory.glob("*.partial"))
    assert len(TeacherRows(directory)(np.array([19, 0]))["teacher_hidden"]) == 2
    # What is cut short is said, and written again.
    cut = directory / "rows-00002.array_record"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:1000])
    assert distill(convert_config, aligned) == 2
    assert "is damaged" in capsys.readouterr().err
    assert cache(convert_config, aligned) == 0 and left[0] == 6
    assert cut.read_bytes() == whole
    # Again, nothing is computed; another form has no place there.
    assert cache(convert_config, aligned) == 0 and left[0] == 6
    assert cache(convert_config, aligned, "--form", "top-k", "--k", "3") == 2
    assert "holds another teacher output (form is 'hidden' there and 'top-k' here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("teacher", "0" * 64, "the teacher's config, weights or dtype"),
        ("data", "0" * 64, "the packed tokens"),
        ("start_token", 7, "the first token of the stage"),
        ("seq_len", 32, "the length of a row"),
        ("rows", 19, "has 19 rows and the stage reads 20"),
    ],
)
def test_the_output_of_another_run_is_refused(field, value, words):
    numbers = {"start_token": 0, "seq_len": 64, "rows": 20, "rows_a_file": 4}
    wanted = teacher_rows.TeacherOutput("hidden", 32, "bfloat16", teacher="a", data="b", **numbers)
    teacher_rows.check_same("W", wanted, wanted)
    with pytest.raises(HypenetError, match=words):
        teacher_rows.check_same("W", dataclasses.replace(wanted, **{field: value}), wanted)


def test_no_room_is_said_before_anything_is_computed(aligned, convert_config, monkeypatch, capsys):
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(teacher_cache, "_computed", lambda *_: pytest.fail("computed"))
    assert cache(convert_config, aligned) == 2
    assert "GB more but the disk has" in capsys.readouterr().err
    assert cache(convert_config, aligned, "--form", "top-k") == 2
    assert "--form top-k needs --k between 1 and the 257" in capsys.readouterr().err


def test_records_are_what_was_written(tmp_path):
    numbers = {"start_token": 0, "seq_len": 3, "rows": 5, "rows_a_file": 2}
    output = teacher_rows.TeacherOutput("hidden", 4, "bfloat16", teacher="a", data="b", **numbers)
    kind = output.arrays["teacher_hidden"][1]
    rows = np.random.default_rng(0).standard_normal((5, 3, 4)).astype(kind)
    for number, name in enumerate(output.files):
        write_file(tmp_path / name, output, ({"teacher_hidden": row} for row in rows[2 * number : 2 * number + 2]))
    (tmp_path / "meta.json").write_text(json.dumps(dataclasses.asdict(output) | {"format": 1}))
    assert read_output(tmp_path) == output
    got = TeacherRows(tmp_path)(np.array([4, 0, 3]))["teacher_hidden"]
    assert got.dtype == kind
    np.testing.assert_array_equal(got, rows[[4, 0, 3]])
    (tmp_path / output.files[1]).unlink()
    with pytest.raises(HypenetError, match="rows-00001.array_record is missing"):
        TeacherRows(tmp_path)


def test_every_bfloat16_comes_back_to_the_bit(tmp_path):
    """All 65,536 of them: infinities, NaNs with what they carry, subnormal numbers, both zeros."""
    numbers = {"start_token": 0, "seq_len": 64, "rows": 4, "rows_a_file": 4}
    output = teacher_rows.TeacherOutput("hidden", 256, "bfloat16", teacher="a", data="b", **numbers)
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(4, 64, 256)
    rows = bits.view(output.arrays["teacher_hidden"][1])
    write_file(tmp_path / output.files[0], output, ({"teacher_hidden": row} for row in rows))
    (tmp_path / "meta.json").write_text(json.dumps(dataclasses.asdict(output) | {"format": 1}))
    np.testing.assert_array_equal(TeacherRows(tmp_path)(np.arange(4))["teacher_hidden"].view(np.uint16), bits)


def test_a_stage_reads_what_a_bfloat16_teacher_says_to_the_bit(finished, byte_teacher, tmp_path):
    """A CPU does not train in bfloat16, but a teacher's hidden states it computes."""
    model, params = hn.load(byte_teacher)
    teacher, mesh = dataclasses.replace(model, dtype="bfloat16"), make_mesh(None, jax.devices()[:1])
    text = PackedTokens(finished / "data" / "train", model.tokenizer)
    stage = StageConfig(steps=3, batch_size=4, seq_len=64, peak_lr=1e-3, end_lr=1e-5, warmup_steps=1)
    output = teacher_cache.output_of(teacher, teacher_cache.fingerprint(teacher, params), text, stage, start_token=256)
    assert (output.dtype, output.row_bytes) == ("bfloat16", 64 * 32 * 2)
    teacher_cache.write(tmp_path / "kept", output, teacher, params, text, stage.batch_size, mesh, lambda line: None)
    rows = teacher_cache.rows_for(tmp_path / "kept", output)
    for batch in stage_batches(text, stage, 256, seed=3, workers=0, mesh=mesh, beside=rows):
        placed = place_batch(batch, stage, mesh)
        live = jax.jit(teacher.hidden)(params, placed["tokens"], placed["segment_ids"])
        assert live.dtype == placed["teacher_hidden"].dtype == "bfloat16"
        got, wanted = (np.asarray(x).view(np.uint16) for x in (placed["teacher_hidden"], live))
        np.testing.assert_array_equal(got, wanted)
        assert len(np.unique(got)) > 1000


@pytest.mark.parametrize(
    ("dtype", "rel"), [("float32", 1e-6), pytest.param("bfloat16", 1e-3, marks=pytest.mark.gpu)], ids=str
)
def test_the_loss_is_that_of_the_live_teacher(tiny, packed_batch, dtype, rel):
    teacher, params = dataclasses.replace(tiny[0], dtype=dtype), jax.tree.map(jax.numpy.asarray, tiny[1])
    student_params, frozen = jax.tree.map(lambda x: 0.9 * x, params), {"lm_head": params["lm_head"].astype(dtype)}
    live = jax.jit(distillation_loss(teacher, teacher, 16))(student_params, params, packed_batch)
    hidden = jax.jit(teacher.hidden)(params, packed_batch["tokens"], packed_batch["segment_ids"])
    loss = jax.jit(cached_distillation_loss(teacher, teacher, 16, "hidden"))
    kept = loss(student_params, frozen, packed_batch | {"teacher_hidden": np.asarray(hidden)})
    assert kept[1] == live[1] and float(kept[0]) == pytest.approx(float(live[0]), rel=rel) and live[0] > 0.01


def test_the_fingerprint_knows_weights_and_not_the_mesh(tiny):
    model, params = tiny
    one = teacher_cache.fingerprint(model, params)
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    spread = jax.device_put(params, param_shardings(model.param_axes(), params, mesh))
    assert teacher_cache.fingerprint(model, spread) == one
    swapped = params | {"lm_head": params["lm_head"][:, ::-1]}
    assert teacher_cache.fingerprint(model, swapped) != one
    assert teacher_cache.fingerprint(dataclasses.replace(model, dtype="bfloat16"), params) != one
