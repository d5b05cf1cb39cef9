"""stream[step] -> Batch: what the model reads at a step, as a pure function of the configuration and the step.

The only place where corpus, sequences and schedule meet. Nothing here iterates or remembers: any step of any length of run
is read directly, any slice of its rows by itself, by any number of hosts.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np

from mixlab.schedule.source import SourceRows
from mixlab.schedule.stages import Stage
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces


class Kind(IntEnum):
    """What put a token where it is."""

    PADDING = 0
    TEXT = 1
    BOS = 2
    EOS = 3


SPAN = np.dtype(
    [
        ("row", np.int32),
        ("offset", np.int32),
        ("length", np.int32),
        ("kind", np.uint8),
        ("source", np.int16),
        ("document", np.int64),
        ("start", np.int64),
    ]
)


@dataclass(frozen=True)
class Batch:
    """One step's input, or some rows of it.

    tokens, targets: int32 [B, L]; the target of a position is the token that follows it, also past the row's end when the
        document goes on there.
    loss_weights: float32 [B, L]; 0 where the target bears no loss.
    segment_ids: int32 [B, L]; documents of a row from 1 on (all 1 without document masking), 0 for padding.
    positions: int32 [B, L]; within the document, or within the row when positions do not restart.
    spans: SPAN [S]; the provenance. Every position of every row lies in exactly one span: `length` tokens of `kind` from
        `offset` on in `row`, of document `document` of source number `source` (its text from `start` on, for TEXT).
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    spans: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """What the device needs: the five [B, L] arrays by name."""
        return {name: value for name, value in vars(self).items() if name != "spans"}


@dataclass(frozen=True)
class Place:
    """Where a piece of a document is read: the rows of `step` count over the whole global batch."""

    step: int
    row: int
    offset: int
    length: int
    start: int


