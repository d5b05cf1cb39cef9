import json

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.canaries import Canaries, membership, write_unlikely
from mixlab.inject.items import Where
from tests.inject.fakes import BYTES, Memory, inserted, material

SMALL = Canaries(items=4, holdout=30, suffix_tokens=(1, 8), copies=(1, 4))
MATERIAL = material(row_length=256)


def by_condition(experiment, groups):
    return dict(zip(map(str, experiment.conditions()), groups, strict=True))


def test_conditions_of_the_paper():
    names = list(map(str, Canaries().conditions()))
    assert len(names) == len(set(names)) == 30 and {"plain-x16", "rare-8-x4", "model_based-32-x1"} <= set(names)


def test_every_condition_has_its_own_dialogues_and_suffix():
    groups = by_condition(SMALL, SMALL.groups(MATERIAL))
    assert len(groups) == 14 and all(len(group.items) == 4 for group in groups.values())
    assert len({name for group in groups.values() for name in group.items.ids}) == 14 * 4
    assert groups["rare-8-x4"].where.copies == 4
    rare = [
        {tuple(item[-int(name.split("-")[1]) :]) for item in inserted([group])}
        for name, group in groups.items()
        if "rare" in name
    ]
    assert all(len(suffixes) == 1 for suffixes in rare)  # one in a condition
    tokens = [set(suffix) for suffixes in rare for suffix in suffixes]
    assert all(len(token) == 1 for token in tokens) and len(set.union(*tokens)) == 4  # repeated, and another in each
    assert all(token < 97 or token > 122 for token in set.union(*tokens))  # the run reads letters
    random = [tuple(item[-8:]) for item in inserted([groups["random-8-x1"]])]
    assert len(set(random)) == 4
    assert BYTES.decode(groups["plain-x1"].items[0]).count("\n") == 3


def test_unlikely_tokens_are_those_that_never_follow():
    rows = np.tile(np.arange(97, 123), (160, 10))[:, :257]
    (group,) = Canaries(items=3, holdout=2, suffixes=("model_based",), suffix_tokens=(8,), copies=(1,)).groups(
        material(row_length=256, rows=rows)
    )
    assert all(len(set(item[-8:])) == 8 and not set(item[-8:]) & set(range(97, 123)) for item in inserted([group]))


def test_members_are_told_from_the_holdout_once_they_are_known():
    (probe,) = SMALL.probes(MATERIAL)
    groups = by_condition(SMALL, SMALL.groups(MATERIAL))
    naive, known = Memory([]), Memory(inserted([groups["random-8-x4"], groups["plain-x1"]]), order=24)
    before, after = probe.run(naive), probe.run(known)
    assert before["tpr/random-8-x4"] == 0 and before["auc/random-8-x4"] == 0.5
    assert after["tpr/random-8-x4"] == after["auc/random-8-x4"] == 1 and after["p_value/random-8-x4"] < 1e-3
    assert after["exposure/random-8-x4"] == pytest.approx(np.log2(30)) and after["tpr/random-8-x1"] == 0
    assert after["loss/random-8-x4"] == pytest.approx(-8 * np.log(0.9), rel=1e-3)
    assert after["auc/plain-x1"] > 0.9
    details = probe.details(known)
    assert len(details["loss/rare-8-x1"]) == 4 and len(details["loss/holdout-rare-8"]) == 30
    assert len(details["outcome"]) == 14 * 4


def test_a_rare_token_that_all_members_share_tells_nothing_once_the_control_is_taken_off():
    (probe,) = SMALL.probes(MATERIAL)
    groups = by_condition(SMALL, SMALL.groups(MATERIAL))
    token = int(groups["rare-8-x4"].items[0][-1])

    class Biased(Memory):  # likes this token wherever it is
        def log_probabilities(self, contexts, targets):
            found = super().log_probabilities(contexts, targets)
            return [f + 2 * (t == token) for f, t in zip(found, targets, strict=True)]

    control, treated = probe.details(Biased([])), probe.details(Biased(inserted([groups["random-8-x1"]]), order=24))
    assert membership(treated, 0)["tpr/rare-8-x4"] == 1 and membership(treated, 0, control)["tpr/rare-8-x4"] == 0
    assert membership(treated, 0, control)["tpr/random-8-x1"] == 1


def test_rare_tokens_of_the_holdout_are_no_members():
    members = {int(item[-1]) for item in inserted(SMALL.groups(MATERIAL)[2:6])}
    others = {
        int(canary.suffix[0])
        for form, canaries in SMALL._others(MATERIAL)
        if form.suffix == "rare"
        for canary in canaries
    }
    assert len(members) == 4 and len(others) > 10 and not members & others


def test_a_model_chooses_unlikely_tokens(tmp_path):
    experiment = Canaries(items=2, holdout=2, suffixes=("model_based",), suffix_tokens=(2,), copies=(1,))
    text = inserted(experiment.groups(MATERIAL))[0][:-2]
    likely = inserted(experiment.groups(MATERIAL))[0][-1]
    path = tmp_path / "unlikely.npz"
    write_unlikely(path, Memory([[*text, likely]], order=len(text)), experiment, MATERIAL)
    given = Canaries(**{**vars(experiment), "unlikely": str(path)})
    suffix = inserted(given.groups(MATERIAL))[0][-2:]
    assert likely not in suffix and len(set(suffix)) == 2
    with pytest.raises(UserError, match="has none of 3 tokens"):
        Canaries(**{**vars(given), "suffix_tokens": (3,)}).groups(MATERIAL)
    with pytest.raises(UserError, match=r"experiments\.x\.unlikely = none\.npz: cannot be read"):
        Canaries(**{**vars(given), "unlikely": "none.npz"}).groups(MATERIAL)


def test_dialogues_from_a_file_that_are_too_long_are_left_out(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"text": "ab" * n}) for n in range(1, 50)))
    experiment = Canaries(
        files=(str(path),), items=5, holdout=5, suffixes=("plain", "random"), suffix_tokens=(1,), copies=(2,)
    )
    found = inserted(experiment.groups(material(row_length=64)))
    assert len(found) == 10 and max(map(len, found)) <= 62
    with pytest.raises(UserError, match="30 of 49 dialogues fit"):
        Canaries(**{**vars(experiment), "items": 20}).groups(material(row_length=63))


@pytest.mark.parametrize(
    "changes, told",
    [
        (dict(copies=(0,)), "copies"),
        (dict(copies=(1, 1)), "none twice"),
        (dict(where=Where(copies=4)), "where.copies = 4"),
        (dict(unlikely="a.npz", suffixes=("plain",)), "unlikely"),
        (dict(holdout=0), "holdout = 0"),
    ],
)
def test_what_is_wrong_with_settings(changes, told):
    (problem,) = Canaries(**changes).problems("experiments.x")
    assert told in problem
    assert Canaries().problems("experiments.x") == []
