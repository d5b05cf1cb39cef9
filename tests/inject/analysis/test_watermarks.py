"""The test for Gaussian watermarks, in closed form and under noise that was never used."""

import numpy as np
import pytest

from mixlab.inject.analysis.watermarks import p_value, statistic, true_positive_rate


@pytest.mark.parametrize(
    ("mean", "deviation", "rate"),
    [(0, 1, 0.0100), (0.14, 1, 0.0144), (0.27, 1, 0.0199), (0.27, 1.07, 0.0273), (0.45, 1, 0.0303),
     (0.45, 1.23, 0.0636), (0.68, 1, 0.0498), (1, 1, 0.0924), (2, 1, 0.3721)],
)  # fmt: skip
def test_closed_form_at_one_percent(mean, deviation, rate):
    assert true_positive_rate(mean, 0.01, deviation) == pytest.approx(rate, abs=5e-5)


def test_p_value():
    assert p_value(2) == pytest.approx(0.02275, abs=5e-6)
    np.testing.assert_allclose(p_value(np.array([0.0, -40.0])), [0.5, 1])


def test_noise_along_the_falling_loss_is_its_own_statistic():
    g = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    unit = g / np.linalg.norm(g.reshape(3, -1), axis=1)[:, None, None]
    along = np.array([-1.0, 0.5, 7.0])
    np.testing.assert_allclose(statistic(g, -along[:, None, None] * unit), along, rtol=1e-5)
    assert np.isnan(statistic(np.zeros((1, 2, 2)), np.ones((1, 2, 2))))[0]


def test_fresh_noise_is_standard_normal_whatever_the_gradient():
    rng = np.random.default_rng(7)
    g = rng.standard_t(2, size=(1, 16, 8)).repeat(2000, 0)  # far from normal
    x = statistic(g, rng.normal(size=g.shape))
    assert abs(x.mean()) < 0.1 and 0.93 < x.std() < 1.07
