"""Watermarks: which batches have noise, and the test of a model that has or has not learnt it."""

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.watermark import Watermark, spread
from tests.inject.fakes import Uniform, material

MATERIAL = material("mark", steps=40, rows_per_step=6, row_length=8)


READ = material("mark", np.random.default_rng(5).integers(65, 91, (240, 9)), 3, 40, 8, 6)  # with insertions


class Learnt(Uniform):
    """Its gradients are noise, with a share of the watermark in them where the rows were read before `step`: other rows than
    those of the material, for other experiments have inserted into them."""

    def __init__(self, step, shift, noises):
        super().__init__(step)
        self.shift, self.rng = shift, np.random.default_rng(0)
        self.known = {}
        for s in noises.steps:
            if s < step:
                rows, _ = MATERIAL.shape(s)
                for row, key in zip(self.read(s), noises.keys(s, np.arange(rows)), strict=True):
                    self.known[row.tobytes()] = key

    def read(self, step):
        return READ.read(step)[:, :-1]

    def noise(self, keys, length):
        drawn = [np.random.default_rng(key.tolist()).normal(size=(length, self.width)) for key in keys]
        return np.array(drawn, np.float32)

    def input_gradients(self, rows):
        g = self.rng.normal(size=(*rows.shape, self.width)).astype(np.float32)
        for i, row in enumerate(rows):
            if row.tobytes() in self.known:
                w = self.noise([self.known[row.tobytes()]], rows.shape[1])[0]
                g[i] -= self.shift * w / np.linalg.norm(w)
        return g * 1e-4


def test_noised_steps():
    assert Watermark(every_steps=10).noise(MATERIAL).steps == (10, 20, 30)
    assert Watermark(steps=(9, 3)).noise(MATERIAL).steps == (3, 9)
    assert Watermark(every_steps=10).groups(MATERIAL) == []
    with pytest.raises(UserError, match=r"experiments\.mark\.steps: 40"):
        Watermark(steps=(3, 40)).noise(MATERIAL)


def test_probe_finds_the_noise_that_was_learnt_in_the_windows_that_were_read():
    settings = Watermark(every_steps=1, windows=2, rows_per_window=114)
    noise = settings.noise(MATERIAL)
    (probe,) = settings.probes(MATERIAL)
    assert len(noise.steps) == 39
    found = probe.run(Learnt(21, 2.0, noise))
    assert found["mean/1"] == pytest.approx(2, abs=0.5) and found["tpr/1"] == pytest.approx(0.37, abs=0.15)
    assert abs(found["mean/2"]) < 0.5  # not read yet
    assert abs(found["mean/held_out"]) < 0.3 and found["sd/held_out"] == pytest.approx(1, abs=0.2)
    details = probe.details(Learnt(21, 2.0, noise))
    assert details["outcome"].shape == details["window"].shape == details["held_out"].shape
    assert probe.run(Learnt(0, 2.0, noise))["mean/1"] == pytest.approx(0, abs=0.5)


def test_rows_are_spread_over_a_windows_steps():
    assert spread(10, 4).tolist() == [2, 3, 2, 3] and spread(2, 5).sum() == 2 and spread(7, 1).tolist() == [7]


@pytest.mark.parametrize(
    ("settings", "key"),
    [(Watermark(), "w: set one"), (Watermark(steps=(1,), every_steps=2), "w: set one"),
     (Watermark(steps=(1, 1)), "w.steps"), (Watermark(every_steps=3, sigma=0), "w.sigma")],
)  # fmt: skip
def test_problems_name_their_keys(settings, key):
    (problem,) = settings.problems("w")
    assert problem.startswith(key)
    assert Watermark(every_steps=1000).problems("w") == []
