import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.training.schedules import ScheduleConfig, compose, composed_rate, learning_rate, problems

OLMO_7B = ScheduleConfig(kind="cosine", peak=3e-4, final_fraction=0.1, warmup_steps=2000, horizon_steps=1_192_093)
OLMO_1B = dataclasses.replace(OLMO_7B, peak=4e-4, warmup_steps=4000, horizon_steps=2_384_186)
OLMO_32B = dataclasses.replace(OLMO_7B, peak=6e-4, horizon_steps=774_860)
ANNEAL = ScheduleConfig(kind="linear", peak=6.1499e-5, final_fraction=0.0)


@pytest.mark.parametrize(
    "config, total_steps, step, expected",
    [
        (OLMO_7B, 928_646, 0, 0.0),
        (OLMO_7B, 928_646, 1000, 1.5e-4),
        (OLMO_7B, 928_646, 2000, 3.0e-4),
        (OLMO_7B, 928_646, 928_000, 6.1499e-5),
        (OLMO_7B, 928_646, 928_646, 6.1351e-5),
        (OLMO_7B, 928_646, 2_000_000, 3.0e-5),  # past the horizon
        (OLMO_1B, 1_907_359, 1_907_359, 7.44873e-5),
        (OLMO_32B, 721_901, 721_901, 6.6232e-5),
        (ANNEAL, 11_921, 0, 6.1499e-5),
        (ANNEAL, 11_921, 5960, 3.07521e-5),
        (ANNEAL, 11_921, 11_920, 5.1589e-9),
        (ANNEAL, 11_921, 11_921, 0.0),
        (ANNEAL, 11_921, 11_931, 0.0),
    ],
)
def test_olmo_2_learning_rates(config, total_steps, step, expected):
    assert problems(config, total_steps) == []
    on_host = learning_rate(config, step, total_steps)
    on_device = jax.jit(lambda s: learning_rate(config, s, total_steps))(jnp.int32(step))
    assert isinstance(on_host, float) and on_device.dtype == jnp.float32
    assert on_host == pytest.approx(expected, rel=1e-5)  # the table prints five or six digits
    assert float(on_device) == pytest.approx(on_host, rel=1e-6)


def test_wsd_by_hand():
    config = ScheduleConfig(kind="wsd", peak=1.0, final_fraction=0.0, warmup_steps=10, decay_fraction=0.2)
    rates = learning_rate(config, np.array([0, 5, 10, 79, 80, 90, 99, 100]), 100)
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 1, 0.5, 0.05, 0], rtol=1e-12)
    assert learning_rate(dataclasses.replace(config, decay_fraction=None, decay_steps=20), 90, 100) == 0.5
    root = dataclasses.replace(config, decay_shape="1-sqrt", final_fraction=0.1)
    assert learning_rate(root, 85, 100) == pytest.approx(0.1 + 0.9 * (1 - 0.25**0.5))
    assert learning_rate(root, 100, 100) == pytest.approx(0.1)


def test_constant_ignores_the_floor():
    assert learning_rate(ScheduleConfig(kind="constant", peak=2e-3), 99, 100) == 2e-3


def test_a_stage_takes_over_where_the_last_one_ended():
    end = learning_rate(OLMO_7B, 928_646, 928_646)
    assert learning_rate(dataclasses.replace(ANNEAL, peak=end), 0, 11_921) == end


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 3_000_000))
    kind = draw(st.sampled_from(["cosine", "linear", "constant", "wsd"]))
    warmup = draw(st.integers(0, total - 1))
    decay = draw(st.integers(1, total - warmup)) if kind == "wsd" else None
    horizon = None
    if kind in ("cosine", "linear"):
        horizon = draw(st.one_of(st.none(), st.integers(warmup + 1, 4_000_000)))
    config = ScheduleConfig(
        kind=kind,
        peak=draw(st.floats(1e-6, 1e-1)),
        final_fraction=draw(st.floats(0, 1)),
        warmup_steps=warmup,
        horizon_steps=horizon,
        decay_steps=decay,
        decay_shape=draw(st.sampled_from(["linear", "1-sqrt"])),
    )
    return config, total


# 55 / 55 comes out as less than 1 where the compiler multiplies by the reciprocal.
LOSSY_DIVISION = ScheduleConfig(kind="wsd", peak=1.0, final_fraction=0.0, decay_steps=55, decay_shape="1-sqrt")


