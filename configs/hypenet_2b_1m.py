"""HypeNet-2B whose last stage reads rows of 1,048,576 tokens: as many tokens as the paper's stage 3, in longer rows.

    hypenet plan --config configs/hypenet_2b_1m.py --topology v5p-128 --stages finetune
    hypenet convert --config configs/hypenet_2b_1m.py --workdir runs/hypenet-2b-1m

Hardware: 64 chips of TPU v5p; a row lies over 32 of them (`seq`). Documents are packed into rows and do not see each
other, so text with long documents is needed for long rows to teach anything.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).parent / "hypenet_2b.py"))["get_config"]()
    config.mesh = dict(fsdp=2, seq=32)
    config.finetune.update(steps=500, batch_size=2, seq_len=1_048_576, gradient_accumulation=1)
    return config
