"""Which rows hold any of many token strings: all windows at once, by a hash that is checked."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixlab.inject.items import Items

_FACTOR = 0x9E3779B97F4A7C15


@dataclass(frozen=True, eq=False)
class Ngrams:
    """strings: int32 [K, n], all of one length n."""

    strings: np.ndarray

    def within(self, rows: np.ndarray) -> np.ndarray:
        """bool [R]: whether a row of int [R, L] holds any of the strings in consecutive tokens."""
        found = np.zeros(len(rows), bool)
        found[[row for row, _ in self._hits(rows)]] = True
        return found

    def occurring(self, rows: np.ndarray) -> np.ndarray:
        """bool [K]: whether any row of int [R, L] holds the string in consecutive tokens."""
        seen = {string for _, string in self._hits(rows)}
        return np.array([self._bytes(string) in seen for string in self.strings], bool)

    def _hits(self, rows: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Rows and the strings in them."""
        length = self.strings.shape[1]
        if not len(self.strings) or rows.shape[1] < length:
            return
        hashes = _window_hashes(rows, length)
        at = np.flatnonzero(self._table[hashes >> self._shift])
        near = np.searchsorted(self._hashes, hashes.ravel()[at])
        at = at[self._hashes[np.minimum(near, len(self._hashes) - 1)] == hashes.ravel()[at]]
        for row, start in zip(*(numbers.tolist() for numbers in np.divmod(at, hashes.shape[1])), strict=True):
            string = self._bytes(rows[row, start : start + length])
            if string in self._known:
                yield row, string

    @staticmethod
    def _bytes(string: np.ndarray) -> bytes:
        return string.astype(np.int32).tobytes()

    @cached_property
    def _known(self) -> frozenset[bytes]:
        return frozenset(map(self._bytes, self.strings))

    @cached_property
    def _hashes(self) -> np.ndarray:
        """uint64, ascending."""
        return np.sort(_window_hashes(self.strings, self.strings.shape[1])[:, 0])

    @property
    def _shift(self) -> np.uint64:
        """What leaves of a hash as many first bits as the table needs for few false alarms."""
        return np.uint64(64 - min(max(16, len(self.strings).bit_length() + 8), 28))

    @cached_property
    def _table(self) -> np.ndarray:
        """Whether any of the strings has a hash that begins with these bits."""
        table = np.zeros(1 << (64 - int(self._shift)), bool)
        table[self._hashes >> self._shift] = True
        return table


def items_holding(strings: Ngrams, items: Items) -> list[int]:
    """The items that hold any of the strings."""
    ends = np.repeat(-1, len(items))  # which no string holds
    joined = np.insert(items.tokens, items.offsets[1:], ends)
    if not strings.within(joined[None]).any():
        return []
    return [i for i in range(len(items)) if strings.within(items[i][None]).any()]


def _window_hashes(rows: np.ndarray, length: int) -> np.ndarray:
    """uint64 [R, L - length + 1]: polynomial hashes of all windows, by doubling: that of a window is made from those of its
    two parts, so as many passes as the length has bits."""
    part = (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    part ^= part >> np.uint64(31)  # windows of the power of two `size`
    whole, covered, size = np.zeros((len(rows), rows.shape[1] + 1), np.uint64), 0, 1
    while size <= length:
        if length & size:  # the windows of this size go before those that are covered
            factor = np.uint64(pow(_FACTOR, covered, 1 << 64))
            whole = part[:, : rows.shape[1] - covered - size + 1] * factor + whole[:, size:]
            covered += size
        size *= 2
        if size <= length:
            factor = np.uint64(pow(_FACTOR, size // 2, 1 << 64))
            part = part[:, : -(size // 2)] * factor + part[:, size // 2 :]
    return whole
