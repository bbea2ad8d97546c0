"""The text of a run: packed once, a share of the documents held out, one data order across the stages."""

from __future__ import annotations

import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from jax.sharding import Mesh

from hypenet_jax.data.batches import StageBatches, document_windows
from hypenet_jax.data.pack_meta import META
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document, is_synthetic, read_documents
from hypenet_jax.data.teacher_rows import TeacherRows
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import ConvertConfig, DataConfig, EvaluateConfig
from hypenet_jax.parallel.processes import first, own_rows
from hypenet_jax.parallel.rules import batch_sharding
from hypenet_jax.train.stage import StageConfig

# What of a document decides whether it is held out.
HEAD_CHARACTERS = 64


def packed_corpus(
    config: DataConfig, tokenizer: Tokenizer, directory: pathlib.Path, say: Callable[[str], None]
) -> tuple[PackedTokens, PackedTokens]:
    """(training, held-out) tokens under `directory`, packed on the first call and reused afterwards.

    Without held-out sources of its own, a document is held out when the checksum of its beginning falls into the
    held-out share: the choice depends on the text alone, so no order, seed or machine moves a document across.
    What is held out is `natural_prose`: synthetic documents that fall into the share are not trained on either.
    A source may also be a directory that `hypenet pack` wrote: it is read where it lies, alone, and the held-out
    documents must then have a source of their own.
    """
    prose = natural_prose(config.heldout or config.sources)
    kept = _training(config, "data.sources", config.sources, tokenizer, directory / "train", say)
    share = _share(config)
    held = (_ready(prose, tokenizer) if config.heldout else None) or _packed(
        prose,
        lambda text: bool(config.heldout) or is_heldout(text, share),
        f"none of the {kept.info.documents} documents falls into the held-out share of {share:g}; raise "
        "data.heldout_share, or give more documents or data.heldout",
        f"the held-out {share:g}",
        tokenizer,
        directory / "heldout",
        config.seed,
    )
    say(
        f"training on {len(kept):,} tokens of {kept.info.documents:,} documents, "
        f"with {len(held):,} tokens of {held.info.documents:,} held out"
    )
    return kept, held


def finetune_corpus(
    config: DataConfig,
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    say: Callable[[str], None],
) -> PackedTokens:
    """The tokens of stage 3's own sources, packed under `directory` without what `packed_corpus` holds out."""
    packed = _training(config, "finetune_sources", sources, tokenizer, directory / "finetune", say)
    say(f"stage finetune on {len(packed):,} tokens of {packed.info.documents:,} documents")
    return packed


def _training(
    config: DataConfig,
    name: str,
    sources: tuple[str, ...],
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    say: Callable[[str], None],
) -> PackedTokens:
    """The documents of the sources `name`, packed into `directory` without the held-out share, or the pack they are."""
    ready = _ready(sources, tokenizer)
    if ready and not config.heldout:
        raise HypenetError(f"{name} is the packed {sources[0]}, from which nothing can be held out; name data.heldout")
    if ready:
        return ready
    if not directory.is_dir():
        say(f"packing {', '.join(sources)}")
    share = _share(config)
    return _packed(
        sources,
        lambda text: not is_heldout(text, share),
        f"every document falls into the held-out share of {share:g}; lower data.heldout_share or give more of them",
        f"without the held-out {share:g}",
        tokenizer,
        directory,
        config.seed,
    )


def _share(config: DataConfig) -> float:
    return 0.0 if config.heldout else config.heldout_share


def natural_prose(sources: tuple[str, ...]) -> tuple[str, ...]:
    """The sources to measure on: each once, without those that make their documents.

    Retrieval pages hold facts like a needle's and end in random values: in a haystack they compete with the needle,
    and no loss on them tells how well a text is read. What a stream lists several times is no new text. A pack is taken
    as it lies. Raises HypenetError where nothing is left.
    """
    kept = tuple(source for source in dict.fromkeys(sources) if not is_synthetic(source))
    if not kept:
        raise HypenetError(
            "the held-out documents are all synthetic; add prose to data.sources or name data.heldout to test on"
        )
    return kept


