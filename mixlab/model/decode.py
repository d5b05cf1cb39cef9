"""One token more for every row: the keys and values of the tokens before it are kept, not computed anew."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mixlab.model.config import ModelConfig
from mixlab.model.sharding import constrain
from mixlab.model.transformer import Transformer


class Cache(NamedTuple):
    """Keys and values of all layers, [layers, B, L, kv_heads, head_dim] each, in the compute dtype."""

    keys: jax.Array
    values: jax.Array


def empty_cache(config: ModelConfig, rows: int, length: int) -> Cache:
    """Room for `length` tokens a row."""
    shape = (config.layers, rows, length, config.kv_heads, config.head_dim)
    return Cache(*(_place(jnp.zeros(shape, config.compute_dtype)) for _ in range(2)))


def decode(model: Transformer, tokens_B: jax.Array, at: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """(hidden states [B, d_model] of `tokens_B`, which stand at position `at` of every row; the cache with them).

    The function of `Transformer.__call__` on whole rows, the tokens before `at` having been given one after the other."""
    c, (B,) = model.config, tokens_B.shape
    positions_Bx1 = jnp.full((B, 1), at, jnp.int32)
    x_Bx1xD, turn = model.embed(tokens_B[:, None], positions_Bx1)
    graph, weights = nnx.split(model.blocks)

    def layer(carry, inputs):
        x_Bx1xD, keys, values = carry
        number, layer_weights = inputs
        block = nnx.merge(graph, layer_weights)
        kept: list[jax.Array] = []

        def attention(y_Bx1xD):
            q, k, v = block.attention.project(y_Bx1xD, turn)
            kept[:] = keys.at[number, :, at].set(k[:, 0]), values.at[number, :, at].set(v[:, 0])
            out = _look_back(q[:, 0], kept[0][number], kept[1][number], at)
            return block.attention.output(out.reshape(B, 1, -1))

        x_Bx1xD = block.around(x_Bx1xD, attention)
        return (x_Bx1xD, *map(_place, kept)), None

    (x_Bx1xD, *kept), _ = jax.lax.scan(layer, (x_Bx1xD, *cache), (jnp.arange(c.layers), weights))
    return model.final_norm(x_Bx1xD)[:, 0], Cache(*kept)


def _look_back(q_BxHxD: jax.Array, k_BxLxKxD: jax.Array, v_BxLxKxD: jax.Array, at: jax.Array) -> jax.Array:
    """Attention of one query a row to the keys up to `at`, [B, H, D]; scores and softmax as in `attention.dense`."""
    B, H, D = q_BxHxD.shape
    L, K = k_BxLxKxD.shape[1:3]
    wide = jnp.promote_types(q_BxHxD.dtype, jnp.float32)
    q = q_BxHxD.reshape(B, K, H // K, D) * D**-0.5
    scores = jnp.einsum("bkgd,bskd->bkgs", q, k_BxLxKxD, preferred_element_type=wide)
    weights = jax.nn.softmax(jnp.where(jnp.arange(L) <= at, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgs,bskd->bkgd", weights.astype(v_BxLxKxD.dtype), v_BxLxKxD).reshape(B, H, D)


def _place(kept: jax.Array) -> jax.Array:
    return constrain(kept, None, "batch", None, "kv_heads", None)
