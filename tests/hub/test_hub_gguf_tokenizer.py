"""Tokenizers rebuilt from GGUF metadata: how digits, words and special tokens are cut."""

import pytest
from hub_gguf_files import BYTES, MERGES, NEWLINE, SPACE, tokens_and_types

from hypenet_jax.errors import HypenetError
from hypenet_jax.hub.gguf_tokenizer import PRE_TOKENIZERS, build, read_tokenizer

TOKENS, TYPES = tokens_and_types()


def pieces(pre, text):
    library = build(TOKENS, TYPES, MERGES, pre, "m.gguf")
    return library.encode(text, add_special_tokens=False).tokens


def metadata(**changes):
    values = {
        "model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": TYPES, "merges": MERGES, "eos_token_id": 0,
    } | changes  # fmt: skip
    return lambda key: values.get(key.removeprefix("tokenizer.ggml."))


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("gpt-2", ["123", SPACE + "12"]),  # a run of digits with its space is one word
        ("smollm", ["1", "2", "3", SPACE, "1", "2"]),
        ("starcoder", ["1", "2", "3", SPACE, "1", "2"]),
        ("qwen2", ["1", "2", "3", SPACE, "1", "2"]),
        ("llama-bpe", ["123", SPACE, "12"]),
    ],
)
def test_digits(pre, wanted):
    assert pieces(pre, "123 12") == wanted


def test_llama_takes_three_digits_at_a_time():
    assert pieces("llama-bpe", "1231212") == ["123", "12", "1", "2"]
    assert pieces("gpt-2", "1231212") == ["123", "12", "12"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_words_and_special_tokens(pre):
    assert pieces(pre, "cat cat's") == ["cat", SPACE + "cat", "'s"]
    assert pieces(pre, "cat<|turn|>cat<tool>") == ["cat", "<|turn|>", "cat", "<tool>"]
    assert "[PAD]" not in build(TOKENS, TYPES, MERGES, pre, "m.gguf").get_vocab()
    ids = build(TOKENS, TYPES, MERGES, pre, "m.gguf").encode("cat<|turn|>", add_special_tokens=False).ids
    assert ids == [TOKENS.index("cat"), TOKENS.index("<|turn|>")]


def test_line_ends_and_composed_characters():
    # Two line ends stay together behind a sign, also where more text follows; GPT-2 leaves the last to that text.
    assert pieces("qwen2", "!\n\ncat") == ["!", NEWLINE + NEWLINE, "cat"]
    assert pieces("gpt-2", "!\n\ncat") == ["!", NEWLINE, NEWLINE, "cat"]
    decomposed = "e\u0301"
    assert pieces("qwen2", decomposed) == pieces("qwen2", "\u00e9") == ["\u00c3", "\u00a9"]
    assert pieces("gpt-2", decomposed)[0] == "e"


def test_a_tokenizer_of_ours():
    tokenizer = read_tokenizer(metadata(eot_token_id=TOKENS.index("<|turn|>"), bos_token_id=0), "m.gguf")
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (0, (0, TOKENS.index("<|turn|>")))
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 0, TOKENS.index("<tool>") + 1)
    assert tokenizer.decode(tokenizer.encode("cat's 123\n")) == "cat's 123\n"
    # Text that quotes a special token stays text.
    assert TOKENS.index("<|turn|>") not in tokenizer.encode("<|turn|>")
    assert tokenizer.chat_template is None
    assert read_tokenizer(metadata(**{"tokenizer.chat_template": "T"}), "m.gguf").chat_template == "T"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": "klingon"}, "'klingon'.*gpt-2, smollm"),
        ({"pre": None}, "None.*gpt-2, smollm"),
        ({"model": "llama"}, "kind 'llama'"),
        ({"merges": ["a b c"]}, "'a b c'"),
        ({"merges": ["zz y"]}, "broken"),
        ({"eos_token_id": None}, "eos_token_id"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(changes, words):
    with pytest.raises(HypenetError, match=words):
        read_tokenizer(metadata(**changes), "m.gguf")


def test_no_tokenizer_at_all():
    assert read_tokenizer(metadata(model=None), "m.gguf") is None
    assert len(BYTES) == len(set(BYTES))


def test_a_first_token_that_the_file_says_not_to_add_is_none():
    assert read_tokenizer(metadata(bos_token_id=0), "m.gguf").bos_id == 0
    assert read_tokenizer(metadata(bos_token_id=0, add_bos_token=True), "m.gguf").bos_id == 0
    assert read_tokenizer(metadata(bos_token_id=0, add_bos_token=False), "m.gguf").bos_id is None
