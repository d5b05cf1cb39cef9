"""Spikes: values of a loss or gradient norm far from those just before. Two published definitions, under two names.

`spike_score` is the OLMo 2 paper's (section 3.2): a percentage, of one series, in both directions. `stability_score` is
OLMo-core's monitor's: a fraction of steps, of loss and gradient norm together, upwards only. They are not comparable.
"""

import math
from dataclasses import dataclass

import numpy as np

from mixlab.report.runs import Run

CHUNK = 4096  # windows held at a time


def spikes(values: np.ndarray, window: int = 1000, deviations: float = 7.0) -> np.ndarray:
    """bool [n]: which of values (float [n]) lie at least so many standard deviations from the mean of those before.

    The mean is of the `window` values before, without the value itself; the standard deviation is the population's. The
    first `window` values are never spikes. What the paper leaves open: where all values before are equal, any other one
    is a spike; a value that is not finite is a spike, and is left out of the windows of those after it.
    """
    values, mean, deviation = _against_window(values, window)
    away = np.abs(values - mean)
    with np.errstate(invalid="ignore"):
        return ~np.isnan(mean) & (~np.isfinite(values) | ((away > 0) & (away >= deviations * deviation)))


def spike_score(values: np.ndarray, window: int = 1000, deviations: float = 7.0) -> float:
    """Per cent of values (float [n]) that are spikes, of those with a full window before them; NaN if there is none."""
    _, mean, _ = _against_window(values, window)
    judged = int((~np.isnan(mean)).sum())
    return 100.0 * float(spikes(values, window, deviations).sum()) / judged if judged else float("nan")


@dataclass(frozen=True, eq=False)
class Stability:
    """spikes: bool [n], steps at which loss or gradient norm spiked.   total: their share of all steps.
    recent: their share of the last 10,000 steps; NaN before there are as many."""

    spikes: np.ndarray
    total: float
    recent: float


def stability_score(
    loss: np.ndarray,
    gradient_norm: np.ndarray,
    window: int = 128,
    deviations: float = 6.0,
    recent_steps: int = 10_000,
) -> Stability:
    """OLMo-core's score of a run from its loss and gradient norm at every step (float [n] each).

    A value spikes when it exceeds the mean of the `window` before it by more than `deviations` standard deviations (the
    population's, which must reach 1e-10). `total` is NaN for runs shorter than the window.
    """
    spiked = _above(loss, window, deviations) | _above(gradient_norm, window, deviations)
    total = float(spiked.mean()) if len(spiked) >= window else float("nan")
    recent = float(spiked[-recent_steps:].mean()) if len(spiked) >= recent_steps else float("nan")
    return Stability(spiked, total, recent)


def spike_scores(run: Run) -> dict[str, float | None]:
    """Both definitions on what a run recorded; None where its steps are too few for one to say anything.

    loss, grad_norm: per cent of the steps after the first 1,000 (`spike_score`).   stability_total, stability_recent:
    fractions of all steps and of the last 10,000, of loss and gradient norm together (`stability_score`).
    """
    loss, norm = run.series("train/loss"), run.series("train/grad_norm")
    _, at_loss, at_norm = np.intersect1d(loss.steps, norm.steps, assume_unique=True, return_indices=True)
    stability = stability_score(loss.values[at_loss], norm.values[at_norm])
    scores = {
        "loss": spike_score(loss.values),
        "grad_norm": spike_score(norm.values),
        "stability_total": stability.total,
        "stability_recent": stability.recent,
    }
    return {name: None if math.isnan(score) else score for name, score in scores.items()}


def _above(values: np.ndarray, window: int, deviations: float) -> np.ndarray:
    values, mean, deviation = _against_window(values, window)
    with np.errstate(invalid="ignore"):
        return ~np.isnan(mean) & (deviation >= 1e-10) & ~(values <= mean + deviations * deviation)


def _against_window(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64 [n] each: values; mean and standard deviation of the `window` finite ones before, NaN if fewer."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    before = np.cumsum(finite) - finite
    means, deviations = np.full((2, int(finite.sum()) + 1), np.nan)
    if finite.sum() >= window:
        windows = np.lib.stride_tricks.sliding_window_view(values[finite], window)
        for first in range(0, len(windows), CHUNK):
            part = windows[first : first + CHUNK]
            at = slice(first + window, first + window + len(part))
            means[at], deviations[at] = part.mean(axis=1), part.std(axis=1)
    return values, means[before], deviations[before]
