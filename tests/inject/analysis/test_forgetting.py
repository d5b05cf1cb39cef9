"""Laws of forgetting, fitted to curves that follow them."""

import numpy as np
import pytest

from mixlab.inject.analysis.forgetting import fit_laws, half_time, peak_step

T = np.array([1, 2, 5, 10, 25, 50, 100, 200, 400, 800])


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_law_that_made_the_curve_is_found(noise):
    wobble = np.exp(np.random.default_rng(0).normal(0, noise, len(T)))
    best, other = fit_laws(T, 0.2 * (T / 25) ** -0.7 * wobble)
    assert (best.law, other.law) == ("power", "exponential") and best.points == 6
    assert (best.a, best.rate) == pytest.approx((0.2, 0.7), rel=4 * noise + 1e-9)
    best, other = fit_laws(T, 0.2 * np.exp(-T / 150) * wobble)
    assert (best.law, other.law) == ("exponential", "power")
    assert (best.a, best.rate) == pytest.approx((0.2, 150), rel=4 * noise + 1e-6)
    np.testing.assert_allclose(best(T[4:]), 0.2 * np.exp(-T[4:] / 150), rtol=6 * noise + 1e-6)
    assert best.aic < other.aic


def test_only_positive_excess_after_the_peak_region_is_fitted():
    excess = 0.2 * (T / 25) ** -0.7
    excess[:4], excess[-1] = 99, -0.01
    power = next(fit for fit in fit_laws(T, excess) if fit.law == "power")
    assert power.points == 5 and power.rate == pytest.approx(0.7)
    assert fit_laws(T[:6], excess[:6]) == ()


def test_peak_and_half_time():
    excess = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.3, 0.1, 0.05, 0, 0])
    assert peak_step(T, excess) == 25
    assert half_time(T, excess) == pytest.approx(75)  # half of the way from 0.3 at 50 to 0.1 at 100
    assert half_time(T[:6], excess[:6]) is None and half_time(T, -excess) is None
    assert half_time(T, 0.5 ** (T / 50)) == pytest.approx(51, abs=2)
