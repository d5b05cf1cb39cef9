"""Every attention path against the dense one, which the NumPy reference checks through the model."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.model import attention
from mixlab.model.blockwise import _first_visible

PATHS = {
    "dense": attention.dense,
    "blockwise": functools.partial(attention.blockwise, block=32),
    "splash": functools.partial(attention.splash, interpret=True),
    "triton": functools.partial(attention.triton, interpret=True),
}


@functools.cache
def forward_and_backward(path):
    """Compiled once a path and shape: (q, k, v, segments, d_out) -> out, d_q, d_k, d_v."""

    def run(q, k, v, segments, d_out):
        out, pull = jax.vjp(lambda q, k, v: PATHS[path](q, k, v, segments), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


def inputs(length, heads, kv_heads, documents, head_dim=16, seed=0):
    """q, k, v, segments, d_out; `documents` are lengths a row, the rest of the row is padding."""
    rng = np.random.default_rng(seed)
    B = len(documents)
    shapes = ((B, length, heads, head_dim), (B, length, kv_heads, head_dim), (B, length, kv_heads, head_dim))
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    segments = np.zeros((B, length), np.int32)
    for row, lengths in enumerate(documents):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        segments[row, : len(ids)] = ids
    d_out = rng.normal(size=shapes[0]).astype(np.float32) * (segments > 0)[..., None, None]
    return q, k, v, segments, d_out


# Grouped queries, a length that is no multiple of any block, documents that end inside, at and across blocks
# of 32, a document of one token, padding at the end, a row that is all padding, a row of one document.
ODD = inputs(83, heads=4, kv_heads=2, documents=[[30, 1, 33, 7], [83], []])


@pytest.mark.parametrize("path", [path for path in PATHS if path != "dense"])
@pytest.mark.parametrize("case", ["odd", "short", "one key head, whole blocks"])
def test_path_equals_dense_forward_and_backward(path, case):
    arguments = {
        "odd": ODD,
        "short": inputs(5, heads=2, kv_heads=2, documents=[[2, 3]]),
        "one key head, whole blocks": inputs(128, heads=3, kv_heads=1, documents=[[64, 64], [100]]),
    }[case]
    got, expected = forward_and_backward(path)(*arguments), forward_and_backward("dense")(*arguments)
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), got, expected, strict=True):
        assert a.dtype == np.float32 and a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", [5, 83, 128])
def test_without_segment_ids_a_row_is_one_segment(path, length):
    q, k, v, segments, d_out = inputs(length, heads=4, kv_heads=2, documents=[[length], [length]])
    got = forward_and_backward(path)(q, k, v, None, d_out)
    masked = forward_and_backward(path)(q, k, v, segments, d_out)
    expected = forward_and_backward("dense")(q, k, v, None, d_out)
    for name, a, b, c in zip(("out", "d_q", "d_k", "d_v"), got, masked, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, err_msg=name)
        np.testing.assert_allclose(a, c, atol=2e-5, err_msg=name)


def equations(jaxpr, but: tuple[str, ...] = ()):
    """Of a program and all programs in it, except those in operations of these names."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and equation.primitive.name not in but:
                yield from equations(inner, but)


@pytest.mark.parametrize("masked", [False, True])
def test_without_segment_ids_blocks_below_the_diagonal_have_no_mask(masked):
    q, k, v, segments, d_out = inputs(128, heads=2, kv_heads=2, documents=[[128]])
    run = forward_and_backward("blockwise").__wrapped__
    program = jax.make_jaxpr(run)(q, k, v, segments if masked else None, d_out).jaxpr

    def has_mask(found):
        return any(v.aval.dtype == bool and v.aval.shape[-2:] == (32, 32) for e in found for v in e.outvars)

    below = [e.params["body_jaxpr"].jaxpr for e in equations(program) if e.primitive.name == "while"]
    assert [has_mask(equations(loop)) for loop in below] == [masked, masked]  # forward and backward
    assert has_mask(equations(program, but=("while",)))


def test_blocks_that_no_query_can_see_are_not_read():
    """What is not a number would show in every sum that it is part of, masked or not."""
    q, k, v, segments, d_out = inputs(128, heads=2, kv_heads=1, documents=[[64, 40], [64, 64]])
    run = forward_and_backward("blockwise")
    whole, second = run(q, k, v, segments, d_out), segments != 1
    k, v = (np.where(second[..., None, None], a, np.nan) for a in (k, v))
    for a, b in zip(run(q, k, v, segments, d_out), whole, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[second], np.asarray(b)[second])


@pytest.mark.parametrize("seed", range(5))
def test_every_block_that_a_query_can_see_is_visited(seed):
    rng = np.random.default_rng(seed)
    n, B, C = 6, 2, 4
    ids = np.sort(rng.integers(1, 7, (B, n * C)), axis=1) if seed else rng.integers(1, 7, (B, n * C))
    first = np.asarray(_first_visible(jnp.asarray(ids.reshape(B, n, C).swapaxes(0, 1)), n))
    for i in range(n):
        mine = ids[:, i * C : (i + 1) * C]
        seen = [j for j in range(i + 1) if (mine[:, :, None] == ids[:, None, j * C : (j + 1) * C]).any()]
        assert first[i] <= seen[0]
        if seed:  # of documents one after the other, none is visited in vain
            assert first[i] == seen[0]


@pytest.mark.parametrize("path", PATHS)
def test_documents_are_isolated_bit_for_bit(path):
    q, k, v, segments, d_out = ODD
    run = forward_and_backward(path)
    before = run(*ODD)
    for document in (1, 2, 3, 0):  # 0: padding, whose content must not matter either
        inside = segments == document
        changed = [np.where(inside[..., None, None], a[..., ::-1] + 1, a) for a in (q, k, v)]
        after = run(*changed, segments, d_out)
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[~inside], np.asarray(b)[~inside])
        assert not np.array_equal(np.asarray(after[0])[inside], np.asarray(before[0])[inside])