def _ready(sources: tuple[str, ...], tokenizer: Tokenizer) -> PackedTokens | None:
    """The packed tokens that the one source is, or None where the sources are documents."""
    packs = [source for source in sources if (pathlib.Path(source) / META).is_file()]
    if not packs:
        return None
    if len(sources) > 1:
        raise HypenetError(f"the packed {packs[0]} stands beside other sources; pack them all into one directory")
    return PackedTokens(packs[0], tokenizer)


def _packed(
    sources: tuple[str, ...],
    wanted: Callable[[str], bool],
    otherwise: str,
    choice: str,
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    seed: int,
) -> PackedTokens:
    """The wanted documents of the sources, packed into `directory`; HypenetError(otherwise) where there is none."""
    documents = (document for document in _documents(sources) if wanted(document.text))

    def write() -> None:
        # Nobody else packs in a work directory: what lies there was killed.
        for left in directory.parent.glob(f".{directory.name}.partial-*"):
            shutil.rmtree(left)
        pack(_some(documents, otherwise), tokenizer, directory, seed=seed, sources=(*sources, choice))

    first(write)
    return PackedTokens(directory, tokenizer)


def is_heldout(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share, by the checksum of its first characters.

    Versions of one document that differ further down (a library's documentation in two releases) stay on one side.
    """
    return zlib.crc32(text[:HEAD_CHARACTERS].encode("utf-8", "surrogatepass")) < share * 2**32


def stage_batches(
    packed: PackedTokens,
    stage: StageConfig,
    start_token: int,
    seed: int,
    workers: int,
    mesh: Mesh | None = None,
    completions: bool = False,
    beside: TeacherRows | None = None,
    joined: bool = False,
) -> StageBatches:
    """A stage's batches, from `start_token` of the endless stream on; the rows of this process's devices on `mesh`."""
    return StageBatches(
        packed,
        seq_len=stage.seq_len,
        batch_size=stage.batch_size,
        start_token=start_token,
        steps=stage.steps,
        seed=seed,
        rows=None if mesh is None else own_rows(batch_sharding(mesh), stage.batch_size, stage.seq_len),
        workers=workers,
        completions=completions,
        beside=beside,
        joined=joined,
    )


def stage_tokens(stage: StageConfig) -> int:
    """Tokens that a whole stage reads."""
    return stage.steps * stage.tokens_per_step


def stage_start(config: ConvertConfig, name: str) -> int:
    """The token of its text at which a stage begins: where the one before ended, unless it has a text of its own."""
    if name == "finetune" and config.finetune_sources:
        return 0
    before = {"align": (), "distill": (config.align,), "finetune": (config.align, config.distill)}
    return sum(map(stage_tokens, before[name]))


def long_documents(heldout: PackedTokens, length: int, count: int) -> np.ndarray:
    """int32 [<= count, length + 1]: the first tokens of held-out documents that are long enough.

    Raises HypenetError when there is none.
    """
    windows = document_windows(heldout, length, count)
    if not len(windows):
        longest = max(len(tokens) for tokens in heldout.documents())
        raise HypenetError(
            f"a length of {length} needs a held-out document of {length + 1} tokens but the longest has {longest}; "
            "lower the length or hold out longer texts"
        )
    return windows


def measured_text(
    settings: EvaluateConfig, heldout: PackedTokens, tokenizer: Tokenizer
) -> tuple[np.ndarray, str | list[str]]:
    """(windows of perplexity as `long_documents`, essays of the haystacks), both held out unless essays are named."""
    windows = long_documents(heldout, settings.perplexity_length, settings.perplexity_documents)
    return windows, settings.essays or heldout_prose(heldout, tokenizer)


def heldout_prose(heldout: PackedTokens, tokenizer: Tokenizer, characters: int = 400_000) -> list[str]:
    """Held-out documents as text, up to about so many characters."""
    texts, total = [], 0
    for tokens in heldout.documents():
        texts.append(tokenizer.decode(tokens.tolist()))
        total += len(texts[-1])
        if total > characters:
            break
    return texts


def _some(documents: Iterator[Document], otherwise: str) -> Iterator[Document]:
    """The documents; HypenetError(otherwise) where there is none."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise HypenetError(otherwise)


def _documents(sources: tuple[str, ...]) -> Iterator[Document]:
    for source in sources:
        yield from read_documents(source)
