"""Causal attention within documents: several ways to compute one function.

Every path takes q [B, L, H, D], k and v [B, L, K, D] with H a multiple of K (query head h reads key head h *
K // H), and segment_ids [B, L]; it returns [B, L, H, D] in the dtype of q. A token attends to the tokens at
or before it that have its segment id. Padding (id 0) is a segment like any other: its outputs are finite,
nobody else reads them, and a loss that gives them no weight sends no gradient into them."""

import jax
import jax.numpy as jnp

DENSE_LENGTH = 1024  # beyond this a [L, L] score matrix a head costs more memory traffic than the blocks do


def attend(
    q_BxLxHxD: jax.Array,
    k_BxLxKxD: jax.Array,
    v_BxLxKxD: jax.Array,
    segment_ids_BxL: jax.Array,
    kernel: str = "auto",
) -> jax.Array:
    """Causal attention within segments by the named kernel ("auto" picks by backend and shape)."""
    if kernel == "auto":
        kernel = choose_kernel(jax.default_backend(), q_BxLxHxD.shape[1])
    return KERNELS[kernel](q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segment_ids_BxL)


def choose_kernel(backend: str, length: int) -> str:
    """The name of the kernel for rows of `length` tokens."""
    return "dense"


def dense(
    q_BxLxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, segment_ids_BxL: jax.Array
) -> jax.Array:
    """The definition, with the whole [L, L] score matrix: what the other paths are tested against, and the
    quickest for short rows on CPU. Scores and softmax in float32."""
    B, L, H, D = q_BxLxHxD.shape
    K = k_BxLxKxD.shape[2]
    wide = jnp.promote_types(q_BxLxHxD.dtype, jnp.float32)
    q = q_BxLxHxD.reshape(B, L, K, H // K, D) * D**-0.5
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k_BxLxKxD, preferred_element_type=wide)
    same = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    visible = same & jnp.tri(L, dtype=bool)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(v_BxLxKxD.dtype), v_BxLxKxD)
    return out.reshape(B, L, H, D)


KERNELS = {"dense": dense}
