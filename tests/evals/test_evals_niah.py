"""Needle samples keep RULER's rules at any length, and the two ways of scoring agree."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals import haystack, niah

PROSE = (
    "Mr. Smith went to the market. He bought apples, pears and e.g. plums. Did he pay? He did! "
    'The year was 1843. "Nobody knows," said J. Doe. Then it rained for forty days and the river rose.'
)


class ByteTokenizer:
    """Ids are bytes; 256 stands for <eos>."""

    vocab_size = 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class WordTokenizer:
    """Pieces of at most 3 characters that never span a blank: encoding is not a fixed width a word."""

    def __init__(self):
        self.pieces, self.ids = [], {}

    def encode(self, text):
        ids = []
        for word in text.replace(" ", "\x00 ").split("\x00"):
            for i in range(0, len(word), 3):
                piece = word[i : i + 3]
                if piece not in self.ids:
                    self.ids[piece] = len(self.pieces)
                    self.pieces.append(piece)
                ids.append(self.ids[piece])
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


TOKENIZERS = {"bytes": ByteTokenizer(), "words": WordTokenizer()}


@hypothesis.given(
    task=st.sampled_from(["S1", "S2", "S3"]),
    name=st.sampled_from(sorted(TOKENIZERS)),
    length=st.integers(640, 3000),
    depth=st.none() | st.floats(0, 100),
    seed=st.integers(0, 1000),
)
def test_samples_fill_their_length_and_hold_one_needle(task, name, length, depth, seed):
    tokenizer = TOKENIZERS[name]
    depths = None if depth is None else [depth]
    samples = niah.make_samples(task, tokenizer, length, 2, depths, seed, essays=[PROSE])
    unit = len(tokenizer.encode(haystack.NOISE_LINE + "\n")) if task == "S1" else len(tokenizer.encode(" forty")) + 6
    for sample in samples:
        text = tokenizer.decode(sample.prompt_ids)
        kind = "uuid" if task == "S3" else "number"
        assert sample.task == (task if task == "S1" else f"{task}-like")
        assert length - niah.ANSWER_BUDGET - 2 * unit <= len(sample.prompt_ids) <= length - niah.ANSWER_BUDGET
        assert text.count("One of the special magic") == 1
        assert text.count(sample.answer_text) == 1
        assert text.startswith(f"A special magic {kind} is hidden within the following text.")
        assert text.endswith(" mentioned in the provided text is")
        assert tokenizer.decode(sample.answer_ids) == " " + sample.answer_text
        assert tokenizer.decode(sample.alternative_ids) == ": " + sample.answer_text
        assert sample.depth == depth if depth is not None else 0 <= sample.depth <= 100


@hypothesis.given(task=st.sampled_from(["S1", "S2"]), depth=st.integers(0, 100))
def test_the_needle_lies_at_its_depth(task, depth):
    sample = niah.make_samples(task, ByteTokenizer(), 6000, 1, [depth], essays=[PROSE])[0]
    text = bytes(sample.prompt_ids).decode()
    context = text.split("\n", 1)[1].rsplit("\n", 1)[0]
    before, after = context.split("One of the special magic")
    share = len(before) / (len(before) + len(after.split(": ", 1)[1]))
    assert share == pytest.approx(depth / 100, abs=0.04)


def test_the_needle_stands_between_whole_sentences():
    words = PROSE.split()
    ends = [words[end - 1] for end in haystack.sentence_ends(words)]
    assert ends == ["market.", "plums.", "pay?", "did!", "1843.", "Doe."]


def test_random_depths_are_rulers():
    drawn = {s.depth for s in niah.make_samples("S2", ByteTokenizer(), 1500, 60, essays=[PROSE])}
    assert drawn <= {float(d) for d in haystack.RULER_DEPTHS}
    assert len(drawn) > 20
    assert haystack.RULER_DEPTHS[:4] == (0, 3, 5, 8) and haystack.RULER_DEPTHS[-1] == 100


def test_samples_are_deterministic_and_ask_the_same_at_every_length():
    short, again, long = (niah.make_samples("S1", ByteTokenizer(), n, 3, seed=7) for n in (800, 800, 1600))
    assert short == again
    assert [s.answer_text for s in short] == [s.answer_text for s in long]
    assert short != niah.make_samples("S1", ByteTokenizer(), 800, 3, seed=8)


@pytest.mark.parametrize("task", ["S1", "S2", "S3"])
def test_a_short_length_names_the_smallest_that_works(task):
    with pytest.raises(HypenetError, match=r"the smallest is \d+$") as error:
        niah.make_samples(task, ByteTokenizer(), 300, 3, essays=[PROSE])
    smallest = int(str(error.value).split()[-1])
    assert len(niah.make_samples(task, ByteTokenizer(), smallest, 3, essays=[PROSE])) == 3
    with pytest.raises(HypenetError):
        niah.make_samples(task, ByteTokenizer(), smallest - 1, 3, essays=[PROSE])


def test_512_bytes_are_enough_with_a_small_answer_budget():
    for task, budget in (("S1", 16), ("S2", 64), ("S3", 48)):
        samples = niah.make_samples(task, ByteTokenizer(), 512, 4, essays=[PROSE], answer_budget=budget)
        assert all(len(s.prompt_ids) + budget <= 512 for s in samples)


def test_a_chat_template_and_a_bos_count_in_the_length():
    wrap = "<user>{}</user>".format
    sample = niah.make_samples("S1", ByteTokenizer(), 900, 1, wrap=wrap, first_ids=[256])[0]
    text = ByteTokenizer().decode(sample.prompt_ids)
    assert sample.prompt_ids[0] == 256
    assert text.startswith("<user>A special magic") and "</user> The special magic number" in text
    assert len(sample.prompt_ids) <= 900 - niah.ANSWER_BUDGET


def test_essays_are_named_after_their_source(tmp_path):
    folder = tmp_path / "PaulGrahamEssays"
    folder.mkdir()
    (folder / "a.txt").write_text(PROSE)
    (tmp_path / "other.json").write_text('{"text": "Some words. Other words."}')
    (tmp_path / "bad.json").write_text("{")
    assert niah.make_samples("S2", ByteTokenizer(), 900, 1, essays=folder)[0].task == "S2"
    assert niah.make_samples("S3", ByteTokenizer(), 900, 1, essays=str(tmp_path / "other.json"))[0].task == "S3-like"
    for bad in (None, [], tmp_path / "missing", tmp_path / "bad.json"):
        with pytest.raises(HypenetError):
            niah.make_samples("S2", ByteTokenizer(), 900, 1, essays=bad)


@pytest.mark.parametrize(
    "wrong",
    [{"task": "S4"}, {"count": 0}, {"depths": []}, {"depths": [101]}, {"answer_budget": 0}, {"answer_budget": 5}],
)
def test_wrong_requests_are_named(wrong):
    request = {"task": "S1", "tokenizer": ByteTokenizer(), "length": 900, "count": 1} | wrong
    with pytest.raises(HypenetError):
        niah.make_samples(**request)


@dataclasses.dataclass(frozen=True)
class Copier:
    """A fake model that has seen the needle: after the text's last "is" it repeats what followed the needle's "is".

    Its hidden state is the one-hot of the next byte: the byte that followed the latest earlier place with the same
    `memory` preceding bytes. A small memory confuses places, which makes it err on some samples.
    """

    memory: int
    vocab: int = 257

    def hidden(self, params, tokens_BT, segment_ids=None):
        shifted = [jnp.pad(tokens_BT, ((0, 0), (i, 0)), constant_values=-1)[:, : tokens_BT.shape[1]] for i in range(64)]
        return self._predict(jnp.stack(shifted[: self.memory], -1), tokens_BT)

    def _predict(self, grams_BTM, tokens_BT):
        length = tokens_BT.shape[1]
        same = jnp.all(grams_BTM[:, :, None] == grams_BTM[:, None], axis=-1)
        earlier = jnp.arange(length)[None, :] < jnp.arange(length)[:, None]
        found = jnp.where(same & earlier, jnp.arange(length), -1).max(axis=-1)
        following = jnp.take_along_axis(tokens_BT, jnp.clip(found + 1, 0, length - 1), axis=1)
        return jax.nn.one_hot(jnp.where(found >= 0, following, 0), self.vocab)

    def head(self, params):
        return jnp.eye(self.vocab)

    def init_cache(self, batch, max_len):
        return {"length": jnp.zeros((batch,), jnp.int32), "tokens": jnp.full((batch, max_len), -2, jnp.int32)}

    def step(self, params, tokens_BT, cache, valid_BT=None):
        width = cache["tokens"].shape[1]
        positions = cache["length"][:, None] + jnp.cumsum(valid_BT, axis=1) - 1
        rows = jnp.arange(tokens_BT.shape[0])[:, None]
        tokens = cache["tokens"].at[rows, jnp.where(valid_BT, positions, width)].set(tokens_BT, mode="drop")
        hidden = jnp.take_along_axis(self.hidden(params, tokens), jnp.maximum(positions, 0)[..., None], axis=1)
        return hidden, {"length": cache["length"] + valid_BT.sum(axis=1), "tokens": tokens}


def greedy(model, params, prompts, max_new_tokens, temperature=0.0):
    """Reference generation, one prompt at a time, without a cache."""
    step = jax.jit(lambda tokens: jnp.argmax(model.hidden(params, tokens) @ model.head(params), -1))
    outputs, width = [], max(map(len, prompts)) + max_new_tokens
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_new_tokens):
            row = jnp.asarray([ids + [0] * (width - len(ids))])
            ids.append(int(step(row)[0, len(ids) - 1]))
        outputs.append(ids[len(prompt) :])
    return outputs


def copy_samples(count):
    """Prompts whose continuation a Copier knows to different degrees: "key=value; ... key="."""
    samples = []
    for i in range(count):
        value = f"{7 * i + 11}x{i}"
        noise = f"{'y=1;' * i}" if i % 2 else ""
        prompt = f"ab=5;q{'abc'[i % 3]}={': ' if i % 4 == 3 else ' '}{value};{noise}ab=5;q{'abc'[i % 3]}="
        ids = tuple(prompt.encode())
        answer, other = (tuple((lead + value).encode()) for lead in (" ", ": "))
        samples.append(niah.NiahSample(ids, value, answer, "S1", (48, 80)[i % 2], 10.0 * i, other))
    return samples


@pytest.mark.parametrize("memory", [2, 3, 6])
def test_forced_and_generated_scores_agree(memory):
    model, samples = Copier(memory), copy_samples(7)
    generated = niah.score(model, None, ByteTokenizer(), samples, greedy, 9, batch_size=4)
    begins = [
        text.startswith((" " + s.answer_text, ": " + s.answer_text))
        for s, text in zip(samples, generated.texts, strict=True)
    ]
    forced = niah.score_forced(model, None, samples, batch_size=4)
    assert list(forced.correct) == begins
    assert all(g or not f for f, g in zip(forced.correct, generated.correct, strict=True))
    assert any(forced.correct)
    assert niah.score_forced(model, None, samples, batch_size=3, prefill_chunk=32).correct == forced.correct
    # Samples of 48 and of 80 tokens side by side in rows of 96.
    assert niah.score_forced(model, None, samples, batch_size=4, row_length=96).correct == forced.correct
    strict = niah.score_forced(model, None, samples, batch_size=4, alternatives=False)
    assert sum(strict.correct) < sum(forced.correct)


def test_a_score_fills_the_rows_of_eval_json():
    samples = copy_samples(4)
    texts = [f"so {s.answer_text.upper()}." if i % 2 else "no" for i, s in enumerate(samples)]
    calls = []

    def generate_fn(model, params, prompts, max_new_tokens, temperature):
        calls.append((len(prompts), max_new_tokens, temperature))
        return [list(texts[[s.prompt_ids for s in samples].index(tuple(p))].encode()) for p in prompts]

    result = niah.score("model", None, ByteTokenizer(), samples, generate_fn, 12, batch_size=3)
    assert result.correct == (False, True, False, True)
    assert result.accuracy == 0.5
    assert calls == [(3, 12, 0.0), (3, 12, 0.0)]
    assert result.rows[0] == {"task": "S1", "length": 48, "depth": 0.0, "correct": 0, "total": 1}
    assert sum(row["total"] for row in result.rows) == 4
    with pytest.raises(HypenetError):
        niah.score_forced(Copier(2), None, [])
    with pytest.raises(HypenetError, match="but the length is 20; raise it"):
        niah.score_forced(Copier(2), None, samples, row_length=20)
