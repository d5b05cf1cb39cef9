"""The transformer: embedding, a stack of identical blocks, final norm, output matrix.

Parameters of the blocks are always stacked on a leading "layers" axis, so a checkpoint does not depend on how
the stack is run: scanned (compile time does not grow with depth) or unrolled (quicker on CPU when shallow).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mixlab.errors import UserError
from mixlab.model.attention import attend
from mixlab.model.config import ModelConfig, config_problems
from mixlab.model.init import residual_init, weight_init
from mixlab.model.layers import ATTENTION, PROJECTION, Linear, Norm, gelu, parameter, swiglu
from mixlab.model.rope import Rotation, rotate, rotation
from mixlab.model.sequence import from_stripes, is_divided, to_stripes
from mixlab.model.sharding import constrain

# The deepest stacks that are unrolled; the time to compile them is linear in their depth. On GPUs what a scanned layer keeps is
# copied into stacks and out of them again: for GPT-2 124M, as compiled for an H100 with 32 rows of 1024 tokens, 0.85 GB of it
# a layer, beside the 1.05 GB that the layer writes on the way forward.
UNROLL_LAYERS = {"cpu": 12, "gpu": 24}


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, init = config, weight_init(config)
        query_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        bias = c.attention_bias
        self.query = Linear(c.d_model, query_width, ("embed", "heads"), bias=bias, init=init, rngs=rngs)
        self.key = Linear(c.d_model, kv_width, ("embed", "kv_heads"), bias=bias, init=init, rngs=rngs)
        self.value = Linear(c.d_model, kv_width, ("embed", "kv_heads"), bias=bias, init=init, rngs=rngs)
        self.output = Linear(query_width, c.d_model, ("heads", "embed"), bias=bias, init=residual_init(c), rngs=rngs)
        self.query_norm = Norm(c.norm, query_width, c.norm_eps, "heads", rngs=rngs) if c.qk_norm else None
        self.key_norm = Norm(c.norm, kv_width, c.norm_eps, "kv_heads", rngs=rngs) if c.qk_norm else None
        self.head_dim, self.kernel, self.across = c.head_dim, c.attention, c.sequence_attention

    def __call__(self, x_BxLxD: jax.Array, segment_ids_BxL: jax.Array | None, turn: Rotation | None) -> jax.Array:
        q, k, v = self.project(x_BxLxD, turn)
        out_BxLxHxD = attend(q, k, v, segment_ids_BxL, self.kernel, self.across)
        return self.output(out_BxLxHxD.reshape(*x_BxLxD.shape[:2], -1))

    def project(self, x_BxLxD: jax.Array, turn: Rotation | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, H, head_dim], keys and values [B, L, K, head_dim], normed and turned."""
        B, L, _ = x_BxLxD.shape
        q, k, v = self.query(x_BxLxD), self.key(x_BxLxD), self.value(x_BxLxD)
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = (y.reshape(B, L, -1, self.head_dim) for y in (q, k, v))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        return q, k, v


