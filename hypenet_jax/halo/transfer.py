"""Step 0 of HALO: a teacher's weights become a HypeNet's, by copying, cloning heads and starting the gates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import STARTS, check_choice
from hypenet_jax.model import LanguageModel, LightningConfig, ModelConfig, mixers, stack
from hypenet_jax.model.config import POSITIONS
from hypenet_jax.model.layers import rms_norm


def convert(
    model: LanguageModel,
    params: dict,
    attention_layers: Sequence[int],
    position: str = "hype",
    start: str = "official",
    seed: int = 0,
    calibration_tokens: np.ndarray | None = None,
    qk_norm: bool | None = None,
) -> tuple[LanguageModel, dict]:
    """A HypeNet student out of a Transformer teacher.

    Layers in `attention_layers` (0-based) keep softmax attention, the others become Lightning layers. `position` is
    "hype" (RoPE in the RNN layers, none in attention), "rope", "nope" or "attention_rope". `start` is "official"
    (random gates, unit output norms) or "calibrated" (gates that are the identity at step 0, and output norms that
    give every channel the teacher's RMS, measured on `calibration_tokens` int32 [B, T], by default random ids).
    "random-gates" and "unit-norms" are the calibrated start with that one thing as in the official one.
    qk_norm: see `student_of`.
    Raises HypenetError for layers outside the model, an unknown choice, or a teacher that is not all attention.
    """
    check_choice("position", position, POSITIONS)
    check_choice("start", start, STARTS)
    student_config = student_of(model.config, attention_layers, position, qk_norm)
    keys = jax.random.split(jax.random.key(seed), model.config.num_layers)
    student_params = {name: value for name, value in params.items() if not name.startswith("layer_")}
    for layer, mixer in enumerate(student_config.mixers):
        teacher_layer = params[f"layer_{layer}"]
        transfer = mixers.BY_NAME[mixer].from_attention
        student_params[f"layer_{layer}"] = teacher_layer | {
            "mixer": transfer(teacher_layer["mixer"], student_config, keys[layer], start)
        }
    student = dataclasses.replace(model, config=student_config)
    if start in ("calibrated", "random-gates"):
        if calibration_tokens is None:
            draw = np.random.default_rng(seed)
            calibration_tokens = draw.integers(0, model.config.vocab_size, (4, 256), dtype=np.int32)
        student_params = calibrate_output_norms(model, params, student, student_params, calibration_tokens)
    return student, student_params


def student_of(
    teacher: ModelConfig, attention_layers: Sequence[int], position: str, qk_norm: bool | None = None
) -> ModelConfig:
    """The student's config: the teacher's sizes, Lightning layers with as many key as query heads.

    qk_norm: whether Lightning layers norm queries and keys; None does as the teacher. Attention layers always do as
    the teacher.
    """
    if teacher.attention_layers != tuple(range(teacher.num_layers)):
        raise HypenetError(f"the teacher's mixers are {teacher.mixers}; only an all-attention model can be converted")
    layers = sorted({int(layer) for layer in attention_layers})
    for layer in layers:
        if not 0 <= layer < teacher.num_layers:
            raise HypenetError(f"attention layer {layer} is outside the model's layers 0 to {teacher.num_layers - 1}")
    attention_rope, lightning_rope = POSITIONS[position]
    return dataclasses.replace(
        teacher,
        family="hypenet",
        mixers=tuple("attention" if i in layers else "lightning" for i in range(teacher.num_layers)),
        attention_rope=attention_rope,
        attention_gate=True,
        lightning=LightningConfig(
            num_heads=teacher.num_heads,
            num_kv_heads=teacher.num_heads,
            head_dim=teacher.head_dim,
            rope=lightning_rope,
            qk_norm=teacher.qk_norm if qk_norm is None else qk_norm,
        ),
    )


def calibrate_output_norms(
    teacher: LanguageModel, params: dict, student: LanguageModel, student_params: dict, tokens_BT: np.ndarray
) -> dict:
    """The student with each Lightning o_norm set so that every channel of its output has the teacher's RMS.

    Both mixers read the teacher's residual stream. The official unit norms start so far off scale that the first
    alignment loss lies above that of predicting zero.
    """
    layers = [i for i, mixer in enumerate(student.config.mixers) if mixer == "lightning"]
    if not layers or student.config.lightning is None or not student.config.lightning.output_norm:
        return student_params

    rms = _channel_rms(teacher, student, params, student_params, jnp.asarray(tokens_BT))
    calibrated = dict(student_params)
    for layer in layers:
        weights = student_params[f"layer_{layer}"]
        calibrated[f"layer_{layer}"] = weights | {"mixer": weights["mixer"] | {"o_norm": rms[layer]}}
    return calibrated


@functools.partial(jax.jit, static_argnums=(0, 1))
def _channel_rms(
    teacher: LanguageModel, student: LanguageModel, params: dict, student_params: dict, tokens_BT: jax.Array
) -> dict[int, jax.Array]:
    """{Lightning layer: [H, d] the teacher's RMS of each channel over that of the student's normed output}."""
    found: dict[int, jax.Array] = {}

    def mix(layer, normed_BTD, context):
        mixer = params[f"layer_{layer}"]["mixer"]
        if student.config.mixers[layer] == "lightning":
            wanted = mixers.attention.heads(mixer, teacher.config, normed_BTD, context)
            own = student_params[f"layer_{layer}"]["mixer"]
            raw = mixers.lightning.heads(own, student.config, normed_BTD, context)
            unit = rms_norm(raw, jnp.ones(raw.shape[-2:]), student.config.norm_eps)
            found[layer] = _rms(wanted) / jnp.maximum(_rms(unit), 1e-6)
        return mixers.attention.forward(mixer, teacher.config, normed_BTD, context)

    stack.forward(params, teacher.config, tokens_BT, dtype=jnp.dtype(teacher.dtype), mix=mix)
    return found


def _rms(o_BTHD: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(o_BTHD.astype(jnp.float32)), axis=(0, 1)))
