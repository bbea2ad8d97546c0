"""The commands that a newcomer types first: help, doctor, import, pack, generate."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hypenet_jax as hn
from hypenet_jax.cli import main
from hypenet_jax.cli_arguments import COMMANDS, PLAN_COMMANDS, RUN_COMMANDS, parser
from hypenet_jax.data.packing import PackedTokens
from hypenet_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from hypenet_jax.inference.console import print_stream
from kernels_pallas.selfcheck import Row

ROOT = pathlib.Path(__file__).resolve().parents[1]


def leaves_with(code, *argv):
    with pytest.raises(SystemExit) as left:
        main([*argv])
    assert left.value.code == code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command, capsys):
    leaves_with(0, command, "--help")
    said = capsys.readouterr().out
    assert f"example:\n  hypenet {command}" in said
    assert ("--set" in said) == (command in (*RUN_COMMANDS, *PLAN_COMMANDS))


def test_help_lists_every_command(capsys):
    leaves_with(0, "--help")
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)
    leaves_with(0, "--version")
    assert capsys.readouterr().out == f"hypenet {hn.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["transmogrify"],
        ["convert"],
        ["generate", "model"],
        ["import", "a"],
        ["import", "a", "b", "--dtype", "int8"],
    ],
)
def test_a_command_line_that_does_not_parse(argv, capsys):
    leaves_with(2, *argv)
    assert "usage: hypenet" in capsys.readouterr().err


def test_the_examples_parse():
    for command, (_, example) in COMMANDS.items():
        words = [word.strip('"') for word in example.replace('"def main"', "text").split()]
        assert words[0] == "hypenet" and parser().parse_args(words[1:]).command == command


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("hypenet_jax", "Python 3", "jax ", "orbax-checkpoint ", "device 0: cpu", "kernel", "tolerance", "xla"):
        assert word in said
    assert "FAILED" not in said and "missing" not in said


def test_doctor_says_when_a_kernel_is_wrong(capsys, monkeypatch):
    rows = [Row("attention", "xla", "forward", error, 1e-5, error < 1e-5) for error in (1e-7, 1.0)]
    monkeypatch.setattr("hypenet_jax.doctor.selfcheck", lambda: rows)
    assert main(["doctor"]) == 2
    said = capsys.readouterr()
    assert said.out.count("FAILED") == 1 and "outside its tolerance" in said.err


def test_import(byte_teacher, tmp_path, capsys):
    assert main(["import", str(byte_teacher), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "qwen3, 2 layers of width 32, 4 query and 2 key heads, vocabulary 257, bfloat16" in capsys.readouterr().out
    model, params = hn.load(tmp_path / "half")
    original, oparams = hn.load(byte_teacher)
    assert model == original and model.tokenizer == original.tokenizer
    np.testing.assert_allclose(params["embedding"], oparams["embedding"], rtol=2**-8)
    # Again, over an export of ours.
    assert main(["import", str(byte_teacher), str(tmp_path / "half")]) == 0
    np.testing.assert_array_equal(hn.load(tmp_path / "half")[1]["embedding"], oparams["embedding"])


def test_pack(documents_file, byte_teacher, tmp_path, capsys):
    assert main(["pack", str(documents_file), "--out", str(tmp_path / "bytes")]) == 0
    texts = [json.loads(line)["text"] for line in documents_file.read_text().splitlines()]
    total = sum(len(text) + 1 for text in texts)
    assert f"{total:,} tokens of 90 documents" in capsys.readouterr().out
    assert main(["pack", str(documents_file), "--tokenizer", str(byte_teacher), "--out", str(tmp_path / "model")]) == 0
    packed = [PackedTokens(tmp_path / name) for name in ("bytes", "model")]
    assert packed[0].fingerprint == packed[1].fingerprint
    decoded = sorted(byte_tokenizer().decode(tokens.tolist()) for tokens in packed[0].documents())
    assert decoded == sorted(texts)
    # Again: found as it is.
    assert main(["pack", str(documents_file), "--out", str(tmp_path / "bytes")]) == 0


def test_generate_streams_what_generate_gives(byte_teacher, capsys, monkeypatch):
    argv = ["generate", str(byte_teacher), "--max-new-tokens", "12"]
    assert main([*argv, "--prompt", "Hello"]) == 0
    said = capsys.readouterr().out
    model, params = hn.load(byte_teacher)
    ids = hn.generate(model, params, [model.tokenizer.encode("Hello")], max_new_tokens=12)[0]
    assert said == model.tokenizer.decode(ids) + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    assert main([*argv, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == said
    assert (
        main([*argv, "--prompt", "Hello", "--temperature", "1", "--top-k", "20", "--top-p", "0.9", "--seed", "3"]) == 0
    )
    assert main([*argv, "--prompt", "Hello", "--max-len", "17"]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "the prompt is no UTF-8 text"),
        (["--prompt", "abcdef", "--max-len", "10", "--max-new-tokens", "5"], "prompt 0 has 6 tokens, which with 5"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a", "--top-k", "0"], "top_k is 0"),
        (["--prompt", "a", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1"),
    ],
)
def test_generate_refuses(byte_teacher, capsys, flags, words):
    assert main(["generate", str(byte_teacher), *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("hypenet: ") and words in said.err and said.err.count("\n") == 1 and not said.out


def test_standard_input_that_is_no_text(byte_teacher, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8"))
    assert main(["generate", str(byte_teacher), "--prompt", "-"]) == 2
    assert "the prompt is no UTF-8 text" in capsys.readouterr().err


def test_a_reader_that_leaves(byte_teacher):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    }
    command = [sys.executable, "-m", "hypenet_jax.cli", "generate", str(byte_teacher), "--prompt", "a"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    child.stdout.close()
    said = child.stderr.read().decode()
    assert child.wait() == 141 and "Traceback" not in said and "Exception" not in said


class Terminal(io.StringIO):
    """Notes every piece that is written."""

    def __init__(self, encoding="utf-8"):
        super().__init__()
        self._encoding, self.pieces = encoding, []

    @property
    def encoding(self):
        return self._encoding

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


def test_a_character_of_several_tokens_comes_whole():
    out = Terminal()
    print_stream(iter("a€😀é".encode()), byte_tokenizer(), out)
    assert [piece for piece in out.pieces if piece] == ["a", "€", "😀", "é", "\n"]
    # Cut off inside a character: what is there is shown as broken.
    out = Terminal()
    print_stream(iter("a😀".encode()[:-1]), byte_tokenizer(), out)
    assert out.getvalue() == "a\N{REPLACEMENT CHARACTER}\n"


texts = st.text(max_size=6).map(str.encode)
cut = st.text(min_size=1, max_size=3).map(lambda text: text.encode()[:-1])


@given(st.lists(st.one_of(texts, cut, st.binary(max_size=6)), max_size=6).map(b"".join), st.text(max_size=9))
def test_a_stream_reads_as_the_whole(new, prompt):
    out = Terminal()
    print_stream(iter(new), byte_tokenizer(), out, after=list(prompt.encode()))
    assert out.getvalue() == byte_tokenizer().decode(list(new)) + "\n"


def test_spaces_that_a_decoder_strips_from_the_first_token(tmp_path):
    """Sentencepiece-like tokenizers (Llama 2) write a space before every word and none before the first."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "</s>": 1, "▁the": 2, "▁cat": 3, "▁sat": 4}
    library = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    tokenizer = load_tokenizer(tmp_path, eos_ids=[1])
    assert tokenizer.decode([2, 3, 4]) == "the cat sat"
    out = Terminal()
    print_stream(iter([3, 4, 3]), tokenizer, out, after=[2])
    assert out.getvalue() == " cat sat cat\n"


def test_a_terminal_of_another_encoding():
    out = Terminal(encoding="ascii")
    print_stream(iter("aé".encode()), byte_tokenizer(), out)
    assert out.getvalue() == "a?\n"
