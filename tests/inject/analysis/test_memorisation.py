import numpy as np
import pytest
from scipy import stats

from mixlab.inject.analysis.memorisation import (
    counterfactual_memorisation,
    distinct,
    exposure,
    extracted,
    extrapolated_exposure,
    mean_loss,
)


@pytest.mark.parametrize("rank, among, bits", [(1, 1000, 9.9658), (1, 1024, 10), (10, 1000, 6.6439), (512, 1024, 1.0)])
def test_exposure_is_that_of_the_rank(rank, among, bits):
    references = np.arange(among) + 0.5
    assert exposure(np.array([rank - 1.0]), references)[0] == pytest.approx(bits, abs=5e-5)


def test_exposure_of_what_no_reference_exceeds_is_nothing():
    assert exposure(np.array([99.0]), np.arange(8))[0] == 0


def test_extrapolated_exposure_is_the_tail_of_the_fitted_distribution():
    truth = stats.skewnorm(4, loc=3, scale=2)
    references = truth.ppf((np.arange(2000) + 0.5) / 2000)
    points = truth.ppf([0.5, 0.1, 0.01])
    assert extrapolated_exposure(points, references) == pytest.approx([1, np.log2(10), np.log2(100)], abs=0.1)
    assert extrapolated_exposure(truth.ppf([1e-5]), references)[0] > np.log2(2000)  # beyond what ranks can tell


def test_extracted_is_token_by_token():
    targets = np.arange(50).reshape(2, 25)
    completions = targets.copy()
    completions[1, 24] += 1
    assert extracted(completions, targets).tolist() == [True, False]


def test_counterfactual_memorisation_is_the_gain_in_accuracy():
    treated = [np.array([1, 1, 1, 0], bool), np.array([1, 1], bool)]
    control = [np.array([1, 0, 0, 0], bool), np.array([1, 1], bool)]
    assert counterfactual_memorisation(treated, control) == pytest.approx((0.25, 0.25))


def test_loss_of_inserted_text_leaves_out_eos_at_the_ends_and_duplicates():
    sequences = [np.array(s) for s in ([0, 5, 6, 0], [5, 6], [0, 0], [7, 0, 8], [9])]
    assert [s.tolist() for s in distinct(sequences, 0)] == [[5, 6], [7, 0, 8]]
    assert mean_loss([np.array([-1.0, -2.0]), np.array([-6.0])]) == pytest.approx(3) and np.isnan(mean_loss([]))
