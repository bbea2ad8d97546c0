"""The wrapper of the tokenizers library: exact bytes, no special ids out of text, special ids from a model's files."""

from __future__ import annotations

import json
import pickle

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from hypenet_jax.errors import HypenetError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def word_level(words, specials):
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(list(specials))
    return library


def model_directory(tmp_path, library=None, **files):
    library = library or word_level(["a", "b", "c"], ["</s>", "<pad>", "<s>", "<end>"])
    (tmp_path / "tokenizer.json").write_text(library.to_str())
    for name, contents in files.items():
        (tmp_path / f"{name}.json").write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return tmp_path


@given(TEXTS)
def test_byte_tokenizer_is_utf8_and_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x" + text]) == [ids, [120, *ids]]


def test_byte_tokenizer_covers_every_byte_and_one_end():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos_id == tokenizer.pad_id == tokenizer.token_id("<eos>") == 256
    assert tokenizer.bos_id is None
    assert len({tokenizer.token(i) for i in range(257)}) == 257
    # "é" cut in the middle is still an id sequence, and the end is left out of the text.
    assert tokenizer.decode([104, 105, 256]) == "hi"
    assert tokenizer.decode([104, 105, 256], special_tokens=True) == "hi<eos>"


def test_special_token_strings_stay_text_unless_asked_for():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("a<eos>") == list(b"a<eos>")
    assert tokenizer.encode_batch(["<eos>"]) == [list(b"<eos>")]
    assert tokenizer.encode("a<eos>", special_tokens=True) == [97, 256]
    # The second call must not have changed the first one's setting, nor must a copy lose it.
    assert tokenizer.encode("<eos>") == list(b"<eos>")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("<eos>") == list(b"<eos>")


def test_tokenizers_compare_and_hash_by_contents():
    first, second = byte_tokenizer(), pickle.loads(pickle.dumps(byte_tokenizer()))
    first.encode("fills the cache")
    assert first == second and hash(first) == hash(second) and first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64
    with pytest.raises(AttributeError):
        first.eos_id = 3


def test_byte_tokenizer_json_is_what_the_library_would_write():
    written = json.loads(tokenizers.Tokenizer.from_str(byte_tokenizer().json).to_str())
    ours = json.loads(byte_tokenizer().json)
    assert written["model"] == ours["model"] and written["added_tokens"] == ours["added_tokens"]
    assert written["pre_tokenizer"] == ours["pre_tokenizer"]


def test_save_and_load_round_trip(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "model")
    assert load_tokenizer(tmp_path / "model") == tokenizer
    assert load_tokenizer(tmp_path / "model" / "tokenizer.json") == tokenizer
    tokenizer.save(tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<eos>" and config["bos_token"] is None


def test_save_refuses_other_contents(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HypenetError, match="exists with other contents"):
        byte_tokenizer().save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_special_ids_from_tokenizer_config_then_generation_config(tmp_path):
    directory = model_directory(
        tmp_path,
        tokenizer_config={"eos_token": {"content": "<end>"}, "bos_token": "<s>", "pad_token": None},
        generation_config={"eos_token_id": [6, 3], "pad_token_id": 4},
        config={"eos_token_id": 5, "bos_token_id": 0},
    )
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (6, 4, 5)
    assert tokenizer.stop_ids == (6, 3)
    assert tokenizer.vocab_size == 7


def test_special_ids_from_config_alone(tmp_path):
    tokenizer = load_tokenizer(model_directory(tmp_path, config={"eos_token_id": 3}))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.stop_ids) == (3, 3, None, (3,))


def test_eos_ids_come_first(tmp_path):
    directory = model_directory(tmp_path, config={"eos_token_id": 3})
    tokenizer = load_tokenizer(directory, eos_ids=[6, 3])
    assert tokenizer.eos_id == 6 and tokenizer.stop_ids == (6, 3)


def test_a_single_usual_name_ends_a_document(tmp_path):
    assert load_tokenizer(model_directory(tmp_path)).eos_id == 3


def test_truncation_and_padding_of_the_file_are_dropped(tmp_path):
    library = word_level(["a", "b"], ["</s>"])
    library.enable_truncation(2)
    library.enable_padding(length=4)
    tokenizer = load_tokenizer(model_directory(tmp_path, library))
    assert tokenizer.encode("a b a b a") == [0, 1, 0, 1, 0]
    assert tokenizer.encode_batch(["a", "a b"]) == [[0], [0, 1]]


def test_no_specials_are_added(tmp_path):
    library = word_level(["a"], ["</s>"])
    library.post_processor = tokenizers.processors.TemplateProcessing("</s> $A </s>", special_tokens=[("</s>", 1)])
    tokenizer = load_tokenizer(model_directory(tmp_path, library))
    assert tokenizer.encode("a") == [0] and tokenizer.encode_batch(["a"]) == [[0]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "<gone>"),
        ({"generation_config": {"eos_token_id": 99}}, "no token 99"),
        ({"config": {"eos_token_id": 3, "pad_token_id": -1}}, "no token -1"),
        ({"config": "{"}, "broken json"),
        ({"config": "[]"}, "object"),
    ],
)
def test_wrong_special_ids(tmp_path, files, message):
    with pytest.raises(HypenetError, match=message):
        load_tokenizer(model_directory(tmp_path, **files))


def test_missing_broken_and_endless_tokenizers(tmp_path):
    with pytest.raises(HypenetError, match="no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(HypenetError, match="no tokenizer.json"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(HypenetError, match="is no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(HypenetError, match="UTF-8"):
        load_tokenizer(tmp_path)
    model_directory(tmp_path, word_level(["a"], ["<other>"]))
    with pytest.raises(HypenetError, match="pass eos_ids"):
        load_tokenizer(tmp_path)
