"""Bad input through the command line: one clear sentence, exit code 2, no traceback, nothing overwritten."""

import json
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.loading import read_config

CONVERT = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = {teacher!r}
    config.dtype = "float32"
    config.data = dict(sources=({documents!r},), heldout_share=0.3)
    shared = dict(batch_size=8, seq_len=64, peak_lr=1e-3, end_lr=1e-5, warmup_steps=1)
    config.align = dict(steps=4, **shared)
    config.distill = dict(steps=4, **shared)
    config.finetune = dict(steps=4, **shared)
    config.select = dict(questions=4, length=512, answer_budget=16, keep=1)
    config.fit_scale = dict(length=128, documents=2, grid=(2, 20, 200))
    config.evaluate = dict(
        tasks=("S1", "S2"), lengths=(576, 1024), samples=2, answer_budget=16, perplexity_length=128, prompts=("a",)
    )
    return config
"""
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def teacher(byte_teacher, tmp_path) -> pathlib.Path:
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(byte_teacher, tmp_path / "teacher"))


@pytest.fixture
def program(byte_teacher, documents_file, tmp_path) -> pathlib.Path:
    file = tmp_path / "program.py"
    file.write_text(CONVERT.format(teacher=str(byte_teacher), documents=str(documents_file)))
    return file


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command that must end with code 2, one sentence with these words, and the same files as before."""

    def files():
        return {os.fspath(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def run(words, *argv, keeps=True):
        before = files()
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        said = capsys.readouterr().err
        sentence = said.splitlines()[-1]
        assert sentence.startswith("hypenet: ") and "Traceback" not in said and len(sentence) < 600
        assert words in sentence, sentence
        if keeps:
            assert files() == before

    return run


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensors(directory: pathlib.Path, **changes) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: array for name, array in tensors.items() if array is not None}, path)


MODEL_FAULTS = {
    "a truncated file": (
        lambda d: (d / "model.safetensors").write_bytes(b"\0" * 50),
        "is not a whole safetensors file",
    ),
    "a missing file": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a missing tensor": (lambda d: set_tensors(d, **{UP: None}), f"lacks the tensor {UP}"),
    "an unexpected tensor": (lambda d: set_tensors(d, extra=np.zeros(3, np.float32)), "the unexpected tensor extra"),
    "a wrong shape": (lambda d: set_tensors(d, **{UP: np.zeros((2, 2), np.float32)}), "has the shape (2, 2)"),
    "whole numbers": (lambda d: set_tensors(d, **{UP: np.zeros((64, 32), np.int32)}), "has the dtype I32"),
    "an architecture": (lambda d: edit(d / "config.json", architectures=["MambaForCausalLM"]), "'MambaForCausalLM'"),
    "an architecture in words": (
        lambda d: edit(d / "config.json", architectures="Qwen3ForCausalLM"),
        "architectures in",
    ),
    "no architecture": (lambda d: edit(d / "config.json", architectures=None, model_type="rwkv"), "model_type 'rwkv'"),
    "a mixer": (lambda d: hybrid(d, ["attn", "rwkv-7"]), "mixer_types[1]"),
    "mixers in words": (lambda d: hybrid(d, "attn"), "mixer_types in"),
    "a mixer that is a list": (lambda d: hybrid(d, ["attn", ["attn"]]), "mixer_types[1]"),
    "too few mixers": (lambda d: hybrid(d, ["attn"]), "mixers has 1 entries but the model has 2 layers"),
    "more layers": (lambda d: edit(d / "config.json", num_hidden_layers=3), "lacks the tensor model.layers.2."),
    "fewer layers": (lambda d: edit(d / "config.json", num_hidden_layers=1), "the unexpected tensor model.layers.1."),
    "a number in words": (lambda d: edit(d / "config.json", hidden_size="wide"), "hidden_size in"),
    "no number": (lambda d: edit(d / "config.json", hidden_size=float("nan")), "hidden_size in"),
    "endless": (lambda d: edit(d / "config.json", vocab_size=float("inf")), "vocab_size in"),
    "a broken config": (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read as JSON"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a smaller vocabulary": (
        lambda d: (edit(d / "config.json", vocab_size=200), cut_embedding(d, 200)),
        "has 257 tokens but the model only 200",
    ),
    "an end that is no id": (lambda d: edit(d / "generation_config.json", eos_token_id="<eos>"), "eos_token_id"),
    "an end that is no token": (lambda d: edit(d / "tokenizer_config.json", eos_token=7), "eos_token 7"),
    "a broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "is no tokenizer.json"),
}


def hybrid(directory: pathlib.Path, mixers) -> None:
    edit(directory / "config.json", architectures=["HypeNetForCausalLM"], mixer_types=mixers)


def cut_embedding(directory: pathlib.Path, size: int) -> None:
    name = "model.embed_tokens.weight"
    set_tensors(directory, **{name: load_file(directory / "model.safetensors")[name][:size]})


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_damaged_models(teacher, tmp_path, refused, fault):
    damage, words = MODEL_FAULTS[fault]
    damage(teacher)
    refused(words, "import", teacher, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_teacher_stops_every_command(teacher, program, tmp_path, refused):
    (teacher / "model.safetensors").write_bytes((teacher / "model.safetensors").read_bytes()[:-10])
    words = "is not a whole safetensors file"
    refused(words, "generate", teacher, "--prompt", "a")
    refused(words, "convert", "--config", program, "--workdir", tmp_path / "run", "--set", f"teacher={teacher}")


@given(st.data())
def test_any_value_in_a_config_is_read_or_refused(byte_teacher, tmp_path_factory, data):
    """Whatever stands in config.json: a model, or one sentence."""
    values = json.loads((byte_teacher / "config.json").read_text())
    values |= {
        "architectures": data.draw(
            st.sampled_from([["Qwen3ForCausalLM"], ["LlamaForCausalLM"], ["HypeNetForCausalLM"]])
        )
    }
    keys = [
        *values,
        "mixer_types",
        "lightning_nh",
        "lightning_scale",
        "attn_logits_scaling",
        "rope_parameters",
        "model_type",
    ]
    plain = st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.text(max_size=4))
    nested = st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), plain)
    anything = st.one_of(plain, st.lists(plain, max_size=2), nested)
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        values[key] = data.draw(anything)
    directory = tmp_path_factory.getbasetemp() / "any-config"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    try:
        read_config(directory)
    except HypenetError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("listed", [5, [], {"a": 5}, {UP: ["x"]}, {UP: "../other.safetensors"}, {UP: "."}])
