"""Causal document attention in memory linear in the length, in plain XLA: for any backend.

The score matrix is cut into C x C blocks. For every block of queries a loop visits the blocks of keys at or before it, from the
first that any of its tokens can see: documents that cannot see each other cost nothing. The order of tokens is compared in the
diagonal's blocks alone, and without segments the others need no mask. The forward pass keeps a running maximum and sum a query
(online softmax); the backward pass recomputes each block's probabilities from the saved log-sum-exp (FlashAttention-2, arXiv
2307.08691)."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mixlab.model.layers import ATTENTION

CPU_BLOCK = 64  # a block's scores stay in cache: 2 to 3 times quicker than 256 at every length tried
ACCELERATOR_BLOCK = 256


def blockwise(
    q_BxLxHxD: jax.Array,
    k_BxLxKxD: jax.Array,
    v_BxLxKxD: jax.Array,
    segment_ids_BxL: jax.Array | None = None,
    block: int | None = None,
) -> jax.Array:
    """The function of `attention.dense`, [B, L, H, D]. Any length: the last block is filled up with padding,
    which causality hides from every real token. `block` is C (None: by backend). Accumulators are float32."""
    B, L, H, D = q_BxLxHxD.shape
    K = k_BxLxKxD.shape[2]
    C = min(block or (CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK), L)
    n = -(-L // C)

    def blocks(
        a: jax.Array,
    ) -> jax.Array:  # [B, L, ...] -> [n, B, ..., C] with the trailing axes kept in front
        a = jnp.pad(a, ((0, 0), (0, n * C - L)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(B, n, C, *a.shape[2:]), 1, 0)

    q = blocks(q_BxLxHxD.reshape(B, L, K, H // K, D) * D**-0.5).transpose(0, 1, 3, 4, 2, 5)  # n B K G C D
    k = blocks(k_BxLxKxD).transpose(0, 1, 3, 2, 4)  # n B K C D
    v = blocks(v_BxLxKxD).transpose(0, 1, 3, 2, 4)
    out = _blockwise(q, k, v, None if segment_ids_BxL is None else blocks(segment_ids_BxL))
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * C, H, D)[:, :L]


@jax.custom_vjp
def _blockwise(q, k, v, segments):
    return _forward(q, k, v, segments)[0]


def _forward(q, k, v, segments):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    first = _first_visible(segments, len(q))

    def block(_, i):
        def visit(j, carry, diagonal=False):
            return absorb(*carry, _scores(q[i], k[j], segments, i, j, diagonal), v[j])

        shape = q.shape[1:]
        start = (jnp.full(shape[:-1], -jnp.inf, wide), jnp.zeros(shape[:-1], wide), jnp.zeros(shape, wide))
        peak, mass, out = jax.lax.fori_loop(first[i], i, visit, visit(i, start, True))
        return None, ((out / mass[..., None]).astype(q.dtype), peak + jnp.log(mass))

    _, kept = jax.lax.scan(block, None, jnp.arange(len(q), dtype=jnp.int32))
    out, log_mass = checkpoint_name(kept, ATTENTION)
    return out, (q, k, v, segments, out, log_mass)


def _backward(saved, d_out):
    q, k, v, segments, out, log_mass = saved
    wide = log_mass.dtype
    overlap = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)  # n B K G C
    first = _first_visible(segments, len(q))

    def block(carry, i):
        def visit(j, carry, diagonal=False):
            d_q, d_k, d_v = carry
            scores = _scores(q[i], k[j], segments, i, j, diagonal)
            to_q, to_k, to_v = gradients(q[i], k[j], v[j], scores, log_mass[i], d_out[i], overlap[i])
            return d_q + to_q, d_k.at[j].add(to_k), d_v.at[j].add(to_v)

        start = (jnp.zeros(q.shape[1:], wide), *carry)
        d_q, *carry = jax.lax.fori_loop(first[i], i, visit, visit(i, start, True))
        return tuple(carry), d_q.astype(q.dtype)

    start = tuple(jnp.zeros(a.shape, wide) for a in (k, v))
    (d_k, d_v), d_q = jax.lax.scan(block, start, jnp.arange(len(q), dtype=jnp.int32))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blockwise.defvjp(_forward, _backward)


def absorb(peak, mass, out, scores, v):
    """(peak, mass, out) of a block of queries, with one more block of keys: largest score and sum of exponentials
    [B, K, G, C], sum of values [B, K, G, C, D], both relative to the peak. scores [B, K, G, C, C], -inf where not visible:
    of each query, the first block that is absorbed has a visible key, so the peak is finite from then on."""
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    shrink = jnp.exp(peak - new_peak)
    weights = jnp.exp(scores - new_peak[..., None])
    update = jnp.einsum("bkgqs,bksd->bkgqd", weights.astype(v.dtype), v, preferred_element_type=out.dtype)
    return new_peak, mass * shrink + weights.sum(axis=-1), out * shrink[..., None] + update


def gradients(q, k, v, scores, log_mass, d_out, overlap):
    """What a pair of blocks adds to the gradients of its q, k, v. log_mass, overlap [B, K, G, C]: of the queries over all
    keys, the logarithm of the sum of exponentials, and d_out · out."""
    einsum = functools.partial(jnp.einsum, preferred_element_type=log_mass.dtype)
    weights = jnp.exp(scores - log_mass[..., None])
    d_weights = einsum("bkgqd,bksd->bkgqs", d_out, v)
    d_scores = (weights * (d_weights - overlap[..., None])).astype(q.dtype)
    return (
        einsum("bkgqs,bksd->bkgqd", d_scores, k),
        einsum("bkgqs,bkgqd->bksd", d_scores, q),
        einsum("bkgqs,bkgqd->bksd", weights.astype(q.dtype), d_out),
    )


def _first_visible(segments, n: int):
    """int32 [n]: for every block of queries, the first block of keys that may hold a token of one of its segments, in any
    row. Segment ids may be in any order."""
    if segments is None:
        return jnp.zeros(n, jnp.int32)
    ids = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)  # padding comes last in a row
    low, high = ids.min(axis=-1), ids.max(axis=-1)  # n B
    meet_nxn = ((low[:, None] <= high[None]) & (low[None] <= high[:, None])).any(axis=-1)
    return jnp.argmax(meet_nxn, axis=1).astype(jnp.int32)  # at the latest the block itself


def _scores(q, k, segments, i, j, diagonal: bool):
    """Scores of query block i against key block j <= i, float32 [B, K, G, C, C], -inf where not visible."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=wide)
    visible = jnp.tri(q.shape[-2], dtype=bool) if diagonal else None
    if segments is not None:
        same = (segments[i][:, :, None] == segments[j][:, None, :])[:, None, None]
        visible = same if visible is None else same & visible
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)
