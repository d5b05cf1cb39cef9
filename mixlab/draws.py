"""Random integers as a function of a seed and a counter: the same with every machine and version of NumPy."""

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def draws(seed: int | np.ndarray, counters: np.ndarray) -> np.ndarray:
    """uint64 of the broadcast shape: uniform 64-bit integers, number `counters` of the sequence `seed`.

    seed: int, or uint64 array (draws themselves can be seeds).   counters: integers >= 0.
    The generator is splitmix64, started anywhere.
    """
    if isinstance(seed, int):
        seed = np.array(seed % 2**64, np.uint64)
    x = np.atleast_1d(seed) + (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
