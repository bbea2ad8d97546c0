"""The text of a run: packed once, a share of the documents held out, one data order across the stages."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from hypenet_jax.data.batches import StageBatches, document_windows
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document, read_documents
from hypenet_jax.data.tokenizers import Tokenizer
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo.settings import DataConfig
from hypenet_jax.train.stage import StageConfig

# What of a document decides whether it is held out.
HEAD_CHARACTERS = 64


def packed_corpus(
    config: DataConfig, tokenizer: Tokenizer, directory: pathlib.Path, say: Callable[[str], None]
) -> tuple[PackedTokens, PackedTokens]:
    """(training, held-out) tokens under `directory`, packed on the first call and reused afterwards.

    Without held-out sources of its own, a document is held out when the checksum of its beginning falls into the
    held-out share: the choice depends on the text alone, so no order, seed or machine moves a document across.
    """
    if not (directory / "train").is_dir():
        say(f"packing {', '.join(config.sources)}")
    share = 0.0 if config.heldout else config.heldout_share
    kept = pack(
        (d for d in _documents(config.sources) if not is_heldout(d.text, share)),
        tokenizer,
        directory / "train",
        seed=config.seed,
        sources=(*config.sources, f"without the held-out {share:g}"),
    )
    held = pack(
        (d for d in _documents(config.heldout or config.sources) if config.heldout or is_heldout(d.text, share)),
        tokenizer,
        directory / "heldout",
        seed=config.seed,
        sources=(*(config.heldout or config.sources), f"the held-out {share:g}"),
    )
    say(f"training on {kept.tokens:,} tokens of {kept.documents:,} documents, with {held.tokens:,} tokens held out")
    return PackedTokens(directory / "train"), PackedTokens(directory / "heldout")


def is_heldout(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out share, by the checksum of its first characters.

    Versions of one document that differ further down (a library's documentation in two releases) stay on one side.
    """
    return zlib.crc32(text[:HEAD_CHARACTERS].encode("utf-8", "surrogatepass")) < share * 2**32


def stage_batches(packed: PackedTokens, stage: StageConfig, start_token: int, seed: int, workers: int) -> StageBatches:
    """This process's share of a stage's batches, from `start_token` of the endless stream on."""
    return StageBatches(
        packed,
        seq_len=stage.seq_len,
        batch_size=stage.batch_size,
        start_token=start_token,
        steps=stage.steps,
        seed=seed,
        host=jax.process_index(),
        hosts=jax.process_count(),
        workers=workers,
    )


def stage_tokens(stage: StageConfig) -> int:
    """Tokens that a whole stage reads."""
    return stage.steps * stage.tokens_per_step


def long_documents(heldout: PackedTokens, length: int, count: int) -> np.ndarray:
    """int32 [<= count, length + 1]: the first tokens of held-out documents that are long enough.

    Raises HypenetError when there is none.
    """
    windows = document_windows(heldout, length, count)
    if not len(windows):
        raise HypenetError(f"no held-out document has {length + 1} tokens; lower the length or hold out longer texts")
    return windows


def heldout_prose(heldout: PackedTokens, tokenizer: Tokenizer, characters: int = 400_000) -> list[str]:
    """Held-out documents as text, up to about so many characters."""
    texts, total = [], 0
    for tokens in heldout.documents():
        texts.append(tokenizer.decode(tokens.tolist()))
        total += len(texts[-1])
        if total > characters:
            break
    return texts


def _documents(sources: tuple[str, ...]) -> Iterator[Document]:
    for source in sources:
        yield from read_documents(source)
