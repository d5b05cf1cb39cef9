"""Causal document attention as a Pallas-Triton kernel, for GPUs: FlashAttention-2 (Dao 2023, arXiv 2307.08691), block-sparse.

One program a block of queries (forward, gradient of q) or of keys (gradients of k and v) walks over the blocks of the other kind
that may hold a token of one of its documents, in its own row: documents that cannot see each other cost nothing. Key heads
are not repeated for grouped queries. Scores, sums and accumulators are float32; softmax works in powers of two.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixlab.model.layers import ATTENTION

HIDDEN = -1e30  # a score that is not visible: finite, so that a block without a visible key leaves no NaN behind


class Tiles(NamedTuple):
    """Tokens a block, powers of two that divide the length."""

    forward_q: int = 128
    forward_k: int = 64
    backward: int = 64  # of queries and of keys


def flash(
    q_BxLxHxD: jax.Array,
    k_BxLxKxD: jax.Array,
    v_BxLxKxD: jax.Array,
    segment_ids_BxL: jax.Array | None = None,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> jax.Array:
    """The function of `attention.dense`, [B, L, H, D], for L a multiple of the tiles. `interpret` runs the kernels' programs
    on any backend, slowly."""
    D = q_BxLxHxD.shape[3]
    room = max(16, pl.next_power_of_2(D)) - D  # Triton's tiles are powers of two, 16 at least
    q, k, v = (jnp.pad(a, ((0, 0),) * 3 + ((0, room),)) for a in (q_BxLxHxD, k_BxLxKxD, v_BxLxKxD))
    return _flash(q, k, v, segment_ids_BxL, D**-0.5, tiles, interpret)[..., :D]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _flash(q, k, v, segments, scale, tiles, interpret):
    return _forward(q, k, v, segments, scale, tiles, interpret)[0]


def _forward(q, k, v, segments, scale, tiles, interpret):
    B, L, H, D = q.shape
    group, Cq, Ck = H // k.shape[2], tiles.forward_q, tiles.forward_k
    by_query, whole, row = _specs(L, D, Cq, group)
    sparse, sparse_specs = (), ()
    if segments is not None:
        sparse = (segments, _visible_blocks(segments, Cq, Ck)[0])
        sparse_specs = (row, _one())
    kept = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale, Cq=Cq, Ck=Ck),
        grid=(L // Cq, B, H),
        in_specs=[by_query, whole, whole, *sparse_specs],
        out_specs=[by_query, pl.BlockSpec((None, None, Cq), lambda i, b, h: (b, h, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32)],
        **_how("flash_forward", D, interpret),
    )(q, k, v, *sparse)
    out, log_mass = checkpoint_name(kept, ATTENTION)
    return out, (q, k, v, segments, out, log_mass)


def _backward(scale, tiles, interpret, saved, d_out):
    q, k, v, segments, out, log_mass = saved
    B, L, H, D = q.shape
    K, C = k.shape[2], tiles.backward
    group = H // K
    overlap_BxHxL = jnp.einsum("blhd,blhd->bhl", d_out, out, preferred_element_type=jnp.float32)
    sparse, first, last = (), (), ()
    if segments is not None:
        sparse = (segments,)
        first, last = ((bound, _one()) for bound in _visible_blocks(segments, C, C))
    by_query, whole, row = _specs(L, D, C, group)
    of_query = pl.BlockSpec((None, None, C), lambda i, b, h: (b, h, i))
    d_q = pl.pallas_call(
        functools.partial(_d_q_kernel, scale=scale, C=C),
        grid=(L // C, B, H),
        in_specs=[by_query, whole, whole, by_query, of_query, of_query, *(row for _ in sparse), *first[1:]],
        out_specs=by_query,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        **_how("flash_d_q", D, interpret),
    )(q, k, v, d_out, log_mass, overlap_BxHxL, *sparse, *first[:1])
    by_key = pl.BlockSpec((None, C, None, D), lambda j, b, h: (b, j, h, 0))
    heads = pl.BlockSpec((None, L, group, D), lambda j, b, h: (b, 0, h, 0))  # the queries that read this key head
    of_heads = pl.BlockSpec((None, group, L), lambda j, b, h: (b, h, 0))
    d_k, d_v = pl.pallas_call(
        functools.partial(_d_kv_kernel, scale=scale, C=C),
        grid=(L // C, B, K),
        in_specs=[heads, by_key, by_key, heads, of_heads, of_heads, *(row for _ in sparse), *last[1:]],
        out_specs=[by_key, by_key],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        **_how("flash_d_kv", D, interpret),
    )(q, k, v, d_out, log_mass, overlap_BxHxL, *sparse, *last[:1])
    return d_q, d_k, d_v, None


_flash.defvjp(_forward, _backward)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, scale: float, Cq: int, Ck: int):
    *sparse, out_ref, log_mass_ref = refs
    i = pl.program_id(0)
    q = q_ref[...]

    def visit(j, carry, diagonal):
        peak, mass, out = carry
        keys = pl.ds(j * Ck, Ck)
        scores = triton.dot(q, k_ref[keys, :].T) * (scale * math.log2(math.e))
        scores = _hide(scores, sparse, i * Cq, j * Ck, diagonal)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(scores - new_peak[:, None])
        update = triton.dot(weights.astype(v_ref.dtype), v_ref[keys, :])
        return new_peak, mass * shrink + weights.sum(axis=1), out * shrink[:, None] + update

    start = (jnp.full(Cq, -jnp.inf, jnp.float32), jnp.zeros(Cq, jnp.float32), jnp.zeros(q.shape, jnp.float32))
    peak, mass, out = _below_and_on_the_diagonal(visit, start, sparse, i, Cq, Ck)
    out_ref[...] = (out / mass[:, None]).astype(out_ref.dtype)
    log_mass_ref[...] = peak + jnp.log2(mass)


def _d_q_kernel(q_ref, k_ref, v_ref, d_out_ref, log_mass_ref, overlap_ref, *refs, scale: float, C: int):
    *sparse, d_q_ref = refs
    i = pl.program_id(0)
    q, d_out, log_mass, overlap = q_ref[...], d_out_ref[...], log_mass_ref[...], overlap_ref[...]

    def visit(j, d_q, diagonal):
        keys = pl.ds(j * C, C)
        k = k_ref[keys, :]
        scores = triton.dot(q, k.T) * (scale * math.log2(math.e))
        weights = jnp.exp2(_hide(scores, sparse, i * C, j * C, diagonal) - log_mass[:, None])
        d_scores = weights * (triton.dot(d_out, v_ref[keys, :].T) - overlap[:, None])
        return d_q + triton.dot(d_scores.astype(k.dtype), k)

    d_q = _below_and_on_the_diagonal(visit, jnp.zeros(q.shape, jnp.float32), sparse, i, C, C)
    d_q_ref[...] = (d_q * scale).astype(d_q_ref.dtype)


def _d_kv_kernel(q_ref, k_ref, v_ref, d_out_ref, log_mass_ref, overlap_ref, *refs, scale: float, C: int):
    *sparse, d_k_ref, d_v_ref = refs
    j = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]
    L, group = q_ref.shape[:2]

    def visit(head, i, carry, diagonal):
        d_k, d_v = carry
        queries = pl.ds(i * C, C)
        q, d_out = q_ref[queries, head, :], d_out_ref[queries, head, :]
        scores = triton.dot(q, k.T) * (scale * math.log2(math.e))
        scores = _hide(scores, sparse, i * C, j * C, diagonal)
        weights = jnp.exp2(scores - log_mass_ref[head, queries][:, None])
        d_v += triton.dot(weights.T.astype(d_out.dtype), d_out)
        d_scores = weights * (triton.dot(d_out, v.T) - overlap_ref[head, queries][:, None])
        return d_k + triton.dot(d_scores.T.astype(q.dtype), q), d_v

    def one_head(head, carry):
        carry = visit(head, j, carry, True)
        end = sparse[1][0] + 1 if sparse else L // C
        return jax.lax.fori_loop(j + 1, end, lambda i, carry: visit(head, i, carry, False), carry)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k, d_v = jax.lax.fori_loop(0, group, one_head, start)
    d_k_ref[...] = (d_k * scale).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _below_and_on_the_diagonal(visit, carry, sparse, i, Cq: int, Ck: int):
    """`visit` of the blocks of keys that the queries of block i may see; their order is compared on the diagonal alone."""
    diagonal, end = jax.lax.div(i * Cq, Ck), jax.lax.div((i + 1) * Cq + Ck - 1, Ck)
    first = sparse[1][0] if sparse else 0
    carry = jax.lax.fori_loop(first, diagonal, lambda j, carry: visit(j, carry, False), carry)
    return jax.lax.fori_loop(jnp.maximum(first, diagonal), end, lambda j, carry: visit(j, carry, True), carry)


def _hide(scores, sparse, first_query, first_key, diagonal: bool):
    """Scores [queries, keys] with HIDDEN where a query does not see a key."""
    queries, keys = scores.shape
    visible = None
    if sparse:
        segments_ref = sparse[0]
        of_queries, of_keys = segments_ref[pl.ds(first_query, queries)], segments_ref[pl.ds(first_key, keys)]
        visible = of_queries[:, None] == of_keys[None, :]
    if diagonal:
        not_later = (first_key + jnp.arange(keys))[None, :] <= (first_query + jnp.arange(queries))[:, None]
        visible = not_later if visible is None else visible & not_later
    return scores if visible is None else jnp.where(visible, scores, HIDDEN)


def _visible_blocks(segments_BxL: jax.Array, Cq: int, Ck: int) -> tuple[jax.Array, jax.Array]:
    """int32 [B, L / Cq], [B, L / Ck]: of every block of queries the first block of keys, and of every block of keys the last
    block of queries, that may hold a token of one of its segments, causality aside. Segment ids may be in any order."""
    ids = jnp.where(segments_BxL == 0, jnp.iinfo(segments_BxL.dtype).max, segments_BxL)  # padding comes last in a row

    def ranges(C):
        blocks = ids.reshape(len(ids), -1, C)
        return blocks.min(axis=2), blocks.max(axis=2)

    (low_q, high_q), (low_k, high_k) = ranges(Cq), ranges(Ck)
    meet_BxQxK = (low_q[:, :, None] <= high_k[:, None]) & (low_k[:, None] <= high_q[:, :, None])
    first = jnp.argmax(meet_BxQxK, axis=2)
    last = meet_BxQxK.shape[1] - 1 - jnp.argmax(meet_BxQxK[:, ::-1], axis=1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


def _specs(L: int, D: int, C: int, group: int) -> tuple[pl.BlockSpec, ...]:
    """For programs (block, row, head): a block of queries of its head; all keys of that head; all segment ids of its row."""
    return (
        pl.BlockSpec((None, C, None, D), lambda i, b, h: (b, i, h, 0)),
        pl.BlockSpec((None, L, None, D), lambda i, b, h: (b, 0, h // group, 0)),
        pl.BlockSpec((None, L), lambda i, b, h: (b, 0)),
    )


def _one() -> pl.BlockSpec:
    """Of [B, blocks], the one number of a program."""
    return pl.BlockSpec((None, 1), lambda i, b, h: (b, i))


def _how(name: str, D: int, interpret: bool) -> dict:
    settings = triton.CompilerParams(num_warps=4 if D <= 64 else 8, num_stages=2)
    return dict(name=name, compiler_params=settings, interpret=interpret)
