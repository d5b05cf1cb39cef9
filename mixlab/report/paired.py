"""Differences between two runs that answered the same questions or read the same held-out documents, item by item: with paired
bootstrap intervals, which leave out what both find hard."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from mixlab.evals.items import read_items
from mixlab.report.runs import Run
from mixlab.report.text import Measure, decimal, measure
from mixlab.seeds import seed_of

RESAMPLES = 2000
AT_ONCE = 100  # resamples held in memory
Recorded = dict[str, np.ndarray]  # of a benchmark or a set: "id" and its numbers [items]


class Items:
    """What a run recorded by item at its evaluations, each step's read once."""

    def __init__(self, run: Run):
        self._run = run
        self._steps: dict[int, Recorded] = {}

    def of(self, name: str, step: int) -> Recorded:
        """Of a benchmark or a set; empty where nothing was recorded."""
        if step not in self._steps:
            self._steps[step] = read_items(self._run.path, step)
        here = {key: array for key, array in self._steps[step].items() if key.rpartition("/")[0] == name}
        found = {key.removeprefix(f"{name}/"): array for key, array in here.items()}
        return found if "id" in found and len(set(map(len, found.values()))) == 1 else {}


def together(recorded: Sequence[Recorded]) -> Recorded:
    """Several sets as one; empty where one of them is."""
    if not recorded or not all(recorded):
        return {}
    return {key: np.concatenate([one[key] for one in recorded]) for key in recorded[0]}


class Difference(NamedTuple):
    """value: other − first.   draws: float64 [RESAMPLES], the same of items drawn with replacement."""

    value: float
    draws: np.ndarray

    def measure(self) -> Measure:
        """With its 95 % interval (of percentiles)."""
        low, high = np.quantile(self.draws, [0.025, 0.975])
        interval = f"{decimal(low, sign=True)} to {decimal(high, sign=True)}"
        return Measure(decimal(self.value, sign=True), clear=bool(low > 0 or high < 0), interval=interval)


def in_items(name: str, first: Recorded, other: Recorded, metric: str) -> Difference | None:
    """Of the mean of a benchmark's metric; None where the two were not asked the same items."""
    if metric not in first or metric not in other or not np.array_equal(first["id"], other["id"]):
        return None
    return _ratio(name, other[metric] - first[metric], np.ones(len(first["id"])))


def in_documents(name: str, first: Recorded, other: Recorded) -> Difference | None:
    """In bits per byte; None where the two did not read the same bytes of the same documents."""
    if not first or not other or not np.array_equal(first["id"], other["id"]):
        return None
    if not np.array_equal(first["bytes"], other["bytes"]):
        return None
    return _ratio(name, (other["nats"] - first["nats"]) / np.log(2), first["bytes"])


def mean(differences: Sequence[Difference | None]) -> Difference | None:
    """Of the mean over sets or benchmarks, whose items are drawn apart; None where one of them is not known."""
    known = [difference for difference in differences if difference is not None]
    if not known or len(known) < len(differences):
        return None
    return Difference(float(np.mean([one.value for one in known])), np.mean([one.draws for one in known], axis=0))


def differences_beside(values: list[tuple[float, float, int]], paired: Sequence[Difference | None]) -> list[Measure]:
    """Those from the first run's value: paired where that is known, else with the root of the sum of the two squared errors.
    values: (value, standard error, step) of every run."""
    first, first_error, _ = values[0]
    return [
        measure(value - first, math.hypot(error, first_error), sign=True) if known is None else known.measure()
        for (value, error, _), known in zip(values[1:], paired, strict=True)
    ]


def _ratio(name: str, differences: np.ndarray, sizes: np.ndarray) -> Difference | None:
    """sum(differences) / sum(sizes), items drawn together with their sizes."""
    if len(differences) < 2 or not np.isfinite(differences).all():
        return None
    found = stats.bootstrap(
        (differences, sizes),
        lambda d, n, axis: d.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        batch=AT_ONCE,
        method="percentile",
        random_state=np.random.default_rng(seed_of("bootstrap", name)),
    )
    return Difference(float(differences.sum() / sizes.sum()), found.bootstrap_distribution)
