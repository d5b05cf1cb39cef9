"""Multiple-choice questions: ranked classification, and what contamination adds to accuracy (Bordt et al. 2025)."""

from collections.abc import Sequence

import numpy as np


def divide(options: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(context, targets): the longest prefix that the token sequences of all options of one question share, and what
    follows it in each; at least one token of each."""
    shared = min(len(option) for option in options) - 1
    block = np.array([option[:shared] for option in options])
    differs = np.flatnonzero((block != block[0]).any(axis=0))
    shared = int(differs[0]) if len(differs) else shared
    return np.asarray(options[0][:shared]), [np.asarray(option[shared:]) for option in options]


def chosen(log_probabilities: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The option of the highest summed log-probability, divided by its length (in characters, say) if `lengths` are given;
    −1, which is never right, where any of them is not a number."""
    scores = np.asarray(log_probabilities, np.float64)
    if np.isnan(scores).any():
        return -1
    return int(np.argmax(scores / np.maximum(lengths, 1) if lengths is not None else scores))


def gap(correct: np.ndarray, holdout: np.ndarray) -> tuple[float, float]:
    """(accuracy − accuracy on the holdout, its standard error), from whether each question was answered rightly."""
    a, b = float(np.mean(correct)), float(np.mean(holdout))
    return a - b, float(np.sqrt(a * (1 - a) / len(correct) + b * (1 - b) / len(holdout)))


def cross_entropy_gain(control: np.ndarray, treated: np.ndarray) -> tuple[float, float]:
    """(mean, standard error) of CE_control(x) − CE_treated(x) over the same texts: above 0 where the treated model has
    read them."""
    gains = np.asarray(control, np.float64) - np.asarray(treated, np.float64)
    return float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("nan")