class Stream:
    """The run's input. `sources` has every source of the stages by name; `pad_id` fills what no document does."""

    def __init__(self, stages: tuple[Stage, ...], sources: dict[str, SourceRows], pad_id: int = 0):
        self.stages, self.sources, self.pad_id = stages, sources, pad_id
        self._numbers = {name: number for number, name in enumerate(sources)}

    def __len__(self) -> int:
        return self.stages[-1].last_step + 1

    def stage(self, step: int) -> Stage:
        """The stage that step (0, 1, …) belongs to; IndexError outside the run."""
        for stage in self.stages:
            if stage.first_step <= step <= stage.last_step:
                return stage
        raise IndexError(f"step {step} is outside the run (0 to {len(self) - 1})")

    def __getitem__(self, step: int) -> Batch:
        """The whole global batch of a step."""
        return self.rows(step, 0, self.stage(step).rows_per_step)

    def rows(self, step: int, first: int, count: int) -> Batch:
        """Rows `first` up to `first + count` of the global batch of `step`: what one host reads."""
        stage = self.stage(step)
        source, number = self.sources[stage.source], self._numbers[stage.source]
        ks = (step - stage.first_step) * stage.rows_per_step + np.arange(first, first + count)
        pieces = source.pieces(ks)
        return render(pieces, source.documents, source.format, count, stage.sequence_length, number, self.pad_id)

    def find(self, source: str, document: int) -> list[Place]:
        """Every place where a document of a source is read during the run, in order; nothing is scanned but its index."""
        places = []
        for stage in (s for s in self.stages if s.source == source):
            rows, per_epoch = self.sources[source], self.sources[source].rows_per_epoch
            total = stage.steps * stage.rows_per_step
            for epoch in range(-(-total // per_epoch)):
                for k in rows.find(document, epoch):
                    if k >= total:
                        continue
                    step, row = stage.first_step + int(k) // stage.rows_per_step, int(k) % stage.rows_per_step
                    pieces = rows.pieces(np.array([k]))
                    offsets = np.cumsum(pieces.lengths) - pieces.lengths
                    places += [
                        Place(step, row, int(offsets[i]), int(pieces.lengths[i]), int(pieces.starts[i]))
                        for i in np.flatnonzero(pieces.documents == document)
                    ]
        return sorted(places, key=lambda place: (place.step, place.row))

    def fingerprint(self) -> str:
        """A hash of everything that decides what is read, other than the number of steps."""
        identity = {
            "stages": [{k: v for k, v in asdict(stage).items() if k != "steps"} for stage in self.stages],
            "sources": {name: source.identity() for name, source in self.sources.items()},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def render(
    pieces: Pieces, documents: Documents, format: FormatConfig, rows: int, length: int, source: int = 0, pad: int = 0
) -> Batch:
    """Pieces to tokens, targets, loss weights, segments, positions and provenance; all at once, no loop over rows.

    Rows are laid out with one token more than `length`, the target of the last position: the next token of the document
    that is cut there, else padding.
    """
    pieces = _one_more(pieces, documents, rows, length)
    spans = _spans(pieces, documents, source)
    kinds, counts = spans["kind"], spans["length"]

    flat = np.repeat(np.array([pad, pad, *_special(documents)], np.int32)[kinds], counts)
    text = spans[kinds == Kind.TEXT]
    buffer = np.empty(int(text["length"].sum()), np.int32)
    documents.store.read(text["document"], text["start"], text["length"], buffer)
    flat[np.repeat(kinds == Kind.TEXT, counts)] = buffer

    real = pieces.documents >= 0
    firsts = np.searchsorted(pieces.rows, np.arange(rows))
    number = np.where(real, np.arange(len(real)) - firsts[pieces.rows] + 1, 0)
    number = np.repeat(number.astype(np.int32), pieces.lengths).reshape(rows, length + 1)
    same_document = number[:, :-1] == number[:, 1:]
    weights = (number[:, 1:] > 0) & (number[:, :-1] > 0)
    if not format.loss_across_documents:
        weights &= same_document

    if format.restart_positions:
        begins = np.cumsum(pieces.lengths) - pieces.lengths
        positions = np.arange(rows * (length + 1)) - np.repeat(begins, pieces.lengths)
        positions = positions.astype(np.int32).reshape(rows, length + 1)[:, :-1]
    else:
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))

    flat = flat.reshape(rows, length + 1)
    segments = number[:, :-1] if format.mask_documents else (number[:, :-1] > 0).astype(np.int32)
    return Batch(
        tokens=np.ascontiguousarray(flat[:, :-1]),
        targets=np.ascontiguousarray(flat[:, 1:]),
        loss_weights=weights.astype(np.float32),
        segment_ids=np.ascontiguousarray(segments),
        positions=np.ascontiguousarray(positions),
        spans=_without_targets(spans, length),
    )


def _special(documents: Documents) -> tuple[int, int]:
    """The ids of BOS and EOS where the documents have them (0 stands in for an absent one, which no span names)."""
    return (documents.prefix or (0,))[0], (documents.suffix or (0,))[0]


def _one_more(pieces: Pieces, documents: Documents, rows: int, length: int) -> Pieces:
    """The pieces with every row filled up to length + 1: by the next token of the document cut at its end, then by padding
    (a piece of document -1)."""
    lengths = pieces.lengths.copy()
    lasts = np.searchsorted(pieces.rows, np.arange(rows), side="right") - 1
    full = np.bincount(pieces.rows, lengths, rows).astype(np.int64)
    ends = pieces.starts[lasts] + lengths[lasts]
    goes_on = (full == length) & (ends < documents.virtual_lengths(pieces.documents[lasts]))
    lengths[lasts[goes_on]] += 1
    missing = length + 1 - full - goes_on
    padded = np.flatnonzero(missing)
    after = lasts[padded] + 1
    return Pieces(
        np.insert(pieces.rows, after, padded),
        np.insert(pieces.documents, after, -1),
        np.insert(pieces.starts, after, 0),
        np.insert(lengths, after, missing[padded]),
    )


def _spans(pieces: Pieces, documents: Documents, source: int) -> np.ndarray:
    """SPAN [S]: each piece cut into its prefix, text and suffix; empty spans left out."""
    real = pieces.documents >= 0
    before = len(documents.prefix)
    text = np.zeros(len(real), np.int64)
    text[real] = documents.text_lengths(pieces.documents[real])
    ends = pieces.starts + pieces.lengths
    in_prefix = np.where(real, np.clip(np.minimum(ends, before) - pieces.starts, 0, None), 0)
    in_suffix = np.where(real, np.clip(ends - np.maximum(pieces.starts, before + text), 0, None), 0)
    spans = np.zeros((len(real), 3), SPAN)
    spans["row"] = pieces.rows[:, None]
    spans["source"] = source
    spans["document"] = pieces.documents[:, None]
    spans["length"][:, 0] = in_prefix
    spans["length"][:, 1] = pieces.lengths - in_prefix - in_suffix
    spans["length"][:, 2] = in_suffix
    spans["kind"] = [Kind.BOS, Kind.TEXT, Kind.EOS]
    spans["kind"][~real, 1] = Kind.PADDING
    spans["start"][:, 1] = np.clip(pieces.starts - before, 0, None)
    spans = spans[spans["length"] > 0]
    begins = np.cumsum(spans["length"]) - spans["length"]
    first_of_row = np.searchsorted(spans["row"], spans["row"])
    spans["offset"] = begins - begins[first_of_row]
    return spans


def _without_targets(spans: np.ndarray, length: int) -> np.ndarray:
    """The spans of the first `length` tokens of each row."""
    spans = spans[spans["offset"] < length].copy()
    spans["length"] = np.minimum(spans["length"], length - spans["offset"])
    return spans
