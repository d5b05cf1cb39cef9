"""The test for Gaussian watermarks (Bordt and Pawelczyk 2025, equations 2 and 3; Pawelczyk et al. 2025).

w ~ N(0, sigma^2 I) was added to the input embeddings of a row in training, if at all. With g, the direction at the row's
clean input embeddings in which its mean loss falls, x = <g, w> / (sigma |g|) is exactly standard normal given g when w was
never used; a model that has trained on w finds its way there, and the mean of x is above 0.
"""

import numpy as np
from scipy.special import ndtr, ndtri


def statistic(gradients_NxLxD: np.ndarray, noise_NxLxD: np.ndarray) -> np.ndarray:
    """float64 [N]: x of every row. gradients: of the loss, so g is minus these.   noise: w / sigma, the standard normal draws
    themselves. NaN where a gradient is zero."""
    flat = -gradients_NxLxD.reshape(len(gradients_NxLxD), -1).astype(np.float64)
    along = np.einsum("np,np->n", flat, noise_NxLxD.reshape(flat.shape).astype(np.float64))
    norm = np.linalg.norm(flat, axis=1)
    return np.divide(along, norm, out=np.full(len(flat), np.nan), where=norm > 0)


def p_value(x: np.ndarray | float) -> np.ndarray | float:
    """One-sided: the probability of a statistic of `x` or more under noise that was never used."""
    return ndtr(-np.asarray(x))


def true_positive_rate(mean: float, false_positive_rate: float = 0.01, deviation: float = 1.0) -> float:
    """Share of watermarked rows found at a false positive rate when their statistic is N(mean, deviation^2); that of
    other rows is N(0, 1)."""
    return float(ndtr((mean - ndtri(1 - false_positive_rate)) / deviation))
