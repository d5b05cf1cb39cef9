"""A seeded permutation of 0 … n-1 as a function: no array in memory, any position at once, and its inverse.

A Feistel network over pairs (left, right) with left < rows and right < columns, rows x columns >= n: each round adds a hash
of one half to the other, modulo its size, so every round can be undone. Values that fall outside n walk on until they are
inside ("cycle walking"); since rows x columns exceeds n by at most about 2 sqrt(n), few do.
"""

from functools import lru_cache
from math import isqrt

import numpy as np

ROUNDS = 8  # of a small domain's permutations all must be reachable about equally often; tested for n = 4

NEIGHBOURS = 2**10  # positions drawn at once, which takes hardly longer than drawing one
KEPT = 2**11  # such draws, of 2 KiB each for n up to 65,536


def permute(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where `positions` (integers in [0, n), any shape) go. Returns int64 of the same shape."""
    return _walk(positions, n, seed, _forward)


def permute_nearby(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """As `permute`, quicker for integers [P] near one another, and for those near any that were asked for lately."""
    groups = positions // NEIGHBOURS
    out = np.empty(len(positions), np.int64)
    for group in dict.fromkeys(groups.tolist()):
        here = groups == group
        out[here] = _neighbours(group, n, seed)[positions[here] - group * NEIGHBOURS]
    return out


@lru_cache(KEPT)
def _neighbours(group: int, n: int, seed: int) -> np.ndarray:
    """Unsigned: where the positions of a group go."""
    first = group * NEIGHBOURS
    return permute(np.arange(first, min(first + NEIGHBOURS, n)), n, seed).astype(np.min_scalar_type(n - 1))


def unpermute(values: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The inverse: unpermute(permute(i, n, seed), n, seed) == i."""
    return _walk(values, n, seed, _backward)


def _walk(values, n, seed, step):
    values = np.asarray(values, np.uint64)
    if values.size and int(values.max()) >= n:
        raise IndexError(f"position {int(values.max())} is outside a permutation of {n}")
    columns = isqrt(n - 1) + 1 if n > 1 else 1
    rows = -(-n // columns)
    keys = _mix(np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64))
    out = step(values.ravel(), np.uint64(rows), np.uint64(columns), keys)
    outside = np.flatnonzero(out >= n)
    while outside.size:
        walked = step(out[outside], np.uint64(rows), np.uint64(columns), keys)
        out[outside] = walked
        outside = outside[walked >= n]
    return out.astype(np.int64).reshape(values.shape)


def _forward(values, rows, columns, keys):
    left, right = values // columns, values % columns
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right + key) % rows) % rows
        else:
            right = (right + _mix(left + key) % columns) % columns
    return left * columns + right


def _backward(values, rows, columns, keys):
    left, right = values // columns, values % columns
    for i, key in reversed(list(enumerate(keys))):
        if i % 2 == 0:
            left = (left + (rows - _mix(right + key) % rows)) % rows
        else:
            right = (right + (columns - _mix(left + key) % columns)) % columns
    return left * columns + right


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (the constants of splitmix64); wraps modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
