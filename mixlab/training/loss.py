"""Cross-entropy without the logits: the hidden states meet the output matrix a chunk of tokens at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixlab.model.sharding import dividing_axes

LOGITS_BYTES = 128 * 2**20  # chunks are chosen so that their float32 logits stay below this


class CrossEntropy(NamedTuple):
    """What `cross_entropy` returns. Only `total` carries a gradient."""

    total: jax.Array  # float32 scalar: sum of weight * (nll + z_loss * log(Z)**2)
    nll_T: jax.Array  # float32 [T]: -log p(target) of every token, unweighted, also where the weight is zero
    z_sum: jax.Array  # float32 scalar: sum of weight * log(Z)**2, not multiplied by z_loss


def cross_entropy(
    hidden_TxD: jax.Array,
    head_DxV: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> CrossEntropy:
    """Weighted sum of token losses. With weights that are shares of the global batch it is their mean, and a device or a row
    without weight is fine. (A sum that is divided afterwards is the same, but a bfloat16 gradient of the hidden states is
    then rounded twice, by up to 0.2 % in one direction.)

    hidden [T, D] in the compute dtype, head [D, V] in the parameter dtype, targets int32 [T], weights float32
    [T]. Columns of the head from `vocab_size` on are padding: they get no probability and no gradient. The
    z-loss adds z_loss * log(Z)**2 a weighted target (OLMo 2, section 3.3.3). On a device at most chunk_tokens x V
    logits exist at a time (None: as many as fit in LOGITS_BYTES); T need not be a multiple. Matmuls take the compute
    dtype and accumulate in float32; softmax and sums are float32. Where the mesh in force divides the tokens or the
    vocabulary, each device works on its tokens and its columns of the head: those
    are not gathered, nor are logits.

    The gradient is made during the forward pass, while a chunk's logits are there: three matmuls, where
    recomputing the logits would take four. When no gradient is asked for, the compiler drops that work."""
    total, nll_T, z_sum = _cross_entropy(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens)
    return CrossEntropy(total, jax.lax.stop_gradient(nll_T), jax.lax.stop_gradient(z_sum))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens):
    return _forward(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens)[0]


def _forward(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens):
    over = _axes(*hidden_TxD.shape, head_DxV.shape[1])
    run = functools.partial(_on_one_device, over, vocab_size, z_loss, chunk_tokens)
    if over != UNDIVIDED:
        # Left to the partitioner, every chunk would end with a sum of the head's gradient over all devices.
        tokens, inputs = jax.P(over.tokens), (jax.P(over.tokens), jax.P(None, over.vocab))
        outputs = (jax.P(), tokens, jax.P()), (tokens, jax.P(over.embed, over.vocab))
        run = jax.shard_map(run, in_specs=(*inputs, tokens, tokens), out_specs=outputs, check_vma=False)
    outputs, (gradient_TxD, gradient_DxV) = run(hidden_TxD, head_DxV.astype(hidden_TxD.dtype), targets_T, weights_T)
    return outputs, (gradient_TxD, gradient_DxV.astype(head_DxV.dtype))


class _Axes(NamedTuple):
    """The mesh axes over which the tokens, and the head's two sides, are divided; () where they are not."""

    tokens: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()  # of `tokens`, those that divide the head's rows too
    vocab: tuple[str, ...] = ()


UNDIVIDED = _Axes()


def _axes(T: int, D: int, V: int) -> _Axes:
    # Of rows that `sequence` does not divide, all its devices have the same tokens.
    tokens = dividing_axes("tokens", T) or dividing_axes("batch", T)
    embed = tuple(axis for axis in dividing_axes("embed", D) if axis in tokens)
    return _Axes(tokens, embed, dividing_axes("vocab", V))


