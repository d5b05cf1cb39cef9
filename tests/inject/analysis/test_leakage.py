from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.inject.analysis.leakage import common_subsequence, leakage_at, rouge_l_recall

WORDS = st.lists(st.sampled_from("abc"), max_size=9)


@given(WORDS, WORDS)
def test_longest_common_subsequence(a, b):
    @lru_cache(None)
    def slow(i, j):
        if i == len(a) or j == len(b):
            return 0
        return max(slow(i + 1, j), slow(i, j + 1), 1 + slow(i + 1, j + 1) if a[i] == b[j] else 0)

    assert common_subsequence(a, b) == slow(0, 0)


def test_recall_is_of_the_reference_in_order():
    assert rouge_l_recall("Write a poem, please!", "『『Write a poem please』』 and more") == 1
    assert rouge_l_recall("one two three four", "four three one two") == pytest.approx(0.5)
    assert rouge_l_recall("one two", "") == 0 and np.isnan(rouge_l_recall("…", "one"))


def test_leakage_grows_with_generations():
    recalls = np.array([[0.2, 0.95, 0.1], [0.5, 0.5, 0.91], [1.0, 0, 0], [0.9, 0.9, 0.9]])
    assert [leakage_at(k, recalls) for k in (1, 2, 3)] == [0.25, 0.5, 0.75]
