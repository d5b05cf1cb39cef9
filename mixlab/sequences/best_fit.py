"""best_fit: whole documents packed into rows with as little padding as greed achieves (best-fit decreasing).

Longest piece first, each goes to the row with the smallest free space that is enough, the oldest such row
among equals, or else to a new row (Pouransari et al. 2024, appendix D; OLMo-core's packed datasets).

Pieces of one length are placed together. A row that takes one of them and has room for another is the
tightest fit for that other, so rows are filled one after the other, and all rows with equal free space are
filled at once. The cost is a few array operations per distinct length, whatever the number of documents.
"""

from typing import Literal

import numpy as np

from mixlab.sequences.index import SequenceIndex


def best_fit(
    documents: np.ndarray,
    lengths: np.ndarray,
    row_length: int,
    long_documents: Literal["split", "truncate"] = "split",
) -> SequenceIndex:
    """Rows of up to row_length tokens, of documents and parts of longer ones.

    documents: int64 [n] in reading order, which decides between pieces of equal length.
    lengths: int64 [n] virtual tokens of each.
    long_documents: "split" cuts row_length tokens off as often as there are, and packs the remainder like a
        document; "truncate" keeps the first row_length tokens, and counts the others as dropped.
    Rows stand in the order in which they were begun, pieces within a row longest first.
    """
    if long_documents == "split":
        counts = -(-lengths // row_length)
        which = np.repeat(np.arange(len(lengths)), counts)
        starts = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * row_length
    else:
        which = np.flatnonzero(lengths)
        starts = np.zeros_like(which)
    pieces = np.minimum(lengths[which] - starts, row_length)
    # A narrow type makes this a radix sort.
    order = np.argsort((row_length - pieces).astype(np.min_scalar_type(row_length)), kind="stable")
    per_length = np.bincount(pieces, minlength=row_length + 1)
    rows, n_rows = _place(per_length, row_length)
    truncated = int(lengths.sum() - pieces.sum())
    by_row = np.argsort(rows, kind="stable")
    order = order[by_row]
    return SequenceIndex(
        documents=_narrow(documents[which[order]]),
        starts=_narrow(starts[order]),
        lengths=_narrow(pieces[order]),
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_rows))]).astype(np.int64),
        dropped_tokens={"truncated": truncated} if truncated else {},
    )


def padded_tokens(index: SequenceIndex, row_length: int) -> int:
    """Positions of the rows that no document fills."""
    return len(index) * row_length - int(index.lengths.sum(dtype=np.int64))


def _place(per_length: np.ndarray, row_length: int) -> tuple[np.ndarray, int]:
    """int64 [pieces]: the row of each piece, pieces in order of descending length; and the number of rows.

    per_length: int64 [row_length + 1], how many pieces there are of each length.
    """
    with_free = _RowsByFreeSpace(row_length)
    parts, n_rows = [np.zeros(0, np.int64)], 0
    for length in np.flatnonzero(per_length)[::-1].tolist():
        left = int(per_length[length])
        while left:
            free = with_free.smallest_at_least(length)
            fits = (free or row_length) // length
            wanted = -(-left // fits)
            if free is None:
                rows = np.arange(n_rows, n_rows + wanted)
                n_rows += wanted
                free = row_length
            else:
                rows = with_free.take_oldest(free, wanted)
            placed = min(left, len(rows) * fits)
            parts.append(np.repeat(rows, fits)[:placed])
            in_last = placed - (len(rows) - 1) * fits
            with_free.add(free - fits * length, rows[:-1])
            with_free.add(free - in_last * length, rows[-1:])
            left -= placed
    return np.concatenate(parts), n_rows


class _RowsByFreeSpace:
    """Begun rows by the tokens that still fit in them. The oldest row has the lowest number."""

    def __init__(self, row_length: int):
        self._rows: list[list[np.ndarray]] = [[] for _ in range(row_length + 1)]  # sorted once they are taken from
        self._present = 0  # bit f is set when there are rows with f tokens free

    def smallest_at_least(self, length: int) -> int | None:
        enough = self._present >> length
        return length + (enough & -enough).bit_length() - 1 if enough else None

    def add(self, free: int, rows: np.ndarray) -> None:
        if free and len(rows):
            self._rows[free].append(rows)
            self._present |= 1 << free

    def take_oldest(self, free: int, count: int) -> np.ndarray:
        """Removes up to `count` rows."""
        parts = self._rows[free]
        rows = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts), kind="stable")
        self._rows[free] = [rows[count:]] if count < len(rows) else []
        if not self._rows[free]:
            self._present ^= 1 << free
        return rows[:count]


def _narrow(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
