"""The runner of probes: what is due, what is written, and that no probe stops a run."""

from types import SimpleNamespace

import numpy as np
import pytest

from mixlab.evals.probes import ProbeRunner
from mixlab.inject.probe import Probe


class Answers:
    """Stands in for Probing: a model that knows its step."""

    def at(self, params, step, stream):
        return SimpleNamespace(params=params, step=step, read=stream)


def measured(model):
    return {"value": model.params + model.step}


def broken(model):
    raise RuntimeError("no answer")


@pytest.fixture
def runner(tmp_path):
    def make(**probes):
        return ProbeRunner(probes, Answers(), tmp_path / "probes", 100)

    return make


def test_each_probe_runs_when_it_is_due(runner):
    some = runner(
        a=[Probe("often", measured, every_steps=10)],
        b=[Probe("named", measured, at_steps=(7,), at_start=False, at_end=False)],
        c=[Probe("ends", measured)],
    )
    due = {step: sorted(some.due(step)) for step in range(101) if some.due(step)}
    assert due == {0: ["a", "c"], 7: ["b"], 100: ["a", "c"]} | {step: ["a"] for step in range(10, 100, 10)}
    assert sorted(some.due(33, starting=True)) == ["a", "c"]
    assert some.run(1.0, 8, None).metrics == {}


def test_numbers_are_metrics_and_arrays_are_kept(runner, tmp_path):
    def details(model):
        return {"loss": [model.step, 2.5], "ids": ["x", "y"]}

    some = runner(a=[Probe("p", measured, details=details)], b=[Probe("q", lambda m: {"n": np.float32(3)})])
    found = some.run(1.0, 100, None)
    assert found.metrics.pop("perf/probe_seconds") >= 0
    assert found.metrics == {"probe/a/value": 101.0, "probe/b/n": 3.0} and type(found.metrics["probe/b/n"]) is float
    assert found.results == {("a", "p"): {"value": 101.0}, ("b", "q"): {"n": 3.0}}
    with np.load(tmp_path / "probes" / "a-100.npz") as kept:
        np.testing.assert_array_equal(kept["loss"], [100, 2.5])
        np.testing.assert_array_equal(kept["ids"], ["x", "y"])
    assert [path.name for path in (tmp_path / "probes").iterdir()] == ["a-100.npz"] and not found.failures


@pytest.mark.parametrize(
    "bad",
    [
        Probe("bad", broken),
        Probe("bad", lambda model: {"value": "high"}),
        Probe("bad", lambda model: {"other": 1.0}, details=broken),
        Probe("bad", lambda model: {"other": 1.0}, details=lambda model: {"ragged": [[1], {}]}),
        Probe("bad", measured),  # the metric that the first has given
    ],
)
def test_a_probe_that_fails_is_told_and_the_others_run(runner, bad):
    some = runner(a=[Probe("good", measured), bad], b=[Probe("good", measured)])
    found = some.run(0.0, 100, None)
    assert found.metrics.pop("perf/probe_seconds") >= 0
    assert found.metrics == {"probe/a/value": 100.0, "probe/a/failed": 1, "probe/b/value": 100.0}
    (failure,) = found.failures
    assert (failure["experiment"], failure["probe"]) == ("a", "bad") and "Error" in failure["error"]


def test_a_controlling_probe_runs_though_it_is_not_due(runner):
    control = Probe("control", measured, at_end=False)
    some = runner(a=[Probe("first", broken), control], b=[Probe("only", broken)])
    found = some.run(0.0, 50, None, control=["a", "b"])
    assert found.results == {("a", "control"): {"value": 50.0}}
    assert some.control("a", found) == {"value": 50.0} and some.control("b", found) is None
    assert found.metrics["probe/b/failed"] == 1 and "probe/a/failed" not in found.metrics
