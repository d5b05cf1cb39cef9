import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.inject.analysis.membership import attack, min_k, tpr_at_fpr

LOG_PROBABILITIES = [-0.1, -5, -0.2, -3, -0.3, -0.4, -7, -0.5, -0.6, -0.7]


@pytest.mark.parametrize("share, score", [(0.1, -7.0), (0.2, -6.0), (0.4, -3.925), (0.01, -7.0)])
def test_min_k(share, score):
    assert min_k(np.array(LOG_PROBABILITIES), share) == pytest.approx(score)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_tpr_is_the_best_of_all_thresholds(members, others, fpr):
    members, others = np.array(members), np.array(others)
    allowed = [t for t in range(-1, 10) if np.mean(others <= t) <= fpr]
    assert tpr_at_fpr(members, others, fpr) == pytest.approx(max(np.mean(members <= t) for t in allowed))


def test_an_attack_that_knows_nothing_finds_one_in_a_hundred():
    others = np.arange(2000.0)
    found = attack(others + 0.5, others, resamples=50)
    assert found.auc == pytest.approx(0.5, abs=1e-3) and found.tpr == pytest.approx(0.01, abs=1e-3)
    assert found.p_value > 0.3 and found.tpr_low <= found.tpr <= found.tpr_high


def test_an_attack_that_knows_all_finds_all():
    found = attack(np.arange(50.0), np.arange(50.0) + 100, resamples=50)
    assert (found.auc, found.tpr, found.tpr_low, found.tpr_high) == (1, 1, 1, 1) and found.p_value < 1e-10


def test_a_reference_model_takes_out_what_is_easy_for_all():
    difficulty = np.linspace(0, 50, 400)
    losses = difficulty - np.where(np.arange(400) % 2, 1.0, 0.0) + np.sin(np.arange(400)) * 0.2
    member = np.arange(400) % 2 == 1
    assert attack(losses[member], losses[~member], resamples=20).tpr < 0.1
    calibrated = losses - difficulty
    assert attack(calibrated[member], calibrated[~member], resamples=20).tpr == 1
