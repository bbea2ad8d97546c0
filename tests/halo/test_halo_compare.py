"""`hypenet compare-architectures`: variants share programs and trainings, and a stopped comparison goes on."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hypenet_jax.cli import main
from hypenet_jax.config import load_config
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import niah
from hypenet_jax.halo.compare import trainings
from hypenet_jax.halo.compare_settings import ComparisonConfig, VariantConfig
from hypenet_jax.halo.pretrain import network
from hypenet_jax.halo.settings import DataConfig, EvaluateConfig, NetworkConfig
from hypenet_jax.halo.shared_program import choice, shared_program
from hypenet_jax.model import LanguageModel, LogitsScaling
from hypenet_jax.train.metrics import Reporter
from hypenet_jax.train.stage import StageConfig

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "attention_layers": (1,),
}  # fmt: skip
COMPARE = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.dtype = "float32"
    config.model = dict({sizes!r})
    config.variants = (
        dict(name="hypenet", scaling="fit"),
        dict(name="constant", scaling="constant"),
        dict(name="nope", position="nope"),
    )
    config.data = dict(sources=({documents!r},), heldout_share=0.3)
    config.train = dict(
        steps=3, batch_size=4, seq_len=64, peak_lr=1e-2, end_lr=1e-4, warmup_steps=1, log_every=1, checkpoint_every=2,
    )
    config.fit_scale = dict(length=128, documents=2, grid=(2, 20, 200), batch_size=2)
    config.row_lengths = (640,)
    config.evaluate = dict(
        tasks=("S1",), lengths=(512, 640), samples=2, answer_budget=16, alternatives=False, perplexity_length=128,
        perplexity_documents=2, batch_tokens=1280,
    )
    return config
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory, documents_file):
    file = tmp_path_factory.mktemp("compare") / "compare.py"
    file.write_text(COMPARE.format(sizes=SIZES, documents=str(documents_file)))
    return file


def run(program, directory, *settings):
    flags = [word for setting in settings for word in ("--set", setting)]
    return main(["compare-architectures", "--config", str(program), "--workdir", str(directory), *flags])


@pytest.mark.usefixtures("on_one_device")
def test_a_stopped_comparison_goes_on_and_is_reported(program, tmp_path, contents, monkeypatch, capsys):
    directory, message = tmp_path / "run", Reporter.message

    def stop_after_the_first(self, text):
        message(self, text)
        if text.startswith("constant, seed 0: S1 512: "):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "message", stop_after_the_first)
        assert run(program, directory) == 130
    assert sorted(file.stem for file in (directory / "results").iterdir()) == ["constant-seed0", "hypenet-seed0"]
    # The two share a training.
    assert [entry.name for entry in (directory / "runs").iterdir()] == ["hypenet-seed0"]
    before = contents(directory / "results") | contents(directory / "runs")
    capsys.readouterr()

    assert run(program, directory) == 0
    said = capsys.readouterr().err
    assert "nope-seed0  step 3/3" in said and "hypenet-seed0  step" not in said and "constant, seed" not in said
    assert before.items() <= (contents(directory / "results") | contents(directory / "runs")).items()

    found = json.loads((directory / "report" / "report.json").read_text())
    labels = ["HypeNet", "HypeNet, constant 1.5", "Hybrid, all NoPE"]
    assert [line["label"] for line in found["lines"]] == labels
    assert [row["total"] for row in found["lines"][0]["accuracy"]] == [2, 2]
    assert len({line["loss"][-1]["nll"] for line in found["lines"]}) == 3
    assert found["run"]["versions"]["jax"] == jax.__version__ and "train nope-seed0" in found["run"]["seconds"]
    assert (directory / "report" / "figure.png").read_bytes().startswith(b"\x89PNG")

    # Measured otherwise: again, without training.
    assert run(program, directory, "evaluate.samples=3") == 0
    assert "step 3/3" not in capsys.readouterr().err
    found = json.loads((directory / "report" / "report.json").read_text())
    assert [row["total"] for row in found["lines"][2]["accuracy"]] == [3, 3]
    # What is refused leaves the directory as it was, its config too.
    before = contents(directory)
    for setting, words in (
        ("model.rope_theta=500.0", "model.rope_theta was"),
        ('variants=[{"name":"nope","position":"rope"}]', "the model has attention_rope = True but the checkpoints in"),
        ("evaluate.lengths=[128]", "in config section 'evaluate': length 128 is too short"),
        ("evaluate.perplexity_length=5000", "needs a held-out document of 5001 tokens"),
        ("fit_scale.length=5000", "in config section 'fit_scale': a length of 5000"),
    ):
        assert run(program, directory, setting) == 2
        assert words in capsys.readouterr().err
    assert run(program, directory, "train.steps=4") == 2
    assert "belongs to another run: train.steps was 3 and is 4" in capsys.readouterr().err
    assert contents(directory) == before


@pytest.mark.usefixtures("on_one_device")
def test_of_several_processes_all_stop_within_a_variant(program, tmp_path, monkeypatch, capsys, of_two_processes):
    """SIGTERM while the second variant answers its first needles: the first one's result and the training stay."""
    directory, score = tmp_path / "run", niah.score_forced

    def scored(*arguments, **options):
        of_two_processes.asked = len(list((directory / "results").glob("*"))) == 1
        return score(*arguments, **options)

    settings = ("train.steps=1", "train.warmup_steps=0", "row_lengths=()")
    monkeypatch.setattr(niah, "score_forced", scored)
    with pytest.raises(SystemExit) as stopped:
        run(program, directory, *settings)
    assert stopped.value.code == 75
    assert "evaluate constant-seed0: stopped; the same command continues" in capsys.readouterr().err
    assert [file.name for file in (directory / "results").iterdir()] == ["hypenet-seed0.json"]
    assert not (directory / "runs" / "nope-seed0").exists()


