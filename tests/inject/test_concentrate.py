"""Experiments at high intensity in a stretch of a run."""

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject import concentrate
from mixlab.inject.experiments.forgetting import Forgetting
from mixlab.inject.experiments.knowledge import Knowledge
from mixlab.inject.experiments.reasoning import Reasoning
from mixlab.inject.experiments.watermark import Watermark
from mixlab.inject.items import Group, Items, Where
from mixlab.inject.probe import Probe
from tests.inject.fakes import material

PLACE = material(steps=200, rows_per_step=4, row_length=100)  # 400 tokens a step


class Two:
    """Two groups of ten items of 8 tokens, 10 with their EOS; the second twice as often."""

    def __init__(self, **where):
        self.where = where

    def groups(self, material):
        items = Items.of([np.arange(8)] * 10)
        return [Group(items, Where(copies=copies, **self.where)) for copies in (3, 6)]

    def probes(self, material):
        return [Probe("one", lambda model: {})]


def concentrated(experiment, first_step, end_step, share):
    return concentrate.concentrated({"x": experiment}, first_step, end_step, share)["x"]


def inserted_tokens(groups):
    per_copy = [(group.items.lengths + 2 * group.where.add_eos).sum() for group in groups]
    return sum(group.where.copies * tokens for group, tokens in zip(groups, per_copy, strict=True))


@pytest.mark.parametrize(("share", "copies"), [(0.15, [20, 40]), (0.0015, [0.2, 0.4]), (1e-9, [0.1, 0.1])])
def test_copies_follow_the_share_and_keep_their_proportion(share, copies):
    groups = concentrated(Two(start_share=0.5, isolated=False), 50, 150, share).groups(PLACE)
    assert [group.where.copies for group in groups] == pytest.approx(copies)
    if share > 1e-6:
        assert inserted_tokens(groups) == pytest.approx(share * 100 * 400)
    for group in groups:
        assert group.where.problems("w") == [] and not group.where.isolated
        assert (group.where.start_step, group.where.end_step, group.where.start_share) == (50, 150, None)
    assert [probe.name for probe in concentrated(Two(), 50, 150, share).probes(PLACE)] == ["one"]


def test_items_with_places_of_their_own_are_refused():
    class Placed(Two):
        def groups(self, material):
            return [Group(Items.of([np.arange(8)]), Where(positions=((3, 0, 0),)))]

    with pytest.raises(UserError, match=r"experiments\.x: has places of its own"):
        concentrated(Placed(), 50, 150, 0.01).groups(PLACE)


def test_whole_steps_are_spread_over_the_stretch():
    assert concentrated(Forgetting(steps=(3,)), 50, 150, 0.02).steps == (50, 100)
    mark = concentrated(Watermark(every_steps=10, windows=5), 50, 150, 0.04)
    assert mark.steps == (50, 75, 100, 125) and mark.problems("w") == [] and mark.windows == 1
    assert concentrated(Watermark(every_steps=10), 50, 60, 0.01).steps == (50,)


@pytest.mark.parametrize(("stretch", "share"), [(30, 0.02), (100, 0.02), (12, 0.15), (3, 0.01)])
def test_whole_steps_of_several_experiments_are_different_ones(stretch, share):
    some = {"mark": Watermark(every_steps=3), "curve": Forgetting(steps=(3,)), "second": Forgetting(steps=(3,))}
    found = concentrate.concentrated(some | {"two": Two()}, 50, 50 + stretch, share)
    taken = [step for name in some for step in found[name].steps]
    assert len(set(taken)) == len(taken) == 3 * max(round(share * stretch), 1)
    assert min(taken) == 50 and max(taken) < 50 + stretch


def test_a_dynamic_experiment_is_inserted_as_it_begins():
    (group,) = concentrated(Knowledge(first_texts=6, facts=2), 50, 150, 0.05).groups(PLACE)
    assert len(group.items) == 6 and group.where.start_step == 50
    assert not hasattr(concentrated(Knowledge(), 50, 150, 0.05), "decide")
    (group,) = concentrated(
        Reasoning(count=5, max_operations=1, max_parameters=2, evaluated_operations=(1,)), 50, 150, 1
    ).groups(PLACE)
    assert group.where.copies > 1
