"""Causal attention within documents: several ways to compute one function.

Every path takes q [B, L, H, D], k and v [B, L, K, D] with H a multiple of K (query head h reads key head
h * K // H), and segment_ids int32 [B, L] or None; it returns [B, L, H, D] in the dtype of q. A token attends to
the tokens at or before it that have its segment id. Padding (id 0) is a segment like any other: its outputs are
finite, nobody else reads them, and a loss that gives them no weight sends no gradient into them. Without segment
ids a token attends to all at or before it, and nothing is compared.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixlab.errors import UserError
from mixlab.model.blockwise import blockwise
from mixlab.model.flash import flash
from mixlab.model.layers import ATTENTION
from mixlab.model.sequence import attend_divided, is_divided
from mixlab.model.sharding import mesh_axes

DENSE_LENGTH = 1024  # the longest rows that an accelerator without its own kernel gets whole
KERNEL_LENGTH = 128  # both Pallas kernels want lengths that are a multiple of this

Array = jax.Array


def attend(
    q_BxLxHxD: Array,
    k_BxLxKxD: Array,
    v_BxLxKxD: Array,
    segment_ids_BxL: Array | None,
    kernel: str,
    across: str = "gather",
) -> Array:
    """Causal attention within segments by the named kernel, a key of KERNELS, or "auto"; where the mesh divides rows along
    their length, `across` devices as `sequence` has it. UserError for a kernel that this backend cannot run."""
    if is_divided(q_BxLxHxD.shape[1]):
        local = functools.partial(attend, kernel=kernel)
        return attend_divided(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segment_ids_BxL, across, local)
    backend = jax.default_backend()
    if kernel == "auto":
        _, length, _, head_dim = q_BxLxHxD.shape
        kernel = choose_kernel(backend, length, head_dim, q_BxLxHxD.dtype, segment_ids_BxL is not None)
    if BACKEND.get(kernel, backend) != backend:
        raise UserError(
            f'model.attention = "{kernel}" runs on {BACKEND[kernel]} only, and this is {backend}: set "auto"'
        )
    return KERNELS[kernel](q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segment_ids_BxL)


def choose_kernel(backend: str, length: int, head_dim: int, dtype: jnp.dtype, masked: bool) -> str:
    """Which kernel serves rows of `length` tokens on this backend ("cpu", "gpu", "tpu"); masked: with segment ids."""
    if backend == "tpu":
        return "splash"
    # Blocks that stay in cache beat whole score matrices on CPU from rows of 64 tokens on (3x at 256, 8x at 1024,
    # forward and backward), and a shorter row is one block.
    if backend == "cpu":
        return "blockwise"
    if backend == "gpu" and not masked and _cudnn_serves(head_dim, dtype):
        return "cudnn"
    # The Triton kernel keeps tiles of q, k, v in shared memory: 16-bit values and heads up to 128 fit.
    if backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim <= 128:
        return "triton"
    # A few large operations, until their [L, L] scores cost too much memory.
    return "dense" if length <= DENSE_LENGTH else "blockwise"


def dense(q_BxLxHxD: Array, k_BxLxKxD: Array, v_BxLxKxD: Array, segment_ids_BxL: Array | None = None) -> Array:
    """The definition, with the whole [L, L] score matrix: what the other paths are tested against.
    Scores and softmax in float32."""
    B, L, H, D = q_BxLxHxD.shape
    K = k_BxLxKxD.shape[2]
    wide = jnp.promote_types(q_BxLxHxD.dtype, jnp.float32)
    q = q_BxLxHxD.reshape(B, L, K, H // K, D) * D**-0.5
    scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k_BxLxKxD, preferred_element_type=wide)
    visible = jnp.tri(L, dtype=bool)
    if segment_ids_BxL is not None:
        same = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
        visible = (visible & same)[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(v_BxLxKxD.dtype), v_BxLxKxD)
    return out.reshape(B, L, H, D)


def splash(
    q_BxLxHxD: Array, k_BxLxKxD: Array, v_BxLxKxD: Array, segment_ids_BxL: Array | None = None, interpret: bool = False
) -> Array:
    """Pallas splash attention, TPU only; `interpret` runs the kernel's program on any backend, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask

    def rows(q: Array, k: Array, v: Array, segments: Array | None = None) -> Array:
        H, L = q.shape[1:3]
        block = next(size for size in (512, 256, 128) if L % size == 0)
        blocks = kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        )
        row = kernel.make_splash_mha(
            mask.MultiHeadMask([mask.CausalMask((L, L))] * H),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        if segments is None:
            return jax.vmap(row)(q, k, v)
        return jax.vmap(lambda q, k, v, s: row(q, k, v, segment_ids=kernel.SegmentIds(q=s, kv=s)))(q, k, v, segments)

    L, D = q_BxLxHxD.shape[1], q_BxLxHxD.shape[3]
    q, k, v, *segments = _padded(q_BxLxHxD * D**-0.5, k_BxLxKxD, v_BxLxKxD, segment_ids_BxL)  # it does not scale
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    out_BxHxLxD = _on_each_device(rows, q, k, v, *segments, head_axis=1)
    return out_BxHxLxD.swapaxes(1, 2)[:, :L]


def triton(
    q_BxLxHxD: Array, k_BxLxKxD: Array, v_BxLxKxD: Array, segment_ids_BxL: Array | None = None, interpret: bool = False
) -> Array:
    """The Pallas-Triton kernel of `flash`, GPU only; `interpret` runs its program on any backend, slowly."""
    rows = functools.partial(flash, interpret=interpret)
    arrays = _padded(q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, segment_ids_BxL)
    return _on_each_device(rows, *arrays, head_axis=2)[:, : q_BxLxHxD.shape[1]]


def cudnn(q_BxLxHxD: Array, k_BxLxKxD: Array, v_BxLxKxD: Array, segment_ids_BxL: Array | None = None) -> Array:
    """cuDNN's flash attention, GPU only, 16-bit, for rows of one document: UserError with segment ids, which it has not."""
    if segment_ids_BxL is not None:
        raise UserError('model.attention = "cudnn" is for rows of one document, and these are packed: set "auto"')
    rows = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return _on_each_device(rows, q_BxLxHxD, k_BxLxKxD, v_BxLxKxD, head_axis=2)


KERNELS: dict[str, Callable[..., Array]] = {
    "dense": dense,
    "blockwise": blockwise,
    "splash": splash,
    "triton": triton,
    "cudnn": cudnn,
}
BACKEND = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}  # the others run anywhere


