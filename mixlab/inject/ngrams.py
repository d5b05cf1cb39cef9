"""Which rows hold any of many token strings: all windows at once, by a hash that is checked."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

_FACTOR = 0x9E3779B97F4A7C15
_TABLE_BITS = 20


@dataclass(frozen=True, eq=False)
class Ngrams:
    """strings: int32 [K, n], all of one length n."""

    strings: np.ndarray

    def within(self, rows: np.ndarray) -> np.ndarray:
        """bool [R]: whether a row of int [R, L] holds any of the strings in consecutive tokens."""
        found = np.zeros(len(rows), bool)
        length = self.strings.shape[1]
        if not len(self.strings) or rows.shape[1] < length:
            return found
        hashes = _window_hashes(rows, length)
        row, at = np.nonzero(self._table[hashes >> np.uint64(64 - _TABLE_BITS)])
        for r, i in zip(row.tolist(), at.tolist(), strict=True):
            found[r] = found[r] or rows[r, i : i + length].astype(np.int32).tobytes() in self._known
        return found

    @cached_property
    def _table(self) -> np.ndarray:
        """Whether any of the strings has a hash that begins with these bits."""
        table = np.zeros(1 << _TABLE_BITS, bool)
        table[_window_hashes(self.strings, self.strings.shape[1])[:, 0] >> np.uint64(64 - _TABLE_BITS)] = True
        return table

    @cached_property
    def _known(self) -> frozenset[bytes]:
        return frozenset(string.tobytes() for string in np.ascontiguousarray(self.strings, np.int32))


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
