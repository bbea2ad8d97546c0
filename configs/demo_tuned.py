"""A fine-tune of the demo's student on short plain text, which costs it retrieval; for `hypenet qk-restore`.

    hypenet pretrain --config configs/demo_tuned.py --workdir runs/demo_tuned   (after the conversion in runs/demo)

600,000 tokens in rows of 64, three to four minutes of two CPU cores. docs/method.md says what comes of it.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.start_from = "runs/demo/export"
    config.model = dict(
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=512,
        # As the demo's conversion chooses and fits them.
        attention_layers=(0, 5),
        position="hype",
        logits_scaling=438.0,
    )
    config.data = dict(sources=("stdlib",), heldout_share=0.06)
    config.train = dict(
        steps=300,
        batch_size=32,
        seq_len=64,
        peak_lr=3e-4,
        end_lr=1e-6,
        warmup_steps=10,
        log_every=50,
        checkpoint_every=300,
        token_chunk=2048,
    )
    config.evaluate = dict(
        lengths=(512,),
        samples=8,
        answer_budget=16,
        alternatives=False,
        tasks=("S1", "S2"),
        perplexity_length=512,
        perplexity_documents=30,
        prompts=(),
    )
    return config
