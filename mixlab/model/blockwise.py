"""Causal document attention in memory linear in the length, in plain XLA: for any backend.

The score matrix is cut into C x C blocks and only its lower triangle is visited, by scans over pairs (query block, key
block); without segments those below the diagonal need no mask. The forward pass keeps a running maximum and sum a query
(online softmax); the backward pass recomputes each block's probabilities from the saved log-sum-exp (FlashAttention-2,
arXiv 2307.08691)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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

    def visit(carry, pair, diagonal):
        peak, mass, out = carry
        i, j = pair
        scores = _scores(q[i], k[j], segments, i, j, diagonal)
        new = absorb(peak[i], mass[i], out[i], scores, v[j])
        return tuple(whole.at[i].set(part) for whole, part in zip(carry, new, strict=True)), None

    start = (jnp.full(q.shape[:-1], -jnp.inf, wide), jnp.zeros(q.shape[:-1], wide), jnp.zeros(q.shape, wide))
    peak, mass, out = _lower_triangle(visit, start, len(q), segments is not None)
    out = (out / mass[..., None]).astype(q.dtype)
    return out, (q, k, v, segments, out, peak + jnp.log(mass))


def _backward(saved, d_out):
    q, k, v, segments, out, log_mass = saved
    wide = log_mass.dtype
    overlap = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)  # n B K G C

    def visit(carry, pair, diagonal):
        d_q, d_k, d_v = carry
        i, j = pair
        scores = _scores(q[i], k[j], segments, i, j, diagonal)
        to_q, to_k, to_v = gradients(q[i], k[j], v[j], scores, log_mass[i], d_out[i], overlap[i])
        return (d_q.at[i].add(to_q), d_k.at[j].add(to_k), d_v.at[j].add(to_v)), None

    start = tuple(jnp.zeros(a.shape, wide) for a in (q, k, v))
    d_q, d_k, d_v = _lower_triangle(visit, start, len(q), segments is not None)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


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


def _lower_triangle(visit, carry, n: int, masked: bool):
    """Calls visit(carry, (i, j), diagonal) for the blocks of the lower triangle, for every i from the diagonal down to
    j = 0. Without segments the diagonal's blocks alone need a mask and come first; with segments all do, and `diagonal`
    is None: one loop over all is quicker then."""
    whole = [(i, j) for i in range(n) for j in range(i, -1, -1)]
    diagonal, below = [(i, i) for i in range(n)], [(i, j) for i, j in whole if i > j]
    for pairs, kind in [(whole, None)] if masked else [(diagonal, True), (below, False)]:
        if pairs:
            step = functools.partial(visit, diagonal=kind)
            carry, _ = jax.lax.scan(step, carry, tuple(np.array(pairs, np.int32).T))
    return carry


def _scores(q, k, segments, i, j, diagonal: bool | None):
    """Scores of query block i against key block j, float32 [B, K, G, C, C], -inf where not visible."""
    C = q.shape[-2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=wide)
    if segments is not None:
        order = (i * C + jnp.arange(C))[:, None] >= (j * C + jnp.arange(C))[None, :]
        visible = (segments[i][:, :, None] == segments[j][:, None, :]) & order
        return jnp.where(visible[:, None, None], scores, -jnp.inf)
    return jnp.where(jnp.tri(C, dtype=bool), scores, -jnp.inf) if diagonal else scores
