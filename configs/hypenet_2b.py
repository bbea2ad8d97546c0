"""HypeNet-2B out of Qwen3-1.7B, with the numbers of the paper (arXiv 2601.22156, its table of stages and sizes).

    hypenet plan --config configs/hypenet_2b.py --topology v5e-16                  # first: does it fit?
    hypenet convert --config configs/hypenet_2b.py --workdir runs/hypenet-2b --set mesh=v5e-16

Hardware: 16 chips of TPU v5e, or any machine that `hypenet plan` says it fits on (docs/planning.md has the figures).
Text: FineWeb-Edu as files below `fineweb-edu/`, and documents of more than 65,536 tokens below `books/` for the fit of
the attention scaling. The teacher is a Hugging Face directory; for `hypenet plan` its name alone is enough.

The layers that keep attention are those that the paper chose; without `attention_layers` they are measured again.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = "teachers/qwen3-1.7b"
    config.data = dict(sources=("fineweb-edu/",), heldout=("books/",), workers=4)
    config.student = dict(attention_layers=(2, 3, 6, 8, 9, 21, 25))
    config.mesh = dict(fsdp=16)
    config.align = dict(steps=20_000, batch_size=32, seq_len=512, peak_lr=1e-3, end_lr=1e-5)
    config.distill = dict(steps=20_000, batch_size=96, seq_len=512, peak_lr=1e-4, end_lr=1e-5)
    config.finetune = dict(
        steps=500,
        batch_size=128,
        seq_len=16_384,
        peak_lr=1e-5,
        end_lr=1e-5,
        schedule="warmup_stable",
        gradient_accumulation=8,
    )
    config.evaluate = dict(lengths=(16_384, 32_768, 65_536))
    return config
