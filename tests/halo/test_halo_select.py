"""Layer selection: the published layers, every method, ties, and tables that do not fit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypenet_jax.cli import main
from hypenet_jax.errors import HypenetError
from hypenet_jax.halo import select
from hypenet_jax.halo.settings import SELECTION_METHODS

CSR, RECALL = [0.5, 0.4, 0.5, 0.3], [0.2, 0.9, 0.4, 0.1]
KL = [0.3, 0.1, 0.2, 0.4]
scores_of = st.integers(1, 12).flatmap(
    lambda layers: st.tuples(*[st.lists(st.floats(0, 1), min_size=layers, max_size=layers)] * 3)
)


@pytest.fixture(scope="module")
def published(shared):
    return shared / "sweep" / "qwen3-1.7b.json"


def test_the_published_scores_give_the_published_layers(published):
    scores = select.read_scores(published)
    assert select.choose(scores, 28, "halo") == (2, 3, 6, 8, 9, 21, 25)
    ranked = select.rank(scores["csr"], scores["recall"])
    assert ranked[0] == 3
    assert sorted(ranked[:7]) == [2, 3, 6, 8, 9, 21, 25]


def test_tasks_are_averaged(published):
    rows = json.loads(published.read_text())["layers"]
    scores = select.read_scores(published)
    assert scores["recall"][5] == pytest.approx(np.mean(list(rows[5]["recall"].values())), abs=1e-12)
    assert scores["csr"][27] == pytest.approx(np.mean(list(rows[27]["csr"].values())), abs=1e-12)


def test_the_published_rule_by_hand():
    # Largest C is 0.5 (layers 0 and 2, clipped at 50), largest R is 0.9.
    expected = [50.0, 0.0, 50.0, 0.8 / (0.2 + 1e-10)]
    np.testing.assert_allclose(select.importance(CSR, RECALL), expected, rtol=1e-12)
    assert select.rank(CSR, RECALL) == [0, 2, 3, 1]
    assert select.rank(CSR, RECALL, clip=1e12) == [0, 2, 3, 1]
    assert select.rank(CSR, RECALL, eps=1.0) == [0, 3, 2, 1]


def test_the_baselines_by_hand():
    assert select.rank(CSR, RECALL, "jet-nemotron") == [3, 0, 2, 1]
    assert select.rank(CSR, RECALL, "kl-ls", kl=KL) == [3, 0, 2, 1]
    assert select.choose({"kl": KL}, 4, "kl-ls", 2) == (0, 3)
    # The layer whose attention brings the all-Lightning model nearest to the teacher comes first.
    assert select.rank(CSR, RECALL, "kl-ls-restored", restored_kl=KL) == [1, 2, 0, 3]
    assert select.choose({"restored_kl": KL}, 4, "kl-ls-restored", 2) == (1, 2)
    assert select.choose({"gate": [0.1, -3.0, 2.0, 0.4]}, 4, "gate-search", 2) == (2, 3)
    assert select.choose({"recall": RECALL}, 4, "jet-nemotron") == (3,)
    assert select.choose({}, 28, "evenly") == (3, 7, 11, 15, 19, 23, 27)
    assert select.choose({}, 28, "latter-half") == (15, 17, 19, 21, 23, 25, 27)
    assert select.choose({}, 28, "none") == ()
    assert select.choose({}, 6, "latter-half", 3) == (3, 4, 5)
    assert select.choose({}, 3, "evenly") == ()


def test_equal_scores_go_by_index():
    assert select.rank([0.5] * 5, [0.5] * 5) == [0, 1, 2, 3, 4]
    assert select.rank([0.5] * 5, [0.5] * 5, "jet-nemotron") == [0, 1, 2, 3, 4]
    assert select.choose({"csr": [0.5] * 8, "recall": [0.5] * 8}, 8, "halo") == (0, 1)


def test_layers_at_the_clip_go_by_their_drop_in_recall():
    # What a probe of 64 choices gave on SmolLM2: the same accuracy without any layer (docs/results/selection-smollm2).
    csr, recall = [0.9375] * 8, [0.98, 0.97, 0.99, 0.75, 0.94, 0.98, 0.99, 0.96]
    assert select.rank(csr, recall) == [3, 4, 7, 1, 0, 5, 2, 6]
    assert select.choose({"csr": csr, "recall": recall}, 8, "halo") == (3, 4)
    assert select.choose({"recall": recall}, 8, "jet-nemotron") == (3, 4)


@given(scores_of, st.sampled_from(SELECTION_METHODS))
def test_a_rank_is_a_permutation(scores, method):
    csr, recall, kl = scores
    ranked = select.rank(csr, recall, method, kl=kl, restored_kl=kl, gate=kl)
    assert sorted(ranked) == list(range(len(csr)))


@given(scores_of, st.sampled_from(sorted(select.NEEDS)), st.data())
def test_the_chosen_layers_are_the_first_of_the_rank(scores, method, data):
    csr, recall, kl = scores
    keep = data.draw(st.integers(0, len(csr)))
    others = {"kl": kl, "restored_kl": kl, "gate": kl}
    chosen = select.choose({"csr": csr, "recall": recall, **others}, len(csr), method, keep)
    assert list(chosen) == sorted(select.rank(csr, recall, method, **others)[:keep])


@given(st.integers(1, 40), st.sampled_from(["evenly", "latter-half"]), st.data())
def test_layers_by_position_are_distinct_and_ascend(num_layers, method, data):
    first = num_layers // 2 if method == "latter-half" else 0
    keep = data.draw(st.integers(0, num_layers - first))
    chosen = select.choose({}, num_layers, method, keep)
    assert len(chosen) == keep
    assert list(chosen) == sorted(set(chosen))
    assert all(first <= layer < num_layers for layer in chosen)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: select.rank(CSR, RECALL, "best"), "method is 'best'"),
        (lambda: select.rank(CSR, RECALL[:3]), r"csr has shape \(4,\) and recall \(3,\)"),
        (lambda: select.rank([], []), "at least one"),
        (lambda: select.rank(CSR, RECALL, "kl-ls"), "give kl"),
        (lambda: select.rank(CSR, RECALL, "kl-ls", kl=KL[:2]), "one value a layer"),
        (lambda: select.rank(CSR, RECALL, "gate-search", gate=[float("nan")] * 4), "gate scores .* not finite"),
        (lambda: select.choose({"kl": KL}, 4, "kl-ls-restored"), "needs the restored_kl score"),
        (lambda: select.rank(CSR, [0.1, float("nan"), 0.1, 0.1]), "recall scores .* not finite"),
        (lambda: select.rank(CSR, RECALL, "kl-ls", kl=[0.1, 0.1, float("inf"), 0.1]), "kl scores .* not finite"),
        (lambda: select.choose({}, 4, "halo"), "needs the csr score"),
        (lambda: select.choose({"csr": CSR, "recall": RECALL}, 4, "kl-ls"), "needs the kl score"),
        (lambda: select.choose({"csr": CSR, "recall": RECALL}, 5, "halo"), "cover 4 layers but the model has 5"),
        (lambda: select.choose({"csr": CSR, "recall": RECALL}, 4, "halo", 5), "keep is 5 but the model has 4"),
        (lambda: select.choose({}, 4, "latter-half", 3), "keep is 3 but 'latter-half' has 2"),
        (lambda: select.choose({}, 4, "evenly", -1), "keep is -1"),
    ],
)
def test_what_cannot_be_ranked(call, words):
    with pytest.raises(HypenetError, match=words):
        call()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'layers'"),
        ('{"layers": 3}', "TypeError"),
        ('{"layers": []}', "without gaps"),
        ('{"layers": [{"layer": 1, "csr": 0.1, "recall": 0.1}]}', r"layers \[1\]"),
        ('{"layers": [{"layer": 0, "csr": 0.1, "recall": 0.1}, {"layer": 0, "csr": 0.1, "recall": 0.1}]}', "gaps"),
        ('{"layers": [{"layer": 0, "csr": 0.1}]}', "KeyError: 'recall'"),
        ('{"layers": [{"layer": 0, "csr": {}, "recall": 0.1}]}', "is no score"),
        ('{"layers": [{"layer": 0, "csr": "high", "recall": 0.1}]}', "ValueError"),
        ('{"layers": [{"layer": 0, "csr": NaN, "recall": 0.1}]}', "is no score"),
        ('{"layers": [{"layer": 0, "csr": 1, "recall": 1, "kl": 1}, {"layer": 1, "csr": 1, "recall": 1}]}', "'kl'"),
        ('{"layers": [{"layer": 0, "csr": 1, "recall": 1}, {"layer": 1, "csr": 1, "recall": 1, "kl": 1}]}', "'kl'"),
        ('{"layers": [{"layer": 0, "csr": 1' + 400 * "0" + ', "recall": 1}]}', "OverflowError"),
        ("[" * 100_000, "RecursionError"),
        ('{"layers": [{"layer": 0, "csr": [1], "recall": 1}]}', "is no score"),
        ('{"layers": [{"layer": 0, "csr": "0.5", "recall": 1}]}', "is no score"),
        ('{"layers": [{"layer": 0, "csr": true, "recall": 1}]}', "is no score"),
        ('{"layers": [{"layer": 0, "csr": {"a": {"b": 1}}, "recall": 1}]}', "is no score"),
        (
            '{"layers": [{"layer": 0, "csr": {"a": 1}, "recall": 1}, {"layer": 1, "csr": {"b": 1}, "recall": 1}]}',
            "csr of layer 1 is of the tasks b and that of layer 0 of the tasks a",
        ),
        (
            '{"layers": [{"layer": 0, "csr": {"a": 1}, "recall": 1}, {"layer": 1, "csr": 1, "recall": 1}]}',
            "csr of layer 1 is of no task by name and that of layer 0 of the tasks a",
        ),
    ],
)
def test_a_table_that_does_not_read(tmp_path, text, words):
    table = tmp_path / "scores.json"
    table.write_text(text)
    with pytest.raises(HypenetError, match=words) as caught:
        select.read_scores(table)
    assert str(table) in str(caught.value)


def test_a_table_in_any_order_with_kl(tmp_path):
    table = tmp_path / "scores.json"
    rows = [{"layer": i, "csr": {"a": i, "b": i + 1}, "recall": 0.1 * i, "kl": 1.0 - i} for i in (2, 0, 1)]
    table.write_text(json.dumps({"layers": rows}))
    assert select.read_scores(table) == {"csr": [0.5, 1.5, 2.5], "recall": [0.0, 0.1, 0.2], "kl": [1.0, 0.0, -1.0]}


@pytest.mark.parametrize("method", ["evenly", "none", "kl-ls", "halo"])
def test_a_table_of_another_model(tmp_path, convert_config, on_one_device, capsys, method):
    """The tiny teacher has two layers; a method that goes by position reads no score, but the table is as wrong."""
    rows = [{"layer": i, "csr": 0.5, "recall": 0.5, "kl": 0.5} for i in range(3)]
    (tmp_path / "scores.json").write_text(json.dumps({"layers": rows}))
    flags = ["--set", f"select.scores={tmp_path / 'scores.json'}", "--set", f"select.method={method}"]
    assert main(["select", "--config", str(convert_config), "--workdir", str(tmp_path / "run"), *flags]) == 2
    assert f"{tmp_path / 'scores.json'} covers 3 layers but the model has 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_table(tmp_path):
    with pytest.raises(HypenetError, match=r"nothing\.json is not a file"):
        select.read_scores(tmp_path / "nothing.json")
