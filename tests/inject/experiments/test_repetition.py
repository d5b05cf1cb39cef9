import json

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.repetition import Repetition
from mixlab.inject.items import Where
from tests.inject.fakes import Memory, inserted, material

MATERIAL = material(row_length=128)


@pytest.fixture()
def experiment(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(20, 127, 30), 6, 127, 400]
    path = tmp_path / "news.jsonl"
    path.write_text("\n".join(json.dumps({"text": bytes(rng.integers(97, 123, n).tolist()).decode()}) for n in lengths))
    return Repetition(files=(str(path),), articles=2, holdout=5, copies=(1, 3))


def test_conditions_of_the_paper():
    names = [f"{kind}-x{n}" for kind in ("whole", "paragraphs", "redivided") for n in (1, 10, 100)]
    assert [f"{kind}-x{n}" for kind in ("whole", "paragraphs", "redivided") for n in Repetition().copies] == names


def test_every_condition_inserts_the_same_tokens_of_its_articles(experiment):
    groups = experiment.groups(MATERIAL)
    conditions = [condition for condition, _ in experiment._conditions(MATERIAL)]
    assert list(map(str, conditions)) == [f"{k}-x{c}" for k in ("whole", "paragraphs", "redivided") for c in (1, 3)]
    names = set()
    for (condition, articles), group in zip(experiment._conditions(MATERIAL), groups, strict=True):
        assert len(articles) == 2 and not names & set(articles)
        names |= set(articles)
        tokens = group.items.lengths.sum() * group.where.copies
        assert tokens == condition.copies * sum(map(len, articles.values()))
    assert [group.where.copies for group in groups] == [1, 3, 1, 3, 1, 1]
    assert [len(group.items) for group in groups] == [2, 2, 14, 14, 14, 42]


def test_paragraphs_are_the_article_divided_anew_each_time(experiment):
    _, articles = list(experiment._conditions(MATERIAL))[5]
    group = experiment.groups(MATERIAL)[5]
    for name, text in articles.items():
        cuts = set()
        for division in range(3):
            parts = [group.items[group.items.ids.index(f"{name}/{division}/{i}")] for i in range(7)]
            assert np.concatenate(parts).tolist() == text.tolist() and min(map(len, parts)) >= 1
            cuts.add(tuple(map(len, parts)))
        assert len(cuts) == 3


def test_losses_of_what_was_read_are_lower(experiment):
    (probe,) = experiment.probes(MATERIAL)
    known = inserted(experiment.groups(MATERIAL)[:1])
    found = probe.run(Memory(known, order=2))
    assert set(found) >= {"loss/whole-x1", "loss/redivided-x3", "loss/holdout"} and len(found) == 7
    assert found["loss/whole-x1"] < 1.5 < found["loss/holdout"]
    details = probe.details(Memory(known))
    assert len(details["outcome"]) == 12 and len(details["loss/holdout"]) == 5


def test_what_cannot_be_is_told(experiment):
    assert experiment.problems("experiments.x") == []
    for changes in (dict(files=()), dict(where=Where(copies=2)), dict(copies=(2, 2)), dict(paragraphs=1)):
        (problem,) = Repetition(**{**vars(experiment), **changes}).problems("experiments.x")
        assert problem.startswith(f"experiments.x.{next(iter(changes))}")
    with pytest.raises(UserError, match="30 of 33 articles have 7 to 126 tokens, but conditions and holdout take 65"):
        Repetition(**{**vars(experiment), "articles": 10}).groups(MATERIAL)
