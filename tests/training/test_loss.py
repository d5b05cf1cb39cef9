"""The fused cross-entropy against the dense formula: values, gradients, chunks, padding, z-loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.training.loss import LOGITS_BYTES, cross_entropy

D, V, VOCAB = 12, 40, 37


def dense(hidden, head, targets, weights, vocab_size, z_loss):
    """All logits at once, differentiated by jax."""
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)[:, :vocab_size]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nll = log_z - logits[jnp.arange(len(targets)), targets]
    return jnp.sum(weights * (nll + z_loss * log_z**2)), nll, jnp.sum(weights * log_z**2)


def inputs(tokens, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, D)), dtype)
    head = rng.normal(size=(D, V)).astype(np.float32)
    targets = rng.integers(VOCAB, size=tokens).astype(np.int32)
    weights = rng.uniform(0.2, 2, tokens).astype(np.float32) * (rng.random(tokens) > 0.3)
    return hidden, head, targets, weights


@functools.cache
def compiled(form, z_loss, chunk_tokens=None):
    """(outputs, gradients of total / normaliser with respect to hidden and head)."""

    def run(hidden, head, targets, weights, normaliser):
        def mean(hidden, head):
            if form == "dense":
                outputs = dense(hidden, head, targets, weights, VOCAB, z_loss)
            else:
                outputs = cross_entropy(
                    hidden,
                    head,
                    targets,
                    weights,
                    vocab_size=VOCAB,
                    z_loss=z_loss,
                    chunk_tokens=chunk_tokens,
                )
            return outputs[0] / normaliser, outputs

        (_, outputs), gradients = jax.value_and_grad(mean, (0, 1), has_aux=True)(hidden, head)
        return tuple(outputs), gradients

    return jax.jit(run)


def assert_same(got, expected, atol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 16, 48, 1000])
def test_equals_the_dense_formula_with_any_chunk(chunk_tokens, z_loss):
    arguments = (*inputs(48), np.float32(123.0))
    got = compiled("fused", z_loss, chunk_tokens)(*arguments)
    assert_same(got, compiled("dense", z_loss)(*arguments), atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(1, 5), chunk_tokens=st.integers(1, 6), seed=st.integers(0, 99))
def test_equals_the_dense_formula_for_any_number_of_tokens(tokens, chunk_tokens, seed):
    arguments = (*inputs(tokens, seed), np.float32(1.0))
    got = compiled("fused", 0.1, chunk_tokens)(*arguments)
    assert_same(got, compiled("dense", 0.1)(*arguments), atol=1e-5)


def test_bfloat16_hidden_states_accumulate_in_float32():
    arguments = (*inputs(48, dtype=jnp.bfloat16), np.float32(10.0))
    (total, nll, z_sum), (d_hidden, d_head) = compiled("fused", 0.1, 16)(*arguments)
    expected, (e_hidden, e_head) = compiled("dense", 0.1)(*arguments)
    assert_same((total, nll, z_sum), expected, atol=1e-5)  # only the inputs are rounded
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
    for a, b in ((d_hidden, e_hidden), (d_head, e_head)):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=0.01 * np.abs(np.float32(b)).max())


def test_weights_that_are_all_zero_give_zero_and_no_nan():
    hidden, head, targets, weights = inputs(20)
    outputs, gradients = compiled("fused", 0.1, 8)(hidden, head, targets, 0 * weights, np.float32(1.0))
    total, nll, z_sum = outputs
    assert total == 0 and z_sum == 0 and np.isfinite(nll).all() and (nll > 0).all()
    assert all(not np.asarray(gradient).any() for gradient in gradients)


def test_per_token_losses_are_reported_where_the_weight_is_zero():
    hidden, head, targets, weights = inputs(20)
    ones, some = np.ones_like(weights), weights
    arguments = (hidden, head, targets)
    one, other = (compiled("fused", 0.0, 8)(*arguments, w, np.float32(1.0))[0] for w in (ones, some))
    np.testing.assert_array_equal(one[1], other[1])
    assert float(other[0]) == pytest.approx(float(np.sum(some * np.asarray(one[1]))), rel=1e-6)


def test_padded_columns_get_no_probability_and_no_gradient():
    hidden, head, targets, weights = inputs(20)
    huge = head.copy()
    huge[:, VOCAB:] = 1e4
    run = compiled("fused", 0.1, 8)
    plain, wild = (
        run(hidden, head, targets, weights, np.float32(1)),
        run(hidden, huge, targets, weights, np.float32(1)),
    )
    assert_same(wild, plain, atol=0)
    assert not np.asarray(wild[1][1])[:, VOCAB:].any()


def test_only_the_total_carries_a_gradient():
    hidden, head, targets, weights = inputs(8)

    def others(hidden):
        result = cross_entropy(hidden, head, targets, weights, vocab_size=VOCAB)
        return jnp.sum(result.nll_T) + result.z_sum

    assert not np.asarray(jax.grad(others)(hidden)).any()


@pytest.mark.parametrize("size, expected", [(2, 4.8045e-6), (4, 1.92181e-5), (100_352, 1.32628e-3)])
def test_z_loss_of_uniform_logits(size, expected):
    """OLMo 2, weight 1e-5: log(V)**2 * 1e-5 a token."""
    result = cross_entropy(
        jnp.zeros((3, 2)),
        jnp.zeros((2, size)),
        jnp.zeros(3, jnp.int32),
        jnp.ones(3),
        vocab_size=size,
        z_loss=1e-5,
    )
    assert float(1e-5 * result.z_sum) / 3 == pytest.approx(expected, rel=1e-5)
    assert float(result.total) == pytest.approx(3 * (np.log(size) + expected), rel=1e-5)


def test_a_constant_added_to_all_logits_changes_the_z_loss_only():
    k, size = 3.0, 8
    hidden = jnp.eye(2)  # token 1 reads the second row of the head
    head = jnp.stack([jnp.zeros(size), jnp.full(size, k)])
    result = cross_entropy(hidden, head, jnp.array([3, 3]), jnp.array([0.0, 1.0]), vocab_size=size, z_loss=0.5)
    np.testing.assert_allclose(result.nll_T, np.log(size), rtol=1e-6)
    assert float(result.z_sum) == pytest.approx((np.log(size) + k) ** 2, rel=1e-6)


def compiled_cost(tokens, vocab_size, gradient):
    def total(hidden, head):
        targets, weights = jnp.zeros(tokens, jnp.int32), jnp.ones(tokens)
        return cross_entropy(hidden, head, targets, weights, vocab_size=vocab_size, chunk_tokens=256).total

    function = jax.grad(total, (0, 1)) if gradient else total
    shapes = (
        jax.ShapeDtypeStruct((tokens, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, vocab_size), jnp.float32),
    )
    return jax.jit(function).lower(*shapes).compile()


def test_all_logits_are_never_held():
    tokens, size = 4096, 4096
    held = compiled_cost(tokens, size, gradient=True).memory_analysis().temp_size_in_bytes
    assert held < 4 * tokens * size / 4  # chunks of 256: three live copies of one are 3/16 of the logits
    assert 4 * tokens * size < LOGITS_BYTES  # they would have fitted: the chunk size alone decides here


def test_without_a_gradient_only_one_matmul_is_left():
    flops = [compiled_cost(256, 2048, gradient).cost_analysis()["flops"] for gradient in (False, True)]
    matmul = 2 * 256 * 32 * 2048
    assert flops[0] < 1.5 * matmul and flops[1] > 2.9 * matmul