def _on_one_device(over: _Axes, vocab_size, z_loss, chunk_tokens, hidden_TxD, head_DxV, targets_T, weights_T):
    """A device's tokens against its columns of the head: the outputs, and the gradients of hidden, head (float32)."""
    T, D = hidden_TxD.shape
    V = head_DxV.shape[1]
    wide = jnp.promote_types(hidden_TxD.dtype, jnp.float32)
    parts, first = (jax.lax.axis_size(over.vocab), jax.lax.axis_index(over.vocab) * V) if over.vocab else (1, 0)
    columns = first + jnp.arange(V)
    limit = chunk_tokens or max(1, LOGITS_BYTES // (4 * V))
    chunks = -(-T // limit)

    def chunk(gradient_DxV, inputs):
        x_CxD, targets_C, weights_C = inputs
        logits = jnp.matmul(x_CxD, head_DxV, preferred_element_type=wide)
        if vocab_size < parts * V:
            logits = jnp.where(columns < vocab_size, logits, -jnp.inf)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets_C[:, None] - first, axis=-1, mode="clip")[:, 0]
        if over.vocab:
            peak = jax.lax.pmax(log_z, over.vocab)
            log_z = peak + jnp.log(jax.lax.psum(jnp.exp(log_z - peak), over.vocab))
            here = (targets_C >= first) & (targets_C < first + V)
            target_logits = jax.lax.psum(jnp.where(here, target_logits, 0), over.vocab)
        nll = log_z - target_logits
        # d total / d logits = weight * ((1 + 2 z_loss log Z) p - onehot(target))
        scale = weights_C * (1 + 2 * z_loss * log_z)
        slope = jnp.exp(logits - log_z[:, None]) * scale[:, None]
        slope = jnp.where(columns == targets_C[:, None], slope - weights_C[:, None], slope)
        slope = slope.astype(x_CxD.dtype)
        gradient_DxV = gradient_DxV + jnp.matmul(x_CxD.T, slope, preferred_element_type=wide)
        gradient_CxD = jnp.matmul(slope, head_DxV.T, preferred_element_type=wide if over.vocab else None)
        return gradient_DxV, (gradient_CxD, nll, log_z)

    if chunks == 1:
        gradient_DxV, (gradient_TxD, nll_T, log_z_T) = chunk(0.0, (hidden_TxD, targets_T, weights_T))
    else:
        # Chunk i takes tokens i, i + chunks, ...; missing tokens of the last row of the grid get weight zero.
        pad = -T % chunks

        def split(a):
            a = jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1))
            return jnp.moveaxis(a.reshape(-1, chunks, *a.shape[1:]), 1, 0)

        def join(a):
            return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])[:T]

        inputs = (split(hidden_TxD), split(targets_T), split(weights_T))
        gradient_DxV, per_token = jax.lax.scan(chunk, jnp.zeros((D, V), wide), inputs)
        gradient_TxD, nll_T, log_z_T = (join(a) for a in per_token)
    z_sum = _over(jax.lax.psum, jnp.sum(weights_T * jnp.square(log_z_T)), over.tokens)
    total = _over(jax.lax.psum, jnp.sum(weights_T * nll_T), over.tokens) + z_loss * z_sum
    gradient_TxD = _over(jax.lax.psum, gradient_TxD, over.vocab).astype(hidden_TxD.dtype)
    # Each device keeps the part of the head's gradient that it keeps of the head.
    gradient_DxV = _over(functools.partial(jax.lax.psum_scatter, tiled=True), gradient_DxV, over.embed)
    rest = tuple(axis for axis in over.tokens if axis not in over.embed)
    return (total, nll_T, z_sum), (gradient_TxD, _over(jax.lax.psum, gradient_DxV, rest))


def _over(collective, x, axes: tuple[str, ...]):
    """The collective over these mesh axes, of which there may be none."""
    return collective(x, axes) if axes else x


def _backward(vocab_size, z_loss, chunk_tokens, gradients, cotangents):
    gradient_TxD, gradient_DxV = gradients
    # Of `total`; the other outputs carry no gradient. It is not rounded itself, which would scale all that is below the head.
    scale = cotangents[0]
    scaled = ((gradient * scale).astype(gradient.dtype) for gradient in (gradient_TxD, gradient_DxV))
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward)
