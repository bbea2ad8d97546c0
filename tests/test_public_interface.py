"""The interface that others build on: these names, these arguments, loaded on first use."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

import hypenet_jax as hn

CHEAP = """
import sys
import hypenet_jax as hn
import hypenet_jax.cli
try:
    hypenet_jax.cli.main(["--help"])
except SystemExit:
    pass
heavy = {"jax", "numpy", "flax", "orbax", "grain", "torch", "tokenizers"} & set(sys.modules)
assert not heavy, heavy
"""


def arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"}


def starts_with(function, wanted):
    assert list(arguments(function).items())[: len(wanted)] == list(wanted.items())


def test_signatures():
    none = inspect.Parameter.empty
    starts_with(hn.load, {"path": none, "dtype": "float32"})
    starts_with(hn.save, {"model": none, "params": none, "directory": none})
    first = {"model": none, "params": none}
    starts_with(hn.convert, first | {"attention_layers": none, "position": "hype", "start": "official", "seed": 0})
    starts_with(hn.generate, first | {"prompts": none, "max_new_tokens": 32, "temperature": 0.0})
    # Jitted: the signature is that of the function within.
    starts_with(hn.LanguageModel.logits, {"params": none, "tokens_BT": none, "segment_ids": None})
    starts_with(hn.LanguageModel.with_logits_scaling, {"scaling": none})
    starts_with(hn.halo.select.rank, {"csr": none, "recall": none, "method": "halo"})


def test_importing_is_cheap():
    subprocess.run([sys.executable, "-c", CHEAP], check=True, capture_output=True)


def test_packages_are_reached_by_name():
    program = (
        "import hypenet_jax as hn\n"
        "assert hn.halo.select.rank([0.5, 0.4], [0.1, 0.2]) == [0, 1]\n"
        "assert hn.hub.load is hn.load and hn.HypenetError is hn.errors.HypenetError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'transmogrify'"):
        _ = hn.transmogrify
    assert {"load", "save", "convert", "generate"} <= set(hn.__all__)
    assert {"load", "save", "convert", "generate", "halo", "LanguageModel"} <= set(dir(hn))


def test_the_lines_of_the_documentation(byte_teacher, tmp_path):
    model, params = hn.load(byte_teacher, dtype="float32")
    tokens = np.array([[72, 101, 108, 108, 111]], np.int32)
    logits = model.logits(params, tokens, segment_ids=None)
    assert logits.shape == (1, 5, 257) and logits.dtype == np.float32
    for start in ("official", "calibrated"):
        student, sparams = hn.convert(model, params, attention_layers=[1], position="hype", start=start, seed=0)
    student = student.with_logits_scaling(500.0)
    prompts = [[72, 101], [108, 108, 111]]
    new = hn.generate(student, sparams, prompts, max_new_tokens=4, temperature=0.0)
    assert [len(ids) for ids in new] == [4, 4] and all(isinstance(token, int) for ids in new for token in ids)
    assert hn.generate(student, sparams, prompts[1:], max_new_tokens=4) == new[1:]
    hn.save(student, sparams, tmp_path / "student")
    again, aparams = hn.load(tmp_path / "student")
    assert again == student
    np.testing.assert_array_equal(again.logits(aparams, tokens), student.logits(sparams, tokens))
    assert isinstance(hn.HypenetError("a sentence"), ValueError)
