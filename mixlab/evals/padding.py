"""Rows of any lengths in batches of a few fixed shapes, so that little is compiled and memory is bounded."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SHORTEST = 32  # tokens of the shortest rows that are told apart


@dataclass(frozen=True)
class Shapes:
    """Batches of `rows` rows of `longest` tokens, of as many tokens in more and shorter rows, or of `rows` shorter rows where
    there are no more than those. Lengths are powers of two."""

    rows: int
    longest: int

    def batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """lengths [N], at most `longest`, to (numbers [n], rows, length) of batches that hold each row once; n <= rows."""
        padded = np.minimum(2 ** np.ceil(np.log2(np.maximum(lengths, SHORTEST))).astype(np.int64), self.longest)
        for length in np.unique(padded).tolist():
            numbers = np.flatnonzero(padded == length)
            numbers = numbers[np.argsort(lengths[numbers], kind="stable")]
            rows = self.rows if len(numbers) <= self.rows else self.rows * (self.longest // length)
            for first in range(0, len(numbers), rows):
                yield numbers[first : first + rows], rows, length
