"""configs/from_scratch.py for two CPU cores: smaller networks, less text, trained at 512 bytes, tested to 4,096.

    hypenet compare-architectures --config configs/from_scratch_toy.py --workdir runs/from_scratch_toy

A try of the machinery: so few steps do not teach retrieval.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("from_scratch.py")))["get_config"]()
    config.dtype = "float32"
    config.seeds = (0,)
    config.model.update(hidden_size=64, intermediate_size=192, num_layers=4, head_dim=16, attention_layers=(1, 3))
    config.variants[-1]["intermediate_size"] = 224
    config.data = dict(sources=("stdlib", "retrieval:6000:seed=1:max_chars=512"), heldout_share=0.1)
    config.train.update(steps=60, batch_size=8, warmup_steps=10, log_every=10, checkpoint_every=30, token_chunk=2048)
    config.fit_scale = dict(length=4096, documents=4, grid=(20, 100, 500, 2000))
    config.row_lengths = (1024, 4096)
    config.evaluate.update(
        lengths=(512, 1024, 2048, 4096), samples=8, perplexity_length=4096, perplexity_documents=4, batch_tokens=8192
    )
    return config
