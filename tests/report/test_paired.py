"""Differences of runs item by item, and benchmarks in reports."""

import json
import math

import numpy as np
import pytest

from mixlab.evals.items import read_items, write_items
from mixlab.report import benchmarks, tables
from mixlab.report.page import write_report
from mixlab.report.paired import in_documents, in_items
from mixlab.report.runs import read_runs
from tests.report.test_report import Page, make_run

ITEMS, DOCUMENTS = 60, 40


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs of the same questions and documents, which differ far less from run to run than from item to item."""
    place, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    hard, easy = rng.normal(3, 1, ITEMS), rng.random(ITEMS)
    sizes = rng.integers(50, 500, DOCUMENTS)
    nats = sizes * rng.normal(1.5, 0.4, DOCUMENTS)
    for index, name in enumerate(("first", "second")):
        path = make_run(place / name, name=name)
        bits = hard - 0.05 * index + 0.02 * rng.normal(size=ITEMS)
        score = (easy < 0.5).astype(float)
        metrics = {"score": score, "acc": 1 - score, "bits_per_byte": bits}
        items = {f"quiz/{key}": values for key, values in metrics.items()} | {
            "quiz/id": np.array([f"q{i}" for i in range(ITEMS)]),
            "code/id": np.array([f"d{i}" for i in range(DOCUMENTS)]),
            "code/nats": nats * (1 - 0.01 * index) + rng.normal(size=DOCUMENTS),
            "code/tokens": sizes,
            "code/bytes": sizes,
        }
        write_items(path, 60, items)
        record = {"step": 60, "tokens": 3840, "eval/quiz/items": ITEMS}
        for key, values in metrics.items():
            record |= {f"eval/quiz/{key}": values.mean(), f"eval/quiz/{key}_se": values.std(ddof=1) / math.sqrt(ITEMS)}
        record |= {
            "eval/other/score": 0.5,
            "eval/other/score_se": 0.1,
            "eval/tasks/score": 0.5,
            "eval/tasks/score_se": 0.1,
        }
        (path / "evaluations.jsonl").write_text(json.dumps(record) + "\n")
        config = json.loads((path / "config.json").read_text())
        config["evaluation"] = {"tasks": {"quiz": {"format": "cloze", "shots": 5}}}
        (path / "config.json").write_text(json.dumps(config))
    return place / "first", place / "second"


def test_the_interval_is_that_of_the_paired_differences(pair):
    first, second = (read_items(path, 60) for path in pair)
    found = in_items(
        "quiz",
        *({k[5:]: v for k, v in one.items() if k.startswith("quiz/")} for one in (first, second)),
        "bits_per_byte",
    )
    change = second["quiz/bits_per_byte"] - first["quiz/bits_per_byte"]
    error = change.std() / math.sqrt(ITEMS)
    assert found.value == pytest.approx(change.mean())
    low, high = np.quantile(found.draws, [0.025, 0.975])
    assert low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)

    one, two = ({k[5:]: v for k, v in items.items() if k.startswith("code/")} for items in (first, second))
    found = in_documents("code", one, two)
    gain, sizes = (two["nats"] - one["nats"]) / math.log(2), one["bytes"]
    value = gain.sum() / sizes.sum()
    error = math.sqrt(np.square(gain - value * sizes).sum()) / sizes.sum()
    assert found.value == pytest.approx(value) and np.std(found.draws) == pytest.approx(error, rel=0.15)
    assert in_documents("code", one, two | {"bytes": sizes + 1}) is None
    assert in_documents("code", one, two | {"id": two["id"][::-1]}) is None and in_documents("code", one, {}) is None


def test_a_report_tells_small_differences_that_pairing_shows(pair, tmp_path):
    runs = read_runs(pair)
    score, bits, other, average = benchmarks.comparison(runs)
    assert (score["differences"][0].value, score["differences"][0].interval) == ("+0.0000", "+0.0000 to +0.0000")
    assert not score["differences"][0].clear
    (change,) = bits["differences"]
    assert change.clear and change.value.startswith("−0.0") and change.interval.startswith("−0.0")
    for row in (other, average):  # nothing to pair by
        assert row["differences"][0].error == "0.1414" and not row["differences"][0].interval
    code, odd, macro = tables.comparison(runs)
    assert code["differences"][0].interval and code["differences"][0].clear
    assert odd["differences"][0].error and macro["differences"][0].error
    page = Page(write_report(pair, tmp_path / "pair"))
    cells = page.row("bits per byte of the right answer")
    assert "95 % interval" in page.all and f"({change.interval})" in cells[3]

    alone = Page(write_report(pair[:1], tmp_path / "alone"))
    row = alone.row("quiz")
    assert row[1] == "cloze, 5 shots" and row[-1] == str(ITEMS) and len(row) == 6
    assert (
        row[2]
        == f"{read_items(pair[0], 60)['quiz/score'].mean():.4f} ± {runs[0].series('eval/quiz/score_se').last:.4f}"
    )
    assert alone.row("mean")[2].startswith("0.5000")
    assert "quiz" not in {row[0] for table in alone.tables if table[0][0] == "set" for row in table}


def test_means_are_paired_where_all_their_parts_are(pair):
    runs = read_runs(pair)
    for path in pair:
        items = read_items(path, 60)
        write_items(path, 60, {f"odd/name $x$ <b>{key[4:]}": items[key] for key in items if key.startswith("code/")})
    _, _, macro = tables.comparison(runs)
    assert macro["differences"][0].interval and not macro["differences"][0].error
