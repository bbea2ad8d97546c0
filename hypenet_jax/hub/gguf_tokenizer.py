"""The tokenizer inside a GGUF file, rebuilt as a tokenizer.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from hypenet_jax.errors import HypenetError

if TYPE_CHECKING:
    from hypenet_jax.data.tokenizers import Tokenizer

# A key of the file -> its value, or None.
Metadata = Callable[[str], Any]

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

# Contractions, words with one leading sign, digits, other signs, line ends, spaces; the two differ in how many digits
# make a token.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-pair merging.

    digits: every digit stands alone, then GPT-2's cut. pattern: cut by this expression instead of GPT-2's.
    nfc: text is brought to Unicode's composed form first. ignore_merges: a word that is a token needs no merging.
    """

    digits: bool = False
    pattern: str | None = None
    nfc: bool = False
    ignore_merges: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None)
        if self.pattern is not None:
            return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(self.pattern), "isolated"), byte_level])
        if self.digits:
            return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        return byte_level


# tokenizer.ggml.pre
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "starcoder": PreTokenizer(digits=True),
    "qwen2": PreTokenizer(pattern=_WORDS + r"\p{N}" + _SIGNS, nfc=True),
    "llama-bpe": PreTokenizer(pattern=_WORDS + r"\p{N}{1,3}" + _SIGNS, ignore_merges=True),
}


def read_tokenizer(metadata: Metadata, where: str) -> Tokenizer | None:
    """The tokenizer of a GGUF file, or None where it holds none.

    Raises:
      HypenetError: a tokenizer that is not byte-level BPE, an unknown pre-tokenizer, no end token, broken merges.
    """
    from hypenet_jax.data.tokenizers import Tokenizer

    kind = metadata("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind != "gpt2":
        raise HypenetError(
            f"the tokenizer of {where} is of the kind {kind!r}; only byte-level BPE ('gpt2') can be rebuilt, "
            "so load the model from its Hugging Face directory"
        )
    library = build(
        tokens=metadata("tokenizer.ggml.tokens") or [],
        types=metadata("tokenizer.ggml.token_type"),
        merges=metadata("tokenizer.ggml.merges") or [],
        pre=metadata("tokenizer.ggml.pre"),
        where=where,
    )
    stop_ids = end_ids(metadata)
    if not stop_ids:
        raise HypenetError(f"{where} names no end token (tokenizer.ggml.eos_token_id); load it from a directory")
    pad_id = metadata("tokenizer.ggml.padding_token_id")
    return Tokenizer(
        json=library.to_str(),
        eos_id=stop_ids[0],
        pad_id=stop_ids[0] if pad_id is None else int(pad_id),
        bos_id=first_id(metadata),
        stop_ids=stop_ids,
        chat_template=metadata("tokenizer.chat_template"),
    )


def first_id(metadata: Metadata) -> int | None:
    """The token before every text; one that the file says not to add is none (SmolLM2's opens a chat turn)."""
    added = metadata("tokenizer.ggml.add_bos_token") is not False
    return metadata("tokenizer.ggml.bos_token_id") if added else None


def end_ids(metadata: Metadata) -> tuple[int, ...]:
    """The end of a text, then the end of a chat turn where that is another token."""
    found = (metadata(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return tuple(dict.fromkeys(int(token_id) for token_id in found if token_id is not None))


def build(
    tokens: Sequence[str], types: Sequence[int] | None, merges: Sequence[str], pre: str | None, where: str
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer from a GGUF file's lists; an id is a position in `tokens`."""
    if pre not in PRE_TOKENIZERS:
        raise HypenetError(
            f"the pre-tokenizer (tokenizer.ggml.pre) of {where} is {pre!r}, which is unknown; "
            f"known are {', '.join(PRE_TOKENIZERS)}"
        )
    how = PRE_TOKENIZERS[pre]
    types = types or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise HypenetError(f"{where} has {len(tokens)} tokens but {len(types)} token types; convert the file again")
    # Unused entries only fill the table up to the embedding's rows.
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
    broken = next((merge for merge in merges if merge.count(" ") != 1), None)
    if broken is not None:
        raise HypenetError(f"the merge {broken!r} of {where} is no pair of tokens; convert the file again")
    pairs = [(merge.split(" ")[0], merge.split(" ")[1]) for merge in merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=how.ignore_merges)
    # The library raises plain `Exception` for a merge of unknown tokens.
    except Exception as error:
        raise HypenetError(f"the tokenizer of {where} is broken ({error}); convert the file again") from error
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizers.NFC() if how.nfc else None
    library.pre_tokenizer = how.build()
    library.decoder = decoders.ByteLevel()
    for kinds, special in (((_UNKNOWN, _CONTROL), True), ((_USER_DEFINED,), False)):
        names = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds]
        library.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return library
