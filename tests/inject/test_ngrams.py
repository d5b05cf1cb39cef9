import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixlab.inject.ngrams import Ngrams


@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_rows_that_hold_a_string_are_found_and_no_others(length, count, row_length, seed):
    rng = np.random.default_rng(seed)
    rows, strings = rng.integers(0, 3, (6, row_length)), rng.integers(0, 3, (count, length))
    windows = [{tuple(row[i : i + length]) for i in range(row_length - length + 1)} for row in rows.tolist()]
    wanted = [bool(found & set(map(tuple, strings.tolist()))) for found in windows]
    assert Ngrams(strings.astype(np.int32)).within(rows).tolist() == wanted
    there = [tuple(string) in set.union(*windows) for string in strings.tolist()]
    assert Ngrams(strings.astype(np.int32)).occurring(rows).tolist() == there


def test_a_string_is_found_at_either_end_of_a_row_but_not_across_two():
    rows = np.arange(400).reshape(4, 100)
    strings = Ngrams(np.stack([rows[0, :50], rows[2, 50:], rows[2:].ravel()[75:125]]).astype(np.int32))
    assert strings.within(rows).tolist() == [True, False, True, False]