@pytest.mark.parametrize("path", PATHS)
def test_a_document_sends_no_gradient_into_another_and_padding_none_at_all(path):
    q, k, v, segments, d_out = ODD
    only_second = d_out * (segments == 2)[..., None, None]
    out, *gradients = forward_and_backward(path)(q, k, v, segments, only_second)
    assert np.isfinite(out).all()
    for gradient in gradients:
        assert not np.asarray(gradient)[segments != 2].any()
    assert np.asarray(gradients[2])[segments == 2].any()


@pytest.mark.parametrize("path", PATHS)
def test_no_token_sees_the_future(path):
    q, k, v, segments, d_out = ODD
    cut = 50  # in the middle of the third document of row 0
    later = (np.arange(83) >= cut)[None, :, None, None]
    changed = [np.where(later, a[..., ::-1] + 1, a) for a in (q, k, v)]
    run = forward_and_backward(path)
    before, after = run(*ODD)[0], run(*changed, segments, d_out)[0]
    np.testing.assert_array_equal(np.asarray(after)[:, :cut], np.asarray(before)[:, :cut])


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_accumulates_in_float32(path):
    q, k, v, segments, d_out = ODD
    low = [jnp.asarray(a, jnp.bfloat16) for a in (q, k, v)]
    exact = [np.asarray(a, np.float32) for a in low]
    got = forward_and_backward(path)(*low, segments, jnp.asarray(d_out, jnp.bfloat16))
    expected = forward_and_backward("dense")(*exact, segments, d_out)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=0.02 * np.abs(b).max())


def test_blockwise_memory_grows_with_the_length_and_not_with_its_square():
    def temporary_bytes(path, length):
        arguments = inputs(length, heads=2, kv_heads=2, documents=[[length]])
        compiled = jax.jit(forward_and_backward(path).__wrapped__).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("blockwise", 2048) < 2.5 * temporary_bytes("blockwise", 1024)
    assert temporary_bytes("blockwise", 2048) < temporary_bytes("dense", 2048) / 10


@pytest.mark.parametrize("head_dim, masked", [(48, True), (64, True), (64, False), (128, True)])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerator_kernels_lower_for_their_platform(platform, head_dim, masked):
    kernel = {"tpu": attention.splash, "cuda": attention.triton}[platform]

    def loss(q, k, v, segments=None):
        return jnp.sum(kernel(q, k, v, segments).astype(jnp.float32))

    q, kv = (jax.ShapeDtypeStruct((2, 300, heads, head_dim), jnp.bfloat16) for heads in (4, 2))
    segments = [jax.ShapeDtypeStruct((2, 300), jnp.int32)] if masked else []
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    # From jax 0.12 on the Triton compiler asks which GPU it compiles for.
    device = jax.sharding.AbstractDevice(
        **{
            "tpu": dict(device_kind="TPU v5e", num_cores=1, platform="tpu"),
            "cuda": dict(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
        }[platform]
    )
    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=[platform], disabled_checks=checks)(
            q, kv, kv, *segments
        )
    assert {"tpu": "tpu_custom_call", "cuda": "xla.gpu.triton"}[platform] in exported.mlir_module()


@pytest.mark.parametrize(
    "backend, length, head_dim, dtype, kernel",
    [
        ("cpu", 16, 64, jnp.float32, "blockwise"),
        ("cpu", 4096, 64, jnp.bfloat16, "blockwise"),
        ("tpu", 256, 64, jnp.bfloat16, "splash"),
        ("tpu", 8192, 128, jnp.float32, "splash"),
        ("gpu", 4096, 128, jnp.bfloat16, "triton"),
        ("gpu", 4096, 256, jnp.bfloat16, "blockwise"),
        ("gpu", 1024, 64, jnp.float32, "dense"),
        ("gpu", 4096, 64, jnp.float32, "blockwise"),
    ],
)
def test_the_kernel_follows_backend_and_shape(backend, length, head_dim, dtype, kernel):
    assert attention.choose_kernel(backend, length, head_dim, dtype, True) == kernel


@pytest.mark.parametrize(
    "capability, head_dim, dtype, kernel",
    [
        ("9.0", 64, jnp.bfloat16, "cudnn"),
        ("8.0", 128, jnp.float16, "cudnn"),
        ("7.0", 64, jnp.bfloat16, "triton"),
        ("9.0", 84, jnp.bfloat16, "triton"),
        ("9.0", 64, jnp.float32, "blockwise"),
    ],
)
def test_rows_of_one_document_take_cudnn_on_gpus_that_have_it(capability, head_dim, dtype, kernel, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    assert attention.choose_kernel("gpu", 4096, head_dim, dtype, False) == kernel


def test_cudnn_is_asked_for_what_the_others_compute(monkeypatch):
    """The kernel itself runs on GPUs only; jax's own XLA form stands in for it."""
    asked, by_xla = [], jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **more):
        asked.append(implementation)
        return by_xla(*arrays, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v, segments, d_out = inputs(83, heads=4, kv_heads=2, documents=[[83], [83]])
    out, pull = jax.vjp(attention.cudnn, q, k, v)
    expected = forward_and_backward("dense")(q, k, v, None, d_out)
    for a, b in zip((out, *pull(d_out)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert asked == ["cudnn"]
    with pytest.raises(UserError, match="rows of one document"):
        attention.cudnn(q, k, v, segments)


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="splash attention runs here")
def test_a_kernel_of_another_backend_is_refused():
    with pytest.raises(UserError, match=r'model\.attention = "splash" runs on tpu only'):
        attention.attend(*ODD[:4], "splash")
