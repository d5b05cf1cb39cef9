import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from mixlab.sequences import complete as module
from mixlab.sequences.complete import CUT, LAST, SINGLE, complete, row_begins


def by_the_book(lengths, row_length):
    """One document after the other into a buffer; a full buffer is written, the rest of its last document dropped."""
    rows, row, free, begins = [], [], row_length, [0]
    dropped = {SINGLE: 0, CUT: 0, LAST: 0}
    waiting = 0
    for i, length in enumerate(lengths):
        if length == 1:
            dropped[SINGLE] += 1
        if length <= 1:
            continue
        if not row:
            begins[-1] = i
        taken = min(length, free)
        row.append((i, taken))
        free -= taken
        waiting += length
        if free == 0:
            kept = [(d, n) for d, n in row if n > 1]
            rows.append(kept)
            dropped[CUT] += waiting - sum(n for _, n in kept)
            row, free, waiting = [], row_length, 0
            begins.append(len(lengths))
    if row:
        dropped[LAST] = waiting
    return rows, begins, {reason: n for reason, n in dropped.items() if n}


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(2, 24), st.sampled_from([1, 4, 2**16]))
@example([9, 7], 16, 2**16)  # fits exactly
@example([9, 7, 5], 12, 2**16)  # the second is cut, the third begins anew
@example([9, 7, 10], 10, 2**16)  # a single token at the end of a row
@example([20], 12, 2**16)  # longer than a row
def test_rows_are_those_of_a_buffer_that_is_emptied_when_full(lengths, row_length, block):
    before, module.BLOCK = module.BLOCK, block
    try:
        documents = np.arange(len(lengths)) * 3 + 1
        index = complete(documents, np.array(lengths, np.int64), row_length)
        begins = row_begins(np.array(lengths, np.int64), row_length)
    finally:
        module.BLOCK = before
    rows, expected_begins, dropped = by_the_book(lengths, row_length)
    found = [
        list(zip(index.documents[a:b].tolist(), index.lengths[a:b].tolist(), strict=True))
        for a, b in zip(index.row_offsets[:-1], index.row_offsets[1:], strict=True)
    ]
    assert found == [[(3 * d + 1, n) for d, n in row] for row in rows]
    assert not index.starts.any()
    assert begins[:-1].tolist() == expected_begins[: len(rows)]
    assert index.dropped_tokens == dropped
    assert sum(lengths) == sum(n for row in found for _, n in row) + sum(dropped.values())


def test_no_documents_make_no_rows():
    assert len(complete(np.zeros(0, np.int64), np.zeros(0, np.int64), 8)) == 0


def test_a_table_on_disk_is_the_same(tmp_path):
    index = complete(np.arange(9), np.full(9, 5), 12)
    index.save(tmp_path / "table")
    again = type(index).load(tmp_path / "table")
    assert len(again) == len(index) == 3
    assert np.array_equal(again.lengths, index.lengths) and not np.asarray(again.starts).any()