class MLP(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, init, bias = config, weight_init(config), config.mlp_bias
        gated = c.activation == "swiglu"
        self.gate = Linear(c.d_model, c.ffn_width, ("embed", "mlp"), bias=bias, init=init, rngs=rngs) if gated else None
        self.up = Linear(c.d_model, c.ffn_width, ("embed", "mlp"), bias=bias, init=init, rngs=rngs)
        self.down = Linear(c.ffn_width, c.d_model, ("mlp", "embed"), bias=bias, init=residual_init(c), rngs=rngs)

    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(gelu(self.up(x_BxLxD)))
        return self.down(swiglu(self.gate(x_BxLxD), self.up(x_BxLxD)))


class Block(nnx.Module):
    """Attention, then MLP, each added to the residual stream; the norm on the way in ("pre") or out
    ("post")."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = config
        self.attention = Attention(c, rngs=rngs)
        self.mlp = MLP(c, rngs=rngs)
        self.attention_norm = Norm(c.norm, c.d_model, c.norm_eps, "embed", rngs=rngs)
        self.mlp_norm = Norm(c.norm, c.d_model, c.norm_eps, "embed", rngs=rngs)
        self.post = c.norm_placement == "post"

    def __call__(self, x_BxLxD: jax.Array, segment_ids_BxL: jax.Array | None, turn: Rotation | None) -> jax.Array:
        return self.around(x_BxLxD, lambda y_BxLxD: self.attention(y_BxLxD, segment_ids_BxL, turn))

    def around(self, x_BxLxD: jax.Array, attention: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """The block, with this function in the place of its attention."""
        if self.post:
            h_BxLxD = x_BxLxD + self.attention_norm(attention(x_BxLxD))
            return h_BxLxD + self.mlp_norm(self.mlp(h_BxLxD))
        h_BxLxD = x_BxLxD + attention(self.attention_norm(x_BxLxD))
        return h_BxLxD + self.mlp(self.mlp_norm(h_BxLxD))


class Transformer(nnx.Module):
    """Raises UserError, all problems in one message, when `config` is not sound."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        if problems := config_problems(config):
            raise UserError("\n".join(problems))
        c, init = config, weight_init(config)
        self.config = c
        self.embedding = parameter(init, rngs, (c.padded_vocab_size, c.d_model), ("vocab", "embed"))
        self.position_embedding = (
            parameter(init, rngs, (c.context_length, c.d_model), ("positions", "embed"))
            if c.positions == "learned"
            else None
        )
        make_stack = nnx.vmap(
            lambda rngs: Block(c, rngs),
            in_axes=0,
            out_axes=0,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        self.blocks = nnx.split_rngs(splits=c.layers)(make_stack)(rngs)
        self.final_norm = Norm(c.norm, c.d_model, c.norm_eps, "embed", rngs=rngs)
        self.head = None if c.tied_head else parameter(init, rngs, (c.d_model, c.padded_vocab_size), ("embed", "vocab"))

    def __call__(
        self,
        tokens_BxL: jax.Array,
        segment_ids_BxL: jax.Array | None,
        positions_BxL: jax.Array,
        added_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, L, d_model] after the final norm, in the compute dtype. Tokens, segment ids and positions int32
        [B, L]; segment id 0 is padding. Without segment ids attention is causal over whole rows. added: float32, is added to
        the tokens' embeddings. UserError when L exceeds the context length."""
        c = self.config
        if tokens_BxL.shape[1] > c.context_length:
            raise UserError(
                f"model.context_length = {c.context_length} is shorter than a row of {tokens_BxL.shape[1]} "
                "tokens: raise it, or shorten the rows"
            )
        striped = is_divided(tokens_BxL.shape[1]) and c.sequence_attention != "all_to_all"
        if striped:
            given = (tokens_BxL, segment_ids_BxL, positions_BxL, added_BxLxD)
            tokens_BxL, segment_ids_BxL, positions_BxL, added_BxLxD = jax.tree.map(to_stripes, given)
        x_BxLxD, turn = self.embed(tokens_BxL, positions_BxL, added_BxLxD)
        graph, weights = nnx.split(self.blocks)

        def layer(x_BxLxD: jax.Array, layer_weights: Any) -> jax.Array:
            y_BxLxD = nnx.merge(graph, layer_weights)(x_BxLxD, segment_ids_BxL, turn)
            return constrain(y_BxLxD, "batch", "length", None)

        x_BxLxD = constrain(x_BxLxD, "batch", "length", None)
        hidden_BxLxD = self.final_norm(run_layers(layer, x_BxLxD, weights, c))
        return from_stripes(hidden_BxLxD) if striped else hidden_BxLxD

    def embed(
        self, tokens_BxL: jax.Array, positions_BxL: jax.Array, added_BxLxD: jax.Array | None = None
    ) -> tuple[jax.Array, Rotation | None]:
        """What goes into the first block, in the compute dtype; and the rotation of its queries and keys, if any."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        # The table is brought together rather than the tokens, of which there are more.
        e_BxLxD = constrain(self.embedding[...], "vocab", None)[tokens_BxL]
        x_BxLxD = (e_BxLxD if added_BxLxD is None else e_BxLxD + added_BxLxD).astype(dtype)
        if self.position_embedding is None:
            return x_BxLxD, rotation(positions_BxL, c.head_dim, c.rope_base)
        table_PxD = constrain(self.position_embedding[...], "positions", None)
        return x_BxLxD + table_PxD[positions_BxL].astype(dtype), None

    def head_DxV(self) -> jax.Array:
        """The output matrix [d_model, padded vocabulary], float32: the embedding transposed when tied.
        Columns from `config.vocab_size` on are padding and must get no probability, as in `logits` and the
        loss."""
        return self.embedding[...].T if self.head is None else self.head[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., d_model] -> float32 logits [..., vocab_size], padding columns cut off. For
        generation and checks; training uses the fused loss, which never holds them all."""
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        head = self.head_DxV()[:, : self.config.vocab_size].astype(hidden.dtype)
        return jnp.matmul(hidden, head, preferred_element_type=wide)


def scans_layers(config: ModelConfig, backend: str) -> bool:
    """Whether the stack runs as a scan. "auto" unrolls stacks that are not too deep: on CPU, where that saves a few per cent,
    not with recomputation, which XLA's CPU compiler merges with the original again unless a loop is in between."""
    if config.layer_loop != "auto":
        return config.layer_loop == "scan"
    return config.layers > UNROLL_LAYERS.get(backend, 0) or (backend == "cpu" and config.remat != "none")


def is_dear(primitive, *arguments, **settings) -> bool:
    """The policy of remat = "dots": kept are projections, and of attention what its gradient would else need all of it for.
    cuDNN's attention bears no name of ours: it is known by its primitive's."""
    named = jax.checkpoint_policies.save_only_these_names(PROJECTION, ATTENTION)
    return primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *arguments, **settings)


def run_layers(
    layer: Callable[[jax.Array, Any], jax.Array], x_BxLxD: jax.Array, weights: Any, config: ModelConfig
) -> jax.Array:
    """Applies `layer(x, layer_weights)` once for each slice of `weights` along the leading "layers" axis."""
    scan = scans_layers(config, jax.default_backend())
    if config.remat != "none":
        policy = is_dear if config.remat == "dots" else None
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scan)  # a scan already keeps CSE out
    if scan:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x_BxLxD, weights)[0]
    layer = jax.jit(layer)  # traced once for all layers; the compiler sees them unrolled
    leaves, structure = jax.tree.flatten(weights)
    for layer_leaves in zip(*(unstack(leaf) for leaf in leaves), strict=True):
        x_BxLxD = layer(x_BxLxD, jax.tree.unflatten(structure, layer_leaves))
    return x_BxLxD


@jax.custom_vjp
def unstack(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """[N, ...] -> N arrays. Differentiating plain slices would add N zero-padded arrays of the stacked size,
    a cost quadratic in depth; here the gradient is one stack."""
    return tuple(stacked[i] for i in range(stacked.shape[0]))


def _unstack_forward(stacked: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    return unstack(stacked), None


def _unstack_backward(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    return (jnp.stack(gradients),)


unstack.defvjp(_unstack_forward, _unstack_backward)
