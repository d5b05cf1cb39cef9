import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.corpus.repetition import Repeat, RepetitionConfig, find_repeats, repeats, repeats_in_rows


def published(tokens, min_period=1, max_period=13):
    """The detector as OLMo describes it: rows of `period` tokens compared with the row above, widened at both ends."""
    found = []
    for period in range(min_period, min(max_period, len(tokens) // 3) + 1):
        padded = np.append(tokens, np.full(period - len(tokens) % period, -1)).reshape(-1, period)
        equal = padded == np.roll(padded, 1, axis=0)
        full = np.flatnonzero(equal.all(axis=1)).tolist()
        while full:
            first = last = full.pop(0)
            while full and full[0] == last + 1:
                last = full.pop(0)
            before = [*equal[first - 1][::-1].tolist(), False]
            after = [*equal[last + 1].tolist(), False] if last + 1 < len(equal) else [False]
            start = (first - 1) * period - before.index(False)
            end = (last + 1) * period + after.index(False)
            if (end - start) // period >= 3:
                found.append(Repeat(start, end, period, (end - start) // period))
    return found


def distinct(n, first=1000):
    return list(range(first, first + n))


CASES = {
    "31 of one token": ([7] * 31 + distinct(40), [(0, 31, 1, 31)], False),
    "32 of one token": ([7] * 32 + distinct(40), [(0, 32, 1, 32), (0, 32, 2, 16), (0, 32, 3, 10)], True),
    "32 trigrams": (
        distinct(5) + [10, 11, 12] * 32 + distinct(30, 2000),
        [(5, 101, 3, 32), (5, 101, 6, 16), (5, 101, 9, 10), (5, 101, 12, 8)],
        True,
    ),
    "31 trigrams": (distinct(5) + [10, 11, 12] * 31 + distinct(30, 2000), [(5, 98, 3, 31)], False),
    "32 13-grams": (distinct(3) + distinct(13, 50) * 32 + distinct(30, 2000), [(3, 419, 13, 32)], True),
    "32 13-grams less a token": (
        distinct(3) + (distinct(13, 50) * 32)[:-1] + distinct(30, 2000),
        [(3, 418, 13, 31)],
        False,
    ),
    "40 14-grams": (distinct(14) * 40, [], False),
    "twice": ([1, 2, 1, 2], [], False),
    "three times within": ([9, 1, 2, 1, 2, 1, 2, 5], [(1, 7, 2, 3)], False),
}


@pytest.mark.parametrize("case", CASES)
def test_published_examples(case):
    tokens, expected, masked = CASES[case]
    tokens = np.array(tokens)
    found = find_repeats(tokens)
    assert set(expected) <= set(found)
    if case not in ("31 of one token", "32 of one token", "31 trigrams"):  # those the examples list in part
        assert found == expected
    assert found == published(tokens)
    assert repeats(tokens, [len(tokens)]).tolist() == [masked]


# Texts of repeated pieces, so that long runs, near misses and runs inside runs are common.
PIECES = st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 12))
TEXTS = st.lists(PIECES, max_size=5).map(lambda pieces: [t for tokens, times in pieces for t in tokens * times])


@given(TEXTS, st.integers(1, 4), st.integers(0, 4))
def test_finds_what_the_published_detector_finds(text, min_period, more):
    tokens = np.array(text, np.int32)
    assert find_repeats(tokens, min_period, min_period + more) == published(tokens, min_period, min_period + more)


@given(st.lists(TEXTS, max_size=5), st.integers(1, 3), st.integers(0, 4), st.integers(3, 12))
def test_the_quick_check_agrees_with_the_detector(texts, min_period, more, count):
    config = RepetitionConfig(min_period, min_period + more, count)
    expected = [bool(find_repeats(np.array(t), min_period, min_period + more, count)) for t in texts]
    flat = np.array([token for text in texts for token in text], np.uint16)
    assert repeats(flat, np.cumsum([len(t) for t in texts], dtype=np.int64), config).tolist() == expected
    rows = np.full((len(texts), max(map(len, texts), default=0) + 60), 0, np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    assert repeats_in_rows(rows, np.array([len(t) for t in texts], np.int64), config).tolist() == expected


@given(st.integers(1, 13), st.integers(0, 200), st.integers(31, 33), st.booleans())
def test_the_quick_check_at_its_own_threshold(period, before, count, one_less):
    run = (distinct(period, 0) * count)[: period * count - one_less]
    tokens = np.array(distinct(before) + run + distinct(50, 5000))
    assert repeats_in_rows(tokens[None]).tolist() == [period * count - one_less >= 32 * period]


def test_a_run_over_two_rows_is_none_and_padding_is_none():
    rows = np.arange(200, dtype=np.int32).reshape(2, 100)
    rows[0, 80:] = rows[1, :20] = 7
    assert repeats_in_rows(rows).tolist() == [False, False]
    rows[1, 40:] = 7
    assert repeats_in_rows(rows).tolist() == [False, True]
    assert repeats_in_rows(rows, np.array([100, 40])).tolist() == [False, False]


def test_problems_name_the_key():
    assert RepetitionConfig().problems("format.repetition") == []
    assert "format.repetition.count" in RepetitionConfig(count=2).problems("format.repetition")[0]
    assert "max_period" in RepetitionConfig(min_period=5, max_period=4).problems("x")[0]
