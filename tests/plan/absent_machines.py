"""`hypenet plan` for machines that are not here: a 4-layer conversion, and a small model trained from scratch."""

import json
import os
import pathlib
import subprocess
import sys

import jax

import hypenet_jax as hn
from hypenet_jax.hub.config_json import common_values

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = "{teacher}"
    config.data = dict(sources=("stdlib",))
    config.student = dict(attention_layers=(2,))
    stage = dict(steps=100, batch_size=32, seq_len=2048, peak_lr=1e-3, end_lr=1e-5, warmup_steps=2)
    config.align, config.distill, config.finetune = (dict(**stage) for _ in range(3))
    config.evaluate = dict(lengths=(64,))
    return config
"""
PRETRAINING = """
import ml_collections

def get_config():
    config = ml_collections.ConfigDict()
    config.model = dict(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128)
    config.data = dict(sources=("stdlib",))
    config.train = dict(steps=100, batch_size=16, seq_len=1024, peak_lr=1e-3, end_lr=1e-5, warmup_steps=2)
    config.evaluate = dict(lengths=(64,))
    return config
"""
V, D, F = 32768, 512, 1024


def run(*words):
    """`hypenet plan` in a process of its own: this one is a CPU with eight devices and has flags of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hypenet_jax.cli", "plan", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def write_conversion(directory, layers=4, vocabulary=V):
    """A config of four layers, or fewer, with a teacher of sizes alone; its path."""
    config = hn.ModelConfig(
        vocab_size=vocabulary, hidden_size=D, intermediate_size=F, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=128, mixers=("attention",) * layers, eos_ids=(0,), pad_id=0, tie_embeddings=False,
    )  # fmt: skip
    values = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **common_values(config)}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "config.py").write_text(CONFIG.format(teacher=directory))
    return directory / "config.py"


def check_one_layer_of_alignment(record, tokens):
    """Stage 1 holds what one layer's gradient is made from, about 25 arrays of `tokens` hidden states, not four's."""
    assert record["temporary_bytes"] < 32 * tokens * D * 2


def write_pretraining(directory):
    """A config for training two layers over bytes from scratch; its path."""
    (directory / "pretraining.py").write_text(PRETRAINING)
    return directory / "pretraining.py"


def layer_matrices(model):
    """Entries of each matrix of the layers; norms, even those of all heads, are small."""
    shapes = model.param_shapes()
    layers = range(model.config.num_layers)
    leaves = [leaf for layer in layers for leaf in jax.tree.leaves(shapes[f"layer_{layer}"])]
    return [leaf.size for leaf in leaves if leaf.size > 10_000]
