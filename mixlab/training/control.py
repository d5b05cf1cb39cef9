"""What a run reads while it is decided on the way: at their intervals, dynamic experiments say what to insert next."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mixlab import loader
from mixlab.config import Config
from mixlab.data import Data
from mixlab.inject.control_log import ControlLog, Entry, decide, insert_nothing
from mixlab.inject.ledger import write_ledger
from mixlab.parallel.mesh import host_rows
from mixlab.stream import BatchShape, Stream
from mixlab.treatment import follow


class Control:
    """The stream of a run, with what its dynamic experiments have decided so far.

    log: the decisions taken before.   folder: of the run. Every decision is in its control.jsonl, and what it inserts in its
    ledger.parquet, before any of it is read."""

    def __init__(self, config: Config, data: Data, log: ControlLog, folder: Path):
        self._config, self._data, self._folder, self.log = config, data, folder, log
        self._experiments = {
            name: data.experiments[name][0]
            for name in config.enabled_experiments
            if hasattr(data.experiments[name][0], "decide")
        }
        self.stream = self._followed(data.stream, log.entries)
        self._save()

    def shapes(self) -> list[BatchShape]:
        """Every shape that a step of the run has, or may have after a decision."""
        shapes = self._data.stream.shapes()
        return list(dict.fromkeys([*shapes, *(shape._replace(masked=True) for shape in shapes if self._experiments)]))

    def due(self, step: int) -> list[str]:
        """The experiments that have to decide before `step` is read, and have not; in the order of their names."""
        decided = {entry["experiment"] for entry in self.log.entries if entry["step"] == step}
        return [
            name
            for name, experiment in sorted(self._experiments.items())
            if step < self._config.total_steps and step % experiment.every_steps == 0 and name not in decided
        ]

    def decide(self, step: int, probes: Mapping[str, dict[str, float] | None]) -> list[Entry]:
        """Takes the decisions due at `step`; they are on disk when this returns. probes: experiment -> what its controlling
        probe has found, None where that failed. Returns the new entries."""
        known = len(self.log)
        for name in self.due(step):
            self._decide(name, step, probes[name])
        if len(self.log) > known:
            self._save()
        return list(self.log.entries[known:])

    def _decide(self, name: str, step: int, probe: dict[str, float] | None) -> None:
        log = decide(self.log, name, self._experiments[name], probe, step, self._config.total_steps)
        try:
            self.stream = self._followed(self.stream, log.entries[-1:])
        except Exception as error:  # what is decided has no place, or cannot be made: training goes on without
            log = insert_nothing(self.log, name, probe, step, error)
        self.log = log

    def batches(self, first: int, meshes: Mapping[BatchShape, Mesh]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, arrays of this process's rows) from `first` to the end of the run; meshes: of every shape. Nothing is read
        ahead of a decision: the caller takes those that are due after a step before asking for the next."""
        total = self._config.total_steps
        mine = {(shape.rows, shape.length): host_rows(mesh, shape.rows) for shape, mesh in meshes.items()}
        while first < total:
            ends = [(first // e.every_steps + 1) * e.every_steps for e in self._experiments.values()]
            end = min([*ends, total])
            yield from loader.batches(self.stream, first, self._config.loader, mine, end)
            first = end

    def _followed(self, stream: Stream, entries: Sequence[Entry]) -> Stream:
        return follow(self._config, stream, self._data.experiments, self._data.tokenizer, entries)

    def _save(self) -> None:
        if jax.process_index() != 0:
            return
        path = self._folder / "control.jsonl"
        if len(self.log) or path.exists():
            self.log.save(path)
        if self.stream.insertions is not None:
            write_ledger(self.stream.insertions, self._folder / "ledger.parquet")
