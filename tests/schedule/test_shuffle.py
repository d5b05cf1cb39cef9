import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.schedule.shuffle import permute, permute_nearby, unpermute


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_is_a_permutation_with_an_inverse(n, seed):
    there = permute(np.arange(n), n, seed)
    assert np.array_equal(np.sort(there), np.arange(n))
    assert np.array_equal(unpermute(there, n, seed), np.arange(n))


def test_one_position_is_the_same_as_the_whole():
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(np.int64(i), 1000, 7)) for i in range(0, 1000, 97)] == whole[::97].tolist()


@given(st.integers(1, 5000), st.integers(0, 3), st.data())
def test_neighbours_go_where_they_go_alone(n, seed, data):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    assert np.array_equal(permute_nearby(positions, n, seed), permute(positions, n, seed))
    far = 10**15 - 1 - positions
    assert np.array_equal(permute_nearby(far, 10**15, seed), permute(far, 10**15, seed))


def test_reaches_far_without_memory():
    n = 10**15
    assert unpermute(permute(np.array([0, n - 1]), n, 3), n, 3).tolist() == [0, n - 1]


def test_small_permutations_are_about_equally_frequent():
    counts = {}
    trials = 24_000
    for seed in range(trials):
        order = tuple(permute(np.arange(4), 4, seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    expected = trials / 24
    chi_square = sum((counts.get(o, 0) - expected) ** 2 / expected for o in counts) + expected * (24 - len(counts))
    assert len(counts) == 24 and chi_square < 60  # 23 degrees of freedom: p < 1e-4 above 53 (the seeds are fixed)


def test_neighbours_are_spread():
    order = permute(np.arange(100_000), 100_000, 11)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 0.02 and abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_order_is_pinned_for_good():
    """Runs resume across versions of everything, so this must never change."""
    assert permute(np.arange(10), 10, 1).tolist() == [5, 1, 6, 3, 8, 2, 7, 4, 9, 0]


def test_outside_is_refused():
    with pytest.raises(IndexError):
        permute(np.array([10]), 10, 1)
    with pytest.raises(IndexError):
        permute_nearby(np.array([3, 10]), 10, 1)
