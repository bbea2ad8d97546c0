"""The closed form of the operations against XLA's own count of a program without loops and kernels."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

import hypenet_jax as hn
from hypenet_jax.halo.align import alignment_loss, mixers_of
from hypenet_jax.halo.distill import distillation_loss
from hypenet_jax.halo.finetune import next_token_loss
from hypenet_jax.halo.transfer import student_of
from hypenet_jax.hub.published import published
from hypenet_jax.plan import flops
from hypenet_jax.plan.hlo import Program

LENGTH, ROWS = 128, 1
TEACHER = hn.ModelConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64,
    mixers=("attention", "attention"), eos_ids=(0,), pad_id=0,
)  # fmt: skip
STUDENT = student_of(TEACHER, (0,), "hype")
IDS = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
BATCH = {"tokens": IDS, "targets": IDS, "segment_ids": IDS, "loss_mask": jax.ShapeDtypeStruct(IDS.shape, bool)}


def counted(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def whole_square(config, passes):
    """What XLA multiplies beyond the closed form: the masked half of attention's scores and values."""
    layers = len(config.attention_layers)
    return passes * layers * 2 * LENGTH * LENGTH * config.num_heads * config.head_dim


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_training_step_has_the_operations_that_xla_counts(stage):
    teacher, student = (hn.LanguageModel(config) for config in (TEACHER, STUDENT))
    loss = distillation_loss(teacher, student, LENGTH) if stage == "distill" else next_token_loss(student, LENGTH)
    arguments = (student.param_shapes(), teacher.param_shapes(), BATCH)
    xla = counted(jax.value_and_grad(loss, has_aux=True), *arguments)
    ours = LENGTH * flops.training_flops(stage, TEACHER, STUDENT, LENGTH, remat=False)
    # Norms, RoPE, softmax, gates and the chunks' masks are XLA's alone: a tenth at these widths.
    assert 0.9 * xla < ours < 1.05 * xla, ours / xla


def test_alignment_multiplies_matrices_exactly_as_often_as_the_closed_form():
    """Stage 1 has no logits, no gradient of anything frozen, none of a mixer's input, and ends at the last mixer."""
    config = student_of(TEACHER, (), "hype")
    teacher, student = hn.LanguageModel(TEACHER), hn.LanguageModel(config)
    arguments = (mixers_of(student.param_shapes(), 2), teacher.param_shapes(), BATCH)
    step = jax.jit(jax.value_and_grad(alignment_loss(teacher, student), has_aux=True))
    xla = 0.0
    for computation in Program(step.lower(*arguments).compile().as_text()).computations.values():
        # What is between the projections has heads for a third axis.
        for one in (one for one in computation.values() if one.opcode == "dot" and len(one.arrays[0].dims) == 2):
            left = computation[one.operands[0]].arrays[0].dims
            (axis,) = re.findall(r"lhs_contracting_dims=\{(\d+)\}", one.rest)
            xla += 2.0 * math.prod(one.arrays[0].dims) * left[int(axis)]
    mixing = sum(
        sum(flops._mixing(config, layer, LENGTH)) + flops._mixing(TEACHER, layer, LENGTH)[0] for layer in (0, 1)
    )
    assert xla == LENGTH * (flops.training_flops("align", TEACHER, config, LENGTH, remat=False) - mixing)


def test_a_forward_pass_has_the_operations_that_xla_counts():
    model = hn.LanguageModel(TEACHER)
    xla = counted(lambda params, tokens: model.logits(params, tokens), model.param_shapes(), BATCH["tokens"])
    ours = LENGTH * flops.forward_flops(TEACHER, LENGTH, head=True) + whole_square(TEACHER, 1)
    assert 0.95 * xla < ours <= xla, ours / xla


def test_what_makes_a_step_dearer():
    def cost(stage="distill", student=STUDENT, length=LENGTH, remat=False):
        return flops.training_flops(stage, TEACHER, student, length, remat)

    assert cost(remat=True) > cost() > cost("finetune") > cost("align")
    # Attention grows with the length, Lightning from one chunk on does not.
    longer = 2.0 * LENGTH * 4 * 64
    assert cost("finetune", length=2 * LENGTH) - cost("finetune") == pytest.approx(3.5 * longer)
    rnn = student_of(TEACHER, (), "hype")
    assert cost("finetune", rnn, length=2 * LENGTH) == cost("finetune", rnn)


def test_what_mfu_counts():
    """Nothing twice: backward is twice forward wherever the input needs a gradient."""
    matrices = sum(flops._matrices(STUDENT, layer) for layer in range(2))
    mixing = sum(flops._mixing(STUDENT, layer, LENGTH)[0] for layer in range(2))
    head = 256 * 512
    assert flops.model_flops("finetune", TEACHER, STUDENT, LENGTH) == pytest.approx(6 * (matrices + head) + 3 * mixing)
    teachers = flops.forward_flops(TEACHER, LENGTH, head=True)
    both = flops.model_flops("distill", TEACHER, STUDENT, LENGTH)
    assert both == pytest.approx(6 * (matrices + head) + 3 * mixing + teachers)
    # Attention is linear in the length, so that documents of several lengths count by their mean.
    ends = [flops.model_flops("finetune", TEACHER, STUDENT, length) for length in (256, 1024)]
    assert flops.model_flops("finetune", TEACHER, STUDENT, 640.0) == pytest.approx(sum(ends) / 2)


def test_the_published_sizes_have_the_parameters_of_their_names():
    for name, billions in {"qwen3-0.6b": 0.6, "teachers/Qwen3-1.7B": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19}.items():
        shapes = hn.LanguageModel(published(name)).param_shapes()
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert count / 1e9 == pytest.approx(billions, rel=0.01), name
    assert published("elsewhere") is None
    assert dataclasses.replace(published("qwen3-8b"), tie_embeddings=True) != published("qwen3-8b")
