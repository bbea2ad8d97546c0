"""HALO in miniature, on two CPU cores: the byte-level teacher that the repository carries becomes a HypeNet.

    hypenet convert --config configs/demo.py --workdir demo        (or: make demo)

The teacher (configs/demo_teacher, 8 layers of softmax attention with RoPE) reads 512 bytes and no more. Every stage
here trains at 512 bytes too, on the standard library's documentation and on retrieval tasks; the needles are then
hidden in up to 8,192 bytes, 16 times the training length. docs/method.md states what the run gives and how long it
takes.
"""

import pathlib

import ml_collections

TEACHER = pathlib.Path(__file__).parent / "demo_teacher"


def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = str(TEACHER)
    config.seed = 0
    config.dtype = "float32"
    config.remat = False
    config.data = dict(sources=("stdlib", "retrieval:8000:seed=11:max_chars=512"), heldout_share=0.06)
    config.student = dict(position="hype", start="calibrated")
    shared = dict(batch_size=4, seq_len=512, warmup_steps=10, log_every=20, checkpoint_every=100, token_chunk=2048)
    config.align = dict(steps=90, peak_lr=3e-3, end_lr=1e-4, **shared)
    # The divergence from the teacher: with this few questions, scores of right answers rank the noise.
    config.select = dict(method="kl-ls", questions=32, length=576, batch_size=16, answer_budget=16)
    config.select.gate = dict(steps=24, batch_size=8, retrieval="retrieval:2000:seed=7:max_chars=512", gate_lr=0.25)
    # hypenet compare-selection: all ways to choose, and a short distillation of each choice.
    config.compare = dict(seeds=(0, 1), steps=60, lengths=(512, 1024), perplexity_length=1024)
    config.distill = dict(steps=270, peak_lr=2e-3, end_lr=1e-5, **shared)
    config.finetune = dict(steps=20, peak_lr=1e-4, end_lr=1e-5, **shared)
    config.fit_scale = dict(length=8192, documents=3, grid=(20, 50, 100, 200, 500, 1000, 5000))
    config.evaluate = dict(
        tasks=("S1", "S2"),
        lengths=(512, 1024, 2048, 4096, 8192),
        samples=8,
        depths=(10.0, 35.0, 65.0, 90.0),
        answer_budget=16,
        alternatives=False,
        perplexity_length=8192,
        perplexity_documents=3,
        batch_tokens=8192,
        prompts=(
            "One of the special magic numbers for tall-boat is: 7041952.\nThe special magic number for tall-boat is",
        ),
        new_tokens=48,
    )
    return config
