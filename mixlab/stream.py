"""stream[step] -> Batch: what the model reads at a step, as a pure function of the configuration and the step.

The only place where corpus, sequences and schedule meet. Nothing here iterates or remembers: any step of any length of run
is read directly, any slice of its rows by itself, by any number of hosts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixlab.batch import SPAN, Batch, Kind, render
from mixlab.schedule.source import Cursor, SourceRows
from mixlab.schedule.stages import Stage
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig

__all__ = ["SPAN", "Batch", "Kind", "Place", "Stream", "render"]


class Reading(NamedTuple):
    """A stage's part of a source's rows: those from `first` on."""

    rows: SourceRows
    first: int


@dataclass(frozen=True)
class Place:
    """Where a piece of a document is read: the rows of `step` count over the whole global batch."""

    step: int
    row: int
    offset: int
    length: int
    start: int


class Stream:
    """The run's input.

    stages: the run, from `place_stages`.   documents: (source, format) -> the documents to read with what surrounds them.
    seed: of the run.   cache: folder for indices (None: memory only).   pad_id: fills what no document does.

    A stage reads on where the one before left a source: in its rows, if both cut them alike, else from the next
    document that no earlier stage has touched; a stage with a seed reads what is left in an order of its own. Sources
    are numbered in alphabetical order.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        documents: Callable[[str, FormatConfig], Documents],
        seed: int = 0,
        cache: Path | None = None,
        pad_id: int = 0,
    ):
        self.stages, self.pad_id = stages, pad_id
        self.names = tuple(sorted({name for stage in stages for name in stage.shares}))
        self.readings: list[dict[str, Reading]] = []
        latest: dict[
            str, tuple[object, SourceRows, int]
        ] = {}  # how its rows are cut, its rows, how many have been read
        for stage in stages:
            readings = {}
            for name, count in stage.rows_of().items():
                how = (stage.format.kind, stage.format.bos, stage.format.eos, stage.sequence_length)
                before, rows, done = latest.get(name, (None, None, 0))
                if rows is None or before != how or stage.seed is not None:
                    start = rows.cursor_after(done) if rows is not None else Cursor()
                    reordered = rows.reordered if rows is not None else ()
                    reordered += () if stage.seed is None else ((start, stage.seed),)
                    chosen = documents(name, stage.format)
                    rows = SourceRows(name, chosen, stage.format, stage.sequence_length, seed, cache, start, reordered)
                    done = 0
                readings[name] = Reading(rows, done)
                latest[name] = (how, rows, done + count)
            self.readings.append(readings)

    def __len__(self) -> int:
        return self.stages[-1].last_step + 1

    def stage(self, step: int) -> Stage:
        """The stage that step (0, 1, …) belongs to; IndexError outside the run."""
        return self.stages[self._stage_number(step)]

    def _stage_number(self, step: int) -> int:
        for number, stage in enumerate(self.stages):
            if stage.first_step <= step <= stage.last_step:
                return number
        raise IndexError(f"step {step} is outside the run (0 to {len(self) - 1})")

    def __getitem__(self, step: int) -> Batch:
        """The whole global batch of a step."""
        return self.rows(step, 0, self.stage(step).rows_per_step)

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows `first` up to `first + count` of the global batch of `step`: what one host reads."""
        number = self._stage_number(step)
        stage, readings = self.stages[number], self.readings[number]
        sources, ks = stage.mixture.locate(
            (step - stage.first_step) * stage.rows_per_step + np.arange(first, first + count)
        )
        parts = []
        for source in np.unique(sources).tolist():
            name = stage.mixture.names[source]
            here = np.flatnonzero(sources == source)
            rows = readings[name].rows
            pieces = rows.pieces(readings[name].first + ks[here])
            batch = render(
                pieces,
                rows.documents,
                stage.format,
                len(here),
                stage.sequence_length,
                self.names.index(name),
                self.pad_id,
            )
            parts.append((here, batch))
        return parts[0][1] if len(parts) == 1 else _interleave(parts, count)

    def find(self, source: str, document: int) -> list[Place]:
        """Every place where a document of a source is read during the run, in order; nothing is scanned but its index."""
        places = []
        for stage, readings in zip(self.stages, self.readings, strict=True):
            if source not in readings:
                continue
            rows, first = readings[source]
            last = first + stage.rows_of()[source]
            for k in rows.find(document, last):
                if k < first:
                    continue
                at = int(stage.mixture.find(stage.mixture.names.index(source), np.array([k - first]))[0])
                pieces = rows.pieces(np.array([k]))
                offsets = np.cumsum(pieces.lengths) - pieces.lengths
                places += [
                    Place(
                        stage.first_step + at // stage.rows_per_step,
                        at % stage.rows_per_step,
                        int(offsets[i]),
                        int(pieces.lengths[i]),
                        int(pieces.starts[i]),
                    )
                    for i in np.flatnonzero(pieces.documents == document)
                ]
        return sorted(places, key=lambda place: (place.step, place.row, place.offset))

    def identity(self) -> list[dict]:
        """For each stage, everything that decides what it reads but for how long it lasts; JSON types."""
        return [
            {
                "name": stage.name,
                "first_step": stage.first_step,
                "rows_per_step": stage.rows_per_step,
                "format": vars(stage.format),
                "shares": {name: str(share.share) for name, share in sorted(stage.shares.items())},
                "block_rows": stage.mixture.block_rows,
                "seed": stage.mixture.seed,
                "sources": {n: [r.rows.identity(), r.first] for n, r in sorted(readings.items())},
            }
            for stage, readings in zip(self.stages, self.readings, strict=True)
        ]

    def fingerprint(self) -> str:
        """A hash of everything that decides what is read, other than the length of the last stage."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def _interleave(parts: list[tuple[np.ndarray, Batch]], count: int) -> Batch:
    """The batches of several sources as one; each comes with the rows (int64) that its rows become."""
    length = parts[0][1].tokens.shape[1]
    arrays = {name: np.empty((count, length), a.dtype) for name, a in parts[0][1].arrays().items()}
    spans = []
    for here, batch in parts:
        for name, array in batch.arrays().items():
            arrays[name][here] = array
        moved = batch.spans.copy()
        moved["row"] = here[batch.spans["row"]]
        spans.append(moved)
    whole = np.concatenate(spans)
    return Batch(**arrays, spans=whole[np.argsort(whole["row"], kind="stable")])
