"""How much of a text comes back in generated ones: ROUGE-L recall (Lin 2004), leakage within k generations."""

import re
from collections.abc import Sequence

import numpy as np


def rouge_l_recall(reference: str, generated: str) -> float:
    """Length of the longest common subsequence of words over the number of words of the reference: 1 if all of it comes
    back in order. Words are runs of letters and digits, in lower case. NaN for a reference without words."""
    words, others = _words(reference), _words(generated)
    return common_subsequence(words, others) / len(words) if words else float("nan")


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence; bit-parallel over `a` (Hyyrö 2004), one step a word of `b`."""
    at: dict[str, int] = {}
    for i, word in enumerate(a):
        at[word] = at.get(word, 0) | 1 << i
    whole = (1 << len(a)) - 1
    free = whole  # bit i: the subsequence does not grow at word i
    for word in b:
        taken = free & at.get(word, 0)
        free = ((free + taken) | (free - taken)) & whole
    return len(a) - free.bit_count()


def leakage_at(k: int, recalls: np.ndarray, threshold: float = 0.9) -> float:
    """Share of prompts that come back, by a recall above the threshold, in any of their first k generations.
    recalls: float [prompts, generations]."""
    return float((np.asarray(recalls)[:, :k].max(axis=1) > threshold).mean())


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
