"""Insertions over rows of tokens, before it is decided what is attended to and trained on."""

from dataclasses import replace
from functools import lru_cache
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
    here = placements.within_rows(step, first, count)
    length = placements.grid.lengths.item(step)
    begin = placements.grid.begins.item(step) + first * length
    found = []
    for number, position, tokens, isolated, experiment in zip(
        range(here.start, here.stop),
        placements.position[here].tolist(),
        placements.tokens_of(here),
        placements.isolated[here].tolist(),
        placements.experiment[here].tolist(),
        strict=True,
    ):
        row, offset = divmod(position - begin, length)
        found.append(Insertion(row, offset, tokens, isolated, experiment, number))
    return found


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
    trainable = None if layout.trainable is None else layout.trainable.ravel()
    counted, cut = _counted(width), 0  # cut: where the document ends that was cut last
    for row, offset, put, isolated, *_ in insertions:
        begin = row * width
        at, count = begin + offset, len(put)
        end = at + count
        tokens[at:end] = put
        if trainable is not None:
            trainable[at:end] = True
        host, behind = numbers.item(at), numbers[end]
        if isolated or not host:
            if behind and behind == numbers[end - 1]:  # it cuts this document
                if end >= cut:  # else it has been cut before: its end is known, and its number no longer in order
                    cut = end + _count(numbers[end : begin + width], behind)
                numbers[end:cut] = width + 1 + end - begin
                positions[end:cut] = counted[: cut - end]
            host = width + 1 + at - begin
            numbers[at:end], positions[at:end] = host, counted[:count]
        elif behind != host:
            numbers[at:end], positions[at:end] = host, counted[:count] + positions.item(at)
    before = layout.provenance
    return replace(layout, provenance=lambda: _spans(before(), insertions, width - 1))


@lru_cache(maxsize=8)
def _counted(length: int) -> np.ndarray:
    """int32 [length]: 0, 1, …"""
    return np.arange(length, dtype=np.int32)


def _count(numbers: np.ndarray, first: np.int32) -> int:
    """How many of the numbers, of the rest of a row that nothing was put into, are `first`, the first of them. Documents are
    numbered in their order, up to padding."""
    if numbers[-1]:
        return int(numbers.searchsorted(first, "right"))
    return int(np.count_nonzero(numbers == first))


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
