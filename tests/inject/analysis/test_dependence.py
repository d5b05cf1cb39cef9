"""The matrix of dependence between experiments, on outcomes whose dependence is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mixlab.inject.analysis.dependence import (
    ALL,
    BASELINE,
    Dependence,
    dependence,
    equivalence,
    holm,
    mcnemar,
    paired_bootstrap,
)

NAMES = ("a", "b", "c")


def outcomes(b, own=1.0, pairwise=0.0, items=40, noise=0.2, seed=0, names=NAMES):
    """Y_i = own E_i + sum_j b[j, i] E_j + pairwise E_1 E_2 (on the first outcome) + noise, item by item."""
    rng, n = np.random.default_rng(seed), len(names)
    arms = {BASELINE: np.zeros(n)} | {name: np.eye(n)[j] for j, name in enumerate(names)} | {ALL: np.ones(n)}
    made = {}
    for i, name in enumerate(names):
        items_base = rng.normal(0, 3, items)  # what pairing takes out
        made[name] = {}
        for arm, on in arms.items():
            effect = own * on[i] + on @ (b[:, i] * (1 - np.eye(n)[i])) + (pairwise * on[1] * on[2] if i == 0 else 0)
            made[name][arm] = items_base + effect + rng.normal(0, noise, items)
    return made


def accuracies(share_changed, items=400, seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for name in NAMES:
        base = rng.random(items) < 0.3
        made[name] = {BASELINE: base}
        for arm in (*NAMES, ALL):
            flips = rng.random(items) < (0.4 if arm in (name, ALL) else share_changed)
            made[name][arm] = base | flips
    return made


def test_without_dependence_cells_are_flagged_no_more_often_than_the_level():
    seeds = 200
    flagged = 0
    for seed in range(seeds):
        made = outcomes(np.zeros((3, 3)), seed=seed)
        changes = [made[i][j] - made[i][BASELINE] for i in NAMES for j in NAMES if i != j]
        flagged += bool((holm(np.array([paired_bootstrap(c, seed, resamples=499) for c in changes])) < 0.05).any())
    assert flagged <= stats.binom.ppf(0.999, seeds, 0.05)


def test_a_dependence_is_flagged_and_only_it():
    b = np.zeros((3, 3))
    b[0, 1] = 0.5
    found = dependence(outcomes(b, items=200))
    assert found.flagged.tolist() == [[False, True, False], [False] * 3, [False] * 3, [False] * 3]
    assert not found.equivalent[0, 1] and found.equivalent[2, 0]
    assert found.effects[0, 1] == pytest.approx(0.5, abs=4 * found.standard_errors[0, 1])
    assert found.joint_adjusted_p_values[1] < 0.05 < found.interaction_adjusted_p_values[1]


def test_the_row_all_is_the_sum_of_its_column_in_a_linear_world():
    b = np.random.default_rng(3).normal(0, 0.3, (3, 3))
    found = dependence(outcomes(b, noise=0.0))
    assert found.effects.shape == (4, 3)
    np.testing.assert_allclose(found.effects[3], found.effects[:3].sum(0), atol=1e-12)
    np.testing.assert_allclose(found.effects[:3], np.where(np.eye(3), 1.0, b), atol=1e-12)


def test_a_product_of_two_experiments_shows_in_the_row_all_alone():
    found = dependence(outcomes(np.zeros((3, 3)), pairwise=0.6))
    assert not found.flagged.any()
    assert found.effects[3, 0] == pytest.approx(1.6, abs=0.2)
    assert found.interaction_adjusted_p_values[0] < 0.05 and found.joint_adjusted_p_values[0] < 0.05
    assert (found.interaction_adjusted_p_values[1:] > 0.05).all()


def test_an_excluded_experiment_has_a_blank_row_and_column():
    made = outcomes(np.zeros((3, 3))) | {"b": None}
    found = dependence(made)
    for matrix in (found.effects, found.p_values, found.adjusted_p_values):
        assert np.isnan(matrix[1]).all() and np.isnan(matrix[:, 1]).all()
    assert np.isfinite(found.effects[np.ix_([0, 2, 3], [0, 2])]).all()
    assert np.isfinite(found.adjusted_p_values).sum() == 2


def test_accuracies_are_told_apart_by_mcnemar():
    found = dependence(accuracies(0.0))
    assert not found.flagged.any() and found.equivalent[~np.eye(4, 3, dtype=bool)][:6].all()
    assert dependence(accuracies(0.1)).flagged.sum() == 6
    assert mcnemar(np.array([1] * 8 + [-1] * 2 + [0] * 90)) == pytest.approx(2 * stats.binom.cdf(2, 10, 0.5))
    assert mcnemar(np.zeros(5)) == 1


def test_json_and_back():
    found = dependence(outcomes(np.zeros((3, 3))) | {"b": None})
    again = Dependence.from_json(found.to_json())
    assert again.names == found.names and again.level == found.level
    for name in ("effects", "adjusted_p_values", "equivalence_p_values", "interactions"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_the_bootstrap_agrees_with_the_t_test_on_normal_items():
    changes = np.random.default_rng(1).normal(0.2, 1, 200)
    assert paired_bootstrap(changes, 0) == pytest.approx(stats.ttest_1samp(changes, 0).pvalue, abs=0.01)
    many = np.random.default_rng(2).normal(0.02, 1, 5000)
    assert paired_bootstrap(many, 0) == pytest.approx(stats.ttest_1samp(many, 0).pvalue)
    skewed = np.random.default_rng(3).exponential(1, 15) - 1  # few and skewed: not Student's test
    assert abs(paired_bootstrap(skewed, 0) - stats.ttest_1samp(skewed, 0).pvalue) > 0.005
    assert paired_bootstrap(np.zeros(9), 0) == 1
    assert paired_bootstrap(np.full(9, 2.0), 0) < 0.001


def test_equivalence_needs_an_effect_that_is_surely_small():
    rng = np.random.default_rng(0)
    own = rng.normal(1, 0.1, 100)
    assert equivalence(rng.normal(0, 0.1, 100), own, 0.1) < 0.05
    assert equivalence(rng.normal(0, 1, 100), own, 0.1) > 0.05  # too noisy to say
    assert equivalence(rng.normal(0.2, 0.1, 100), own, 0.1) > 0.95  # large
    assert equivalence(rng.normal(0, 0.1, 100), -own, 0.1) < 0.05  # the sign of the own effect does not matter


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_follows_its_definition(p_values):
    adjusted = holm(np.array(p_values))
    ordered = sorted(p_values)
    for p, value in zip(p_values, adjusted, strict=True):
        expected = max(min(1, (len(ordered) - k) * q) for k, q in enumerate(ordered) if q <= p)
        assert value == pytest.approx(expected) or p_values.count(p) > 1
    assert holm(np.array([0.01, np.nan, 0.04])) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
