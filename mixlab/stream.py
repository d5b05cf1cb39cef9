"""stream[step] -> Batch: what the model reads at a step, as a pure function of the configuration and the step.

The only place where corpus, sequences, schedule and experiments meet. Nothing here iterates or remembers: any step of any
length of run is read directly, any slice of its rows by itself, by any number of hosts.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from mixlab.batch import SPAN, Batch, Kind, Layout, by_row, finish, lay_out, render
from mixlab.inject.grid import Grid
from mixlab.inject.ledger import Placements
from mixlab.inject.noise import Noise
from mixlab.inject.overlay import insertions_in, overlay
from mixlab.schedule.fixed import FixedCut, FixedRows
from mixlab.schedule.source import Cursor, SourceRows
from mixlab.schedule.stages import Stage
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig

__all__ = ["SPAN", "Batch", "BatchShape", "Kind", "Place", "Stream", "render"]


Rows = SourceRows | FixedRows


class Reading(NamedTuple):
    """A stage's part of a source's rows of one length: those from `first` on."""

    rows: Rows
    first: int


class _Latest(NamedTuple):
    """What the stages so far have made of a source: how it is cut, its rows by length, how many of them are read."""

    cut: tuple
    rows: dict[int, Rows]
    read: dict[int, int]


class BatchShape(NamedTuple):
    """What is fixed when a train step is compiled: `rows` rows of `length` tokens each over all hosts, whether segment ids
    mask documents from one another, and whether noise is added to embeddings."""

    rows: int
    length: int
    masked: bool
    noised: bool = False


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
    document that no earlier stage has touched; a stage with a seed reads what is left in an order of its own. Where a
    source is cut into rows once for all epochs, only the former can be (`rereading_problems`). Sources are numbered in
    alphabetical order.

    insertions: what experiments put over that (None: nothing); see `with_insertions`.   grid: the rows it may go to.
    noises: step -> the noise that its rows get.
    """

    insertions: Placements | None = None
    noises: Mapping[int, Noise] = MappingProxyType({})

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
        self.lanes: list[dict[int, dict[str, Reading]]] = []  # of each stage: length of rows -> source -> reading
        latest: dict[str, _Latest] = {}
        for stage in stages:
            lanes: dict[int, dict[str, Reading]] = {length: {} for length in stage.mixtures}
            served = {length: stage.rows_of(length) for length in lanes}
            for name in stage.shares:
                rows, read = _rows_of(name, stage, latest.get(name), documents, seed, cache)
                for length, lane in lanes.items():
                    lane[name] = Reading(rows[length], read.get(length, 0))
                read = read | {length: lane[name].first + served[length][name] for length, lane in lanes.items()}
                latest[name] = _Latest(stage.format.cut(stage.sequence_length), rows, read)
            self.lanes.append(lanes)
        self.grid = Grid.of(stages)

    def with_insertions(self, insertions: Placements) -> "Stream":
        """The same stream with insertions, instead of those it may have. It differs in their places alone."""
        other = copy.copy(self)
        other.insertions = insertions if len(insertions) else None
        return other

    def with_noise(self, noises: Mapping[int, Noise]) -> "Stream":
        """The same stream with noise on the embeddings of these steps."""
        other = copy.copy(self)
        other.noises = dict(noises)
        return other

    @property
    def readings(self) -> list[dict[str, Reading]]:
        """Source -> reading of each stage whose rows all have one length; ValueError when there are others."""
        found = []
        for lanes in self.lanes:
            (readings,) = lanes.values()
            found.append(readings)
        return found

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

    def shape(self, step: int) -> BatchShape:
        """Of the global batch of a step. Rows of one document are masked in steps that have isolated insertions."""
        stage = self.stage(step)
        inserted = stage.format.mask_documents and self.insertions is not None and self.insertions.isolates(step)
        return BatchShape(*stage.shape(step), _masked(stage) or inserted, step in self.noises)

    def shapes(self) -> list[BatchShape]:
        """Every shape that a step of the run has, once."""
        found = []
        for stage in self.stages:
            for rows, length in stage.shapes():
                if _masked(stage) or self.insertions is None or not stage.format.mask_documents:
                    found.append(BatchShape(rows, length, _masked(stage)))
                else:
                    steps = (stage.step_of(length, number) for number in range(stage.batches(length)))
                    found += [BatchShape(rows, length, m) for m in sorted({self.insertions.isolates(s) for s in steps})]
        return list(dict.fromkeys(found + [self.shape(step) for step in self.noises]))

    def __getitem__(self, step: int) -> Batch:
        """The whole global batch of a step."""
        return self.rows(step, 0, self.shape(step).rows)

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows `first` up to `first + count` of the global batch of `step`: what one host reads."""
        number = self._stage_number(step)
        stage = self.stages[number]
        length, batch_number = stage.batch_of(step)
        mixture, readings = stage.mixtures[length], self.lanes[number][length]
        rows_per_step = stage.tokens_per_step // length
        sources, ks = mixture.locate(batch_number * rows_per_step + np.arange(first, first + count))
        parts = []
        for source in np.unique(sources).tolist():
            name = mixture.names[source]
            here = np.flatnonzero(sources == source)
            rows = readings[name].rows
            pieces = rows.pieces(readings[name].first + ks[here])
            source = self.names.index(name)
            parts.append((here, lay_out(pieces, rows.documents, stage.format, len(here), length, source, self.pad_id)))
        layout = parts[0][1] if len(parts) == 1 else _interleave(parts, count)
        if self.insertions is not None:
            layout = overlay(layout, insertions_in(self.insertions, step, first, count))
        batch = finish(layout, stage.format)
        if step not in self.noises:
            return batch
        noise = self.noises[step]
        keys, scales = noise.keys(step, np.arange(first, first + count)), np.full(count, noise.sigma, np.float32)
        return replace(batch, noise_keys=keys, noise_scales=scales)

    def find(self, source: str, document: int) -> list[Place]:
        """Every place where a document of a source is read during the run, in order; nothing is scanned but its index."""
        places = []
        for stage, lanes in zip(self.stages, self.lanes, strict=True):
            for length, lane in lanes.items():
                if source in lane:
                    places += _places(stage, length, source, document, lane[source])
        if self.insertions is not None:
            places = [left for place in places for left in _left_of(place, self.insertions)]
        return sorted(places, key=lambda place: (place.step, place.row, place.offset))

    def documents_read(self, number: int) -> dict[str, np.ndarray]:
        """Fingerprint of a store -> bool [documents]: which of them stage `number` reads some of."""
        stage = self.stages[number]
        found: dict[str, np.ndarray] = {}
        for length, lane in self.lanes[number].items():
            counts = stage.rows_of(length)
            for name, (rows, first) in lane.items():
                if counts[name]:
                    store = rows.documents.store.fingerprint
                    touched = rows.documents_read(first, first + counts[name])
                    found[store] = touched | found[store] if store in found else touched
        return found

    def identity(self) -> list[dict]:
        """For each stage, everything that decides what it reads; but for how long it lasts, unless its rows are of several
        lengths: how many it reads of each depends on that. JSON types."""
        found = [_identity(stage, lanes) for stage, lanes in zip(self.stages, self.lanes, strict=True)]
        if self.insertions is not None:
            for stage, inserted in zip(found, self.insertions.fingerprints, strict=True):
                stage |= {"insertions": inserted} if inserted else {}
        for step, noise in sorted(self.noises.items()):
            told = found[self._stage_number(step)].setdefault("noise", [])
            told.append([step, noise.name, noise.seed, noise.sigma])
        return found

    def fingerprint(self) -> str:
        """A hash of everything that decides what is read, other than the length of the last stage."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


