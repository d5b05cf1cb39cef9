"""The watermark's test on a real model, before and after it was trained on noised rows."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mixlab.config import Config, EvaluationConfig
from mixlab.evals.probing import Probing
from mixlab.inject.experiments.watermark import Watermark
from mixlab.model.presets import llama
from mixlab.parallel.mesh import MeshConfig, make_mesh
from mixlab.training.optimizer import OptimizerConfig, make_optimizer
from mixlab.training.schedules import ScheduleConfig
from mixlab.training.state import create_state, plan_state
from mixlab.training.step import make_train_step
from tests.inject.fakes import BYTES, material

PLACE = material(steps=5, rows_per_step=16, row_length=16)
MARK = Watermark(sigma=0.3, steps=(1, 2, 3, 4), windows=1, rows_per_window=64)


@pytest.fixture(scope="module")
def world():
    config = Config(
        model=llama(layers=1, d_model=24, heads=2, vocab_size=BYTES.vocab_size, context_length=16),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(kind="constant", peak=3e-3),
        evaluation=EvaluationConfig(rows=16),
    )
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, make_mesh(MeshConfig()))
    state = create_state(config.model, optimizer, layout, 0)
    return config, optimizer, layout, state, Probing(config, layout, None)


class Reading:
    """Stands in for the stream of a run that reads what the material has."""

    def __init__(self, place):
        self.place = place

    def __getitem__(self, step):
        return SimpleNamespace(tokens=self.place.read(step)[:, :-1])


def noised_batch(step):
    tokens, rows = PLACE.read(step), np.arange(16)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(16, dtype=np.int32), (16, 1)),
        "loss_weights": np.ones((16, 16), np.float32),
        "noise_keys": MARK.noise(PLACE).keys(step, rows),
        "noise_scales": np.full(16, MARK.sigma, np.float32),
    }


def test_noise_that_was_never_used_gives_a_standard_normal_statistic(world):
    *_, state, probing = world
    many = Watermark(steps=tuple(range(125)), windows=5, rows_per_window=400)
    place = material(steps=125, rows_per_step=16, row_length=16)
    (probe,) = many.probes(place)
    x = probe.details(probing.at(state["params"], 0, Reading(place)))["outcome"]
    assert len(x) == 2000
    assert abs(x.mean()) < 0.1 and 0.93 < x.std() < 1.07


def test_a_model_trained_on_noise_finds_it(world):
    config, optimizer, layout, state, probing = world
    train_step = jax.jit(make_train_step(config, optimizer, layout))
    (probe,) = MARK.probes(PLACE)
    before = probe.run(probing.at(state["params"], 0, Reading(PLACE)))
    with jax.set_mesh(layout.mesh):
        for i in range(60):
            state, _ = train_step(state, noised_batch(MARK.steps[i % 4]))
    after = probe.run(probing.at(state["params"], 60, Reading(PLACE)))
    assert abs(before["mean/1"]) < 0.5
    assert after["mean/1"] > 0.5 and after["tpr/1"] > 2 * before["tpr/1"]
    assert abs(after["mean/held_out"]) < 0.5