def test_float32_keeps_six_digits_at_the_start_of_the_decay():
    assert float(learning_rate(LOSSY_DIVISION, jnp.int32(0), 55)) == pytest.approx(1.0, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(schedules(), st.data())
def test_rises_then_never_rises_again_and_both_forms_agree(drawn, data):
    config, total = drawn
    assert problems(config, total) == []
    drawn_steps = data.draw(st.lists(st.integers(0, total), min_size=1, max_size=20))
    steps = np.unique([0, config.warmup_steps, total - 1, total, *drawn_steps])
    rates = learning_rate(config, steps, total)
    assert (rates >= 0).all() and (rates <= config.peak * (1 + 1e-12)).all()
    warm = steps <= config.warmup_steps
    assert (np.diff(rates[warm]) >= 0).all()
    assert (np.diff(rates[steps >= config.warmup_steps]) <= 1e-15).all()
    assert learning_rate(config, config.warmup_steps, total) == pytest.approx(config.peak)
    np.testing.assert_allclose(learning_rate(config, jnp.asarray(steps), total), rates, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"kind": "cosin"}, "kind"),
        ({"peak": float("nan")}, "peak"),
        ({"final_fraction": 1.5}, "final_fraction"),
        ({"warmup_steps": 101}, "warmup_steps"),
        ({"warmup_steps": 100}, "warmup_steps"),
        ({"warmup_steps": 10, "horizon_steps": 10}, "horizon_steps"),
        ({"kind": "constant", "horizon_steps": 10}, "horizon_steps"),
        ({"decay_steps": 10}, "decay_steps"),
        ({"kind": "wsd"}, "decay_steps"),
        ({"kind": "wsd", "decay_steps": 5, "decay_fraction": 0.1}, "decay_steps"),
        ({"kind": "wsd", "decay_steps": 60, "warmup_steps": 50}, "decay_steps"),
        ({"kind": "wsd", "decay_fraction": 0.001}, "decay_fraction"),
        ({"decay_shape": "cubic"}, "decay_shape"),
    ],
)
def test_problems_name_the_key(change, field):
    found = problems(dataclasses.replace(ScheduleConfig(), **change), 100, key="stages.0.schedule")
    assert len(found) == 1 and found[0].startswith(f"stages.0.schedule.{field}: ")


# --- runs of several stages ---


def test_stages_without_a_rule_follow_the_runs():
    run = ScheduleConfig("cosine", peak=1e-3, warmup_steps=10)
    ruled = compose(run, [(60, None), (40, None)])
    for step in range(100):
        assert composed_rate(ruled, step) == learning_rate(run, step, 100)


def test_an_anneal_starts_where_the_trunk_had_come_to_and_ends_at_zero():
    """OLMo 2 7B: truncated cosine over 5T tokens, then linear to zero (fixture A; the joint by the formula)."""
    horizon = round(5e12 / 4_194_304)
    trunk = ScheduleConfig("cosine", peak=3e-4, warmup_steps=2000, horizon_steps=horizon)
    anneal = ScheduleConfig("linear", peak=None, final_fraction=0.0)
    ruled = compose(trunk, [(928_646, None), (11_921, anneal)])
    assert composed_rate(ruled, 928_646) == pytest.approx(6.1351e-5, rel=1e-5)
    assert composed_rate(ruled, 928_646 + 11_921) == 0
    named = compose(trunk, [(928_646, None), (11_921, dataclasses.replace(anneal, peak=6.1499e-5))])
    for local, expected in ((0, 6.1499e-5), (5_960, 3.07521e-5), (11_920, 5.1589e-9)):
        assert composed_rate(named, 928_646 + local) == pytest.approx(expected, rel=1e-4)


def test_the_composed_rate_agrees_on_device_and_with_a_formula_of_its_own():
    run = ScheduleConfig("linear", peak=2e-3, warmup_steps=20, final_fraction=0.1)
    rewarm = ScheduleConfig("constant", peak=5e-4, warmup_steps=30)
    last = ScheduleConfig("linear", peak=None, final_fraction=0.0)
    ruled = compose(run, [(200, None), (100, rewarm), (50, last)])

    def formula(step):
        if step < 200:
            return 2e-3 * step / 20 if step < 20 else 2e-3 * (0.1 + 0.9 * (200 - step) / 180)
        if step < 300:
            return 5e-4 * min((step - 200) / 30, 1)
        return 5e-4 * (350 - step) / 50

    on_device = jax.jit(lambda step: composed_rate(ruled, step))
    for step in np.random.default_rng(0).integers(0, 350, 100).tolist() + [199, 200, 299, 300, 349]:
        assert composed_rate(ruled, step) == pytest.approx(formula(step), rel=1e-9, abs=1e-15)
        assert float(on_device(step)) == pytest.approx(formula(step), rel=1e-6, abs=1e-12)


def test_a_stage_between_may_have_its_own_rule():
    run = ScheduleConfig("constant", peak=1e-3)
    ruled = compose(run, [(10, None), (10, ScheduleConfig("constant", peak=5e-4)), (10, None)])
    assert [composed_rate(ruled, step) for step in (5, 15, 25)] == [1e-3, 5e-4, 1e-3]