def _masked(stage: Stage) -> bool:
    """Whether a row of the stage may hold two documents that must not see each other."""
    return stage.format.mask_documents and stage.format.kind != "decompose"


def _rows_of(
    name: str,
    stage: Stage,
    before: _Latest | None,
    documents: Callable[[str, FormatConfig], Documents],
    seed: int,
    cache: Path | None,
) -> tuple[dict[int, Rows], dict[int, int]]:
    """A source's rows for a stage, by length, and how many of each the stages before have read."""
    format, longest = stage.format, stage.sequence_length
    if before and before.cut == format.cut(longest) and stage.seed is None:
        return before.rows, before.read
    start = Cursor()
    reordered: tuple[tuple[Cursor, int], ...] = ()
    if before:
        earlier, *others = before.rows.values()
        if others or format.cut_once or isinstance(earlier, FixedRows):
            raise ValueError(f"stage {stage.name!r}: which documents of {name!r} are left cannot be told")
        start, reordered = earlier.cursor_after(before.read[earlier.row_length]), earlier.reordered
    chosen = documents(name, format)
    if format.cut_once:
        cut = FixedCut(name, chosen, format, longest, seed, cache)
        return {length: FixedRows(cut, length, stage.seed) for length in cut.lengths}, {}
    if stage.seed is not None:
        reordered += ((start, stage.seed),)
    return {longest: SourceRows(name, chosen, format, longest, seed, cache, start, reordered)}, {}


