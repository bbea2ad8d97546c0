"""The first half of the demo teacher's training: a byte-level Qwen3 of 1.6M parameters that reads 512 bytes.

    hypenet pretrain --config configs/demo_teacher.py --workdir runs/demo_teacher

Its text is the documentation inside Python's standard library (PSF licence) and synthetic retrieval tasks; nothing is
downloaded. One H100: about 5 minutes for 524M tokens; on 2 CPU cores the same takes more than a day, and 10M tokens
(train.steps=80 train.batch_size=256) already retrieve at 512 bytes. configs/demo_teacher_refresh.py is the second half.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.model = dict(
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=512,
    )
    # The documentation is listed six times to make up two fifths of the stream.
    config.data = dict(sources=("stdlib",) * 6 + ("retrieval:60000:seed=1:max_chars=512",), heldout_share=0.06)
    config.train = dict(
        steps=4000,
        batch_size=256,
        seq_len=512,
        peak_lr=2e-3,
        end_lr=6e-5,
        warmup_steps=200,
        log_every=100,
        checkpoint_every=2000,
        token_chunk=16384,
    )
    config.evaluate = dict(
        lengths=(512, 576, 1024),
        samples=64,
        answer_budget=16,
        alternatives=False,
        tasks=("S1", "S2"),
        perplexity_length=512,
        perplexity_documents=64,
        prompts=("The special magic number", "Return a new list containing"),
        new_tokens=96,
    )
    return config
