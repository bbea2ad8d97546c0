"""HypeNet-9B out of Qwen3-8B, with the numbers of the paper (arXiv 2601.22156): stage 2 at a peak rate of 3e-5.

    hypenet plan --config configs/hypenet_9b.py --topology v5p-64 --topology v5e-256
    hypenet convert --config configs/hypenet_9b.py --workdir runs/hypenet-9b --set mesh=v5p-64

Hardware: 32 chips of TPU v5p (v5p-64); docs/planning.md has what the plan says of it and of v5e-256. Text and teacher
as in configs/hypenet_2b.py.
"""

import pathlib
import runpy


def get_config():
    config = runpy.run_path(str(pathlib.Path(__file__).parent / "hypenet_2b.py"))["get_config"]()
    config.teacher = "teachers/qwen3-8b"
    config.student.attention_layers = (1, 2, 4, 6, 7, 10, 24, 33, 34)
    config.mesh = dict(fsdp=32)
    config.distill.peak_lr = 3e-5
    config.finetune.gradient_accumulation = 4
    return config
