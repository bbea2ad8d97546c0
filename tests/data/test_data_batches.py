"""A stage sees each token of its range once, whoever reads them; a position is saved and set exactly."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.data.batches import StageBatches, batch_of, document_windows
from hypenet_jax.data.packing import PackedTokens, pack
from hypenet_jax.data.sources import Document
from hypenet_jax.data.tokenizers import byte_tokenizer
from hypenet_jax.errors import HypenetError

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("batches") / "tokens"
    texts = [f"{i} " + "word " * (i % 17) for i in range(120)]
    pack((Document("s", t) for t in texts), TOKENIZER, directory, seed=0, block=32, shard_tokens=640)
    return PackedTokens(directory)


def stage(packed, **options):
    return StageBatches(packed, **{"seq_len": 16, "batch_size": 4, "start_token": 0, "steps": 10, "seed": 3, **options})


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@given(seq_len=st.integers(1, 70), batch_size=st.integers(1, 6), start=st.integers(0, 20000), steps=st.integers(1, 9))
def test_each_token_of_the_range_once(packed, seq_len, batch_size, start, steps):
    batches = stage(packed, seq_len=seq_len, batch_size=batch_size, start_token=start, steps=steps)
    assert batches.stop_token == start + steps * batch_size * seq_len
    rows = [(tuple(t), tuple(g)) for batch in batches for t, g in zip(batch["tokens"], batch["targets"], strict=True)]
    tokens, _ = packed.slice(start, batches.stop_token + 1)
    expected = [
        (tuple(tokens[i : i + seq_len]), tuple(tokens[i + 1 : i + seq_len + 1]))
        for i in range(0, len(tokens) - 1, seq_len)
    ]
    assert sorted(rows) == sorted(expected)


def test_stages_go_on_where_the_last_one_stopped(packed):
    first = stage(packed)
    second = stage(packed, start_token=first.stop_token)
    seen = np.sort(np.concatenate([batch["tokens"] for batch in itertools.chain(first, second)]), axis=0)
    once = np.concatenate([batch["tokens"] for batch in stage(packed, steps=20)])
    np.testing.assert_array_equal(seen, np.sort(once, axis=0))


def test_an_epoch_is_every_token_of_the_corpus(packed):
    total = len(packed)
    batches = stage(packed, seq_len=1, batch_size=total, steps=1, start_token=total // 2)
    tokens = next(batches)["tokens"]
    np.testing.assert_array_equal(np.sort(tokens[:, 0]), np.sort(packed.slice(0, total)[0]))


def test_rows_are_shuffled_by_the_seed(packed):
    a, b, c = ([batch["tokens"] for batch in stage(packed, seed=seed)] for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(np.ravel(a), packed.slice(0, np.size(a))[0])


@given(st.lists(st.booleans(), min_size=2, max_size=40))
def test_segments_and_loss_mask(starts):
    starts_BS = np.array([starts, starts[::-1]])
    tokens_BS = np.arange(starts_BS.size, dtype=np.int32).reshape(starts_BS.shape)
    batch = batch_of(tokens_BS, starts_BS)
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32", "targets": "int32", "segment_ids": "int32", "loss_mask": "bool",
    }  # fmt: skip
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    for row in range(2):
        document = 0
        for t in range(len(starts) - 1):
            document += bool(t and starts_BS[row, t])
            assert batch["segment_ids"][row, t] == document
            assert batch["loss_mask"][row, t] == (not starts_BS[row, t + 1])


def test_batches_of_text(packed):
    batches = stage(packed, seq_len=100)
    for batch in batches:
        ended = batch["tokens"] == TOKENIZER.eos_id
        np.testing.assert_array_equal(batch["loss_mask"], ~ended)
        np.testing.assert_array_equal(np.diff(batch["segment_ids"]), ended[:, :-1])
        assert not batch["segment_ids"][:, 0].any()
        np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 3], [1], [2]], [[0, 1, 2, 3], [1, 2]]])
def test_processes_read_their_rows_of_the_same_global_batches(packed, shares):
    parts = [(rows, stage(packed, rows=rows)) for rows in shares]
    for whole in stage(packed):
        for rows, part in parts:
            assert_same(next(part), {name: array[rows] for name, array in whole.items()})


@pytest.mark.parametrize("step", [0, 1, 7, 10])
def test_resume_equals_uninterrupted(packed, step):
    interrupted, whole = stage(packed), list(stage(packed))
    for _ in range(step):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    resumed = stage(packed)
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    rest = list(resumed)
    assert len(rest) == 10 - step
    for left, right in zip(rest, whole[step:], strict=True):
        assert_same(left, right)


def test_resume_in_another_number_of_processes(packed):
    first = stage(packed)
    whole = list(first)
    half = stage(packed)
    for _ in range(4):
        next(half)
    parts = [stage(packed, rows=rows) for rows in ([0, 1], [2, 3])]
    for part in parts:
        part.set_state(half.get_state())
    shares = [next(part) for part in parts]
    assert_same(whole[4], {name: np.concatenate([share[name] for share in shares]) for name in whole[4]})


def test_setting_a_position_reads_nothing_before_it(packed, monkeypatch):
    far = stage(packed, steps=100_000)
    reads = []
    rows = PackedTokens.rows_with_prompts
    monkeypatch.setattr(PackedTokens, "rows_with_prompts", lambda self, *args: reads.append(args) or rows(self, *args))
    far.set_state({**far.get_state(), "step": 99_990})
    next(far)
    far.close()
    assert 1 <= len(reads) <= 10


@pytest.mark.parametrize(
    "changed",
    [{"workers": 2}, {"seq_len": 8}, {"batch_size": 2}, {"seed": 4}, {"start_token": 64}, {"steps": 11}],
)
def test_a_position_of_another_stream_is_refused(packed, changed):
    state = stage(packed).get_state()
    name, value = next(iter(changed.items()))
    with pytest.raises(HypenetError, match=f"has {name} .* but this run has {value}"):
        stage(packed, **changed).set_state(state)


def test_a_position_in_other_data_is_refused(packed, tmp_path):
    pack([Document("s", "other text")], TOKENIZER, tmp_path / "p", seed=0)
    with pytest.raises(HypenetError, match="has data"):
        stage(PackedTokens(tmp_path / "p")).set_state(stage(packed).get_state())
    with pytest.raises(HypenetError, match="step 11 of 10"):
        stage(packed).set_state({**stage(packed).get_state(), "step": 11})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": [3, 4]}, r"rows are \[3, 4\]; give places 0..3"),
        ({"rows": [1, 0]}, r"rows are \[1, 0\]"),
        ({"rows": []}, r"rows are \[\]"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"start_token": -1}, "start_token is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"steps": 2**31}, "batch_size is 8589934592"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_wrong_arguments(packed, changed, message):
    with pytest.raises(HypenetError, match=message):
        stage(packed, **changed)


def test_worker_processes_give_the_same_batches(packed):
    batches = stage(packed, steps=5, workers=2)
    batches.set_state({**batches.get_state(), "step": 2})
    try:
        for left, right in zip(batches, list(stage(packed, steps=5))[2:], strict=True):
            assert_same(left, right)
    finally:
        batches.close()


def test_document_windows(packed):
    documents = list(packed.documents())
    long = [document for document in documents if len(document) > 60]
    windows = document_windows(packed, 60, 5)
    assert windows.shape == (5, 61) and windows.dtype == np.int32
    np.testing.assert_array_equal(windows, [document[:61] for document in long[:5]])
    assert len(document_windows(packed, 60, 10**6)) == len(long)
    assert document_windows(packed, 10**6, 3).shape == (0, 10**6 + 1)
    np.testing.assert_array_equal(document_windows([[1, 2], [3, 4, 5], [6, 7, 8, 9]], 2, 9), [[3, 4, 5], [6, 7, 8]])
    with pytest.raises(HypenetError, match="length 0"):
        document_windows(packed, 0, 1)


def test_joined_rows_are_one_document(packed):
    masked, joined = next(stage(packed)), next(stage(packed, joined=True))
    assert masked["segment_ids"].max() > 0 and not masked["loss_mask"].all()
    assert not joined["segment_ids"].any() and joined["loss_mask"].all()
    for name in ("tokens", "targets"):
        np.testing.assert_array_equal(masked[name], joined[name])
    with pytest.raises(HypenetError, match="joined"):
        stage(packed).set_state(stage(packed, joined=True).get_state())


KILLED = """
import multiprocessing, os, signal, sys
from hypenet_jax.data.batches import StageBatches
from hypenet_jax.data.packing import PackedTokens

if __name__ == "__main__":
    options = dict(seq_len=16, batch_size=4, start_token=0, steps=1000, seed=3, workers=2)
    batches = StageBatches(PackedTokens(sys.argv[1]), **options)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_that_read_ahead_end_with_a_run_that_was_killed(packed, tmp_path):
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    # Into a file: what still runs would keep a pipe open.
    with open(tmp_path / "said", "w") as said:
        subprocess.run([sys.executable, program, packed.directory], stdout=said, env=environment, timeout=120)
    workers = [int(pid) for pid in (tmp_path / "said").read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    try:
        while any(map(runs, workers)):
            assert time.monotonic() < deadline, "they run on"
            time.sleep(0.05)
    finally:
        for pid in filter(runs, workers):
            os.kill(pid, signal.SIGKILL)


def runs(pid):
    """Whether the process is there and no zombie that nobody has waited for."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
