"""Dynamic control of knowledge: the algorithm's traces, its texts, and what is measured."""

import json

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject import facts
from mixlab.inject.cloze import Cloze, partial_ratio, split
from mixlab.inject.experiments.knowledge import Knowledge, next_texts
from tests.inject.fakes import BYTES, Uniform, material

PAPER = Knowledge(caps=((0, 256),))


def trace(settings, values, state=None):
    """[(texts, first)] of decisions at 0, 1000, … of 100,000 steps, and the last state."""
    state, found = state or {}, []
    for i, value in enumerate(values):
        state, decision = settings.decide(state, {"probability": value}, 1000 * i, 100_000)
        state, decision = json.loads(json.dumps([state, decision]))  # as a log keeps them
        found.append((decision["texts"], decision["first"]))
    return found, state


def test_the_pool_holds_whatever_may_be_decided():
    place = material("facts", steps=60)
    for settings in (
        Knowledge(every_steps=10, first_texts=3, facts=2, paraphrases=100),
        Knowledge(every_steps=10, first_texts=3, facts=2, paraphrases=100, caps=((0, 2),)),
        Knowledge(every_steps=10, first_texts=3, facts=2, paraphrases=5),  # of which some come again
    ):
        pool = settings.pool(place).items
        held, state = {pool[i].tobytes() for i in range(len(pool))}, {}
        for step, value in zip(range(0, 60, 10), [0, 0, 1, 0, 0, 0], strict=True):
            state, decision = settings.decide(state, {"probability": value}, step, 60)
            (group,) = settings.groups_of(decision, place)
            assert {group.items[i].tobytes() for i in range(len(group.items))} <= held
    assert len(held) == 10 and [len(s.pool(place).items) for s in (PAPER,)] == [64]


def test_golden_trace():
    values = [1e-9, 2e-4, 3e-4, 5e-4, 0.01, 0.0041, 0.0048, 0.02, 0, 0]
    found, state = trace(PAPER, values)
    assert found == [(64, 0), (128, 64), (256, 192), (512, 448), (256, 960), (256, 1216), (256, 1472), (128, 1728),
                     (256, 1856), (512, 2112)]  # fmt: skip
    assert state["emitted"] == 2624


def test_growth_and_decline():
    n, found = 1, []
    for _ in range(12):
        n = next_texts(n, 0.0, 50, 100, 0.08, 256)
        found.append(n)
    assert found == [2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280]
    n, found = 1000, []
    for _ in range(11):
        n = next_texts(n, 1.0, 50, 100, 0.08, 256)
        found.append(n)
    assert found == [744, 488, 244, 122, 61, 30, 15, 7, 3, 1, 1]
    assert next_texts(8000, 0.0, 50, 100, 0.08, None) == 8192


def test_near_the_line_nothing_changes():
    for factor, expected in ((0.94, 200), (0.96, 100), (1.04, 100), (1.06, 50)):
        assert next_texts(100, factor * 0.04, 50, 100, 0.08, None) == expected


def test_caps_hold_from_their_step_on():
    settings = Knowledge(caps=((2000, 100), (3000, 10)), first_texts=200)
    assert [n for n, _ in trace(settings, [0, 0, 0, 0, 0])[0]] == [200, 400, 500, 510, 520]


def test_the_pool_goes_round_and_every_item_has_a_name_of_its_own(tmp_path):
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)))
    queries = tmp_path / "queries.jsonl"
    queries.write_text(json.dumps({"input": "The ruler is ", "target": "Ada"}) + "\n")
    settings, place = Knowledge(texts=(str(pool),), queries=(str(queries),)), material()
    assert settings.groups(place) == [] and settings.clozes(place) == [Cloze("The ruler is", "Ada")]
    (group,) = settings.groups_of({"first": 2, "texts": 5}, place)
    said = [BYTES.decode(group.items[i]) for i in range(5)]
    assert said == ["text 2", "text 0", "text 1", "text 2", "text 0"] and len(set(group.items.ids)) == 5
    assert group.items.ids[0] == "pool:3@2"
    pool.unlink()
    gone = Knowledge(texts=(str(pool) + "x",), queries=(str(queries),))
    with pytest.raises(UserError, match=r"experiments\.x\.texts"):
        gone.groups(place)


def test_made_up_texts_state_what_is_asked_in_ever_other_words():
    questions = [facts.clozes(9, fact) for fact in range(4)]
    assert len({cloze for fact in questions for cloze in fact}) == 16
    for fact, clozes in enumerate(questions):
        texts = [facts.text(9, fact, i) for i in range(200)]
        assert len(set(texts)) == 200 and texts[0] == facts.text(9, fact, 0)
        for text in texts:
            assert all(cloze.target in text for cloze in clozes)
            assert not any(cloze.input in text for cloze in clozes)  # learnt, not copied
    assert facts.clozes(8, 0) != questions[0]
    (group,) = Knowledge(facts=4).groups_of({"first": 0, "texts": 4}, material())
    assert [name.split(":")[0] for name in group.items.ids] == [f"fact-{i}" for i in range(4)]


def test_probe():
    place, settings = material(), Knowledge(facts=2)
    (probe,) = settings.probes(place)
    clozes = settings.clozes(place)
    answer = clozes[3].target.upper()
    found = probe.run(Uniform(says=f" it is {answer}", probability=0.9))
    expected = np.mean([0.9 ** (len(cloze.target) + 1) for cloze in clozes])  # the space counts
    assert found["probability"] == pytest.approx(expected, rel=1e-5)
    assert found["accuracy"] == 1 / 8 and 12.5 < found["similarity"] < 60
    assert probe.details(Uniform(says=answer))["outcome"].tolist() == [i == 3 for i in range(8)]
    assert probe.name == "control" and probe.due(1000, 5000) and not probe.due(1500, 5000)


def test_split_gives_the_input_as_context():
    (context,), (target,) = split(BYTES, [Cloze("ab", "cd")])
    assert (bytes(context.tolist()), bytes(target.tolist())) == (b"ab", b" cd")


def test_partial_ratio():
    assert partial_ratio("Zorgon", "it was ZORGON, I think") == 100
    assert partial_ratio("abcd", "xxabxcdxx") == pytest.approx(75)
    assert partial_ratio("abcd", "") == 0 and 0 < partial_ratio("abcd", "ab") < 100


@pytest.mark.parametrize(
    ("settings", "key"),
    [(Knowledge(every_steps=0), "k.every_steps"), (Knowledge(target=0), "k.target"), (Knowledge(texts=("a",)), "k: texts"),
     (Knowledge(caps=((5, 1), (1, 1))), "k.caps"), (Knowledge(first_texts=0), "k.first_texts")],
)  # fmt: skip
def test_problems_name_their_keys(settings, key):
    (problem,) = settings.problems("k")
    assert problem.startswith(key)
    assert PAPER.problems("k") == []
