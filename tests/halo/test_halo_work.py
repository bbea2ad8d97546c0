"""What the compiled steps of the three stages do not do: logits in stage 1, gradients of what is not trained."""

import collections

import jax
import pytest

import hypenet_jax as hn
from hypenet_jax.halo.settings import ConvertConfig, DataConfig, StudentConfig
from hypenet_jax.parallel.mesh import make_mesh
from hypenet_jax.plan.hlo import Program
from hypenet_jax.plan.stages import work_of
from hypenet_jax.train.stage import StageConfig

# Sizes that no other axis has, so that an array's shape says what it is.
VOCABULARY, WIDTH, FEED_FORWARD, LAYERS = 1009, 40, 52, 2
GATE, DOWN, HEAD, EMBEDDING = (WIDTH, FEED_FORWARD), (FEED_FORWARD, WIDTH), (WIDTH, VOCABULARY), (VOCABULARY, WIDTH)
TEACHER = hn.ModelConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_layers=LAYERS, num_heads=4,
    num_kv_heads=2, head_dim=8, mixers=("attention",) * LAYERS, tie_embeddings=False,
)  # fmt: skip
STAGE = StageConfig(steps=10, batch_size=2, seq_len=16, peak_lr=1e-3, end_lr=1e-5, warmup_steps=1)


@pytest.fixture(scope="module")
def program():
    """stage -> its compiled program, compiled once."""
    config = ConvertConfig(
        teacher="none", data=DataConfig(sources=("none",)), align=STAGE, distill=STAGE, finetune=STAGE,
        student=StudentConfig(attention_layers=(0,)), dtype="float32", remat=False,
    )  # fmt: skip
    mesh, made = make_mesh(None, jax.devices()[:1]), {}

    def compiled(stage: str) -> Program:
        if stage not in made:
            work = work_of(stage, config, TEACHER, mesh)
            with jax.set_mesh(mesh):
                made[stage] = Program(work.step.lower(*work.arguments).compile().as_text())
        return made[stage]

    return compiled


def instructions(program):
    return [one for computation in program.computations.values() for one in computation.values()]


def arguments(program):
    """How many arguments of each shape a program is given; what it does not use, it is not given."""
    entry = program.computations[program.entry].values()
    return collections.Counter(one.arrays[0].dims for one in entry if one.opcode == "parameter")


def products(program):
    """How many matrix products give each shape."""
    return collections.Counter(one.arrays[0].dims for one in instructions(program) if one.opcode == "dot")


def test_alignment_makes_no_logits(program):
    """Only the rows of the embedding are looked up: nothing else has an axis of the vocabulary."""
    found = program("align")
    with_vocabulary = [one for one in instructions(found) if any(VOCABULARY in array.dims for array in one.arrays)]
    assert with_vocabulary and {one.opcode for one in with_vocabulary} == {"parameter"}
    assert {one.arrays[0].dims for one in with_vocabulary} == {EMBEDDING}
    assert arguments(found)[EMBEDDING] == 1 and not arguments(found)[HEAD]


def test_alignment_reads_nothing_above_the_last_mixer(program):
    """Neither the last feed-forward and its norm nor the final norm; and no feed-forward has a gradient."""
    given = arguments(program("align"))
    assert (given[GATE], given[DOWN], given[(WIDTH,)]) == (2 * (LAYERS - 1), LAYERS - 1, 2 * LAYERS - 1)
    made = products(program("align"))
    assert not made[GATE] and not made[DOWN]
    # One forward of one feed-forward, none of its input's gradients.
    assert made[(32, FEED_FORWARD)] == 2 * (LAYERS - 1)


def test_distillation_has_no_gradient_of_the_teacher(program):
    given, made = arguments(program("distill")), products(program("distill"))
    # Masters, two moments, and the teacher's.
    assert given[GATE] == 2 * LAYERS * 4 and given[HEAD] == given[EMBEDDING] == 4
    assert (made[GATE], made[DOWN], made[HEAD]) == (2 * LAYERS, LAYERS, 1)
    # Two forward passes and one backward pass through every feed-forward.
    assert made[(32, FEED_FORWARD)] == 2 * LAYERS * 2 + LAYERS


def test_finetuning_has_no_teacher(program):
    given, made = arguments(program("finetune")), products(program("finetune"))
    assert given[GATE] == 2 * LAYERS * 3 and given[HEAD] == given[EMBEDDING] == 3
    assert (made[GATE], made[DOWN], made[HEAD]) == (2 * LAYERS, LAYERS, 1)
    assert made[(32, FEED_FORWARD)] == 2 * LAYERS + LAYERS
