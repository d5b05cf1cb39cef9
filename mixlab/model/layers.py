"""Linear maps and norms. Parameters are float32; each carries the logical names of its axes, which
`parallel/rules.py` maps to mesh axes. Nothing here knows of a mesh."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# Names of what is dear to compute again, for remat policies: a linear map's output; attention's, and the log-sum-exp of its
# scores, with which its gradient needs nothing else of the forward pass.
PROJECTION, ATTENTION = "projection", "attention"

Initializer = jax.nn.initializers.Initializer


def parameter(init: Initializer, rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter whose axes have these logical names."""
    # Sharding is decided where the state is made (jit with out_shardings), never while a module is
    # constructed.
    return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes, eager_sharding=False)


class Linear(nnx.Module):
    """x [..., in] -> [..., out], in the dtype of x; accelerators accumulate in float32 whatever that is."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        axes: tuple[str, str],
        *,
        bias: bool,
        init: Initializer,
        rngs: nnx.Rngs,
    ):
        self.kernel = parameter(init, rngs, (width_in, width_out), axes)
        self.bias = parameter(nnx.initializers.zeros, rngs, (width_out,), axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(project(x, self.kernel[...]), PROJECTION)
        return y if self.bias is None else add_bias(y, self.bias[...])


@jax.custom_vjp
def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out], in the dtype of x.

    Its own gradient, for two reasons. The kernel's is accumulated and kept in the kernel's float32, where the
    rule of `@` would round it to the dtype of x. And it is formed as x^T g: that rule forms g^T x and transposes,
    which costs XLA on CPU a copy of g and a matmul at a third of the speed."""
    return x @ kernel.astype(x.dtype)


def _project_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return project(x, kernel), (x, kernel)


def _project_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    leading = tuple(range(x.ndim - 1))
    d_kernel = jax.lax.dot_general(x, g, ((leading, leading), ((), ())), preferred_element_type=kernel.dtype)
    return g @ kernel.T.astype(g.dtype), d_kernel


project.defvjp(_project_forward, _project_backward)


@jax.custom_vjp
def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., out] + bias [out], in the dtype of y. Its own gradient: the bias' is summed over all tokens in the bias' float32,
    where the rule of `+` would round every partial sum to the dtype of y."""
    return y + bias.astype(y.dtype)


def _add_bias_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_bias(y, bias), bias


def _add_bias_backward(bias: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g, g.astype(bias.dtype).sum(axis=tuple(range(g.ndim - 1)))


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


class Norm(nnx.Module):
    """RMSNorm (scale) or LayerNorm (scale and bias) over the last axis, in float32, returned in the dtype of
    x."""

    def __init__(self, kind: str, width: int, eps: float, axis: str, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = parameter(nnx.initializers.ones, rngs, (width,), (axis,))
        self.bias = parameter(nnx.initializers.zeros, rngs, (width,), (axis,)) if kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return normalise(x, self.scale[...], None if self.bias is None else self.bias[...], self.eps)


# What follows is quick to compute again: the backward pass does so from the inputs, which it has anyway, in place of
# keeping every intermediate value, several of them float32.
cheap = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(cheap, static_argnums=3)
def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if bias is not None:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(wide).mean(axis=-1, keepdims=True)
    y = wide * jax.lax.rsqrt(variance + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@cheap
def gelu(x: jax.Array) -> jax.Array:
    """By tanh, as GPT-2 has it."""
    return jax.nn.gelu(x, approximate=True)


@cheap
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up
