import numpy as np
import pytest

from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.decompose import decompose
from mixlab.sequences.statistics import (
    average_context_length,
    average_sequence_length,
    expected_step_time,
    fit_step_time,
    tokens_by_length,
)

# The paper's table 1: tokens in buckets 2^6 … 2^13, average sequence and context length.
MIXTURES = {
    "natural": ([3, 6, 10, 17, 21, 17, 13, 9], 482.2, 1017.8),
    "equal": ([12] * 8, 257.0, 1019.5),
    "1k only": ([0, 0, 0, 0, 96, 0, 0, 0], 1024.0, 511.5),
    "at most 2k": ([16] * 6 + [0, 0], 195.0, 335.5),
    "mid": ([0, 0, 24, 24, 24, 24, 0, 0], 546.1, 479.5),
    "at least 256": ([0, 0, 16, 16, 16, 16, 16, 16], 780.2, 1343.5),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_averages_of_the_papers_mixtures(name):
    tokens, sequence, context = MIXTURES[name]
    by_length = {2 ** (6 + i): t for i, t in enumerate(tokens)}
    assert average_sequence_length(by_length) == pytest.approx(sequence, abs=0.05)
    assert average_context_length(by_length) == pytest.approx(context, abs=0.05)


def test_averages_of_real_rows():
    lengths = np.array([5, 3, 10])
    chunks = concat_chunk(np.arange(3), lengths, 8)
    assert tokens_by_length(chunks) == {3: 3, 5: 5, 8: 8}
    assert average_context_length(tokens_by_length(chunks)) == pytest.approx(41 / 16)
    assert average_context_length({8: 16}) == 3.5  # the same rows, attended to across documents
    buckets = decompose(np.arange(3), lengths, "exact", 1, 8)
    tokens = {n: t for index in buckets.values() for n, t in tokens_by_length(index).items()}
    assert sum(tokens.values()) == 18 and average_context_length(tokens) == pytest.approx(2.0)


def test_step_time_is_linear_in_the_sequence_length():
    lengths, milliseconds = [8192, 4096, 2048, 1024, 512], [304, 265, 243, 232, 227]
    fixed, per_token = fit_step_time(lengths, milliseconds)
    assert fixed == pytest.approx(222, abs=0.5) and per_token == pytest.approx(0.01006, abs=1e-5)
    assert max(abs(fixed + per_token * n - t) for n, t in zip(lengths, milliseconds, strict=True)) < 2
    expected = {
        name: expected_step_time(fixed, per_token, {2 ** (6 + i): t for i, t in enumerate(tokens)})
        for name, (tokens, *_) in MIXTURES.items()
    }
    assert expected["at least 256"] == pytest.approx(249, abs=0.5)
    assert expected["natural"] == pytest.approx(243, abs=1)
    assert expected["1k only"] == pytest.approx(232, abs=1)
    fixed, per_token = fit_step_time([16384, 8192, 4096, 2048, 1024], [719, 566, 487, 445, 426])
    assert fixed == pytest.approx(407, abs=1) and per_token == pytest.approx(0.0191, abs=1e-4)
