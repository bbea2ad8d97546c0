"""The settings of a conversion and of a training from scratch, as frozen dataclasses with their defaults.

Defaults follow arXiv 2601.22156 where it gives a value; docs/method.md names the departures.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hypenet_jax.errors import HypenetError
from hypenet_jax.model.config import POSITIONS
from hypenet_jax.parallel.sequence.attention import EXCHANGES
from hypenet_jax.train.stage import StageConfig

SELECTION_METHODS = (
    "halo", "jet-nemotron", "kl-ls", "kl-ls-restored", "gate-search", "evenly", "latter-half", "none",
)  # fmt: skip
GATE_SEARCH_TRAINS = ("gates", "mixers")
STARTS = ("official", "calibrated", "random-gates", "unit-norms")
FINETUNE_LOSSES = ("all", "completions")
DOCUMENTS = ("masked", "joined")


def check_choice(name: str, value: str, choices) -> None:
    """Raise unless value is one of choices."""
    if value not in choices:
        raise HypenetError(f"{name} is {value!r}; use one of {', '.join(choices)}")


def check_positive(section: str, settings: Any, *names: str) -> None:
    """Raise unless each named field is at least 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise HypenetError(f"{section}.{name} is {getattr(settings, name)}; it must be at least 1")


def check_each_once(section: str, settings: Any, *names: str) -> None:
    """Raise where a named field, a tuple or None, has a value twice: needles asked twice count as twice as many.

    A task and its "-like" are one.
    """
    for name in names:
        values = getattr(settings, name) or ()
        alike = {value.removesuffix("-like") if isinstance(value, str) else value for value in values}
        if len(alike) < len(values):
            raise HypenetError(f"{section}.{name} is {values}; name each once")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text to train on. A share of the documents, chosen by their content, is held out for every measurement.

    Synthetic documents ("retrieval:...") are for training alone: none is measured on.
    """

    sources: tuple[str, ...]
    heldout: tuple[str, ...] = ()  # documents of their own instead of a held-out share
    heldout_share: float = 0.01
    seed: int = 0
    workers: int = 0
    documents: str = "masked"  # "joined": training reads across their boundaries, as the official code does

    def __post_init__(self):
        check_choice("data.documents", self.documents, DOCUMENTS)
        if not self.sources:
            raise HypenetError("data.sources is empty; name at least one file, folder or built-in source")
        if not 0 < self.heldout_share < 1 and not self.heldout:
            raise HypenetError(f"data.heldout_share is {self.heldout_share}; it must lie between 0 and 1")
        if self.workers < 0:
            raise HypenetError(f"data.workers is {self.workers}; it must be at least 0")


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """What the teacher becomes."""

    position: str = "hype"
    start: str = "calibrated"
    attention_layers: tuple[int, ...] | None = None  # None: chosen by `select`
    qk_norm: bool | None = None  # of the Lightning layers; None: as the teacher

    def __post_init__(self):
        check_choice("student.position", self.position, POSITIONS)
        check_choice("student.start", self.start, STARTS)


@dataclasses.dataclass(frozen=True)
class GateSearchConfig:
    """The joint gate search (`halo/gate_search.py`): every layer mixes both ways, a learned gate between the two."""

    steps: int = 300
    batch_size: int = 16
    seq_len: int = 512
    retrieval: str = "retrieval:20000:seed=7:max_chars=512"  # a source, see docs/data.md
    retrieval_share: float = 0.75  # of a batch's rows; the others are training text
    trains: str = "gates"  # beside the gates nothing, or the Lightning "mixers"
    gate_lr: float = 0.1
    mixer_lr: float = 1e-3
    start_share: float = 0.9  # of all layers' attention that is open at the first step
    noise: float = 1.0  # of the gates drawn for every row; 0: the same gates for all rows
    temperature: float = 0.3  # the lower, the nearer every drawn gate is to 0 or 1
    pressed_by: float = 0.7  # share of the steps after which only as much is open as layers are to be kept

    def __post_init__(self):
        check_choice("gate.trains", self.trains, GATE_SEARCH_TRAINS)
        check_positive("gate", self, "steps", "batch_size", "seq_len")
        for name in ("retrieval_share", "start_share", "pressed_by"):
            if not 0 < getattr(self, name) <= 1:
                raise HypenetError(f"gate.{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        if not 0 <= self.noise < math.inf:
            raise HypenetError(f"gate.noise is {self.noise}; it must be a number of 0 or above")
        for name in ("gate_lr", "mixer_lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise HypenetError(f"gate.{name} is {getattr(self, name)}; it must be a number above 0")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What stage 2 minimises: (1 - ce_weight) * KL + ce_weight * CE + hidden_weight * H, each a mean over all tokens.

    CE: next-token cross-entropy. H: squared error of the last hidden states over the teacher's squared norm.
    kl_one_in: n lets only the first of every n rows into the KL, whose sum is still divided by the number of all
    tokens. The official code did so with its 12 rows of 512 until commit 5438a19 of April 2026: its loop over chunks of
    512 tokens ended after the first.
    """

    ce_weight: float = 0.0
    hidden_weight: float = 0.0
    kl_one_in: int = 1

    def __post_init__(self):
        if not 0 <= self.ce_weight <= 1:
            raise HypenetError(f"objective.ce_weight is {self.ce_weight:g}; it must lie between 0 and 1")
        if not 0 <= self.hidden_weight < math.inf:
            raise HypenetError(f"objective.hidden_weight is {self.hidden_weight:g}; it must be finite and at least 0")
        check_positive("objective", self, "kl_one_in")


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """How the attention layers are chosen: a rule over measured or given scores, or a search."""

    method: str = "halo"
    keep: int | None = None  # None: floor(L / 4)
    scores: str | None = None  # a JSON table of scores a layer, instead of measuring
    questions: int = 64
    length: int = 512
    batch_size: int = 16
    answer_budget: int = 128
    gate: GateSearchConfig = GateSearchConfig()

    def __post_init__(self):
        check_choice("select.method", self.method, SELECTION_METHODS)
        if self.keep is not None and self.keep < 0:
            raise HypenetError(f"select.keep is {self.keep}; it must be at least 0")
        check_positive("select", self, "questions", "length", "batch_size", "answer_budget")


