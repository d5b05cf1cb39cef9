"""Batches read once: which rows go where, and when their loss is measured."""

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.forgetting import Forgetting
from tests.inject.fakes import Uniform, material

MATERIAL = material("curve", steps=100, rows_per_step=3, row_length=16)
SETTINGS = Forgetting(steps=(60, 20), after=(0, 1, 5), rows=2)


def test_whole_batches_of_unseen_text():
    groups = SETTINGS.groups(MATERIAL)
    assert [(group.where.unit, group.where.steps) for group in groups] == [("step", (20,)), ("step", (60,))]
    for group, step in zip(groups, (20, 60), strict=True):
        np.testing.assert_array_equal(group.items.tokens.reshape(3, 16), MATERIAL.unseen(3, 16, f"batch {step}"))
    assert groups[0].where.problems("w") == [] and not np.array_equal(groups[0].items.tokens, groups[1].items.tokens)


def test_a_step_beyond_the_run_is_refused():
    with pytest.raises(UserError, match=r"experiments\.curve\.steps: 100 is not a step"):
        Forgetting(steps=(5, 100)).groups(MATERIAL)


class Halves(Uniform):
    """Knows the rows it was given: half a nat a token, and two nats of others."""

    def __init__(self, known):
        super().__init__()
        self.known = {row.tobytes() for row in known}

    def log_probabilities(self, contexts, targets):
        rows = [np.concatenate(pair) for pair in zip(contexts, targets, strict=True)]
        assert all(len(context) == 1 for context in contexts)
        return [np.full(len(row) - 1, -0.5 if row.tobytes() in self.known else -2.0, np.float32) for row in rows]


def test_losses_of_each_batch():
    (probe,) = SETTINGS.probes(MATERIAL)
    model = Halves(MATERIAL.unseen(3, 16, "batch 20")[:1])
    assert probe.run(model) == {"loss/batch_20": 1.25, "loss/batch_60": 2.0}
    details = probe.details(model)
    assert details["outcome"].tolist() == [-0.5, -2, -2, -2] and details["step"].tolist() == [20, 20, 60, 60]


def test_measured_densely_after_every_exposure():
    (probe,) = SETTINGS.probes(MATERIAL)
    due = [step for step in range(101) if probe.due(step, 100)]
    assert due == [0, 20, 21, 25, 60, 61, 65, 100]


@pytest.mark.parametrize(
    ("settings", "key"),
    [(Forgetting(), "f.steps"), (Forgetting(steps=(2, 2)), "f.steps"), (Forgetting(steps=(1,), after=(-1,)), "f.after"),
     (Forgetting(steps=(1,), rows=0), "f.rows")],
)  # fmt: skip
def test_problems_name_their_keys(settings, key):
    (problem,) = settings.problems("f")
    assert problem.startswith(key)
    assert SETTINGS.problems("f") == []
