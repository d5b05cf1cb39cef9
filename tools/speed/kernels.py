"""Attention and loss by themselves, forward and backward, beside their plain forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.model.attention import BACKEND, KERNELS, attend, dense
from mixlab.training.loss import cross_entropy
from speed import clock

DENSE_BYTES = 4 * 2**30  # above which whole score matrices are not tried


def attention(shapes: list[tuple[int, int, int, int, int | None]], dtype: str, repeats: int) -> dict:
    """shapes: (rows, length, heads, head width, tokens a document or None: one document a row, unmasked)."""
    found, which = {}, clock.clock()
    for rows, length, heads, width, document in shapes:
        rng = np.random.default_rng(0)
        q, k, v, d_out = (jnp.asarray(rng.normal(size=(rows, length, heads, width)), dtype) for _ in range(4))
        segments = None if document is None else packed(rng, rows, length, document)
        paths = {"ours": functools.partial(attend, kernel="auto")}
        if 2 * rows * heads * length**2 * 4 < DENSE_BYTES:
            paths["whole score matrix"] = dense
        named = f"{rows} x {length}, {heads} heads of {width}, {f'documents of {document}' if document else 'unmasked'}"
        for name, path in paths.items():
            call = functools.partial(_forward_and_backward, path, q, k, v, segments, d_out)
            seconds = clock.timed(call, repeats).of(which)
            flops = 6 * rows * heads * width * length**2  # the train step's formula, for rows of one document
            found[f"{named}: {name}, seconds of {which} time"] = seconds
            found[f"{named}: {name}, FLOP/s if rows were one document"] = flops / seconds
    return found


def packed(rng: np.random.Generator, rows: int, length: int, document_tokens: int) -> jax.Array:
    """Segment ids [rows, length] from 1 on (0 would be padding) of documents of about so many tokens."""
    begins = rng.random((rows, length)) < 1 / document_tokens
    return jnp.asarray(1 + np.cumsum(begins, axis=1), jnp.int32)


def here() -> list[str]:
    """The kernels that this backend runs, but for the whole score matrix."""
    backend = jax.default_backend()
    return [name for name in KERNELS if name != "dense" and BACKEND.get(name, backend) == backend]


def agreement(kernel: str) -> dict:
    """The largest difference of this kernel from the whole score matrix, forward and backward, in bfloat16, over the largest
    value; grouped queries, a length that is no multiple of any block, packed documents and single ones."""
    found: dict[str, float] = {}
    rng = np.random.default_rng(0)
    shapes = (2, 1000, 8, 64), (2, 1000, 2, 64), (2, 1000, 2, 64), (2, 1000, 8, 64)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    documents = {"packed": packed(rng, 2, 1000, 100), "single documents": None}
    for rows, segments in documents.items():
        if kernel == "cudnn" and segments is not None:
            continue
        both = (_forward_and_backward(path, q, k, v, segments, d_out) for path in (KERNELS[kernel], dense))
        pairs = zip(*map(jax.tree.leaves, both), strict=True)
        worst = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
        found[f"{kernel}, {rows}: largest difference from whole score matrices"] = worst
    return found


@functools.partial(jax.jit, static_argnums=0)
def _forward_and_backward(attend, q, k, v, segments, d_out):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments), q, k, v)
    return out, pull(d_out)


def loss(tokens: int, width: int, vocabulary: int, dtype: str, repeats: int) -> dict:
    """The fused loss beside one that holds all logits."""
    rng, which = np.random.default_rng(0), clock.clock()
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocabulary)) * 0.02, jnp.float32)
    targets, weights = jnp.asarray(rng.integers(0, vocabulary, tokens)), jnp.ones(tokens)

    def fused(hidden, head):
        return cross_entropy(hidden, head, targets, weights, vocab_size=vocabulary).total

    def plain(hidden, head):
        logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1))

    found = {"setting": f"{tokens} tokens, width {width}, vocabulary {vocabulary}, {dtype}, forward and backward"}
    for name, function in {"ours": fused, "all logits": plain}.items():
        call = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(hidden, head).compile()
        found[f"{name}: seconds of {which} time"] = clock.timed(lambda call=call: call(hidden, head), repeats).of(which)
        found[f"{name}: temporary memory, MiB"] = call.memory_analysis().temp_size_in_bytes / 2**20
    return found