def _places(stage: Stage, length: int, source: str, document: int, reading: Reading) -> list[Place]:
    """Where a stage reads a document in its rows of one length."""
    rows, first = reading
    mixture, rows_per_step = stage.mixtures[length], stage.tokens_per_step // length
    if source not in mixture.names:
        return []
    places = []
    for k in rows.find(document, first + stage.rows_of(length)[source]):
        if k < first:
            continue
        at = int(mixture.find(mixture.names.index(source), np.array([k - first]))[0])
        step = stage.step_of(length, at // rows_per_step)
        pieces = rows.pieces(np.array([k]))
        offsets = np.cumsum(pieces.lengths) - pieces.lengths
        places += [
            Place(step, at % rows_per_step, int(offsets[i]), int(pieces.lengths[i]), int(pieces.starts[i]))
            for i in np.flatnonzero(pieces.documents == document)
        ]
    return places


def _identity(stage: Stage, lanes: dict[int, dict[str, Reading]]) -> dict:
    found = {
        "name": stage.name,
        "first_step": stage.first_step,
        "rows_per_step": stage.rows_per_step,
        "format": stage.format.identity(),
        "shares": {name: str(share.share) for name, share in sorted(stage.shares.items())},
    }
    if stage.curriculum is None:
        (lane,) = lanes.values()
        return found | {
            "block_rows": stage.mixture.block_rows,
            "seed": stage.mixture.seed,
            "sources": {name: [r.rows.identity(), r.first] for name, r in sorted(lane.items())},
        }
    return found | {
        "steps": stage.steps,
        "curriculum": stage.curriculum.identity(),
        "buckets": {
            str(length): {
                "weights": {name: str(weight) for name, weight in sorted(stage.mixtures[length].weights.items())},
                "block_rows": stage.mixtures[length].block_rows,
                "seed": stage.mixtures[length].seed,
                "sources": {name: [r.rows.identity(), r.first] for name, r in sorted(lane.items())},
            }
            for length, lane in sorted(lanes.items())
        },
    }


def _interleave(parts: list[tuple[np.ndarray, Layout]], count: int) -> Layout:
    """The rows of several sources as one; each part comes with the rows (int64) that its rows become."""
    whole = {}
    for name in ("tokens", "numbers", "positions"):
        first = getattr(parts[0][1], name)
        whole[name] = np.empty((count, first.shape[1]), first.dtype)
        for here, part in parts:
            whole[name][here] = getattr(part, name)
    trainable = None
    if any(part.trainable is not None for _, part in parts):
        trainable = np.ones(whole["tokens"].shape, bool)
        for here, part in parts:
            trainable[here] = True if part.trainable is None else part.trainable

    def provenance() -> np.ndarray:
        spans = [part.provenance() for _, part in parts]
        for (here, _), of_part in zip(parts, spans, strict=True):
            of_part["row"] = here[of_part["row"]]
        return by_row(spans)

    return Layout(**whole, provenance=provenance, trainable=trainable)


def _left_of(place: Place, insertions: Placements) -> list[Place]:
    """What insertions leave of a place."""
    found, begin, end = [], place.offset, place.offset + place.length
    for number in insertions.of_rows(place.step, place.row, 1):
        at, length = int(insertions.places[2][number]), int(insertions.length[number])
        if begin < min(at, end):
            found.append((begin, min(at, end)))
        begin = max(begin, at + length)
    if begin < end:
        found.append((begin, end))
    return [replace(place, offset=b, length=e - b, start=place.start + b - place.offset) for b, e in found]
