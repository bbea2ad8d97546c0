"""The table of a comparison of layer selection: overlap, means over seeds, intervals."""

import pytest

from hypenet_jax.errors import HypenetError
from hypenet_jax.evals.intervals import wilson
from hypenet_jax.evals.selection_table import overlap, selection_table, write_selection


def student(layers, correct, perplexity):
    niah = [{"task": "S1", "length": 512, "depth": depth, "correct": correct, "total": 4} for depth in (10.0, 90.0)]
    return {
        "layers": layers, "kl": 0.1, "tokens": 64, "seconds": 1.0, "perplexity": perplexity,
        "perplexity_by_position": [], "niah": niah,
    }  # fmt: skip


def choice(method, seed, layers, tokens=10):
    return {"method": method, "seed": seed, "layers": layers, "tokens": tokens, "seconds": 2.0 + seed}


@pytest.fixture
def table():
    settings = {
        "distill": {"steps": 1, "batch_size": 2, "seq_len": 32},
        "evaluate": {"perplexity_length": 128},
    }
    choices = [choice("gate-search", 0, [1]), choice("gate-search", 1, [2], 30)]
    choices += [choice("evenly", seed, [3], 0) for seed in (0, 1)]
    students = [student([1], 4, 2.0), student([2], 1, 4.0), student([3], 0, 9.0)]
    return selection_table(
        choices, students, student([], 4, 1.5), settings=settings, methods=("gate-search", "evenly"), num_layers=4,
        train_length=32, run={"seconds": {"teacher": 1.5}, "command": "hypenet <compare>", "device": "a cpu"},
    )  # fmt: skip


def test_overlap():
    assert overlap([(1, 2), (1, 2), (1, 3)]) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert overlap([(1, 2), (3, 4)]) == 0
    assert overlap([(1, 2)]) is None and overlap([(), ()]) is None


def test_a_method_is_the_mean_of_its_seeds(table):
    gates, evenly = table["methods"]
    assert gates["layers"] == [[1], [2]] and gates["kept_share"] == [0, 0.5, 0.5, 0]
    assert gates["overlap"] == 0 and evenly["overlap"] == 1 and table["chance_overlap"] == 0.25
    assert gates["perplexity"] == 3.0 and gates["tokens"] == 20 and gates["seconds"] == 2.5
    row = gates["accuracy"][0]
    # 8 and 2 of 8 needles: the mean is 5, and two seeds are not 16 needles.
    assert (row["correct"], row["total"], row["accuracy"]) == (5, 8, 5 / 8)
    assert (row["low"], row["high"]) == wilson(5, 8)


def test_the_page_of_a_table(table, tmp_path):
    page = write_selection(tmp_path, table).read_text()
    for word in ("gate-search", "0 to 32", "31 to 86", "2.000 to 4.000", "hypenet &lt;compare&gt;", "5/8"):
        assert word in page, word
    assert "Wall time, teacher</td><td>2 s" in page and "Seeds</td><td>0, 1<" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "table.json"]
    write_selection(tmp_path, table)
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(HypenetError, match="is not a page of hypenet_jax"):
        write_selection(tmp_path, table)
