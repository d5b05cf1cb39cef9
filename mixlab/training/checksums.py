"""Checksums of arrays, computed where they lie.

Each is a sum over the elements of (raw bits x an odd multiplier drawn from the element's flat index), modulo
2^32: the order of summation, and so the mesh, does not matter; and a change of one element is always noticed,
because an odd multiplier times a difference that is not zero is not zero.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

SALTS = (0x9E3779B9, 0x7F4A7C15)  # two sums an array
PIECE = 2**22  # elements of an array in host memory that are summed at a time


def checksums(tree) -> dict[str, list[int]]:
    """{"params/blocks/up/kernel": [sum, sum], ...} for every array of the tree, as Python integers. Blocks
    until the arrays are there. In several processes, a collective: every process calls it and gets the same
    answer."""
    # One program a shape, not one for the tree: quicker to compile, quicker to run on CPU, and used again.
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        pair = _jitted(_place(leaf))(leaf)
        if jax.default_backend() == "cpu":  # where collectives of several programs in flight may wait for each other
            pair.block_until_ready()
        sums["/".join(str(entry.key) for entry in path)] = pair
    return {name: pair.tolist() for name, pair in jax.device_get(sums).items()}


def host_checksum(array: np.ndarray) -> list[int]:
    """The two sums of an array in host memory, without a copy of it."""
    flat = array.reshape(-1)
    sums = np.zeros(len(SALTS), np.uint32)
    for first in range(0, flat.size, PIECE):
        sums += np.asarray(_jitted(None)(flat[first : first + PIECE], np.uint32(first % 2**32)))
    return sums.tolist()


def _place(array):
    """Replicated over the array's mesh, so that each process can read the answer; None without a mesh."""
    if isinstance(array.sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    return None


@functools.cache
def _jitted(place):
    return jax.jit(_checksum, out_shardings=place)


def _checksum(x: jax.Array, first: int = 0) -> jax.Array:
    """uint32 [2] of one array of any shape and any dtype of 1, 2, 4 or 8 bytes; of a piece of a flat one, that begins at
    `first`."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]  # 8 bytes: a last axis of 2
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    index += jnp.uint32(first) * jnp.uint32(bits.size // max(x.size, 1))
    return jnp.stack([jnp.sum(bits * _odd(index, salt), dtype=jnp.uint32) for salt in SALTS])


def _odd(index: jax.Array, salt: int) -> jax.Array:
    """An odd number scattered over the 32-bit integers (the finaliser of MurmurHash3, made odd)."""
    h = index + jnp.uint32(salt)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return (h ^ (h >> 16)) | jnp.uint32(1)
