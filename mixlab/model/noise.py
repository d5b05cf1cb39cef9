"""Gaussian noise on input embeddings, made anew from keys wherever it is needed."""

import jax
import jax.numpy as jnp

from mixlab.model.sharding import constrain


def standard_noise(keys_Bx2: jax.Array, length: int, width: int) -> jax.Array:
    """float32 [B, length, width], independent standard normal values: a function of each row's key (uint32 [2]) and of the
    shape alone, however rows are divided over devices."""

    def row(key):
        return jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), (length, width), jnp.float32)

    return constrain(jax.vmap(row)(keys_Bx2), "batch", "length", None)


def scaled_noise(keys_Bx2: jax.Array, scales_B: jax.Array, length: int, width: int) -> jax.Array:
    """The same times each row's scale; exactly zero where that is 0."""
    scales = scales_B[:, None, None]
    return jnp.where(scales > 0, scales * standard_noise(keys_Bx2, length, width), 0.0)
