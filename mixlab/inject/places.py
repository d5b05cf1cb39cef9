"""The places that a window of the run has for an occurrence, and how one of them is drawn."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mixlab.inject.grid import Grid

_LOW = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


def draw(seed: int, name: str, occurrence: int, attempt: int) -> tuple[int, int]:
    """Two uniform 64-bit integers for an attempt to place an occurrence of the experiment `name`, by BLAKE2b."""
    digest = hashlib.blake2b(f"mixlab-inject-v1|{seed}|{name}|{occurrence}|{attempt}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def first_draws(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """uint64 [count, 2]: `draw` at attempt 0 of the occurrences from `first` on."""
    begun = hashlib.blake2b(f"mixlab-inject-v1|{seed}|{name}|".encode(), digest_size=16)
    digests = []
    for occurrence in range(first, first + count):
        hashed = begun.copy()
        hashed.update(b"%d|0" % occurrence)
        digests.append(hashed.digest())
    return np.frombuffer(b"".join(digests), "<u8").reshape(count, 2)


class _Class(NamedTuple):
    """A window's rows of one length. before: int64 [S + 1], how many such rows the run has before each step.
    first: how many before the window.   rows: how many in it."""

    length: int
    before: np.ndarray
    first: int
    rows: int


class Places:
    """Every place within the steps [first, end) of `window` that holds an item: (row, offset), rows of each length in training
    order; whole rows only, if `whole_rows`. A draw makes all places equally likely (Bordt and Pawelczyk 2025): its first
    integer chooses the row, the second the offset. Where rows have several lengths, the first chooses the length too, in
    proportion to the places in its rows."""

    def __init__(self, grid: Grid, window: tuple[int, int], whole_rows: bool):
        self.grid, self.window, self.whole_rows = grid, window, whole_rows

    @cached_property
    def _classes(self) -> list[_Class]:
        first, end = self.window
        found = [
            _Class(length, n, int(n[first]), int(n[end] - n[first])) for length, n in self.grid.rows_before.items()
        ]
        return [rows for rows in found if rows.rows]

    def at(self, length: int, u0: int, u1: int) -> tuple[int, int]:
        """(position of the row's begin, position) that a draw means for an item of `length` tokens."""
        classes = [c for c in self._classes if (length == c.length if self.whole_rows else length <= c.length)]
        at = u0 * sum(c.rows * (c.length - length + 1) for c in classes) >> 64
        for rows in classes:
            offsets = rows.length - length + 1
            if at < rows.rows * offsets:
                break
            at -= rows.rows * offsets
        row = rows.first + at // offsets
        step = int(np.searchsorted(rows.before, row, side="right")) - 1
        begin = int(self.grid.begins[step]) + (row - int(rows.before[step])) * rows.length
        return begin, begin + (u1 * offsets >> 64)

    def many(self, lengths: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """int64 [P]: the positions that draws (uint64 [P, 2]) mean for items of the given lengths (int [P])."""
        offsets = [np.maximum(rows.length - lengths.astype(np.int64) + 1, 0) for rows in self._classes]
        if self.whole_rows:
            offsets = [np.where(o == 1, 1, 0) for o in offsets]
        slots = [rows.rows * o for rows, o in zip(self._classes, offsets, strict=True)]
        left = _product_high(draws[:, 0], sum(slots, np.zeros(len(lengths), np.int64)))
        positions = np.full(len(lengths), -1)
        for rows, o, s in zip(self._classes, offsets, slots, strict=True):
            here = np.flatnonzero((positions < 0) & (left < s))
            row = rows.first + left[here] // o[here]
            step = np.searchsorted(rows.before, row, side="right") - 1
            begin = self.grid.begins[step] + (row - rows.before[step]) * rows.length
            positions[here] = begin + _product_high(draws[here, 1], o[here])
            left = left - s
        return positions

    def rows(self, length: int) -> Iterator[tuple[int, int]]:
        """(begin, length) of every row of the window that holds an item of `length` tokens, in training order."""
        for step in range(*self.window):
            row_length, begin = int(self.grid.lengths[step]), int(self.grid.begins[step])
            if length == row_length if self.whole_rows else length <= row_length:
                for row in range(int(self.grid.rows[step])):
                    yield begin + row * row_length, row_length


def _product_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int64: floor(a x b / 2^64), exactly, of a uint64 and b int64 >= 0."""
    b = b.astype(np.uint64)
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW, b >> _HALF, b & _LOW
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    other = a_low * b_high + (middle & _LOW)
    return (a_high * b_high + (middle >> _HALF) + (other >> _HALF)).astype(np.int64)
