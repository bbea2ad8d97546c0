"""HypeNet-2B out of Qwen3-1.7B at batches for one GPU of 80 GB, for `hypenet bench train`: no weights, no text.

    hypenet bench train --config configs/bench_2b.py --stage distill finetune --documents 1000 0 --json train.json

Stage 1 and 2 have rows of 512 tokens in HALO's own batches (arXiv 2601.22156: 32 and 96 rows), stage 3 rows of 16,384
in a batch of 4 instead of 128: an update more often, so that throughput is understated rather than flattered.

Memory, estimated from sizes and not measured (the student has 1.926e9 parameters, the teacher 1.721e9):

- float32 masters 7.2 GiB, their two moments 14.4, gradients 7.2, the teacher in bfloat16 3.2, the student's matrices
  cast to bfloat16 up to 3.6: 35.6 GiB at most, whatever the batch;
- with `remat` the input of each of 28 layers: 28 x 2,048 x 2 bytes = 112 KiB a token, and within one layer about
  60 KiB a token: 8.1 GiB for the 49,152 tokens of stage 2, 10.8 GiB for the 65,536 of stage 3;
- the loss: the head's float32 gradient is counted above; those of 2,048 tokens' logits in bfloat16 are 0.6 GiB.

That makes near 44 GiB in either stage if everything lived at once. XLA's compiler for an H100 that was not there (jax
0.10.2) plans 35.6 GiB for stage 2, of which 10.9 are temporaries, 35.5 for stage 3 (13.9), and 29.3 for stage 1 (19.6,
as alignment keeps every activation); with remat=False and 32 rows stage 2 is 62.1 GiB (37.4). `hypenet bench train`
prints what the compiler plans there and what the device says. Let JAX hand out more than its default three quarters of
the device's memory: XLA_PYTHON_CLIENT_MEM_FRACTION=.95.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.teacher = "qwen3-1.7b"
    # Not read: the text of a measurement is random.
    config.data = dict(sources=("random",))
    config.student = dict(attention_layers=(2, 3, 6, 8, 9, 21, 25))
    config.align = dict(steps=20_000, batch_size=32, seq_len=512, peak_lr=1e-3, end_lr=1e-5)
    config.distill = dict(steps=20_000, batch_size=96, seq_len=512, peak_lr=1e-4, end_lr=1e-5)
    config.finetune = dict(
        steps=16_000, batch_size=4, seq_len=16_384, peak_lr=1e-5, end_lr=1e-5, schedule="warmup_stable"
    )
    return config
