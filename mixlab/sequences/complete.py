"""complete: every row begins with a document, and what does not fit at its end is dropped (Gao et al. 2025, section 2).

Documents are laid end to end until they fill a row; the rest of the one that fills it is dropped, and the next row begins
with the next document. So no row begins in the middle of a document, and no document is in two rows.
"""

import numpy as np

from mixlab.sequences.index import SequenceIndex

LAST = "last partial row"
CUT = "past the row's end"
SINGLE = "a single token"
BLOCK = 2**16  # documents whose successors are in a list at a time


def complete(documents: np.ndarray, lengths: np.ndarray, row_length: int) -> SequenceIndex:
    """Rows over `documents` in the given order.

    documents: int64 [n] in reading order.   lengths: int64 [n] virtual tokens of each.
    A piece of one token has nothing to predict or to be predicted from: at the end of a row it is dropped, and the row is
    one short; a document of one token is in no row.
    """
    firsts = row_begins(lengths, row_length)
    used = np.flatnonzero(lengths > 1)
    row_firsts = np.searchsorted(used, firsts)
    used_lengths = lengths[used[: row_firsts[-1]]]
    rows = np.repeat(np.arange(len(firsts) - 1), np.diff(row_firsts))
    begins = np.cumsum(used_lengths) - used_lengths
    room = row_length - (begins - begins[row_firsts[:-1]][rows] if len(rows) else begins)
    pieces = np.minimum(used_lengths, room)
    kept = pieces > 1
    dropped = {
        SINGLE: int(lengths[lengths == 1].sum()),
        CUT: int((used_lengths - pieces * kept).sum()),
        LAST: int(lengths[used[row_firsts[-1] :]].sum()),
    }
    return SequenceIndex(
        documents=_narrow(documents[used[: row_firsts[-1]][kept]]),
        starts=np.broadcast_to(np.uint8(0), int(kept.sum())),
        lengths=_narrow(pieces[kept]),
        row_offsets=np.concatenate([[0], np.cumsum(np.bincount(rows[kept], minlength=len(firsts) - 1))]).astype(
            np.int64
        ),
        dropped_tokens={reason: n for reason, n in dropped.items() if n},
    )


def row_begins(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """int64 [rows + 1]: number (in the given order) of the document that each row begins with, and of the first that is in no
    row because the last one is not filled."""
    used = np.flatnonzero(lengths > 1)
    ends = np.cumsum(lengths[used])
    begins = ends - lengths[used]
    # The document that fills a row which begins with document i is the first to end row_length or more after i begins.
    found, at, count = [0], 0, len(used)
    for first in range(0, count, BLOCK):
        if at >= first + BLOCK:
            continue
        after = (np.searchsorted(ends, begins[first : first + BLOCK] + row_length) + 1).tolist()
        while at < first + len(after) and after[at - first] <= count:
            at = after[at - first]
            found.append(at)
        if at < first + len(after):
            break
    return np.append(used, len(lengths))[found]


def _narrow(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
