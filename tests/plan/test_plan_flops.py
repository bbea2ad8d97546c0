"""The closed form of the operations against XLA's own count of a program without loops and kernels."""

import dataclasses

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


@pytest.mark.parametrize("stage", ["align", "distill", "finetune"])
def test_a_training_step_has_the_operations_that_xla_counts(stage):
    """Also that XLA finds no work to do beyond the closed form's: no logits in stage 1, no teacher's gradient."""
    config = student_of(TEACHER, (), "hype") if stage == "align" else STUDENT
    teacher, student = hn.LanguageModel(TEACHER), hn.LanguageModel(config)
    losses = {
        "align": alignment_loss(teacher, student),
        "distill": distillation_loss(teacher, student, LENGTH),
        "finetune": next_token_loss(student, LENGTH),
    }
    trained = student.param_shapes()
    trained = mixers_of(trained, config.num_layers) if stage == "align" else trained
    xla = counted(jax.value_and_grad(losses[stage], has_aux=True), trained, teacher.param_shapes(), BATCH)
    ours = LENGTH * flops.training_flops(stage, TEACHER, config, LENGTH, remat=False)
    # Norms, RoPE, softmax, gates and the chunks' masks are XLA's alone: a tenth at these widths.
    assert 0.9 * xla < ours < 1.05 * xla, ours / xla


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
