"""Insertions over rows of tokens, before it is decided what is attended to and trained on."""

from dataclasses import dataclass, replace

import numpy as np

from mixlab.batch import SPAN, Kind, Layout
from mixlab.inject.ledger import Placements


@dataclass(frozen=True, eq=False, slots=True)
class Insertion:
    """tokens: int32 [n], which take the place of those from `offset` on in `row`.   isolated: see Where.
    experiment, number: for the provenance: number of the experiment, and of the insertion in the ledger."""

    row: int
    offset: int
    tokens: np.ndarray
    isolated: bool = True
    experiment: int = 0
    number: int = 0


def insertions_in(placements: Placements, step: int, first: int, count: int) -> list[Insertion]:
    """The insertions into rows `first` up to `first + count` of a step, by row and offset; rows count from `first`."""
    numbers = placements.of_rows(step, first, count)
    length = int(placements.grid.lengths[step])
    begin = int(placements.grid.begins[step]) + first * length
    return [
        Insertion(at // length, at % length, placements.tokens(number), isolated, experiment, number)
        for at, isolated, experiment, number in zip(
            (placements.position[numbers] - begin).tolist(),
            placements.isolated[numbers].tolist(),
            placements.experiment[numbers].tolist(),
            numbers.tolist(),
            strict=True,
        )
    ]


def overlay(layout: Layout, insertions: list[Insertion]) -> Layout:
    """Puts the insertions (by row and offset, none overlapping) in their places, in the layout's own arrays; nothing is
    touched but what lies under them, and what is left of the documents that they cut.

    An isolated insertion is a segment of its own, and so is what is left of the document behind it. One in context belongs
    to the document in which it begins, up to its own end; in padding it is isolated all the same. Positions count from 0
    in every segment. New segments are numbered by where they begin, past all others of the row."""
    if not insertions:
        return layout
    width = layout.tokens.shape[1]
    tokens, numbers, positions = layout.tokens.ravel(), layout.numbers.ravel(), layout.positions.ravel()
    counted = np.arange(width, dtype=np.int32)
    for one in insertions:
        row = one.row * width
        at, end = row + one.offset, row + one.offset + len(one.tokens)
        tokens[at:end] = one.tokens
        host, last, behind = numbers[[at, end - 1, end]].tolist()
        if one.isolated or not host:
            if behind and behind == last:  # it cuts this document
                left = end + np.count_nonzero(numbers[end : row + width] == behind)
                numbers[end:left] = width + end - row
                positions[end:left] = counted[: left - end]
            host, first = width + at - row, 0
        else:
            first = int(positions[at])
        if one.isolated or behind != host:
            numbers[at:end] = host
            positions[at:end] = counted[: end - at] + first
    if layout.trainable is not None:
        for one in insertions:
            layout.trainable[one.row, one.offset : one.offset + len(one.tokens)] = True
    return replace(layout, spans=_spans(layout.spans, insertions, width - 1))


def _spans(spans: np.ndarray, insertions: list[Insertion], length: int) -> np.ndarray:
    """The provenance of rows of `length` tokens with the insertions in it; both cover or lie in rows 0, 1, … without a gap."""
    offsets = [one.row * length + one.offset for one in insertions]
    new = np.array(
        [(one.row, one.offset, len(one.tokens), Kind.INSERTED, one.experiment, one.number, 0) for one in insertions],
        SPAN,
    )
    old_begins = spans["row"] * np.int64(length) + spans["offset"]
    new_begins = np.array(offsets)
    new_ends, end = new_begins + new["length"], int(old_begins[-1] + spans["length"][-1])
    begins = np.concatenate([old_begins, new_begins, new_ends[new_ends < end]])
    begins.sort(kind="stable")
    begins = begins[np.diff(begins, prepend=-1) > 0]
    last = np.searchsorted(new_begins, begins, side="right") - 1  # the insertion that began last, if any
    inserted = (last >= 0) & (begins < new_ends[last])
    kept = ~inserted | (begins == new_begins[last])
    begins, last, inserted = begins[kept], last[kept], inserted[kept]
    under = np.searchsorted(old_begins, begins, side="right") - 1
    found = spans[under]
    moved = begins - old_begins[under]
    found["offset"] += moved.astype(np.int32)
    found["start"] += np.where(np.isin(found["kind"], (Kind.TEXT, Kind.METADATA)), moved, 0)
    found["length"] = np.diff(begins, append=end)
    found[inserted] = new
    return found