@dataclasses.dataclass(frozen=True)
class FitScaleConfig:
    """The grid on which the `a` of s_t = ln(t+a)/ln(a) is fitted, by loss on long held-out documents.

    tolerance: nats a token that the loss may end above its best for a smaller a, which sharpens attention more: needles
    are found best there (docs/method.md). 0 is the paper's fit.
    """

    grid: tuple[float, ...] = (10, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000, 1500, 2000, 5000)
    length: int = 65536
    documents: int = 8
    batch_size: int = 1
    tolerance: float = 0.0

    def __post_init__(self):
        if not 0 <= self.tolerance < math.inf:
            raise HypenetError(f"fit_scale.tolerance is {self.tolerance}; it must be a number of 0 or above")
        if len(set(self.grid)) < 3 or not all(1 < a < math.inf for a in self.grid):
            raise HypenetError(f"fit_scale.grid is {self.grid}; it needs at least three values, all above 1 and finite")
        check_positive("fit_scale", self, "length", "documents", "batch_size")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Needles, perplexity and a sample, for teacher and student."""

    tasks: tuple[str, ...] = ("S1", "S2", "S3")
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    samples: int = 20
    seed: int | None = None  # of the needles; None: the run's. Another asks a finished run what it has not been asked
    depths: tuple[float, ...] | None = None  # None: RULER's random depths
    essays: str | None = None  # file or folder of essays; None: held-out prose, tasks then named S2-like, S3-like
    answer: str = "forced"  # "forced": greedy match read off one forward; "generate": decode and search
    answer_budget: int = 128  # tokens kept free for the answer, as RULER does
    alternatives: bool = True  # "forced" tries ": value" where " value" was missed
    prefill_chunk: int = 8192  # longer needle tests run in chunks with a cache
    row_tokens: int | None = None  # "forced": rows of so many tokens that hold several samples, one program for all
    perplexity_length: int = 4096
    perplexity_documents: int = 32
    batch_tokens: int = 32768
    prompts: tuple[str, ...] = ()
    new_tokens: int = 128
    scale_lengths: tuple[int, ...] = ()  # where the student is asked the same needles for every a of scale_grid
    scale_grid: tuple[float, ...] = ()  # empty: fit_scale.grid
    chat: bool = False  # the prompts are user turns, written by the teacher's chat template

    def __post_init__(self):
        check_choice("evaluate.answer", self.answer, ("forced", "generate"))
        check_positive("evaluate", self, "samples", "answer_budget", "prefill_chunk", "batch_tokens", "new_tokens")
        check_positive("evaluate", self, "perplexity_length", "perplexity_documents")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise HypenetError(f"evaluate.seed is {self.seed}; it must be at least 0 and below 2**32")
        check_each_once("evaluate", self, "tasks", "lengths", "scale_lengths")
        if self.row_tokens is not None and self.row_tokens < max(self.lengths, default=1):
            raise HypenetError(
                f"evaluate.row_tokens is {self.row_tokens}, below the longest of the lengths {self.lengths}; raise it"
            )
        if self.tasks and not self.lengths:
            raise HypenetError("evaluate.lengths is empty but evaluate.tasks are not; give lengths, or no tasks")
        if not all(1 < a < math.inf for a in self.scale_grid):
            raise HypenetError(f"evaluate.scale_grid is {self.scale_grid}; its values must be above 1 and finite")
        if not all(self.prompts):
            raise HypenetError("evaluate.prompts holds an empty prompt; write a text to continue")

    def needle_seed(self, of_run: int) -> int:
        """The seed of the needles of a run that has this seed."""
        return of_run if self.seed is None else self.seed


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What `hypenet compare-selection` compares. None: as the stage `distill`, or `evaluate`, has it."""

    methods: tuple[str, ...] = ("halo", "jet-nemotron", "kl-ls", "kl-ls-restored", "evenly", "gate-search")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200  # of the equal distillation of each distinct choice
    batch_size: int | None = None
    tasks: tuple[str, ...] | None = None
    lengths: tuple[int, ...] | None = None
    samples: int | None = None
    perplexity_length: int | None = None

    def __post_init__(self):
        for method in self.methods:
            check_choice("compare.methods", method, SELECTION_METHODS)
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise HypenetError(f"compare.{name} is {values}; name at least one, and each once")
        check_each_once("compare", self, "tasks", "lengths")
        if not 0 <= min(self.seeds) <= max(self.seeds) < 2**32:
            raise HypenetError(f"compare.seeds is {self.seeds}; each must be at least 0 and below 2**32")
        given = ("batch_size", "samples", "perplexity_length")
        check_positive("compare", self, "steps", *(name for name in given if getattr(self, name) is not None))


