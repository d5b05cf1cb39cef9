"""The matrix of dependence as tables and as a picture."""

import io
import json

import matplotlib.image
import numpy as np
import pytest

from mixlab.inject.analysis.dependence import Dependence, dependence
from mixlab.report.dependence import as_markdown, findings, write_dependence
from tests.inject.analysis.test_dependence import NAMES, outcomes

FACTS = {
    "run": "runs/trunk",
    "step": 1000,
    "steps": 100,
    "share": 0.01,
    "outcomes": {n: {"accuracy": n == "a", "items": 40, "before": 0.25, "baseline": 0.5} for n in ("a", "c")},
    "losses": {},
}


@pytest.fixture(scope="module")
def matrix():
    b = np.zeros((3, 3))
    b[0, 2] = 0.5
    return dependence(outcomes(b, items=200) | {"b": None})


def test_files(matrix, tmp_path):
    write_dependence(matrix, FACTS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dependence-dark.png", "dependence.json", "dependence.md", "dependence.png", "index.html",
    ]  # fmt: skip
    values = json.loads((tmp_path / "dependence.json").read_text())
    again = Dependence.from_json(json.dumps(values["matrix"]))
    np.testing.assert_array_equal(again.effects, matrix.effects)
    assert values["step"] == 1000
    assert matplotlib.image.imread(io.BytesIO((tmp_path / "dependence.png").read_bytes())).std() > 0.05
    page = (tmp_path / "index.html").read_text()
    assert page.count('class="flagged"') == 1 and "a on c" in page


def test_markdown(matrix):
    lines = as_markdown(matrix, FACTS).splitlines()
    assert lines[0] == "| read | a (pp) | b | c |" and len(NAMES) == 3
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1] == "a" and cells[2].startswith("+") and cells[3] == "–"
    assert cells[4].startswith("**+0.4") and "±" in cells[4]
    assert float(cells[2].split()[0]) == pytest.approx(100 * matrix.effects[0, 0], abs=0.06)
    assert [line.split("|")[1].strip() for line in lines[5:8]] == [
        "ALL", "ALL less the diagonal", "ALL less the sum of its column",
    ]  # fmt: skip


def test_findings(matrix):
    one, two, three = findings(matrix)
    assert one == "1 of 2 cells off the diagonal differ from zero (level 0.05, Holm): a on c"
    assert two.startswith("1 of 2 are shown to be below 10%") and "effect on c differs" in three
