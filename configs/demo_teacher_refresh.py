"""The second half of the demo teacher's training: what it memorised is shaken off, what it can do is kept.

    hypenet pretrain --config configs/demo_teacher_refresh.py --workdir runs/demo_teacher_refresh

configs/demo_teacher.py shows the standard library's documentation some ninety times, which a network of 1.6M
parameters learns by heart: its loss on held-out pages is six times that on its own. Here it starts from half its
weights and half a random start, and reads one pass more. Two CPU cores: about 12 minutes for 2.5M tokens.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 1
    config.dtype = "float32"
    config.start_from = "runs/demo_teacher/export"
    config.start_share = 0.5
    config.model = dict(
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=512,
    )
    config.data = dict(sources=("stdlib", "retrieval:8000:seed=2:max_chars=512"), heldout_share=0.06)
    config.train = dict(
        steps=300,
        batch_size=16,
        seq_len=512,
        peak_lr=2e-3,
        end_lr=4e-5,
        warmup_steps=10,
        log_every=10,
        checkpoint_every=100,
        token_chunk=2048,
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
