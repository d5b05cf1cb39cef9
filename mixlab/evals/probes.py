"""Runs the probes of a run's experiments when they are due. Whatever a probe does, training goes on."""

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from mixlab.config import Config
from mixlab.data import Data
from mixlab.evals.probing import ProbedModel, Probing
from mixlab.inject.probe import Probe
from mixlab.stream import Stream
from mixlab.training.state import Layout


class ProbeRunner:
    """The probes of all experiments.

    probes: experiment -> its probes.   folder: gets <experiment>-<step>.npz, the arrays by item.   steps: of the run.
    """

    def __init__(self, probes: Mapping[str, Sequence[Probe]], probing: Probing, folder: Path, steps: int):
        self._probes, self._probing, self._folder, self._steps = probes, probing, folder, steps

    def of(self, experiment: str | None = None) -> dict[str, Sequence[Probe]]:
        """Experiment -> its probes, of one experiment or of all."""
        return {name: probes for name, probes in self._probes.items() if experiment in (None, name)}

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

    def run(self, params, step: int, stream: Stream, starting: bool = False, control: Collection[str] = ()) -> "Probed":
        """What the probes due at `step` find, and the controlling probes of the experiments `control`, due or not. Arrays by item
        are written. stream: what the run reads."""
        due = self.due(step, starting)
        for name in control:
            probe = controlling(self._probes[name])
            due[name] = [probe, *(other for other in due.get(name, []) if other is not probe)]
        found = self.ask(params, step, stream, due)
        if jax.process_index() == 0:
            for name, arrays in found.details.items():
                self._write(f"{name}-{step}.npz", arrays)
        return found

    def ask(self, params, step: int, stream: Stream, probes: Mapping[str, Sequence[Probe]]) -> "Probed":
        """What these probes (experiment -> probes) find in the model of `step`, whose run reads `stream`."""
        began = time.perf_counter()
        model, found = self._probing.at(params, step, stream), Probed()
        for name, asked in probes.items():
            for probe in asked:
                try:
                    found.add(name, probe, *_ask(probe, model))
                except Exception as error:
                    found.fail(name, probe, f"{type(error).__name__}: {error}")
        if probes:
            found.metrics["perf/probe_seconds"] = time.perf_counter() - began
        return found

    def _write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        self._folder.mkdir(exist_ok=True)
        part = self._folder / (name + ".partial")
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        part.replace(self._folder / name)


def open_probes(config: Config, data: Data, layout: Layout, workdir: Path) -> ProbeRunner:
    """The runner of all probes of the run in `workdir`, enabled experiments' or not."""
    bos_id = data.tokenizer.bos_id if data.stream.stages[-1].format.bos else None
    probes = {name: experiment.probes(material) for name, (experiment, material) in data.experiments.items()}
    return ProbeRunner(probes, Probing(config, layout, bos_id), workdir / "probes", config.total_steps)


class Probed:
    """What the probes of a step have found.

    metrics: probe/<experiment>/<metric>, probe/<experiment>/failed, perf/probe_seconds.
    results: (experiment, probe) -> metric -> number, of those that did not fail.   details: experiment -> arrays by item.
    failures: {"experiment", "probe", "error"} of those that did."""

    def __init__(self):
        self.metrics: dict[str, float] = {}
        self.results: dict[tuple[str, str], dict[str, float]] = {}
        self.details: dict[str, dict[str, np.ndarray]] = {}
        self.failures: list[dict[str, str]] = []

    def add(self, name: str, probe: Probe, values: dict[str, float], arrays: dict[str, np.ndarray]) -> None:
        """ValueError for what another probe of the experiment has given already."""
        metrics = _once(self.metrics, {f"probe/{name}/{metric}": value for metric, value in values.items()})
        if arrays:
            self.details[name] = self.details.get(name, {}) | _once(self.details.get(name, {}), arrays)
        self.metrics |= metrics
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
