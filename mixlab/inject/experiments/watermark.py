"""Can noise on the input embeddings tell later what a model was trained on? Gaussian watermarks (Bordt and Pawelczyk 2025,
appendix E.6): no token changes; every row of some batches has noise of its own added, which is made again for the test."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixlab.inject.analysis.watermarks import statistic, true_positive_rate
from mixlab.inject.checks import at_least
from mixlab.inject.experiments.forgetting import check_steps
from mixlab.inject.items import Group, Material
from mixlab.inject.noise import Noise
from mixlab.inject.probe import Model, Probe

FALSE_POSITIVE_RATE = 0.01
_ROWS_AT_A_TIME = 16  # gradients and noise are [rows, L, D]


@dataclass(frozen=True)
class Watermark:
    """sigma: standard deviation of the noise.   steps: whose batches are noised; or every_steps: the multiples of it.
    windows: noised steps, in order, are tested in so many windows, from the earliest to the latest.
    rows_per_window: tested in each; a mean has a standard error of rows_per_window^-0.5.
    probe_every_steps: between tests; 0 for one before the first step and one at the end.
    """

    kind: Literal["watermark"] = "watermark"
    sigma: float = 0.075
    steps: tuple[int, ...] = ()
    every_steps: int = 0
    windows: int = 4
    rows_per_window: int = 256
    probe_every_steps: int = 0

    def problems(self, where: str) -> list[str]:
        found = at_least(self, where, windows=1, rows_per_window=2, every_steps=0, probe_every_steps=0)
        if not self.sigma > 0:
            found.append(f"{where}.sigma = {self.sigma}: must be above 0; experiments_enabled leaves out experiments")
        if bool(self.steps) == bool(self.every_steps):
            found.append(f"{where}: set one of steps and every_steps, to say which batches have noise")
        if len(set(self.steps)) != len(self.steps) or any(step < 0 for step in self.steps):
            found.append(f"{where}.steps: must be different steps, from 0 on")
        return found

    def groups(self, material: Material) -> list[Group]:
        """None: no token changes."""
        return []

    def noise(self, material: Material) -> Noise:
        check_steps(self.steps, material)
        steps = self.steps or range(self.every_steps, material.steps, self.every_steps)
        return Noise(material.name, material.seed, self.sigma, tuple(sorted(steps)))

    def probes(self, material: Material) -> list[Probe]:
        """For every window w, from 1 on, and for the same rows under fresh noise (held_out): mean/<w> and sd/<w> of the
        statistic, and tpr/<w>, the share of rows found at a false positive rate of 1 % that follows from the mean. The rows
        are those that were read, with what other experiments had inserted. Windows not read yet are held out as well. `outcome`: the statistic of every tested row."""
        noise = self.noise(material)
        fresh = Noise(f"{material.name} held out", material.seed, self.sigma, noise.steps)
        windows = [window for window in np.array_split(np.array(noise.steps), self.windows) if len(window)]

        def tested(model: Model, source: Noise, window: np.ndarray) -> np.ndarray:
            """float64 [rows]: the statistic of rows spread over the steps of a window."""
            found, wanted = [], spread(self.rows_per_window, len(window))
            for step, rows in zip(window.tolist(), wanted.tolist(), strict=True):
                n_rows, length = material.shape(step)
                chosen = np.arange(min(rows, n_rows))
                if not len(chosen):
                    continue
                tokens = model.read(step)[chosen]
                keys = source.keys(step, chosen)
                for first in range(0, len(chosen), _ROWS_AT_A_TIME):
                    part = slice(first, first + _ROWS_AT_A_TIME)
                    gradients = model.input_gradients(tokens[part])
                    found.append(statistic(gradients, model.noise(keys[part], length)))
            return np.concatenate(found)

        def details(model: Model) -> dict[str, np.ndarray]:
            parts = [tested(model, noise, window) for window in windows]
            numbers = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
            held_out = np.concatenate([tested(model, fresh, window) for window in windows])
            return {"outcome": np.concatenate(parts), "window": numbers, "held_out": held_out}

        def run(model: Model) -> dict[str, float]:
            found = details(model)
            sets = {str(w): found["outcome"][found["window"] == w] for w in np.unique(found["window"])}
            return {
                f"{metric}/{name}": value
                for name, x in (sets | {"held_out": found["held_out"]}).items()
                for metric, value in _summary(x).items()
            }

        return [Probe("statistic", run, self.probe_every_steps, details=details)] if windows else []


def spread(count: int, places: int) -> np.ndarray:
    """int64 [places]: `count` things over the places, as evenly as can be."""
    return np.diff(np.arange(places + 1) * count // places)


def _summary(x: np.ndarray) -> dict[str, float]:
    mean = float(np.nanmean(x))
    return {"mean": mean, "sd": float(np.nanstd(x)), "tpr": true_positive_rate(mean, FALSE_POSITIVE_RATE)}
