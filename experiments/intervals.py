"""Means over seeds, and differences of them, with 95 % intervals."""

import numpy as np
from scipy import stats


def interval(values: list[float]) -> dict[str, float]:
    """mean, sd (n - 1) and half, the half-width of the 95 % t interval of the mean, of values of n >= 2 seeds."""
    n = len(values)
    sd = float(np.std(values, ddof=1))
    return {"mean": float(np.mean(values)), "sd": sd, "half": float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5}


def difference(a: list[float], b: list[float]) -> dict[str, float]:
    """mean(a) - mean(b) and half, the half-width of its 95 % interval (Welch: unequal variances, independent seeds)."""
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)) if va + vb else 1.0
    half = float(stats.t.ppf(0.975, freedom)) * float(va + vb) ** 0.5
    return {"mean": float(np.mean(a) - np.mean(b)), "half": half}
