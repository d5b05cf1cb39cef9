"""Insertions over rows of tokens, before it is decided what is attended to and trained on."""

from dataclasses import dataclass, replace

import numpy as np

from mixlab.batch import SPAN, Kind, Layout
from mixlab.inject.ledger import Placements


@dataclass(frozen=True, eq=False)
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
    if not len(numbers):
        return []
    _, rows, offsets = placements.grid.locate(placements.position[numbers])
    return [
        Insertion(row - first, offset, placements.tokens(number), isolated, experiment, number)
        for row, offset, isolated, experiment, number in zip(
            rows.tolist(),
            offsets.tolist(),
            placements.isolated[numbers].tolist(),
            placements.experiment[numbers].tolist(),
            numbers.tolist(),
            strict=True,
        )
    ]


def overlay(layout: Layout, insertions: list[Insertion]) -> Layout:
    """The rows with the insertions (by row and offset, none overlapping) in place; other rows are as they were.

    An isolated insertion is a segment of its own, and so is what comes after it. One in context belongs to the document in
    which it begins, up to its own end; in padding it is isolated all the same. Positions count from 0 in every segment."""
    if not insertions:
        return layout
    tokens, numbers, positions = layout.tokens.copy(), layout.numbers.copy(), layout.positions.copy()
    trainable = None if layout.trainable is None else layout.trainable.copy()
    touched = np.unique([insertion.row for insertion in insertions])
    slot = {row: i for i, row in enumerate(touched.tolist())}
    old = numbers[touched]
    real = old > 0
    begins = np.ones_like(real)  # where a segment begins
    begins[:, 1:] = old[:, 1:] != old[:, :-1]
    for one in insertions:
        i, at, end = slot[one.row], one.offset, one.offset + len(one.tokens)
        tokens[one.row, at:end] = one.tokens
        if trainable is not None:
            trainable[one.row, at:end] = True
        if one.isolated or not real[i, at]:
            begins[i, at] = begins[i, end] = True
        else:
            begins[i, end] |= old[i, end] != old[i, at]
        begins[i, at + 1 : end] = False
        real[i, at:end] = True
    columns = np.arange(old.shape[1], dtype=np.int32)
    numbers[touched] = np.where(real, np.cumsum(begins & real, axis=1), 0)
    positions[touched] = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    spans = _spans(layout.spans, insertions, tokens.shape[1] - 1)
    return replace(layout, tokens=tokens, numbers=numbers, positions=positions, spans=spans, trainable=trainable)


def _spans(spans: np.ndarray, insertions: list[Insertion], length: int) -> np.ndarray:
    """The provenance of rows of `length` tokens with the insertions in it; both cover or lie in rows 0, 1, … without a gap."""
    new = np.zeros(len(insertions), SPAN)
    for name, values in (
        ("row", [one.row for one in insertions]),
        ("offset", [one.offset for one in insertions]),
        ("length", [len(one.tokens) for one in insertions]),
        ("source", [one.experiment for one in insertions]),
        ("document", [one.number for one in insertions]),
    ):
        new[name] = values
    new["kind"] = Kind.INSERTED
    old_begins, new_begins = (s["row"].astype(np.int64) * length + s["offset"] for s in (spans, new))
    new_ends, end = new_begins + new["length"], int(old_begins[-1] + spans["length"][-1])
    begins = np.unique(np.concatenate([old_begins, new_begins, new_ends[new_ends < end]]))
    last = np.searchsorted(new_begins, begins, side="right") - 1  # the insertion that began last, if any
    inserted = (last >= 0) & (begins < new_ends[last])
    kept = ~inserted | (begins == new_begins[last])
    begins, last, inserted = begins[kept], last[kept], inserted[kept]
    under = np.searchsorted(old_begins, begins, side="right") - 1
    found = np.where(inserted, new[last], spans[under])
    found["row"], found["offset"] = np.divmod(begins, length)
    found["length"] = np.diff(begins, append=end)
    found["start"] += np.where(np.isin(found["kind"], [Kind.TEXT, Kind.METADATA]), begins - old_begins[under], 0)
    return found
