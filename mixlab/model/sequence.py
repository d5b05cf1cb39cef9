"""Causal attention over rows that are cut along their length, a part a device of the mesh's axis "sequence".

Three ways for queries to meet the keys of other devices:
- "gather": every device gets all keys and values;
- "ring": keys and values go round, a device's share at a time (Liu et al., arXiv 2310.01889);
- "all_to_all": whole rows of a share of the heads, for the time of the attention (DeepSpeed-Ulysses, arXiv 2309.14509). The
  number of heads a device must divide, and any kernel can serve.

In the first two a row lies in stripes: it is cut into two for each of S devices, and device r holds the pieces r and 2 S - 1 - r.
In place of one early and one late device there are then S alike, each of which has 2 S + 1 pairs of pieces to compare.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mixlab.errors import UserError
from mixlab.model.blockwise import ACCELERATOR_BLOCK, CPU_BLOCK, absorb, gradients
from mixlab.model.layers import ATTENTION
from mixlab.model.sharding import extent, mesh_axes

AXIS = "sequence"
# (piece of queries, piece of keys, same piece) of what a device holds itself; a query's own piece comes first.
OWN = ((0, 0, True), (1, 1, True), (1, 0, False))


def is_divided(length: int) -> bool:
    """Whether rows of this length are cut on the mesh in force."""
    return extent("length", length) > 1


def to_stripes(x_BxL: jax.Array) -> jax.Array:
    """[B, L, …] with the tokens of its rows in stripes."""
    return _exchange(x_BxL, to_stripes=True)


def from_stripes(x_BxL: jax.Array) -> jax.Array:
    """The inverse of `to_stripes`."""
    return _exchange(x_BxL, to_stripes=False)


def attend_divided(
    q_BxLxHxD: jax.Array,
    k_BxLxKxD: jax.Array,
    v_BxLxKxD: jax.Array,
    segment_ids_BxL: jax.Array | None,
    how: str,
    local: Callable[..., jax.Array],
) -> jax.Array:
    """The function of `attention.dense`, of rows in stripes unless `how` is "all_to_all", which computes `local`.
    UserError when the heads do not divide for it."""
    batch, heads = mesh_axes("batch", q_BxLxHxD.shape[0]), mesh_axes("heads", q_BxLxHxD.shape[2])
    # Queries and their keys must stay together: heads are divided only when both divide in the same way.
    heads = heads if heads == mesh_axes("kv_heads", k_BxLxKxD.shape[2]) else None
    arrays, spec = (q_BxLxHxD, k_BxLxKxD, v_BxLxKxD), jax.P(batch, AXIS, heads, None)
    arrays += () if segment_ids_BxL is None else (segment_ids_BxL,)
    run = functools.partial(_all_to_all, local) if how == "all_to_all" else functools.partial(_pieces, how)
    specs = (spec, spec, spec, *(jax.P(batch, AXIS) for _ in arrays[3:]))
    return jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def _exchange(x: jax.Array, to_stripes: bool) -> jax.Array:
    def run(x):
        size = jax.lax.axis_size(AXIS)
        even = jax.lax.axis_index(AXIS) % 2 == 0  # here the first of two stripes is an even piece

        def move(x, odd):
            ways = [(r, min(2 * r + odd, 2 * size - 1 - 2 * r - odd)) for r in range(size)]
            return jax.lax.ppermute(x, AXIS, ways if to_stripes else [(b, a) for a, b in ways])

        one, other = jnp.split(x, 2, axis=1)
        if to_stripes:
            one, other = move(one, 0), move(other, 1)
        one, other = jnp.where(even, one, other), jnp.where(even, other, one)
        if not to_stripes:
            one, other = move(one, 0), move(other, 1)
        return jnp.concatenate([one, other], axis=1)

    spec = jax.P(mesh_axes("batch", x.shape[0]), AXIS)
    return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _all_to_all(local, q, k, v, segments=None):
    size, heads, kv_heads = jax.lax.axis_size(AXIS), q.shape[2], k.shape[2]
    if heads % size:
        raise UserError(
            f'model.sequence_attention = "all_to_all" divides the heads that a device has, {heads}, over mesh.sequence = '
            f'{size}; use a divisor of {heads}, or "gather" or "ring"'
        )
    copies = size // math.gcd(kv_heads, size)
    k, v = (jnp.repeat(a, copies, axis=2) for a in (k, v))
    q, k, v = (jax.lax.all_to_all(a, AXIS, split_axis=2, concat_axis=1, tiled=True) for a in (q, k, v))
    if segments is not None:
        segments = jax.lax.all_gather(segments, AXIS, axis=1, tiled=True)
    return jax.lax.all_to_all(local(q, k, v, segments), AXIS, split_axis=1, concat_axis=2, tiled=True)


def _pieces(how, q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segments_BxL=None):
    """The part of one device; its two pieces are cut into n blocks of C tokens each."""
    B, L, H, D = q_BxLxHxD.shape
    K, piece = k_BxLxKxD.shape[2], L // 2
    least = min(CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK, piece)
    C = next(size for size in range(least, piece + 1) if piece % size == 0)
    n = piece // C
    q = (q_BxLxHxD * D**-0.5).reshape(B, 2, n, C, K, H // K, D).transpose(1, 2, 0, 4, 5, 3, 6)  # 2 n B K G C D
    k, v = (a.reshape(B, 2, n, C, K, D).transpose(1, 2, 0, 4, 3, 5) for a in (k_BxLxKxD, v_BxLxKxD))  # 2 n B K C D
    segments = None if segments_BxL is None else segments_BxL.reshape(B, 2, n, C).transpose(1, 2, 0, 3)
    out = _divided(how, q, k, v, segments)
    return out.transpose(2, 0, 1, 5, 3, 4, 6).reshape(B, L, H, D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divided(how, q, k, v, segments):
    return _forward(how, q, k, v, segments)[0]


def _forward(how, q, k, v, segments):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    visit = functools.partial(_absorb, q, segments)
    keys = (k, v, segments)
    sums = (jnp.full(q.shape[:-1], -jnp.inf, wide), jnp.zeros(q.shape[:-1], wide), jnp.zeros(q.shape, wide))
    size = jax.lax.axis_size(AXIS)
    if how == "gather":
        every = _gather(keys)
        sums = visit(sums, keys, OWN)
        sums, _ = jax.lax.scan(
            lambda sums, t: (visit(sums, _at(every, _origin(t)), _turns(t)), None), sums, np.arange(1, size)
        )
    else:
        coming = _pass_on(keys)  # the next keys are on their way while these are compared
        sums = visit(sums, keys, OWN)
        (sums, coming), _ = jax.lax.scan(
            lambda carry, t: ((visit(*carry, _turns(t)), _pass_on(carry[1])), None),
            (sums, coming),
            np.arange(1, size - 1),
        )
        sums = visit(sums, coming, _turns(size - 1))
    peak, mass, out = sums
    out, log_mass = checkpoint_name(((out / mass[..., None]).astype(q.dtype), peak + jnp.log(mass)), ATTENTION)
    return out, (q, k, v, segments, out, log_mass)


def _backward(how, saved, d_out):
    q, k, v, segments, out, log_mass = saved
    wide = log_mass.dtype
    overlap = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    visit = functools.partial(_differentiate, (q, log_mass, d_out, overlap), segments)
    keys, size = (k, v, segments), jax.lax.axis_size(AXIS)
    zeros = tuple(jnp.zeros(a.shape, wide) for a in (k, v))
    d_q, d_keys = visit((jnp.zeros(q.shape, wide), zeros), keys, OWN)
    if how == "gather":
        every = _gather(keys)

        def step(carry, t):
            d_q, d_every = carry
            there = _origin(t)
            d_q, d_there = visit((d_q, zeros), _at(every, there), _turns(t))
            return (d_q, jax.tree.map(lambda a, b: a.at[there].set(b), d_every, d_there)), None

        d_every = jax.tree.map(lambda a: jnp.zeros((size, *a.shape), wide).at[_origin(0)].set(a), d_keys)
        (d_q, d_every), _ = jax.lax.scan(step, (d_q, d_every), np.arange(1, size))
        d_keys = jax.tree.map(lambda a: jax.lax.psum_scatter(a, AXIS), d_every)
    else:

        def step(carry, t):
            d_q, keys, d_keys = carry
            keys, d_keys = _pass_on(
                (keys, d_keys)
            )  # the gradient travels with its keys, and comes home with the last turn
            d_q, d_keys = visit((d_q, d_keys), keys, _turns(t))
            return (d_q, keys, d_keys), None

        (d_q, _, d_keys), _ = jax.lax.scan(step, (d_q, keys, d_keys), np.arange(1, size))
        d_keys = _pass_on(d_keys)
    return d_q.astype(q.dtype), d_keys[0].astype(k.dtype), d_keys[1].astype(v.dtype), None


_divided.defvjp(_forward, _backward)


def _origin(t):
    """Whose keys a device compares with at turn t of the ring."""
    return (jax.lax.axis_index(AXIS) - t) % jax.lax.axis_size(AXIS)


def _turns(t):
    """The pairs of pieces at turn t from 1 on: the late queries see the early keys; and the early ones see those of the
    devices before them, the late ones the late keys of the devices after."""
    late = (_origin(t) > jax.lax.axis_index(AXIS)).astype(jnp.int32)
    return ((1, 0, False), (late, late, False))


def _pass_on(keys):
    size = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(r, (r + 1) % size) for r in range(size)]), keys)


def _gather(keys):
    return jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS), keys)


def _at(tree, i):
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _pairs(n: int, same: bool):
    """Numbers of the blocks of two pieces that are compared; of the same piece from the diagonal down."""
    pairs = [(a, b) for a in range(n) for b in (range(a, -1, -1) if same else range(n))]
    return tuple(np.array(pairs, np.int32).T)


def _absorb(q, segments, sums, keys, pieces):
    """The sums of all queries of a device, with these pairs of pieces compared."""
    for i, j, same in pieces:
        one = _absorb_piece(_at((q, segments), i), _at(keys, j), _at(sums, i), same)
        sums = jax.tree.map(lambda whole, part, i=i: whole.at[i].set(part), sums, one)
    return sums


def _absorb_piece(queries, keys, sums, same):
    def visit(sums, pair):
        (q, segments), (k, v, others) = _at(queries, pair[0]), _at(keys, pair[1])
        scores = _scores(q, k, segments, others, pair if same else None)
        new = absorb(*_at(sums, pair[0]), scores, v)
        return jax.tree.map(lambda whole, part: whole.at[pair[0]].set(part), sums, new), None

    return jax.lax.scan(visit, sums, _pairs(len(sums[0]), same))[0]


def _differentiate(queries, segments, d_sums, keys, pieces):
    """(d_q, (d_k, d_v)) with what these pairs of pieces add."""
    for i, j, same in pieces:
        one = _differentiate_piece(_at((*queries, segments), i), _at(keys, j), same)
        d_q, d_keys = d_sums
        d_sums = d_q.at[i].add(one[0]), jax.tree.map(lambda whole, part, j=j: whole.at[j].add(part), d_keys, one[1])
    return d_sums


def _differentiate_piece(queries, keys, same):
    def visit(d_sums, pair):
        (q, log_mass, d_out, overlap, segments), (k, v, others) = _at(queries, pair[0]), _at(keys, pair[1])
        scores = _scores(q, k, segments, others, pair if same else None)
        to_q, to_k, to_v = gradients(q, k, v, scores, log_mass, d_out, overlap)
        d_q, (d_k, d_v) = d_sums
        return (d_q.at[pair[0]].add(to_q), (d_k.at[pair[1]].add(to_k), d_v.at[pair[1]].add(to_v))), None

    wide = queries[1].dtype
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, wide), (queries[0], keys[:2]))
    return jax.lax.scan(visit, zeros, _pairs(len(queries[0]), same))[0]


def _scores(q, k, segments, others, pair):
    """Scores of a pair of blocks, [B, K, G, C, C], -inf where not visible; pair: their numbers where they are of one piece,
    None where all keys are before all queries."""
    C, visible = q.shape[-2], None
    scores = jnp.einsum("bkgqd,bksd->bkgqs", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    if pair is not None:
        visible = (pair[0] * C + jnp.arange(C))[:, None] >= (pair[1] * C + jnp.arange(C))
    if segments is not None:
        alike = (segments[:, :, None] == others[:, None, :])[:, None, None]
        visible = alike if visible is None else alike & visible
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)
