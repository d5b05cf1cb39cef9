import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.report.spikes import spike_score, spikes, stability_score

ALTERNATING = np.tile([0.0, 1.0], 500)  # mean 0.5, standard deviation 0.5


@pytest.mark.parametrize(("value", "spiked"), [(4.1, True), (3.9, False), (-3.1, True), (-2.9, False), (np.nan, True)])
def test_the_papers_definition(value, spiked):
    series = np.append(ALTERNATING, value)
    assert spikes(series).tolist() == [False] * 1000 + [spiked]
    assert spike_score(series) == (100.0 if spiked else 0.0)


@pytest.mark.parametrize(("value", "spiked"), [(3.6, True), (3.4, False), (-3.0, False), (np.inf, True)])
def test_the_monitors_definition(value, spiked):
    calm = np.ones(129)
    series = np.append(ALTERNATING[:128], value)
    for loss, norm in [(series, calm), (calm, series)]:
        scored = stability_score(loss, norm)
        assert scored.spikes.tolist() == [False] * 128 + [spiked]
        assert scored.total == spiked / 129 and math.isnan(scored.recent)


def test_a_step_counts_once_and_recent_steps_by_themselves():
    series = np.tile([0.0, 1.0], 200)
    series[200] = 50.0
    scored = stability_score(series, series, recent_steps=100)
    assert scored.spikes.sum() == 1 and scored.total == 1 / 400 and scored.recent == 0.0


def test_undefined_until_a_window_is_full():
    assert math.isnan(spike_score(ALTERNATING)) and math.isnan(spike_score(np.zeros(0)))
    assert math.isnan(stability_score(np.ones(127), np.ones(127)).total)


def test_a_constant_series():
    flat = np.full(1200, 0.1)
    assert spike_score(flat) == 0.0
    flat[1100] = 0.2
    assert spikes(flat).nonzero()[0].tolist() == [1100]
    assert not stability_score(flat[:1101], flat[:1101]).spikes.any()  # a standard deviation of 0 is none to it


def test_a_value_that_is_not_finite_does_not_blind_the_windows_after_it():
    series = np.concatenate([ALTERNATING, [np.nan, 0.0, 4.1]])
    assert spikes(series).nonzero()[0].tolist() == [1000, 1002]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 9.0, np.nan, np.inf]), max_size=40), st.integers(1, 8))
def test_both_agree_with_the_definitions_read_literally(series, window):
    history, paper, monitor = [], [], []
    for value in series:
        full = len(history) >= window
        mean, deviation = (np.mean(history[-window:]), np.std(history[-window:])) if full else (0.0, 0.0)
        away = abs(value - mean)
        paper.append(full and (not np.isfinite(value) or (away > 0 and away >= 2 * deviation)))
        monitor.append(full and deviation >= 1e-10 and not value <= mean + 2 * deviation)
        if np.isfinite(value):
            history.append(value)
    values = np.array(series)
    assert spikes(values, window, 2.0).tolist() == paper
    assert stability_score(values, np.zeros(len(values)), window, 2.0).spikes.tolist() == monitor
