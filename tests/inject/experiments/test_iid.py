import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.iid import Iid
from tests.inject.fakes import Memory, inserted, material

MATERIAL = material(steps=40, rows_per_step=4, row_length=64)
SMALL = Iid(random_share=0.1, decile_batches=2, unique_batches=1, probe_rows=3)


def test_three_ways_of_the_stated_sizes():
    random, *deciles, unique = SMALL.groups(MATERIAL)
    budget = 0.1 * MATERIAL.tokens
    assert budget - 64 < random.items.lengths.sum() <= budget and random.where.unit == "span"
    assert 2 <= random.items.lengths.min() < 16 and 48 < random.items.lengths.max() <= 64
    assert [(g.where.start_share, g.where.end_share) for g in deciles] == [(d / 10, (d + 1) / 10) for d in range(10)]
    assert all(g.where.unit == "row" and g.items.lengths.tolist() == [64] * 8 for g in [*deciles])
    assert unique.where.start_share is None and len(unique.items) == 4
    rows = [tuple(item) for item in inserted([*deciles, unique])]
    assert len(set(rows)) == len(rows)


def test_sizes_of_the_paper():
    assert 50 * 512 * 4096 == 104_857_600
    run = material(steps=100_000, rows_per_step=512, row_length=4096, rows=np.zeros((0, 0)))
    assert round(Iid().random_share * run.tokens / 1e6) == 419


def test_unique_rows_share_nothing_with_the_run():
    calls = []

    def unseen(count, length, purpose):
        if purpose != "holdout":
            calls.append(purpose)
        drawn = np.random.default_rng(len(calls)).integers(65, 91, (count, length)).astype(np.int32)
        if len(calls) == 1:
            drawn[2, 32:] = MATERIAL.read(7)[1, 5:37]  # known, and so left out
        return drawn

    experiment = Iid(random_share=0, decile_batches=0, unique_batches=1, unique_tokens=16)
    changed = material(steps=40, rows_per_step=4, row_length=64, unseen=unseen)
    found = inserted(experiment.groups(changed))
    assert len(found) == 4 and len(calls) == 2 and all(item.max() < 91 for item in found)
    with pytest.raises(UserError, match="0 of 4 were found"):
        experiment.groups(material(rows_per_step=4, unseen=lambda n, length, _: MATERIAL.read(0)[:n, :length]))


def test_losses_of_what_was_read_are_lower():
    groups = SMALL.groups(MATERIAL)
    (probe,) = SMALL.probes(MATERIAL)
    found = probe.run(Memory(inserted(groups[1:3]), order=12))
    assert len(found) == 13
    # the first tokens of a row tell little: a text's place is known after twelve
    assert max(found["loss/decile-0"], found["loss/decile-1"]) < 0.5 * min(
        found["loss/decile-2"], found["loss/holdout"]
    )
    details = probe.details(Memory([]))
    assert len(details["outcome"]) == 12 * 3 and details["loss/holdout"] == pytest.approx(np.full(3, np.log(259)))


def test_what_cannot_be_is_told():
    assert Iid().problems("experiments.x") == []
    assert "nothing is inserted" in Iid(random_share=0, decile_batches=0, unique_batches=0).problems("experiments.x")[0]
    assert "below 1" in Iid(random_share=1.0).problems("experiments.x")[0]
    with pytest.raises(UserError, match="a tenth of the run has 4 steps"):
        Iid(random_share=0.01).groups(MATERIAL)
    with pytest.raises(UserError, match="hold no row's beginning"):
        Iid(random_share=1e-9).groups(MATERIAL)
