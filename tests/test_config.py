"""Config programs and `--set`: every mistake is named by its key, whatever the program does."""

import dataclasses
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.config import AnyConfig, differences, load_config, to_mapping
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import PretrainConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STAGE = "dict(steps=100, batch_size=8, seq_len=64, peak_lr=1e-3, end_lr=1e-5)"
GOOD = f"""
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = "there"
    config.data = dict(sources=("stdlib",))
    config.align, config.distill, config.finetune = {STAGE}, {STAGE}, {STAGE}
    return config
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(GOOD)
    return file


def refused(file, words, *overrides):
    with pytest.raises(HypenetError, match=words) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_the_configs_of_the_repository(file):
    config = load_config(file)
    assert isinstance(config, AnyConfig)
    json.dumps(to_mapping(config))


def test_defaults_and_types(program):
    config = load_config(program)
    assert config.align.steps == 100 and config.align.warmup_steps == 50 and config.data.sources == ("stdlib",)
    assert config.select.method == "halo" and config.student.attention_layers is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


def test_overrides(program):
    config = load_config(
        program,
        [
            "align.steps=200", "align.peak_lr=1", "student.attention_layers=[2,3]", "student.start=official",
            "data.sources=('a','b')", "teacher=a=b", "mesh.fsdp=4", "mesh.tensor=2", "evaluate.essays=essays.txt",
            "evaluate.depths=None", "fit_scale.grid=[5,10,20]", "seed=1", "seed=2", "select.keep=None",
        ],
    )  # fmt: skip
    assert config.align.steps == 200 and config.align.peak_lr == 1.0 and isinstance(config.align.peak_lr, float)
    assert config.student.attention_layers == (2, 3) and config.student.start == "official"
    assert config.data.sources == ("a", "b") and config.teacher == "a=b" and config.mesh == {"fsdp": 4, "tensor": 2}
    assert config.evaluate.essays == "essays.txt" and config.evaluate.depths is None and config.seed == 2
    assert config.fit_scale.grid == (5.0, 10.0, 20.0)
    assert load_config(program).align.steps == 100


def test_an_override_reaches_from_scratch(program):
    sizes = "hidden_size=8, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4"
    text = GOOD.replace('config.teacher = "there"', f"config.model = dict({sizes})")
    program.write_text(text.replace("config.align, config.distill, config.finetune", "_, _, config.train"))
    config = load_config(program, ["model.attention_layers=(0,)", "train.steps=70"])
    assert isinstance(config, PretrainConfig) and config.model.attention_layers == (0,) and config.train.steps == 70
    refused(program, "config key teacher is unknown", "teacher=there")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("align.steps", "is not of the form section.field=value"),
        ("=5", "is not of the form"),
        ("align..steps=5", "is not of the form"),
        ("align.step=5", "config key align.step is unknown; did you mean steps?"),
        ("alien.steps=5", "config key alien is unknown; did you mean align?"),
        ("colour=5", "config key colour is unknown; known here: ablate, align"),
        ("align.steps=many", "config key align.steps is 'many'; it must be of type int"),
        ("align.steps=1.5", "align.steps is 1.5; it must be of type int"),
        ("align.steps=True", "align.steps is True; it must be of type int"),
        ("align.peak_lr=nan", "align.peak_lr is 'nan'; it must be of type float"),
        ("align.peak_lr=1e999", "in config section 'align': peak_lr is inf"),
        ("align=5", "config key align is 5; it must be a section"),
        ("mesh=5", "config key mesh is 5; it must be a mapping"),
        ("mesh.fsdp=all", "config key mesh.fsdp is 'all'; it must be of type int"),
        ("teacher.path=x", "teacher, which is 'there' and has none"),
        ("teacher=5", "config key teacher is 5; it must be of type str"),
        ("data.sources=stdlib", "config key data.sources is 'stdlib'; it must be a list"),
        ("data.sources=[1]", r"config key data.sources\[0\] is 1; it must be of type str"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.workers=-1", "data.workers is -1"),
        ("align.warmup_steps=100", "warmup_steps is 100 but the stage has 100 steps"),
        ("select.questions=0", "select.questions is 0; it must be at least 1"),
        ("select.batch_size=0", "select.batch_size is 0"),
        ("fit_scale.grid=[5,5,5]", "fit_scale.grid is"),
        ("fit_scale.grid=[1,5,10]", "fit_scale.grid is"),
        ("fit_scale.batch_size=0", "fit_scale.batch_size is 0"),
        ("evaluate.lengths=[]", "evaluate.lengths is empty"),
        ("evaluate.lengths=[512,512]", "evaluate.lengths is .*; name each once"),
        ("evaluate.tasks=['S1','S1']", "evaluate.tasks is .*; name each once"),
        ("evaluate.tasks=['S2','S2-like']", "evaluate.tasks is .*; name each once"),
        ("evaluate.scale_lengths=[512,1024,512]", "evaluate.scale_lengths is .*; name each once"),
        ("ablate.needle_lengths=[512,512]", "ablate.needle_lengths is .*; name each once"),
        ("compare.lengths=[512,512]", "compare.lengths is .*; name each once"),
        ("compare.tasks=['S1','S1']", "compare.tasks is .*; name each once"),
        ("evaluate.prefill_chunk=0", "evaluate.prefill_chunk is 0"),
        ("evaluate.prompts=['']", "holds an empty prompt"),
        ("evaluate.answer=aloud", "evaluate.answer is 'aloud'; use one of forced, generate"),
        ("student.position=yarn", "student.position is 'yarn'"),
        ("dtype=float16", "dtype is 'float16'; use one of float32, bfloat16"),
    ],
)
def test_wrong_overrides(program, override, words):
    refused(program, words, override)


@given(
    st.text(max_size=12),
    st.sampled_from(["", "align.", "data.", "mesh.", "teacher.", "evaluate.depths"]),
    st.text(max_size=12),
)
def test_any_override_is_taken_or_refused(tmp_path_factory, name, section, value):
    file = tmp_path_factory.getbasetemp() / "any.py"
    file.write_text(GOOD)
    try:
        load_config(file, [f"{section}{name}={value}"])
    except HypenetError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "defines no get_config"),
        ("def get_config(:\n", "SyntaxError"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere', line 1"),
        ("x = 1\n\nx / 0\n", "ZeroDivisionError: division by zero, line 3"),
        ("raise OSError(2, 'gone', 'file.txt')", "FileNotFoundError"),
        ("def get_config():\n    return {}['steps']\n", "KeyError: 'steps', line 2"),
        ("def get_config():\n    raise ValueError('one\\ntwo')\n", "ValueError: one, line 2"),
        ("def get_config(size):\n    return {}\n", "TypeError"),
        ("def get_config():\n    return None\n", "returns NoneType; it must return an ml_collections ConfigDict"),
        ("get_config = 3", "TypeError"),
        ("def get_config():\n    return {3: 4}\n", "does not run|unknown"),
        ("\0", "SyntaxError|ValueError"),
        ("def get_config():\n    return {}\n", "config key teacher is missing"),
        (GOOD.replace("teacher", "teachers"), "config key teachers is unknown; did you mean teacher?"),
        (GOOD.replace('dict(sources=("stdlib",))', "3"), "config key data is 3; it must be a section"),
        (GOOD.replace('dict(sources=("stdlib",))', "dict()"), "config key data.sources is missing"),
    ],
)
def test_programs_that_do_not_run(program, text, words):
    program.write_text(text)
    refused(program, words)


def test_a_plain_dict_will_do(program):
    program.write_text(
        GOOD.replace("ml_collections.ConfigDict()", "type('D', (dict,), {'__setattr__': dict.__setitem__})()")
    )
    assert load_config(program).teacher == "there"


def test_no_program(tmp_path):
    refused(tmp_path / "nothing.py", r"nothing\.py is not a file")
    refused(tmp_path, "is not a file")


def test_any_name_will_do_and_file_is_known(tmp_path):
    file = tmp_path / "config.txt"
    file.write_text(GOOD.replace('"there"', "__file__"))
    assert load_config(file).teacher == str(file)
    assert [path.name for path in tmp_path.iterdir()] == ["config.txt"], "nothing is written beside it"


def test_differences_name_every_leaf():
    old, new = {"a": {"b": 1, "c": (1, 2)}, "d": 3, "e": {"x": 1}}, {"a": {"b": 2, "c": [1, 2]}, "d": 3, "f": 4}
    assert differences(old, new) == ["a.b was 1 and is 2", "e was {'x': 1} and is None", "f was None and is 4"]
    assert differences(old, new, free=("a.b", "e", "f")) == []
