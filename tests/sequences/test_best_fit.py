import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.sequences.best_fit import best_fit, padded_tokens
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.stream import render


def as_lists(index):
    pieces = index.pieces(np.arange(len(index)))
    rows = [[] for _ in range(len(index))]
    for r, d, s, n in zip(pieces.rows, pieces.documents, pieces.starts, pieces.lengths, strict=True):
        rows[r].append((int(d), int(s), int(n)))
    return rows


def naive(documents, lengths, row_length, long_documents):
    """Best-fit decreasing as one would say it, piece by piece."""
    pieces = []
    for document, length in zip(documents.tolist(), lengths.tolist(), strict=True):
        end = length if long_documents == "split" else min(length, row_length)
        pieces += [(document, s, min(row_length, end - s)) for s in range(0, end, row_length)]
    rows, free = [], []
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        enough = [r for r in range(len(rows)) if free[r] >= piece[2]]
        if enough:
            row = min(enough, key=lambda r: (free[r], r))
        else:
            row = len(rows)
            rows.append([])
            free.append(row_length)
        rows[row].append(piece)
        free[row] -= piece[2]
    return rows


def test_worked_example():
    index = best_fit(np.arange(5), np.array([10, 5, 4, 3, 2]), 8)
    assert as_lists(index) == [[(0, 0, 8)], [(1, 0, 5), (3, 0, 3)], [(2, 0, 4), (0, 8, 2), (4, 0, 2)]]
    assert padded_tokens(index, 8) == 0 and index.dropped_tokens == {}


def test_truncation_counts_what_it_drops_and_padding_is_counted():
    index = best_fit(np.array([3, 9]), np.array([21, 5]), 8, "truncate")
    assert as_lists(index) == [[(3, 0, 8)], [(9, 0, 5)]]
    assert index.dropped_tokens == {"truncated": 13} and padded_tokens(index, 8) == 3


@given(
    st.lists(st.integers(0, 40), max_size=80),
    st.integers(1, 24),
    st.sampled_from(["split", "truncate"]),
)
def test_same_rows_as_the_naive_rule(lengths, row_length, long_documents):
    documents, lengths = np.arange(len(lengths))[::-1] * 3, np.array(lengths, np.int64)
    index = best_fit(documents, lengths, row_length, long_documents)
    assert as_lists(index) == naive(documents, lengths, row_length, long_documents)
    tokens = int(np.sum(index.lengths, dtype=np.int64))
    assert tokens + sum(index.dropped_tokens.values()) == lengths.sum()
    assert tokens + padded_tokens(index, row_length) == len(index) * row_length


@pytest.mark.parametrize("row_length", [64, 300])
def test_same_rows_for_many_documents(row_length):
    rng = np.random.default_rng(row_length)
    lengths = np.minimum(np.exp(rng.normal(3.5, 1, 2000)).astype(np.int64) + 1, 1000)
    index = best_fit(np.arange(2000), lengths, row_length)
    assert as_lists(index) == naive(np.arange(2000), lengths, row_length, "split")


def test_rows_that_are_not_full_are_padded_without_loss(memory_store):
    documents = Documents(memory_store([21, 5, 2]), np.arange(3))
    index = best_fit(documents.ids, documents.lengths, 8)
    batch = render(index.pieces(np.arange(len(index))), documents, FormatConfig(), len(index), 8, pad=7)
    assert as_lists(index) == [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 5), (2, 0, 2)], [(1, 0, 5)]]
    padding = batch.segment_ids == 0
    assert padding.sum() == padded_tokens(index, 8) == 4
    assert (batch.tokens[padding] == 7).all() and not batch.loss_weights[padding].any()
    assert batch.loss_weights.sum(axis=1).tolist() == [8, 8, 4 + 1, 4]  # a row cut from a document predicts on
    assert batch.targets[0, -1] == 108
