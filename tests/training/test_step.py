import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.config import Config, TrainingConfig
from mixlab.model.noise import scaled_noise
from mixlab.model.presets import llama
from mixlab.parallel.mesh import MeshConfig, global_batch, make_mesh
from mixlab.schedule.stages import StageConfig
from mixlab.training.optimizer import make_optimizer
from mixlab.training.schedules import ScheduleConfig
from mixlab.training.state import create_state, plan_state
from mixlab.training.step import compile_train_step, make_input_gradients, make_token_losses, make_train_step

ROWS, LENGTH = 4, 16


def config(compute_dtype="float32", **training):
    model = llama(layers=2, d_model=32, heads=2, vocab_size=61, context_length=LENGTH)
    return Config(
        model=dataclasses.replace(model, compute_dtype=compute_dtype),
        stages=(StageConfig("main", 20, sequence_length=LENGTH, tokens_per_step=ROWS * LENGTH),),
        schedule=ScheduleConfig("constant", peak=1e-2),
        training=TrainingConfig(**training),
    )


@functools.cache
def setting(accumulation_steps=1, z_loss=0.0, compute_dtype="float32"):
    settings = config(compute_dtype, accumulation_steps=accumulation_steps, z_loss=z_loss)
    mesh = make_mesh(MeshConfig())
    optimizer = make_optimizer(settings.optimizer)
    layout = plan_state(settings.model, optimizer, mesh)
    step = compile_train_step(make_train_step(settings, optimizer, layout), layout, ROWS, LENGTH)
    return settings, optimizer, layout, step


def fresh(seed=0, **kwargs):
    settings, optimizer, layout, _ = setting(**kwargs)
    return create_state(settings.model, optimizer, layout, seed)


def batch(seed=0, weights=None, **kwargs):
    layout = setting(**kwargs)[2]
    tokens = np.random.default_rng(seed).integers(0, 61, (ROWS, LENGTH + 1)).astype(np.int32)
    local = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((ROWS, LENGTH), np.float32) if weights is None else weights.astype(np.float32),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
    }
    return global_batch(layout.mesh, local, ROWS)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def test_learns_and_counts():
    step, state = setting()[3], fresh()
    losses = []
    for i in range(20):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
        assert int(state["step"]) == i + 1 and float(metrics["loss_tokens"]) == ROWS * LENGTH
    assert losses[0] == pytest.approx(np.log(61), rel=0.02) and losses[-1] < 0.6 * losses[0]
    assert float(metrics["learning_rate"]) == np.float32(1e-2) and float(metrics["skipped"]) == 0


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts):
    weights = np.random.default_rng(1).random((ROWS, LENGTH)) > 0.6
    weights[2] = False  # a part whose rows bear no loss
    one, one_metrics = setting(z_loss=1e-3)[3](fresh(z_loss=1e-3), batch(weights=weights))
    many, many_metrics = setting(accumulation_steps=parts, z_loss=1e-3)[3](
        fresh(accumulation_steps=parts, z_loss=1e-3), batch(weights=weights)
    )
    for name in one_metrics:
        assert float(one_metrics[name]) == pytest.approx(float(many_metrics[name]), rel=1e-5), name
    # The moments, linear in the gradient: Adam's first update is nearly its sign, which magnifies rounding.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8),
        host(one["opt_state"]),
        host(many["opt_state"]),
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_without_segment_ids_the_step_is_that_of_one_document_a_row(parts):
    settings, optimizer, layout, step = setting(accumulation_steps=parts)
    plain = compile_train_step(make_train_step(settings, optimizer, layout), layout, ROWS, LENGTH, masked=False)
    local = batch()
    masked_state, masked = step(fresh(accumulation_steps=parts), local)
    local.pop("segment_ids")
    state, metrics = plain(fresh(accumulation_steps=parts), local)
    for name in masked:
        assert float(metrics[name]) == pytest.approx(float(masked[name]), rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8),
        host(state["opt_state"]),
        host(masked_state["opt_state"]),
    )


def test_targets_without_weight_do_not_matter():
    """Gradients reach metadata as what is read, never as what is predicted."""
    weights = np.random.default_rng(1).random((ROWS, LENGTH)) > 0.4
    one = batch(weights=weights)
    other = dict(one)
    changed = np.where(weights, np.asarray(one["targets"]), (np.asarray(one["targets"]) + 7) % 61).astype(np.int32)
    other["targets"] = jax.device_put(changed, one["targets"].sharding)
    results = [setting()[3](fresh(), arrays) for arrays in (one, other)]
    states, metrics = zip(*host(results), strict=True)
    assert metrics[0] == metrics[1] and metrics[0]["loss_tokens"] == weights.sum()
    assert jax.tree.all(jax.tree.map(np.array_equal, *states))


