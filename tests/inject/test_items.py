import numpy as np
import pytest

from mixlab.inject.items import Items, Where
from mixlab.inject.probe import Probe


def test_items_hold_sequences_of_any_length():
    items = Items.of([[1, 2], [], [3]], ["a", "b", "c"])
    assert len(items) == 3 and items.lengths.tolist() == [2, 0, 1]
    assert items[0].tolist() == [1, 2] and items[1].tolist() == [] and items[2].dtype == np.int32
    assert Items.of([[1], [2]]).ids == ("0", "1") and len(Items.of([])) == 0


@pytest.mark.parametrize("where", [Where(), Where(copies=0.5), Where(copies=144, start_share=0.2, stage="main")])
def test_what_can_be_placed(where):
    assert where.problems("here") == []


@pytest.mark.parametrize(
    "where, told",
    [
        (Where(copies=2.5), "here.copies = 2.5"),
        (Where(copies=0), "here.copies"),
        (Where(start_step=3, end_step=3), "is empty"),
        (Where(start_step=3, end_share=0.5), "in steps, in tokens or in shares"),
        (Where(end_share=1.5), "between 0 and 1"),
        (Where(start_step=-1), "negative"),
        (Where(unit="step"), "here.steps"),
        (Where(unit="step", steps=(3, 3)), "twice"),
        (Where(steps=(3,)), "belongs to unit 'step'"),
        (Where(positions=((0, 0, 0),), end_step=5), "no meaning"),
        (Where(positions=((0, 0),)), "here.positions.0"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot(where, told):
    (problem,) = where.problems("here")
    assert told in problem


def test_when_a_probe_is_due():
    probe = Probe("loss", lambda model: {}, every_steps=10, at_steps=(3,))
    assert [step for step in range(26) if probe.due(step, 25)] == [0, 3, 10, 20, 25]
    only_end = Probe("loss", lambda model: {}, at_start=False)
    assert [step for step in range(26) if only_end.due(step, 25)] == [25]
