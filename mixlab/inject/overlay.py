"""Insertions over rows of tokens, before it is decided what is attended to and trained on."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixlab.batch import RAW, SPAN, Kind, Layout
from mixlab.inject.ledger import Placements


class Insertion(NamedTuple):
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
        host, last, behind = numbers.item(at), numbers.item(end - 1), numbers.item(end)
        if one.isolated or not host:
            if behind and behind == last:  # it cuts this document
                left = end + np.count_nonzero(numbers[end : row + width] == behind)
                numbers[end:left] = width + 1 + end - row
                positions[end:left] = counted[: left - end]
            host, first = width + 1 + at - row, 0
        else:
            first = positions.item(at)
        if one.isolated or behind != host:
            numbers[at:end] = host
            positions[at:end] = counted[: end - at] + first
    if layout.trainable is not None:
        for one in insertions:
            layout.trainable[one.row, one.offset : one.offset + len(one.tokens)] = True
    return replace(layout, spans=_spans(layout.spans, insertions, width - 1))


def _spans(spans: np.ndarray, insertions: list[Insertion], length: int) -> np.ndarray:
    """The provenance of rows of `length` tokens with the insertions in it; both cover or lie in rows 0, 1, … without a gap."""
    new = np.array(
        [(one.row, one.offset, len(one.tokens), Kind.INSERTED, one.experiment, one.number, 0) for one in insertions],
        SPAN,
    )
    begins = np.empty(len(spans) + 1, np.int64)  # over all rows, one behind the other; the last is their end
    begins[:-1] = spans["row"]
    begins[:-1] *= length
    begins[:-1] += spans["offset"]
    begins[-1] = begins[-2] + spans["length"][-1]
    at = np.array([one.row * length + one.offset for one in insertions])
    end = at + new["length"]
    under, behind = (
        begins.searchsorted(at, "right") - 1,
        begins[:-1].searchsorted(end),
    )  # spans: first under, first after
    # What lies under an insertion's begin ends there, unless an earlier insertion has cut it already …
    lengths, keep = spans["length"].copy(), np.ones(len(spans), bool)
    first_cut = begins[under] >= np.concatenate([[0], end[:-1]])
    lengths[under[first_cut]] = (at - begins[under])[first_cut]
    keep[under[begins[under] == at]] = False
    for first, last in zip((under + 1).tolist(), behind.tolist(), strict=True):
        keep[first:last] = False
    # … and what lies under its end goes on behind it, up to the next insertion.
    left = spans.take(behind - 1)
    passed = end - begins[behind - 1]
    left["start"] += np.where((left["kind"] == Kind.TEXT) | (left["kind"] == Kind.METADATA), passed, 0)
    left["offset"] += passed.astype(np.int32)
    upto = np.minimum(begins[behind], np.concatenate([at[1:], begins[-1:]]))
    remains = np.maximum(upto - end, 0)

    whole = np.concatenate([part.view(RAW) for part in (spans, new, left)]).view(SPAN)
    lengths = np.concatenate([lengths, new["length"], remains])
    keep = np.concatenate([keep, np.ones(len(new), bool), remains > 0])
    added = np.arange(len(spans), len(whole)).reshape(2, -1).T.ravel()  # each insertion, and what is left behind it
    order = np.insert(np.arange(len(spans)), np.repeat(behind, 2), added)
    order = order[keep[order]]
    found = whole.take(order)
    found["length"] = lengths[order]
    return found
