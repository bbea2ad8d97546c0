"""Eight CPU devices, a persistent compilation cache, and where the shared material lies."""

import json
import os
import pathlib
import random
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"hypenet-jax-cache-{os.getuid()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

hypothesis.settings.register_profile("suite", deadline=None, max_examples=12, derandomize=True)
hypothesis.settings.load_profile("suite")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu")


SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    if not SHARED.is_dir():
        pytest.skip("the shared material (golden outputs, corpus) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def byte_teacher(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face directory: a Qwen3 of two layers over bytes, its weights random and large enough to matter."""
    import numpy as np

    import hypenet_jax as hn
    from hypenet_jax.data.tokenizers import byte_tokenizer

    config = hn.ModelConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mixers=("attention", "attention"), rope_theta=1e4, max_position=512, eos_ids=(256,), pad_id=256,
    )  # fmt: skip
    model, rng = hn.LanguageModel(config, tokenizer=byte_tokenizer()), np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.1 * noise if len(leaf.shape) == 1 else 0.15 * noise

    directory = tmp_path_factory.mktemp("teacher") / "teacher"
    hn.save(model, jax.tree.map(draw, model.param_shapes()), directory)
    return directory


@pytest.fixture(scope="session")
def documents_file(tmp_path_factory) -> pathlib.Path:
    """A .jsonl of 90 documents of 200 to 900 characters: sentences of random words."""
    rng, lines = random.Random(0), []
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(60)]
    for _ in range(90):
        text, length = "", rng.randint(200, 900)
        while len(text) < length:
            text += " ".join(rng.choices(words, k=rng.randint(3, 9))).capitalize() + ". "
        lines.append(json.dumps({"text": text[:length]}) + "\n")
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    file.write_text("".join(lines))
    return file
