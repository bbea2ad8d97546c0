"""HypeNet-2B out of Qwen3-1.7B at batches for one GPU of 80 GB, for `hypenet bench train`: no weights, no text.

    hypenet bench train --config configs/bench_2b.py --stage distill finetune --documents 1000 0 --json train.json

Stage 1 and 2 have rows of 512 tokens in HALO's own batches (arXiv 2601.22156: 32 and 96 rows), stage 3 rows of 16,384
in a batch of 4 instead of 128: an update more often, so that throughput is understated rather than flattered.

Measured on an H100 80GB (docs/planning.md): 72.6 GiB for stage 2 and 72.3 for stage 3, of which 26.6 and 23.1 are
float32 masters, moments and the teacher in bfloat16, the rest activations and gradients of a microbatch. Activations
are kept, as a third and a quarter of the batch at a time allows; with everything made again in the backward pass
(`--set remat=True --set distill.gradient_accumulation=1 --set finetune.gradient_accumulation=1`) it is 36.5 and 36.7
GiB, and 10% and 14% slower. Stage 1 holds one layer's activations either way (12.7 GiB by the compiler).
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = "qwen3-1.7b"
    # Not read: the text of a measurement is random.
    config.data = dict(sources=("random",))
    config.remat = False
    config.student = dict(attention_layers=(2, 3, 6, 8, 9, 21, 25))
    config.align = dict(steps=20_000, batch_size=32, seq_len=512, peak_lr=1e-3, end_lr=1e-5)
    config.distill = dict(steps=20_000, batch_size=96, seq_len=512, peak_lr=1e-4, end_lr=1e-5, gradient_accumulation=3)
    config.finetune = dict(
        steps=16_000,
        batch_size=4,
        seq_len=16_384,
        peak_lr=1e-5,
        end_lr=1e-5,
        schedule="warmup_stable",
        gradient_accumulation=4,
    )
    return config
