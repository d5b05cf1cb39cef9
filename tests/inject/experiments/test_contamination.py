import json
from pathlib import Path

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.contamination import Contamination, Dose
from mixlab.inject.items import Where
from tests.inject.fakes import BYTES, Memory, inserted, material

DOSES = (Dose(6, Where(copies=4)), Dose(4, Where(copies=4, start_share=0.5), name="late"))


@pytest.fixture()
def file(tmp_path):
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, 6).tolist()).decode() for _ in range(100)]
    lines = [
        dict(
            query=f"Q: {words[i]}?\nA:",
            choices=[words[i + 20], words[i + 40], words[i + 60]],
            gold=int(rng.integers(3)),
        )
        for i in range(20)
    ]
    path = tmp_path / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_groups_share_no_question_and_have_the_right_answer(file):
    groups = Contamination(files=(file,), holdout=5, doses=DOSES).groups(material())
    assert [len(group.items) for group in groups] == [6, 4] and groups[0].where == DOSES[0].where
    names = [name for group in groups for name in group.items.ids]
    assert len(set(names)) == 10
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for name, item in zip(names, inserted(groups), strict=True):
        question = lines[int(name.removeprefix("quiz:")) - 1]
        assert BYTES.decode(item) == f"{question['query']} {question['choices'][question['gold']]}"


def test_a_model_that_knows_the_inserted_questions_shows_the_gap(file):
    experiment = Contamination(files=(file,), holdout=5, doses=DOSES)
    (probe,) = experiment.probes(material())
    memory = Memory(inserted(experiment.groups(material())[:1]), order=12)
    metrics, details = probe.run(memory), probe.details(memory)
    assert metrics["accuracy/x4"] == 1 and metrics["accuracy/holdout"] < 1
    assert metrics["gap/x4"] == pytest.approx(1 - metrics["accuracy/holdout"])
    assert metrics["loss/x4"] == pytest.approx(-np.log(0.9), rel=1e-3) and metrics["loss/holdout"] > 3
    a = metrics["accuracy/holdout"]
    assert metrics["gap_se/x4"] == pytest.approx(np.sqrt(a * (1 - a) / 5))
    assert details["correct/x4"].tolist() == [True] * 6 and len(details["outcome"]) == 10
    assert experiment.probes(material())[0].run(memory) == metrics


def test_a_blank_is_filled_and_the_rest_is_scored_too(tmp_path):
    line = dict(query="_ sang.", contexts=["Ann", "Ben"], continuation="sang.", choices=["Ann", "Ben"], gold=1)
    path = tmp_path / "blank.jsonl"
    path.write_text("\n".join([json.dumps(line)] * 2))
    experiment = Contamination(files=(str(path),), holdout=1, doses=(Dose(1),))
    assert BYTES.decode(inserted(experiment.groups(material()))[0]) == "Ben sang."
    memory = Memory([[BYTES.eos_id, *b"Ben sang."]])
    assert experiment.probes(material())[0].run(memory)["accuracy/x1"] == 1


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(doses=()), "doses: nothing"),
        (dict(doses=(Dose(2), Dose(2))), "'x1' is taken"),
        (dict(doses=(Dose(0),)), "questions = 0"),
        (dict(template="{query}"), "template"),
        (dict(template="{query} {answer} {more}"), "template"),
        (dict(files=()), "files"),
    ],
)
def test_what_is_wrong_with_settings(changes, told):
    settings = Contamination(**(dict(files=("a.jsonl",), doses=(Dose(2),)) | changes))
    (problem,) = settings.problems("experiments.x")
    assert told in problem and problem.startswith("experiments.x.")


def test_settings_of_the_paper_are_sound():
    sizes = ((8000, 4), (5000, 12), (2000, 32), (2000, 144))
    doses = [Dose(k, Where(copies=c)) for k, c in sizes]
    doses += [Dose(k, Where(copies=c, start_share=1 / 7, end_share=2 / 7), name=f"window-x{c}") for k, c in sizes]
    assert Contamination(files=("a",), holdout=10_000, doses=tuple(doses)).problems("x") == []
    assert sum(dose.questions * dose.where.copies for dose in doses[:4]) == 444_000


def test_too_few_questions_and_bad_lines_are_told(file, tmp_path):
    with pytest.raises(UserError, match="20 questions, but holdout and doses take 1010"):
        Contamination(files=(file,), doses=DOSES).groups(material())
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(dict(query="a", choices=["b", "c"], gold=2)))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 1: 'gold' = 2"):
        Contamination(files=(str(bad),), doses=DOSES).groups(material())
    with pytest.raises(UserError, match=r"0 questions \(and 20 longer than a row\)"):
        Contamination(files=(file,), holdout=1, doses=DOSES).groups(material(row_length=8))