def test_rows_of_one_weight_are_the_mean_of_their_means():
    weights = np.zeros((ROWS, LENGTH))
    weights[0, :5], weights[1, :3], weights[2, :] = 1 / 5, 1 / 3, 1 / LENGTH
    metrics = setting()[3](fresh(), batch(weights=weights))[1]
    alone = []
    for row in range(3):
        single = np.zeros_like(weights)
        single[row] = weights[row] > 0
        alone.append(float(setting()[3](fresh(), batch(weights=single))[1]["loss"]))
    assert float(metrics["loss"]) == pytest.approx(np.mean(alone), rel=1e-5)
    assert float(metrics["loss_tokens"]) == 8 + LENGTH


def test_weights_count_as_shares_alone():
    """Whatever their sum, also where 1 / sum rounded to bfloat16 would be 0.4 % too large."""
    low, told = dict(compute_dtype="bfloat16"), []
    for total in (64, 255):
        weights = np.full((ROWS, LENGTH), total / (ROWS * LENGTH))
        told.append(host(setting(**low)[3](fresh(**low), batch(weights=weights))))
    for a, b in zip(*map(jax.tree.leaves, told), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_a_batch_without_loss_is_fine():
    state, metrics = setting()[3](fresh(), batch(weights=np.zeros((ROWS, LENGTH))))
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0 and float(metrics["skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(host(state)))


def test_a_non_finite_update_is_left_out_bit_for_bit():
    step = setting()[3]
    state, _ = step(fresh(), batch())
    poisoned = host(state)
    good = host(state)
    weights = np.ones((ROWS, LENGTH))
    weights[0, 0] = np.inf
    after, metrics = step(jax.tree.map(jnp.asarray, poisoned), batch(weights=weights))
    assert float(metrics["skipped"]) == 1 and int(after["step"]) == int(good["step"]) + 1
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, host(after[part]), good[part])
    after, metrics = step(after, batch())
    assert float(metrics["skipped"]) == 0 and np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_state_is_donated(parts):
    """Every array of it, and its memory is the new state's."""
    step, state = setting(accumulation_steps=parts)[3], fresh(accumulation_steps=parts)
    leaves = jax.tree.leaves(state)
    step(state, batch())
    assert all(leaf.is_deleted() for leaf in leaves)
    assert step.memory_analysis().alias_size_in_bytes == sum(leaf.nbytes for leaf in leaves)


def test_another_shape_is_refused_not_recompiled():
    _, _, _layout, step = setting()
    wrong = {name: array[:, : LENGTH // 2] for name, array in batch().items()}
    with pytest.raises(TypeError):
        step(fresh(), wrong)


def test_noise_is_added_to_the_rows_that_have_a_scale():
    settings, optimizer, layout, plain = setting()
    noised = compile_train_step(make_train_step(settings, optimizer, layout), layout, ROWS, LENGTH, noised=True)
    keys = np.random.default_rng(5).integers(0, 2**32, (ROWS, 2), dtype=np.uint32)

    def after(step, scales=None):
        one = batch()
        if scales is not None:
            one |= global_batch(layout.mesh, {"noise_keys": keys, "noise_scales": np.float32(scales)}, ROWS)
        return host(step(fresh(), one))

    state, metrics = after(plain)
    for a, b in zip(jax.tree.leaves(after(noised, [0, 0, 0, 0])), jax.tree.leaves((state, metrics)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # another program may round otherwise
    told = after(noised, [0, 0.5, 0, 0])[1]
    assert told["loss"] != metrics["loss"] and after(noised, [0, 0.5, 0, 0])[1]["loss"] == told["loss"]

    losses, local = make_token_losses(settings, layout), batch()
    local |= {"noise_keys": keys, "noise_scales": np.float32([0, 0.5, 0, 0])}
    nll = host(jax.jit(losses)(fresh()["params"], local))
    clean = host(jax.jit(losses)(fresh()["params"], batch()))
    changed = (nll != clean).any(axis=1)
    np.testing.assert_array_equal(changed, [False, True, False, False])


def test_training_on_noise_makes_its_direction_lower_the_loss():
    """The sign of the watermark's statistic (Train Once, Answer All, equation 3): along noise that was trained on the loss
    falls, so its gradient at the clean embeddings comes to point against it."""
    settings, optimizer, layout, _ = setting()
    noised = compile_train_step(make_train_step(settings, optimizer, layout), layout, ROWS, LENGTH, noised=True)
    gradients = jax.jit(make_input_gradients(settings, layout))
    keys = {
        kind: np.random.default_rng(i).integers(0, 2**32, (ROWS, 2), dtype=np.uint32) for i, kind in enumerate("ab")
    }
    scales = np.full(ROWS, 0.2, np.float32)
    state = fresh()

    def statistic(kind):
        g = np.asarray(gradients(state["params"], batch())).reshape(ROWS, -1)
        w = np.asarray(scaled_noise(keys[kind], scales, LENGTH, 32)).reshape(ROWS, -1) / 0.2
        return (g * w).sum(axis=1) / np.linalg.norm(g, axis=1)

    for _ in range(40):
        noise = {"noise_keys": keys["a"], "noise_scales": scales}
        state, _ = noised(state, batch() | global_batch(layout.mesh, noise, ROWS))
    assert statistic("a").mean() < -3  # fresh noise: standard normal, so 0 with standard error 1/2
    assert abs(statistic("b").mean()) < 2.5
