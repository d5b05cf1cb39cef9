import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.index import SequenceIndex


def as_lists(index):
    pieces = index.pieces(np.arange(len(index)))
    rows = [[] for _ in range(len(index))]
    for r, d, s, n in zip(pieces.rows, pieces.documents, pieces.starts, pieces.lengths, strict=True):
        rows[r].append((int(d), int(s), int(n)))
    return rows


def test_worked_example():
    index = concat_chunk(np.array([7, 3, 5]), np.array([3, 6, 2]), 4)
    assert as_lists(index) == [[(7, 0, 3), (3, 0, 1)], [(3, 1, 4)]]
    assert index.dropped_tokens == {"last partial row": 3}


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 40))
def test_every_token_once_in_order(lengths, row_length):
    documents = np.arange(len(lengths))[::-1].copy()
    index = concat_chunk(documents, np.array(lengths, np.int64), row_length)
    laid_out = [(int(d), t) for d, n in zip(documents, lengths, strict=True) for t in range(n)]
    read = [(d, s + t) for row in as_lists(index) for d, s, n in row for t in range(n)]
    assert read == laid_out[: len(index) * row_length]
    assert index.dropped_tokens["last partial row"] == len(laid_out) - len(read) < row_length
    assert all(sum(n for *_, n in row) == row_length for row in as_lists(index))


def test_no_documents_no_rows():
    assert len(concat_chunk(np.zeros(0, np.int64), np.zeros(0, np.int64), 8)) == 0


def test_survives_the_disk_and_finds_documents(tmp_path):
    rng = np.random.default_rng(0)
    index = concat_chunk(np.arange(200), rng.integers(1, 60, 200), 32)
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # a second process that comes late
    again = SequenceIndex.load(tmp_path / "index")
    assert as_lists(again) == as_lists(index) and again.dropped_tokens == index.dropped_tokens
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index"]
    for document in (0, 17, 150):
        assert again.find(document).tolist() == [
            r for r, row in enumerate(as_lists(index)) if any(d == document for d, *_ in row)
        ]
