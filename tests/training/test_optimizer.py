import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from mixlab.training.muon import scale_by_muon
from mixlab.training.optimizer import OptimizerConfig, apply_gradients, make_optimizer, problems, roles

OLMO_2 = OptimizerConfig(decay_norms_and_biases=True)


def parameters():
    generator = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    return {
        "embed": {"embedding": normal(11, 4)},
        "blocks": {
            "attention": {"query": {"kernel": normal(3, 4, 6)}, "query_norm": {"scale": normal(3, 6)}},
            "mlp": {"up": {"kernel": normal(3, 4, 8), "bias": normal(3, 8)}},
            "experts": {"down": {"kernel": normal(3, 2, 8, 4)}},
            "norm": {"scale": normal(3, 4)},
        },
        "head": {"kernel": normal(4, 11)},
    }


def one_update(config, params, gradients, learning_rate=0.01):
    optimizer = make_optimizer(config)
    return jax.jit(lambda p, g: apply_gradients(optimizer, g, optimizer.init(p), p, learning_rate))(params, gradients)


def test_roles():
    found = {
        "/".join(k.key for k in path): role for path, role in jax.tree_util.tree_leaves_with_path(roles(parameters()))
    }
    assert found == {
        "embed/embedding": "embedding",
        "blocks/attention/query/kernel": "matrix",
        "blocks/attention/query_norm/scale": "norm_or_bias",
        "blocks/mlp/up/kernel": "matrix",
        "blocks/mlp/up/bias": "norm_or_bias",
        "blocks/experts/down/kernel": "matrix",
        "blocks/norm/scale": "norm_or_bias",
        "head/kernel": "head",
    }
    with pytest.raises(ValueError, match="mystery"):
        roles({"mystery": jnp.ones(3)})


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("embeddings", [True, False])
def test_decay_alone(name, norms, embeddings):
    """OLMo 2 section 10 E: with a zero gradient and zero moments only the decay acts, by role."""
    config = OptimizerConfig(name=name, decay_norms_and_biases=norms, decay_embeddings=embeddings)
    before = parameters()
    after, _, norm = one_update(config, before, jax.tree.map(jnp.zeros_like, before))
    assert norm == 0
    decays = {"embedding": embeddings, "norm_or_bias": norms, "matrix": True, "head": True}

    def check(role, p, q):
        expected = p * (1 - 0.1 * 0.01) if decays[role] else p
        np.testing.assert_allclose(q, expected, rtol=1e-6)
        if not decays[role]:
            np.testing.assert_array_equal(p, q)

    jax.tree.map(check, roles(before), before, after)


def test_adamw_by_hand():
    config = dataclasses.replace(OLMO_2, clip_norm=None)
    params, rate = parameters(), 0.01
    g1, g2 = (jax.tree.map(lambda p, k=k: jnp.sin(p * k), params) for k in (1.0, 2.0))
    optimizer = make_optimizer(config)
    state, now = optimizer.init(params), params
    for g in (g1, g2):
        now, state, norm = apply_gradients(optimizer, g, state, now, rate)
    assert norm == pytest.approx(float(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(g2)))), rel=1e-6)

    p = np.asarray(params["head"]["kernel"], np.float64)
    a, b = (np.asarray(g["head"]["kernel"], np.float64) for g in (g1, g2))
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate((a, b), 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p * (1 - 0.1 * rate) - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    np.testing.assert_allclose(now["head"]["kernel"], p, rtol=1e-5, atol=1e-6)


def test_clipping_scales_the_gradient_and_reports_the_norm_before():
    params = parameters()
    gradients = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    config = dataclasses.replace(OLMO_2, eps=1.0, weight_decay=0.0)  # a large eps, so that the scale is seen
    norm = float(optax.global_norm(gradients))
    scaled = jax.tree.map(lambda g: g / norm, gradients)
    clipped, _, reported = one_update(config, params, gradients)
    expected, _, _ = one_update(dataclasses.replace(config, clip_norm=None), params, scaled)
    assert reported == pytest.approx(norm, rel=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), clipped, expected)


def test_muon_orthogonalises_each_matrix_of_the_stack_and_no_more():
    params = parameters()
    gradients = jax.tree.map(jnp.cos, params)
    config = OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=None)
    after, _, _ = one_update(config, params, gradients, 1.0)
    adam, _, _ = one_update(dataclasses.replace(config, name="adamw"), params, gradients, 1.0)

    def check(role, p, q, a):
        step = np.asarray(p - q)
        if role != "matrix":
            return np.testing.assert_allclose(q, a, rtol=1e-5)
        singular = np.linalg.svd(step, compute_uv=False) / (0.2 * max(p.shape[-2:]) ** 0.5)
        assert (singular > 0.5).all() and (singular < 1.3).all(), singular  # as close to 1 as five iterations bring it
        rms = np.sqrt((step**2).mean((-2, -1)))
        assert (rms > 0.2 * 0.5).all() and (rms < 0.2 * 1.3).all()

    jax.tree.map(check, roles(params), params, after, adam)

    # A layer's update depends on that layer's gradient only.
    gradients["blocks"]["mlp"]["up"]["kernel"] = gradients["blocks"]["mlp"]["up"]["kernel"].at[0].set(7.0)
    other, _, _ = one_update(config, params, gradients, 1.0)
    a, b = (tree["blocks"]["mlp"]["up"]["kernel"] for tree in (after, other))
    np.testing.assert_allclose(a[1:], b[1:], rtol=1e-6)
    assert not np.allclose(a[0], b[0])


def test_muon_is_that_of_optax():
    """Which has the iteration within; ours stands outside it. States are the same, bit for bit."""

    def last_two_axes(tree):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), tree)

    ours = scale_by_muon(momentum=0.9, iterations=4, rms=0.2, eps=1e-8)
    theirs = optax.contrib.scale_by_muon(beta=0.9, ns_steps=4, weight_dimension_numbers=last_two_axes)
    matrices = parameters()["blocks"]
    matrices = {"wide": matrices["mlp"]["up"]["kernel"], "tall": matrices["experts"]["down"]["kernel"]}
    mine, other = ours.init(matrices), theirs.init(matrices)
    for step in range(3):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(p + step), matrices)
        update, mine = ours.update(gradients, mine)
        expected, other = theirs.update(gradients, other)
        jax.tree.map(np.testing.assert_array_equal, mine[0], other)
        for name, matrix in matrices.items():
            scaled = expected[name] * 0.2 * max(matrix.shape[-2:]) ** 0.5
            np.testing.assert_allclose(update[name], scaled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_layout_of_the_state_does_not_depend_on_clipping(name):
    def paths(config):
        state = make_optimizer(config).init(parameters())
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]

    config = OptimizerConfig(name=name)
    assert paths(config) == paths(dataclasses.replace(config, clip_norm=None, weight_decay=0.0))


def test_problems_name_the_key():
    assert problems(OptimizerConfig()) == []
    found = problems(OptimizerConfig(name="sgd", b2=1.0, clip_norm=0.0), key="optimizer")
    assert [text.split(":")[0] for text in found] == ["optimizer.name", "optimizer.b2", "optimizer.clip_norm"]
