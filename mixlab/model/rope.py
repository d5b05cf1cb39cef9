"""Rotary position embedding."""

import jax
import jax.numpy as jnp

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, each [B, L, 1, head_dim / 2]


def rotation(positions_BxL: jax.Array, head_dim: int, base: float) -> Rotation:
    """Cosines and sines of position * base ** (-2 i / head_dim), in float32 (float64 under enable_x64, where
    a check may need it). Computed once a step and shared by all layers."""
    wide = jnp.promote_types(jnp.float32, jax.dtypes.canonicalize_dtype(float))
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=wide) / head_dim)
    angles = positions_BxL.astype(wide)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxLxHxD: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs (x[i], x[i + D/2]) by their angles; the pairing of Llama and OLMo checkpoints as
    distributed. Computed in the rotation's precision, returned in the input's."""
    cos, sin = rotation
    first, second = jnp.split(x_BxLxHxD, 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x_BxLxHxD.dtype)
