"""Cross-entropy without the logits: the hidden states meet the output matrix a chunk of tokens at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    """Weighted sum of token losses, to be divided by the caller's normaliser (the sum of weights over the
    global batch), so that a device or a row without weight is fine: sum / normaliser then has the right
    gradient.

    hidden [T, D] in the compute dtype, head [D, V] in the parameter dtype, targets int32 [T], weights float32
    [T]. Columns of the head from `vocab_size` on are padding: they get no probability and no gradient. The
    z-loss adds z_loss * log(Z)**2 a weighted target (OLMo 2, section 3.3.3). At most chunk_tokens x V logits
    exist at a time (None: as many as fit in LOGITS_BYTES); T need not be a multiple. Matmuls take the compute
    dtype and accumulate in float32; softmax and sums are float32.

    The gradient is made during the forward pass, while a chunk's logits are there: three matmuls, where
    recomputing the logits would take four. When no gradient is asked for, the compiler drops that work."""
    total, nll_T, z_sum = _cross_entropy(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens)
    return CrossEntropy(total, jax.lax.stop_gradient(nll_T), jax.lax.stop_gradient(z_sum))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _cross_entropy(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens):
    return _forward(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens)[0]


def _forward(hidden_TxD, head_DxV, targets_T, weights_T, vocab_size, z_loss, chunk_tokens):
    T, D = hidden_TxD.shape
    V = head_DxV.shape[1]
    wide = jnp.promote_types(hidden_TxD.dtype, jnp.float32)
    head = head_DxV.astype(hidden_TxD.dtype)
    limit = chunk_tokens or max(1, LOGITS_BYTES // (4 * V))
    chunks = -(-T // limit)

    def chunk(gradient_DxV, inputs):
        x_CxD, targets_C, weights_C = inputs
        logits = jnp.matmul(x_CxD, head, preferred_element_type=wide)
        if vocab_size < V:
            logits = jnp.where(jnp.arange(V) < vocab_size, logits, -jnp.inf)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nll = log_z - jnp.take_along_axis(logits, targets_C[:, None], axis=-1)[:, 0]
        # d total / d logits = weight * ((1 + 2 z_loss log Z) p - onehot(target))
        scale = weights_C * (1 + 2 * z_loss * log_z)
        slope = jnp.exp(logits - log_z[:, None]) * scale[:, None]
        slope = jnp.where(jnp.arange(V) == targets_C[:, None], slope - weights_C[:, None], slope)
        slope = slope.astype(x_CxD.dtype)
        gradient_DxV = gradient_DxV + jnp.matmul(x_CxD.T, slope, preferred_element_type=wide)
        return gradient_DxV, (slope @ head.T, nll, log_z)

    if chunks == 1:
        gradient_DxV, (gradient_TxD, nll_T, log_z_T) = chunk(0.0, (hidden_TxD, targets_T, weights_T))
    else:
        # Chunk i takes tokens i, i + chunks, ...: with rows sharded over devices, every device then has its
        # share of every chunk. Missing tokens of the last row of the grid get weight zero.
        pad = -T % chunks

        def split(a):
            a = jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1))
            return jnp.moveaxis(a.reshape(-1, chunks, *a.shape[1:]), 1, 0)

        def join(a):
            return jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:])[:T]

        inputs = (split(hidden_TxD), split(targets_T), split(weights_T))
        zeros = jnp.zeros((D, V), wide)
        gradient_DxV, per_token = jax.lax.scan(chunk, zeros, inputs)
        gradient_TxD, nll_T, log_z_T = (join(a) for a in per_token)
    z_sum = jnp.sum(weights_T * jnp.square(log_z_T))
    total = jnp.sum(weights_T * nll_T) + z_loss * z_sum
    return (total, nll_T, z_sum), (gradient_TxD, gradient_DxV.astype(head_DxV.dtype))


def _backward(vocab_size, z_loss, chunk_tokens, gradients, cotangents):
    gradient_TxD, gradient_DxV = gradients
    scale = cotangents[0]  # of `total`; the other outputs carry no gradient
    return (
        gradient_TxD * scale.astype(gradient_TxD.dtype),
        gradient_DxV * scale.astype(gradient_DxV.dtype),
        None,
        None,
    )


_cross_entropy.defvjp(_forward, _backward)
