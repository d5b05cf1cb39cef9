import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.inject.analysis.choices import chosen, cross_entropy_gain, divide, gap


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=5))
def test_options_are_divided_after_their_longest_common_prefix(options):
    context, targets = divide([np.array(o) for o in options])
    assert [[*context, *target] for target in targets] == options and min(map(len, targets)) >= 1
    assert len({int(t[0]) for t in targets}) > 1 or min(map(len, targets)) == 1  # nothing more could be shared


def test_the_highest_probability_is_chosen_and_length_can_matter():
    assert chosen([-6, -4]) == 1
    assert chosen([-6, -4], lengths=[6, 2]) == 0
    assert chosen([-6, float("nan")]) == -1


def test_gap_and_its_standard_error():
    correct, holdout = np.repeat([True, False], [80, 20]), np.repeat([True, False], [500, 500])
    value, error = gap(correct, holdout)
    assert value == pytest.approx(0.3) and error == pytest.approx(np.sqrt(0.16 / 100 + 0.25 / 1000))


def test_cross_entropy_gain_is_paired():
    assert cross_entropy_gain(np.array([3.0, 5.0]), np.array([2.0, 2.0])) == pytest.approx((2.0, 1.0))
