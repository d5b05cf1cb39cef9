"""Was this text trained on? Membership inference from losses: lower means member (Shokri et al. 2017, Carlini et al. 2022,
Shi et al. 2024).

A raw score is the loss of a text. A calibrated one is its loss less that under a model that has read neither members nor
others (`losses - reference_losses`): what makes a text easy for any model then cancels.
"""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from mixlab.draws import draws


@dataclass(frozen=True)
class Attack:
    """How well members are told from others.

    auc: probability that a member has the lower score, ties counting half.
    p_value: one-sided Mann–Whitney test of members having lower scores.
    tpr: share of members found where at most the stated share of others is taken for members; [tpr_low, tpr_high] is its
        95 % bootstrap interval.
    """

    auc: float
    p_value: float
    tpr: float
    tpr_low: float
    tpr_high: float


def attack(members: np.ndarray, others: np.ndarray, fpr: float = 0.01, resamples: int = 1000, seed: int = 0) -> Attack:
    """From the scores of members, float [M], and of others, float [N]."""
    members, others = np.asarray(members, np.float64), np.asarray(others, np.float64)
    test = stats.mannwhitneyu(members, others, alternative="less")
    low, high = tpr_interval(members, others, fpr, resamples, seed)
    return Attack(
        auc=float(1 - test.statistic / (len(members) * len(others))),
        p_value=float(test.pvalue),
        tpr=tpr_at_fpr(members, others, fpr),
        tpr_low=low,
        tpr_high=high,
    )


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, fpr: float = 0.01) -> float:
    """The largest share of members found at any threshold by which at most `fpr` of the others are taken for members."""
    allowed = int(fpr * len(others) + 1e-9)
    if allowed >= len(others):
        return 1.0
    return float(np.mean(members < np.partition(others, allowed)[allowed]))


def tpr_interval(
    members: np.ndarray, others: np.ndarray, fpr: float, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of `tpr_at_fpr`, members and others resampled."""
    found = np.empty(resamples)
    size = len(members) + len(others)
    for i in range(resamples):
        numbers = draws(seed, np.arange(i * size, (i + 1) * size))
        again = members[numbers[: len(members)] % np.uint64(len(members))]
        found[i] = tpr_at_fpr(again, others[numbers[len(members) :] % np.uint64(len(others))], fpr)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def min_k(log_probabilities: np.ndarray, share: float = 0.2) -> float:
    """Min-K% probability (Shi et al. 2024): the mean of the `share` lowest of a text's log-probabilities, at least one;
    higher means member. NaN for none."""
    values = np.sort(np.asarray(log_probabilities, np.float64))
    return float(values[: max(1, int(share * len(values) + 1e-9))].mean()) if len(values) else float("nan")