def test_a_shard_index_that_is_nonsense(teacher, tmp_path, refused, listed):
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    refused("index.json", "import", teacher, tmp_path / "out")


@given(st.integers(0), st.integers(0, 255))
def test_a_header_with_any_byte_changed(byte_teacher, tmp_path_factory, place, value):
    directory = tmp_path_factory.getbasetemp() / "any-header"
    shutil.copytree(byte_teacher, directory, dirs_exist_ok=True)
    whole = bytearray((byte_teacher / "model.safetensors").read_bytes())
    whole[place % (8 + int.from_bytes(whole[:8], "little"))] = value
    (directory / "model.safetensors").write_bytes(whole)
    try:
        hn.load(directory)
    except HypenetError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("contents", [b"", b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 60, b"PK\3\4" * 20, b"\0" * 4096])
def test_files_that_are_no_gguf(tmp_path, refused, contents):
    (tmp_path / "model.gguf").write_bytes(contents)
    refused("model.gguf", "import", tmp_path / "model.gguf", tmp_path / "out")


def test_nothing_there(tmp_path, refused):
    refused("there is no model at", "import", tmp_path / "nowhere", tmp_path / "out")
    refused("there is no model at", "generate", tmp_path / "nowhere", "--prompt", "a")
    refused("does not exist", "report", tmp_path / "nowhere")
    refused("source 'nowhere' does not exist", "pack", "nowhere", "--out", tmp_path / "out")
    refused("'nowhere' has no tokenizer.json", "pack", "stdlib", "--tokenizer", "nowhere", "--out", tmp_path / "out")
    refused("is not a file", "convert", "--config", tmp_path / "nowhere.py", "--workdir", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    refused("has no config.json", "generate", tmp_path / "empty", "--prompt", "a")
    refused("holds nothing to report", "report", tmp_path / "empty")
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer(teacher, program, tmp_path, refused):
    (teacher / "tokenizer.json").unlink()
    refused("has no tokenizer.json", "generate", teacher, "--prompt", "a")
    refused(
        "has no tokenizer.json",
        "align",
        "--config",
        program,
        "--workdir",
        tmp_path / "r",
        "--set",
        f"teacher={teacher}",
    )


CORPORA = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b" \n\t\n", "holds no text"),
    "binary.txt": (b"text\0more", "is binary"),
    "latin.txt": (b"caf\xe9", "is no UTF-8 text (byte 3)"),
    "picture.png": (b"\x89PNG", "is of no known kind"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": ', "line 2 of source file"),
    "other.jsonl": (b'{"body": "a"}\n', "has no string in the field 'text'"),
    "broken.jsonl.gz": (b"\x1f\x8b\x08broken", "is broken"),
    "broken.parquet": (b"PAR1", "is no readable parquet file"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_that_are_no_text(tmp_path, refused, program, name):
    contents, words = CORPORA[name]
    (tmp_path / name).write_bytes(contents)
    refused(words, "pack", tmp_path / name, "--out", tmp_path / "out")
    flags = ["--workdir", tmp_path / "run", "--set", f"data.sources=['{tmp_path / name}']"]
    refused(words, "convert", "--config", program, *flags, keeps=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "run" / "align").exists()
    assert list((tmp_path / "run").rglob("*partial*")) == []


def test_a_corpus_of_one_document(tmp_path, refused, program):
    """The usual first try: one text file, from which no document can be held out."""
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 100)
    for share, words in (
        (0.000001, "none of the 1 documents falls into the held-out share"),
        (0.999999, "every document"),
    ):
        flags = ["--set", f"data.sources=['{tmp_path / 'book.txt'}']", "--set", f"data.heldout_share={share}"]
        refused(words, "convert", "--config", program, "--workdir", tmp_path / str(share), *flags, keeps=False)


def test_outputs_that_hold_something_else(byte_teacher, documents_file, program, tmp_path, refused):
    for name in ("out", "run"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    refused("thesis.tex", "import", byte_teacher, tmp_path / "out")
    refused("holds no packed tokens", "pack", documents_file, "--out", tmp_path / "out")
    refused("holds something else", "convert", "--config", program, "--workdir", tmp_path / "run")
    file = tmp_path / "file"
    file.write_text("a file")
    refused("file", "import", byte_teacher, file)
    refused("file", "pack", documents_file, "--out", file)
    refused("is a file", "convert", "--config", program, "--workdir", file)
    refused("file", "import", byte_teacher, file / "below")
    refused("file", "pack", documents_file, "--out", file / "below")
    refused("file", "convert", "--config", program, "--workdir", file / "below")
    (tmp_path / "out" / "report").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "report" / "index.html").write_text("my page")
    refused("is not a page of hypenet_jax", "report", tmp_path / "out")


def test_an_export_that_somebody_added_to(byte_teacher, tmp_path, refused):
    assert main(["import", str(byte_teacher), str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused("notes.txt", "import", byte_teacher, tmp_path / "out")


def test_other_packs(documents_file, tmp_path, refused):
    assert main(["pack", str(documents_file), "--out", str(tmp_path / "out")]) == 0
    refused("was packed with seed 0, not 1", "pack", documents_file, "--out", tmp_path / "out", "--seed", 1)
    other = tmp_path / "other.txt"
    other.write_text("another text")
    refused("was packed from", "pack", other, "--out", tmp_path / "out")


def test_names_that_are_too_long(byte_teacher, documents_file, program, tmp_path, refused):
    name = tmp_path / ("x" * 300)
    refused("File name too long", "import", byte_teacher, name)
    refused("File name too long", "import", name, tmp_path / "out")
    refused("File name too long", "pack", documents_file, "--out", name)
    refused("File name too long", "convert", "--config", program, "--workdir", name)
    refused("File name too long", "convert", "--config", name, "--workdir", tmp_path / "run")
    refused("File name too long", "report", name)


EARLY = {
    "align.batch_size=7": "batch_size 7 in 1 microbatches gives 7 rows",
    "distill.batch_size=12": "in config section 'distill': batch_size 12",
    "finetune.gradient_accumulation=2": "in config section 'finetune': batch_size 8 in 2 microbatches",
    "mesh.fsdp=3": "does not multiply to the 8 devices here",
    "mesh.experts=8": "mesh axis 'experts' is unknown",
    "dtype=bfloat16": "dtype is 'bfloat16' but the devices are CPUs",
    "teacher=nowhere": "there is no model at nowhere",
    "seed=-1": "seed is -1",
    "student.attention_layers=[2]": "attention layer 2 is outside the model's layers 0 to 1",
    "student.attention_layers=[-1]": "attention layer -1 is outside",
    "select.keep=3": "keep is 3 but the model has 2 layers",
    "select.scores=nowhere.json": "the table of scores nowhere.json is not a file",
    "select.length=128": "in config section 'select': length 128 is too short for S1",
    "fit_scale.length=5000": "in config section 'fit_scale': a length of 5000 needs a held-out document of 5001 tokens",
    "evaluate.perplexity_length=5000": "in config section 'evaluate': a length of 5000 needs",
    "evaluate.lengths=[1024,128]": "in config section 'evaluate': length 128 is too short for S1",
    "evaluate.answer_budget=3": "answer_budget 3 is below the 8 tokens of an answer",
    "evaluate.tasks=['S4']": "task 'S4' is unknown",
    "evaluate.depths=[101]": "depth 101.0 is outside 0..100",
    "evaluate.essays=nowhere": "essays nowhere do not exist",
    "align.steps=4000000000": "steps * batch_size is 32000000000",
    "colour=blue": "config key colour is unknown",
    "align.steps=soon": "config key align.steps is 'soon'",
    "align.steps": "is not of the form section.field=value",
}


@pytest.mark.parametrize("setting", EARLY)
def test_refused_before_anything_is_trained(program, tmp_path, refused, setting):
    refused(
        EARLY[setting], "convert", "--config", program, "--workdir", tmp_path / "run", "--set", setting, keeps=False
    )
    made = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert made <= {"config.json", "data"}


def test_too_few_held_out_documents_for_a_choice(program, tmp_path, refused):
    lines = [json.dumps({"text": f"{i} " + "word " * 60}) + "\n" for i in range(3)]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    flags = ["--workdir", tmp_path / "run", "--set", f"data.heldout=['{tmp_path / 'few.jsonl'}']"]
    refused("3 documents have at least 120 tokens but 4", "convert", "--config", program, *flags, keeps=False)
    assert not (tmp_path / "run" / "align").exists()


def test_a_table_of_scores_of_another_model(program, tmp_path, refused):
    table, rows = tmp_path / "scores.json", [{"layer": i, "csr": 0.5, "recall": 0.5} for i in range(3)]
    table.write_text(json.dumps({"layers": rows}))
    flags = ["--workdir", tmp_path / "run", "--set", f"select.scores={table}", "--set"]
    refused("covers 3 layers but the model has 2", "convert", "--config", program, *flags, "select.method=halo")
    table.write_text(json.dumps({"layers": rows[:2]}))
    refused("needs the kl score", "convert", "--config", program, *flags, "select.method=kl-ls")


@pytest.mark.parametrize(
    "error", ["ZeroDivisionError()", "KeyError('a')", "OSError(28, 'No space')", "Exception('no')"]
)
def test_a_config_that_raises(tmp_path, refused, error):
    file = tmp_path / "program.py"
    file.write_text(f"def get_config():\n    raise {error}\n")
    refused("program.py does not run", "convert", "--config", file, "--workdir", tmp_path / "run")


def test_control_c(program, tmp_path, capsys, monkeypatch):
    def interrupt(*_arguments, **_settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("hypenet_jax.halo.run.open_run", interrupt)
    assert main(["convert", "--config", str(program), "--workdir", str(tmp_path / "run")]) == 130
    assert "the same command continues" in capsys.readouterr().err
    monkeypatch.setattr("hypenet_jax.hub.load", interrupt)
    assert main(["generate", "model", "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "hypenet: interrupted\n"


@pytest.mark.parametrize(
    "said",
    [
        "Out of memory while trying to allocate 17.75GiB with allocator GPU_0_bfc on device 0. ",
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.01G of 15.75G hbm. ",
    ],
)
def test_a_device_without_memory(said, monkeypatch, capsys):
    def spent(*_arguments):
        try:
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}[executable_name='jit_step']\nmore")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("a library's own words") from error

    monkeypatch.setattr("hypenet_jax.hub.load", spent)
    assert main(["generate", "model", "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hypenet: the device's memory is used up (") and "ut of memory" in line
    assert "gradient_accumulation" in line and "executable_name" not in line


@pytest.mark.parametrize(
    "said",
    [
        "Shared memory size limit exceeded",
        "Out of shared memory",
        "XLA:TPU compile permanent error. Ran out of memory in memory space vmem.",
    ],
)
def test_a_kernel_without_memory_of_its_core_is_a_bug(said, monkeypatch):
    def bug(*_arguments):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    monkeypatch.setattr("hypenet_jax.hub.load", bug)
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["generate", "model", "--prompt", "a"])


def test_a_bug_is_not_hidden(monkeypatch):
    def bug(*_arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr("hypenet_jax.hub.load", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["generate", "model", "--prompt", "a"])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own with a few megabytes; returns a function that leaves so many kilobytes free."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], capture_output=True).returncode
    ):
        pytest.skip("only root can mount the small disk that this test fills")

    def leave(kilobytes: int) -> pathlib.Path:
        (directory / "ballast").unlink(missing_ok=True)
        (directory / "ballast").write_bytes(b"x" * (shutil.disk_usage(directory).free - 1024 * kilobytes))
        return directory

    yield leave
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk(small_disk, byte_teacher, documents_file, program, refused):
    directory = small_disk(40)
    refused("MB free; make room", "import", byte_teacher, directory / "out", keeps=False)
    refused("the disk is full", "pack", documents_file, documents_file, "--out", directory / "packed", keeps=False)
    assert [path.name for path in directory.iterdir()] == ["ballast"]
    small_disk(4)
    convert = ["convert", "--config", program, "--workdir", directory / "run"]
    refused("the disk is full", *convert, keeps=False)
    small_disk(0)
    refused("No space left", "convert", "--config", program, "--workdir", directory / "other", keeps=False)
    small_disk(500)
    refused("a checkpoint in", *convert, keeps=False)
    assert sorted(path.name for path in (directory / "run").iterdir()) == ["align", "config.json", "data", "run.json"]
    assert list((directory / "run" / "align" / "checkpoints").iterdir()) == []
