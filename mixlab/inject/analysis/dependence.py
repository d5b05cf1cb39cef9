"""Dependence between experiments that share a run: the tests of continual pretraining dependence testing (Bordt and
Pawelczyk 2025, section 5).

From one checkpoint training goes on for a while as it would have (the baseline), with each experiment alone (an arm), and
with all together. `effects[j, i]` is what arm j did to the outcome of experiment i. The paper asks for small off-diagonal
cells and a row ALL like the diagonal, and names no test; here every cell is tested on the items of its outcome, paired
with the baseline's. These tests speak for the items, given the arms that were trained, not for other training seeds.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

BASELINE, ALL = "(baseline)", "(all)"  # no names of experiments
RESAMPLES = 9999
BOOTSTRAPPED_ITEMS = 2000  # of more items the t statistic follows its limit
_CHUNK = 2**22  # resampled items held at a time

Outcome = Mapping[str, np.ndarray]  # arm -> [items]: bools (right or wrong) or floats (more is more of the effect)


@dataclass(frozen=True)
class Dependence:
    """names: the n experiments, of rows and columns alike; the row after them is ALL. NaN: the row or column was excluded.

    effects, standard_errors, p_values: [n + 1, n], each cell against the baseline, two-sided.
    adjusted_p_values: [n + 1, n], by Holm over the off-diagonal cells that were tested; NaN elsewhere.
    equivalence_p_values: [n + 1, n], off-diagonal: that |effect| is not below `bound` times the diagonal's.
    joint_*: [n], the row ALL against the diagonal: can the effect alone be read from the joint run? Adjusted by Holm.
    interaction_*: [n], the row ALL against the sum of the rows above it: do experiments act other than one by one?
    """

    names: tuple[str, ...]
    level: float
    bound: float
    effects: np.ndarray
    standard_errors: np.ndarray
    p_values: np.ndarray
    adjusted_p_values: np.ndarray
    equivalence_p_values: np.ndarray
    joint_differences: np.ndarray
    joint_adjusted_p_values: np.ndarray
    interactions: np.ndarray
    interaction_adjusted_p_values: np.ndarray

    @property
    def flagged(self) -> np.ndarray:
        """bool [n + 1, n]: off-diagonal cells that are not zero."""
        return self.adjusted_p_values < self.level

    @property
    def equivalent(self) -> np.ndarray:
        """bool [n + 1, n]: off-diagonal cells shown to be small against the diagonal."""
        return self.equivalence_p_values < self.level

    def to_json(self) -> str:
        """Arrays as nested lists, NaN as null."""
        values = {name: _lists(value) for name, value in asdict(self).items()}
        return json.dumps(values | {"flagged": self.flagged.tolist(), "equivalent": self.equivalent.tolist()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Dependence":
        values = {name: value for name, value in json.loads(text).items() if name not in ("flagged", "equivalent")}
        arrays = {n: np.array(v, np.float64) for n, v in values.items() if n not in ("names", "level", "bound")}
        return cls(**values | arrays | {"names": tuple(values["names"])})


def dependence(
    outcomes: Mapping[str, Outcome | None], level: float = 0.05, bound: float = 0.1, seed: int = 0
) -> Dependence:
    """The matrix with its tests. outcomes: experiment -> arm (BASELINE, the experiments, ALL) -> its items; None, or an arm
    that is missing, leaves row and column blank. Accuracies are tested by McNemar's exact test, other outcomes by the paired
    bootstrap of the t statistic."""
    names = tuple(outcomes)
    n = len(names)
    blank = lambda *shape: np.full(shape, np.nan)  # noqa: E731
    effects, errors, p_values, small = blank(n + 1, n), blank(n + 1, n), blank(n + 1, n), blank(n + 1, n)
    joint, joint_p, interactions, interaction_p = blank(n), blank(n), blank(n), blank(n)
    included = [i for i, name in enumerate(names) if outcomes[name] is not None]
    for i in included:
        arms = outcomes[names[i]] or {}
        changes = {j: _change(arms, names[j]) for j in included} | {n: _change(arms, ALL)}
        accuracy = arms[BASELINE].dtype == bool
        for j, change in changes.items():
            effects[j, i], errors[j, i] = change.mean(), standard_error(change)
            p_values[j, i] = mcnemar(change) if accuracy else paired_bootstrap(change, seed)
            if j not in (i, n):
                small[j, i] = equivalence(change, changes[i], bound)
        apart, beyond = changes[n] - changes[i], changes[n] - sum(changes[j] for j in included)
        joint[i], interactions[i] = apart.mean(), beyond.mean()
        joint_p[i] = mcnemar(apart) if accuracy else paired_bootstrap(apart, seed)
        interaction_p[i] = paired_bootstrap(beyond, seed)
    off_diagonal = np.vstack([~np.eye(n, dtype=bool), np.zeros((1, n), bool)])
    adjusted = blank(n + 1, n)
    adjusted[off_diagonal] = holm(p_values[off_diagonal])
    return Dependence(
        names, level, bound, effects, errors, p_values, adjusted, small,
        joint, holm(joint_p), interactions, holm(interaction_p),
    )  # fmt: skip


def _change(arms: Outcome, arm: str) -> np.ndarray:
    """float64 [items]: what the arm did to every item."""
    return arms[arm].astype(np.float64) - arms[BASELINE].astype(np.float64)


def standard_error(changes: np.ndarray) -> float:
    return float(np.std(changes, ddof=1) / np.sqrt(len(changes))) if len(changes) > 1 else np.nan


def mcnemar(changes: np.ndarray) -> float:
    """Two-sided p-value of the exact test. changes: [items] of -1 (lost), 0 and 1 (gained)."""
    gained, lost = int((changes > 0).sum()), int((changes < 0).sum())
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def paired_bootstrap(changes: np.ndarray, seed: int, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value that the mean of [items] is zero: the t statistic among those of resamples of the centred items; of more
    than BOOTSTRAPPED_ITEMS items, Student's test."""
    n = len(changes)
    deviation = np.std(changes, ddof=1) if n > 1 else 0.0
    if deviation == 0:
        return 1 / (resamples + 1) if n > 1 and changes[0] else 1.0
    if n > BOOTSTRAPPED_ITEMS:
        return float(stats.ttest_1samp(changes, 0).pvalue)
    t = abs(changes.mean()) / deviation
    centred, rng, extreme = changes - changes.mean(), np.random.default_rng(seed), 0
    rows = max(_CHUNK // n, 1)
    for first in range(0, resamples, rows):
        sample = centred[rng.integers(0, n, (min(rows, resamples - first), n))]
        extreme += int((np.abs(sample.mean(1)) >= t * np.std(sample, axis=1, ddof=1)).sum())
    return (extreme + 1) / (resamples + 1)


def equivalence(changes: np.ndarray, own: np.ndarray, bound: float) -> float:
    """p-value of two one-sided t-tests that the mean of `changes` is not within ± bound x the mean of `own`, item by item,
    so that the uncertainty of the diagonal counts too. Both are [items]."""
    margin = bound * np.sign(own.mean()) * own
    below, above = changes - margin, changes + margin
    if min(np.std(below), np.std(above)) <= 1e-12 * np.abs(own).max(initial=0):  # every item did the same
        return 0.0 if below.mean() < 0 < above.mean() else 1.0
    less, greater = stats.ttest_1samp(below, 0, alternative="less"), stats.ttest_1samp(above, 0, alternative="greater")
    return float(max(less.pvalue, greater.pvalue))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values adjusted for their number (Holm 1979), [m]; NaN is no test and stays NaN."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted


def _lists(value):
    if isinstance(value, np.ndarray):
        return (
            [_lists(entry) for entry in value] if value.ndim > 1 else [None if np.isnan(x) else float(x) for x in value]
        )
    return value
