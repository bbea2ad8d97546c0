"""The paper's from-scratch comparison in miniature: trained at 512 bytes, tested to 32,768, 64 times as much.

    hypenet compare-architectures --config configs/from_scratch.py --workdir runs/from_scratch

Five networks of the same size see the same bytes in the same order: documentation out of Python's standard library
(PSF licence) and synthetic retrieval tasks; nothing is downloaded. The three variants of HypeNet that differ in the
scaling of their attention share one training. Other text: --set 'data.sources=["text.parquet", "retrieval:60000"]'.
configs/from_scratch_toy.py is the same for a CPU.

Measured on one H100 that another program shared: 14.5 minutes (docs/results/from-scratch).
"""

import ml_collections

# Transformer layers hold fewer mixer parameters; wider MLPs make up for them to half a percent.
SAME_SIZE = 456


def get_config():
    config = ml_collections.ConfigDict()
    config.dtype = "bfloat16"
    config.seeds = (0, 1, 2)
    config.model = dict(
        hidden_size=128,
        intermediate_size=384,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        attention_layers=(3, 7),
        max_position=512,
    )
    config.variants = (
        dict(name="hypenet", position="hype", scaling="fit"),
        dict(name="hypenet-unscaled", position="hype", scaling="none"),
        dict(name="hypenet-constant", position="hype", scaling="constant", constant=1.5),
        dict(name="all-rope", position="rope"),
        dict(name="all-nope", position="nope"),
        dict(name="attention-rope", position="attention_rope"),
        dict(name="transformer", hybrid=False, position="rope", intermediate_size=SAME_SIZE),
    )
    # The documentation is listed four times to make up a third of the stream.
    config.data = dict(sources=("stdlib",) * 4 + ("retrieval:60000:seed=1:max_chars=512",), heldout_share=0.1)
    config.train = dict(
        # After half of them a network may or may not have learned to retrieve (docs/results/from-scratch).
        steps=2000,
        batch_size=128,
        seq_len=512,
        peak_lr=2e-3,
        end_lr=6e-5,
        warmup_steps=50,
        log_every=50,
        checkpoint_every=500,
        token_chunk=16384,
    )
    config.fit_scale = dict(length=32768, documents=3, grid=(20, 50, 100, 200, 500, 1000, 2000, 5000))
    config.row_lengths = (2048, 8192, 32768)
    config.evaluate = dict(
        tasks=("S1", "S2"),
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768),
        samples=64,
        answer_budget=16,
        alternatives=False,
        perplexity_length=32768,
        perplexity_documents=8,
        batch_tokens=262144,
    )
    return config