def _cudnn_serves(head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether cuDNN's kernel takes such heads, forward and backward, and this GPU has it (Ampere or newer)."""
    if jnp.dtype(dtype).itemsize != 2 or head_dim > 128 or head_dim % 8:
        return False
    return float(getattr(jax.devices()[0], "compute_capability", 0)) >= 8


def _padded(q_BxLxHxD: Array, *others_BxL: Array | None) -> list[Array]:
    """The arrays that there are, their lengths filled up to a multiple of KERNEL_LENGTH; causality hides the filling
    from every real token."""
    pad = -q_BxLxHxD.shape[1] % KERNEL_LENGTH
    arrays = [a for a in (q_BxLxHxD, *others_BxL) if a is not None]
    return [jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)) for a in arrays]


def _on_each_device(
    rows: Callable[..., Array], q: Array, k: Array, v: Array, *segments: Array, head_axis: int
) -> Array:
    """Runs a Pallas kernel on every device's own rows and heads. The partitioner cannot look into a kernel,
    so without this it would gather the whole batch everywhere."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return rows(q, k, v, *segments)
    batch = mesh_axes("batch", q.shape[0])
    # Queries and their keys must stay together: heads are divided only when both divide in the same way.
    heads = mesh_axes("heads", q.shape[head_axis])
    if heads != mesh_axes("kv_heads", k.shape[head_axis]):
        heads = None
    spec = [batch, None, None, None]
    spec[head_axis] = heads
    spec = jax.P(*spec)
    specs = (spec, spec, spec, *(jax.P(batch, None) for _ in segments))
    return jax.shard_map(rows, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, *segments)