@dataclasses.dataclass(frozen=True)
class AblateConfig:
    """How `hypenet ablate` compares recipes: the size of a cell, which is one variant with one seed.

    align_steps, distill_steps: updates of a cell's two stages. batch_size, seq_len: None takes those of `distill`.
    peak_lr: of distillation, None takes that of `distill`; end_lr shrinks with it.
    measure_every: updates between measurements on held-out text, of heldout_rows rows. needle_lengths: lengths at
    which a finished cell is asked for `evaluate.samples` needles of `needle_task`.
    """

    seeds: int = 3
    align_steps: int = 100
    distill_steps: int = 300
    batch_size: int | None = None
    seq_len: int | None = None
    peak_lr: float | None = None
    measure_every: int = 20
    heldout_rows: int = 32
    needle_task: str = "S1"
    needle_lengths: tuple[int, ...] = ()

    def __post_init__(self):
        check_positive("ablate", self, "align_steps", "distill_steps", "measure_every", "heldout_rows")
        check_each_once("ablate", self, "needle_lengths")
        for name in ("batch_size", "seq_len"):
            if getattr(self, name) is not None:
                check_positive("ablate", self, name)
        if self.peak_lr is not None and not 0 < self.peak_lr < math.inf:
            raise HypenetError(f"ablate.peak_lr is {self.peak_lr:g}; it must be above 0 and finite")
        if self.seeds < 2:
            raise HypenetError(f"ablate.seeds is {self.seeds}; an interval needs at least 2")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """All five steps of HALO and the evaluation."""

    teacher: str
    data: DataConfig
    align: StageConfig
    distill: StageConfig
    finetune: StageConfig
    finetune_loss: str = "all"  # "completions": of conversations only what the assistant says counts
    finetune_sources: tuple[str, ...] = ()  # text of its own for stage 3; empty: it goes on in data.sources
    objective: ObjectiveConfig = ObjectiveConfig()  # of stage 2
    student: StudentConfig = StudentConfig()
    select: SelectConfig = SelectConfig()
    fit_scale: FitScaleConfig = FitScaleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()
    ablate: AblateConfig = AblateConfig()
    seed: int = 0
    dtype: str = "bfloat16"
    remat: bool = True
    exchange: str = "auto"  # where the mesh splits positions, how attention gets at other devices' keys
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    # Logical axis of parameters -> mesh axes, where they differ from the table of parallel/rules.py.
    rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # the student's
    teacher_rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    teacher_output: str = "live"  # what stage 2 learns from: "live", or a directory that `cache-teacher` wrote

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("exchange", self.exchange, EXCHANGES)
        check_choice("finetune_loss", self.finetune_loss, FINETUNE_LOSSES)
        if self.objective.kl_one_in > self.distill.batch_size:
            raise HypenetError(
                f"objective.kl_one_in is {self.objective.kl_one_in} but distill.batch_size is "
                f"{self.distill.batch_size}; a batch needs that many rows"
            )
        if self.teacher_output != "live" and (self.objective != ObjectiveConfig() or self.data.documents != "masked"):
            raise HypenetError(
                f"teacher_output is {self.teacher_output!r}, which knows only the exact KL of masked documents; use "
                "'live' with another objective or with data.documents"
            )


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a network trained from scratch; `attention_layers` None makes a plain Transformer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_layers: tuple[int, ...] | None = None
    position: str = "rope"
    rope_theta: float = 1e6
    tie_embeddings: bool = True
    qk_norm: bool = True
    max_position: int = 4096
    logits_scaling: float | None = None  # a of s_t, for inference: training goes without

    def __post_init__(self):
        check_choice("model.position", self.position, POSITIONS)
        if self.attention_layers is None and self.position != "rope":
            raise HypenetError(
                f"model.position is {self.position!r} but model.attention_layers is not given; "
                "only a HypeNet has variants"
            )
        if self.attention_layers is None and self.logits_scaling is not None:
            raise HypenetError(
                f"model.logits_scaling is {self.logits_scaling:g} but model.attention_layers is not given; "
                "only a HypeNet scales its logits"
            )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Training from scratch with cross-entropy: teachers, and the paper's from-scratch comparison."""

    model: NetworkConfig
    data: DataConfig
    train: StageConfig
    tokenizer: str = "bytes"  # "bytes", a model directory, a tokenizer.json or a GGUF file
    start_from: str | None = None  # a model of the same sizes to start from, instead of random parameters
    start_share: float = 1.0  # how much of its matrices is kept; the rest is the random start (shrink and perturb)
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = 0
    dtype: str = "bfloat16"
    remat: bool = False
    exchange: str = "auto"
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    rules: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # see ConvertConfig

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("exchange", self.exchange, EXCHANGES)
        if not 0 < self.start_share <= 1:
            raise HypenetError(f"start_share is {self.start_share}; it must be above 0 and at most 1")