def weights(model: LanguageModel) -> dict:
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.3 * noise if len(leaf.shape) == 1 else 0.3 * noise

    return jax.tree.map(draw, model.param_shapes())


def test_one_program_is_every_variant():
    plain = LanguageModel(network(NetworkConfig(**SIZES), byte_tokenizer()))
    params, program = weights(plain), shared_program(plain, scaled=True)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 257, (2, 24), dtype=np.int32)
    segments = np.array([[0] * 24, [0] * 9 + [1] * 12 + [-1] * 3], np.int32)
    shared = jax.jit(lambda params, chosen: program.hidden({"weights": params, "choice": chosen}, tokens, segments))
    seen = []
    for position, scaling in (
        ("hype", LogitsScaling("hype", 20.0)),
        ("nope", LogitsScaling("constant", 1.5)),
        ("attention_rope", None),
        ("rope", None),
    ):
        config = network(NetworkConfig(**SIZES, position=position), byte_tokenizer())
        model = LanguageModel(config).with_logits_scaling(scaling)
        assert shared_program(model, scaled=True) == program
        own = jax.jit(lambda params, model=model: model.hidden(params, tokens, segments))(params)
        found = shared(params, choice(model.config))
        np.testing.assert_allclose(found, own, rtol=2e-6, atol=2e-6)
        seen.append(np.asarray(found))
    assert shared._cache_size() == 1
    for i, one in enumerate(seen):
        assert all(np.abs(one - other).max() > 1e-2 for other in seen[:i])


def test_a_layer_without_positions_learns_the_same_in_the_shared_program():
    config = network(NetworkConfig(**SIZES, position="nope"), byte_tokenizer())
    model = LanguageModel(config)
    params, program, chosen = weights(model), shared_program(model, scaled=False), choice(config)
    tokens = np.arange(24, dtype=np.int32)[None] % 11

    def mean(hidden):
        return jnp.mean(hidden[:, ::3] ** 3)

    own = jax.jit(jax.grad(lambda p: mean(model.hidden(p, tokens))))(params)
    shared = jax.jit(jax.grad(lambda p: mean(program.hidden({"weights": p, "choice": chosen}, tokens))))(params)
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_configs_compare_networks_of_one_size():
    for name in ("from_scratch", "from_scratch_toy"):
        config = load_config(f"configs/{name}.py")
        groups = trainings(config, byte_tokenizer())
        assert [len(variants) for _, variants in groups] == [3, 1, 1, 1, 1]
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes())) for model, _ in groups]
        assert max(sizes) < 1.01 * min(sizes)
        # The hybrids share a program, the Transformer has its own.
        assert len({shared_program(model, scaled=False) for model, _ in groups}) == 2
        assert max(config.evaluate.lengths) == max(config.row_lengths)
    assert max(load_config("configs/from_scratch.py").evaluate.lengths) == 64 * 512


GOOD = {
    "variants": (VariantConfig("a"), VariantConfig("b", position="nope")),
    "model": NetworkConfig(**SIZES),
    "data": DataConfig(("stdlib",)),
    "train": StageConfig(steps=60, batch_size=1, seq_len=64, peak_lr=1e-3, end_lr=1e-4),
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": ()}, "variants are named"),
        ({"variants": (VariantConfig("a"), VariantConfig("a"))}, "each a name of its own"),
        ({"seeds": ()}, "seeds are"),
        ({"seeds": (0, 0)}, "seeds are"),
        ({"seeds": (0, 2**32)}, "seeds are .* below 2\\*\\*32"),
        ({"row_lengths": (640, 0)}, "row_lengths are .*; each must be at least 1"),
        ({"model": dataclasses.replace(GOOD["model"], attention_layers=None)}, "model.attention_layers is not given"),
        ({"model": dataclasses.replace(GOOD["model"], position="nope")}, "model.position is 'nope'; set it in the"),
        ({"model": dataclasses.replace(GOOD["model"], logits_scaling=50.0)}, "model.logits_scaling is 50.0"),
        ({"evaluate": EvaluateConfig(answer="generate")}, "a comparison scores 'forced'"),
        ({"evaluate": EvaluateConfig(tasks=())}, "evaluate.tasks is empty"),
    ],
)
def test_comparisons_that_cannot_be(changes, words):
    ComparisonConfig(**GOOD)
    with pytest.raises(HypenetError, match=words):
        ComparisonConfig(**GOOD | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": "alibi"}, "variants.position is 'alibi'"),
        ({"scaling": "fitted"}, "variants.scaling is 'fitted'"),
        ({"hybrid": False}, "is no hybrid but its position is 'hype'"),
        ({"name": "a/b"}, "usable as the name of a directory"),
        ({"name": ""}, "usable as the name of a directory"),
        ({"name": "a\0b"}, "usable as the name of a directory"),
        ({"scaling": "constant", "constant": 0.0}, "variant 'a' has the constant 0; it must be above 0 and finite"),
        ({"constant": math.nan}, "variant 'a' has the constant nan"),
        ({"intermediate_size": 0}, "variant 'a' has the intermediate_size 0; it must be at least 1"),
    ],
)
def test_variants_that_cannot_be(changes, words):
    with pytest.raises(HypenetError, match=words):
        VariantConfig(**{"name": "a"} | changes)


def test_the_other_kind_of_config(program, tmp_path, capsys):
    assert main(["pretrain", "--config", str(program), "--workdir", str(tmp_path / "a")]) == 2
    assert "is a config for comparing architectures; hypenet pretrain needs one for training" in capsys.readouterr().err
    assert run("configs/demo_teacher.py", tmp_path / "b") == 2
    assert "needs one for comparing architectures" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
