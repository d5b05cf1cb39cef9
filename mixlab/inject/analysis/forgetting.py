"""How what was read once is forgotten: the curve of a batch's excess over a model that never read it, and laws fitted to it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

FITTED_FROM_STEPS = 25  # the effect of an exposure is largest some steps after it, and decays from there on


@dataclass(frozen=True)
class Fit:
    """`law` "power": a (t / FITTED_FROM_STEPS)^-rate; "exponential": a exp(-t / rate), rate in steps. aic: Akaike's criterion of
    the log excess, to compare laws fitted to the same points; points: how many."""

    law: Literal["power", "exponential"]
    a: float
    rate: float
    aic: float
    points: int

    def __call__(self, t_steps: np.ndarray) -> np.ndarray:
        t = np.asarray(t_steps, np.float64)
        if self.law == "power":
            return self.a * (t / FITTED_FROM_STEPS) ** -self.rate
        return self.a * np.exp(-t / self.rate)


def fit_laws(t_steps: np.ndarray, excess: np.ndarray) -> tuple[Fit, ...]:
    """The laws fitted to the excess of the losses, control minus treatment, [n] steps after exposure: least squares on the
    log of positive excess from FITTED_FROM_STEPS on, the better law by AIC first. Empty with fewer than three such points:
    two parameters would meet them exactly."""
    t, e = np.asarray(t_steps, np.float64), np.asarray(excess, np.float64)
    used = (t >= FITTED_FROM_STEPS) & (e > 0)
    if used.sum() < 3:
        return ()
    t, log_e = t[used], np.log(e[used])
    slope, level, aic = _line(np.log(t / FITTED_FROM_STEPS), log_e)
    power = Fit("power", float(np.exp(level)), -slope, aic, len(t))
    slope, level, aic = _line(t, log_e)
    exponential = Fit("exponential", float(np.exp(level)), -1 / slope if slope else np.inf, aic, len(t))
    return tuple(sorted((power, exponential), key=lambda fit: fit.aic))


def peak_step(t_steps: np.ndarray, excess: np.ndarray) -> float:
    """Steps after exposure at which the excess is largest."""
    return float(np.asarray(t_steps)[np.nanargmax(excess)])


def half_time(t_steps: np.ndarray, excess: np.ndarray) -> float | None:
    """Steps after exposure at which the excess, past its peak, first falls to half of it, on a straight line between two
    measurements; None when it has not."""
    t, e = np.asarray(t_steps, np.float64), np.asarray(excess, np.float64)
    top = int(np.nanargmax(e))
    below = np.flatnonzero(e[top:] <= e[top] / 2)
    if e[top] <= 0 or not len(below):
        return None
    after = top + int(below[0])
    share = (e[after - 1] - e[top] / 2) / (e[after - 1] - e[after])
    return float(t[after - 1] + share * (t[after] - t[after - 1]))


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(slope, level at 0, AIC) of the least-squares line; parameters: slope, level and the residuals' variance."""
    slope, level = np.polyfit(x, y, 1)
    squares = max(float(np.sum((y - level - slope * x) ** 2)), 1e-300)  # an exact fit has a finite AIC
    return float(slope), float(level), len(x) * np.log(squares / len(x)) + 2 * 3
