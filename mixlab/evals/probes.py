"""Runs the probes of a run's experiments when they are due. Whatever a probe does, training goes on."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from mixlab.evals.probing import ProbedModel, Probing
from mixlab.inject.probe import Probe


class ProbeRunner:
    """The probes of all experiments.

    probes: experiment -> its probes.   folder: gets <experiment>-<step>.npz, the arrays by item.   steps: of the run.
    """

    def __init__(self, probes: Mapping[str, Sequence[Probe]], probing: Probing, folder: Path, steps: int):
        self._probes, self._probing, self._folder, self._steps = probes, probing, folder, steps

    def due(self, step: int, starting: bool = False) -> dict[str, list[Probe]]:
        """Experiment -> its probes that are due when `step` updates are done; `starting`: a run that begins here."""
        due = {
            name: [probe for probe in probes if probe.due(step, self._steps) or (starting and probe.at_start)]
            for name, probes in self._probes.items()
        }
        return {name: probes for name, probes in due.items() if probes}

    def control(self, name: str, probed: "Probed") -> dict[str, float] | None:
        """What the controlling probe of an experiment has found; None where it failed."""
        return probed.results.get((name, controlling(self._probes[name]).name))

    def run(self, params, step: int, starting: bool = False, control: Collection[str] = ()) -> "Probed":
        """What the probes due at `step` find, and the controlling probes of the experiments `control`, due or not."""
        began = time.perf_counter()
        due = self.due(step, starting)
        for name in control:
            probe = controlling(self._probes[name])
            due[name] = [probe, *(other for other in due.get(name, []) if other is not probe)]
        model, found = self._probing.at(params, step), Probed()
        for name, probes in due.items():
            details: dict[str, np.ndarray] = {}
            for probe in probes:
                try:
                    values, arrays = _ask(probe, model)
                    arrays = _once(details, arrays)
                    found.add(name, probe, values)
                    details |= arrays
                except Exception as error:
                    found.fail(name, probe, f"{type(error).__name__}: {error}")
            if details and jax.process_index() == 0:
                self._folder.mkdir(exist_ok=True)
                path = self._folder / f"{name}-{step}.npz"
                part = path.with_name(path.name + ".partial")
                with part.open("wb") as file:
                    np.savez_compressed(file, **details)
                part.replace(path)
        if due:
            found.metrics["perf/probe_seconds"] = time.perf_counter() - began
        return found


class Probed:
    """What the probes of a step have found.

    metrics: probe/<experiment>/<metric>, probe/<experiment>/failed, perf/probe_seconds.
    results: (experiment, probe) -> metric -> number, of those that did not fail.
    failures: {"experiment", "probe", "error"} of those that did."""

    def __init__(self):
        self.metrics: dict[str, float] = {}
        self.results: dict[tuple[str, str], dict[str, float]] = {}
        self.failures: list[dict[str, str]] = []

    def add(self, name: str, probe: Probe, values: dict[str, float]) -> None:
        self.metrics |= _once(self.metrics, {f"probe/{name}/{metric}": value for metric, value in values.items()})
        self.results[name, probe.name] = values

    def fail(self, name: str, probe: Probe, error: str) -> None:
        self.metrics[f"probe/{name}/failed"] = 1
        self.failures.append({"experiment": name, "probe": probe.name, "error": error})


def controlling(probes: Sequence[Probe]) -> Probe:
    """The probe whose result a dynamic experiment decides on: the one named "control", else its first."""
    return next((probe for probe in probes if probe.name == "control"), probes[0])


def _ask(probe: Probe, model: ProbedModel) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    values = {metric: float(value) for metric, value in probe.run(model).items()}
    arrays = {name: np.asarray(array) for name, array in (probe.details(model) if probe.details else {}).items()}
    for name, array in arrays.items():
        if array.dtype == object:
            raise ValueError(f"details {name!r} are no array of numbers or texts")
    return values, arrays


def _once(there: Mapping, new: dict) -> dict:
    if twice := there.keys() & new.keys():
        raise ValueError(f"another probe of the experiment has given {sorted(twice)} too")
    return new
