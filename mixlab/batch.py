"""Batch: what the model gets of some rows, with the provenance of every token; and how pieces become one.

Pieces are first laid out as tokens (`lay_out`); only then is it decided what is attended to and trained on (`finish`), so that
whatever overwrites tokens in between is masked, numbered and filtered like all others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from mixlab.corpus.repetition import repeats_in_rows
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces
from mixlab.sequences.metadata import Metadata, runs


class Kind(IntEnum):
    """What put a token where it is."""

    PADDING = 0
    TEXT = 1
    BOS = 2
    EOS = 3
    METADATA = 4
    INSERTED = 5


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
RAW = np.dtype((np.void, SPAN.itemsize))  # many spans are copied as bytes a hundred times as fast as field by field


@dataclass(frozen=True)
class Batch:
    """One step's input, or some rows of it.

    tokens, targets: int32 [B, L]; the target of a position is the token that follows it, also past the row's end when the
        document goes on there.
    loss_weights: float32 [B, L]; 0 where the target bears no loss.
    segment_ids: int32 [B, L]; documents of a row from 1 on (all 1 without document masking), 0 for padding.
    positions: int32 [B, L]; within the document, or within the row when positions do not restart.
    spans: SPAN [S]; the provenance. Every position of every row lies in exactly one span: `length` tokens of `kind` from
        `offset` on in `row`, of document `document` of source number `source` (its text or metadata from `start` on).
        `provenance` makes them when they are first asked for: training never asks.
    noise_keys: uint32 [B, 2], noise_scales: float32 [B]; of the noise on the rows' embeddings (see inject/noise.py), None in
        steps without.
    """

    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    provenance: Callable[[], np.ndarray]
    noise_keys: np.ndarray | None = None
    noise_scales: np.ndarray | None = None

    @cached_property
    def spans(self) -> np.ndarray:
        return self.provenance()

    def arrays(self, masked: bool = True) -> dict[str, np.ndarray]:
        """What the device needs: the arrays by name that there are, segment_ids only where documents are `masked`."""
        left_out = ("provenance", "spans", *(() if masked else ("segment_ids",)))
        return {name: value for name, value in vars(self).items() if name not in left_out and value is not None}


@dataclass
class Layout:
    """Rows of tokens with one more than the batch will have: the target of the last position.

    tokens: int32 [R, L + 1].
    numbers: int32 [R, L + 1]; which document of its row a token belongs to, from 1 on, 0 for padding.
    positions: int32 [R, L + 1]; within the document's part that is in this row.
    provenance: makes SPAN [S]; that of the first L tokens of every row.
    trainable: bool [R, L + 1]; whether a token may bear loss as a target. None: all may.
    """

    tokens: np.ndarray
    numbers: np.ndarray
    positions: np.ndarray
    provenance: Callable[[], np.ndarray]
    trainable: np.ndarray | None = None


def render(
    pieces: Pieces, documents: Documents, format: FormatConfig, rows: int, length: int, source: int = 0, pad: int = 0
) -> Batch:
    """Pieces to tokens, targets, loss weights, segments, positions and provenance."""
    return finish(lay_out(pieces, documents, format, rows, length, source, pad), format)


def lay_out(
    pieces: Pieces, documents: Documents, format: FormatConfig, rows: int, length: int, source: int = 0, pad: int = 0
) -> Layout:
    """Pieces to tokens; all at once, no loop over rows.

    The token after a row's last is the next one of the document that is cut there, if the format has targets past the row,
    else padding.
    """
    pieces = _one_more(pieces, documents, rows, length, format.predicts_past_row)
    spans = _spans(pieces, documents, source, length + 1)
    kinds, counts = spans["kind"], spans["length"]

    flat = np.repeat(np.array([pad, pad, *_special(documents), pad], np.int32)[kinds], counts)
    text = spans.compress(kinds == Kind.TEXT)
    buffer = np.empty(int(text["length"].sum()), np.int32)
    documents.store.read(text["document"], text["start"], text["length"], buffer)
    flat[np.repeat(kinds == Kind.TEXT, counts)] = buffer
    trainable = None
    if documents.metadata is not None:
        written = spans.compress(kinds == Kind.METADATA)
        places = runs(written["row"] * np.int64(length + 1) + written["offset"], written["length"])
        flat[places] = documents.metadata.read(written["document"], written["start"], written["length"])
        trainable = _trainable(pieces, spans, places, documents, documents.metadata, format).reshape(rows, length + 1)

    real = pieces.documents >= 0
    firsts = np.searchsorted(pieces.rows, np.arange(rows))
    per_piece = np.where(real, np.arange(len(real)) - firsts[pieces.rows] + 1, 0)
    begins = (np.cumsum(pieces.lengths) - pieces.lengths).astype(np.int32)
    counted = np.arange(rows * (length + 1), dtype=np.int32) - np.repeat(begins, pieces.lengths)
    return Layout(
        tokens=flat.reshape(rows, length + 1),
        numbers=np.repeat(per_piece.astype(np.int32), pieces.lengths).reshape(rows, length + 1),
        positions=counted.reshape(rows, length + 1),
        provenance=lambda: _without_targets(spans, length),
        trainable=trainable,
    )


def finish(layout: Layout, format: FormatConfig) -> Batch:
    """What is attended to and trained on, of tokens as they lie."""
    rows, length = layout.tokens.shape[0], layout.tokens.shape[1] - 1
    tokens = np.ascontiguousarray(layout.tokens[:, :-1])
    own, following = layout.numbers[:, :-1], layout.numbers[:, 1:]
    trained = (own > 0) & (following > 0)
    if not format.loss_across_documents:
        trained &= own == following
    if layout.trainable is not None:
        trained &= layout.trainable[:, 1:]
    if format.mask_repetitions:
        trained[repeats_in_rows(tokens, (own > 0).sum(axis=1))] = False
    weights = trained.astype(np.float32)
    if format.loss_normaliser == "rows":
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)
    if format.restart_positions:
        positions = layout.positions[:, :-1]
    else:
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(
        tokens=tokens,
        targets=np.ascontiguousarray(layout.tokens[:, 1:]),
        loss_weights=weights,
        segment_ids=np.ascontiguousarray(own) if format.mask_documents else (own > 0).astype(np.int32),
        positions=np.ascontiguousarray(positions),
        provenance=layout.provenance,
    )


def by_row(parts: list[np.ndarray]) -> np.ndarray:
    """The spans of parts (SPAN), each in order, as one."""
    joined = np.concatenate([part.view(RAW) for part in parts]).view(SPAN)
    return joined.take(np.argsort(joined["row"], kind="stable"))


def _special(documents: Documents) -> tuple[int, int]:
    """The ids of BOS and EOS where the documents have them (0 stands in for an absent one, which no span names)."""
    return (documents.prefix or (0,))[0], (documents.suffix or (0,))[0]


def _places(spans: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """int64: where the tokens of the chosen spans (bool [S]) lie among those of all spans."""
    ends = np.cumsum(spans["length"], dtype=np.int64)[chosen]
    counts = spans["length"][chosen]
    return runs(ends - counts, counts)


def _trainable(
    pieces: Pieces,
    spans: np.ndarray,
    written: np.ndarray,
    documents: Documents,
    metadata: Metadata,
    format: FormatConfig,
) -> np.ndarray:
    """bool [tokens]: False for metadata (at the places `written`) and the BOS before them, unless they bear loss; and for the
    token after metadata that are there once more, where the piece before has predicted it: no text is predicted twice."""
    trainable = np.ones(int(pieces.lengths.sum()), bool)
    if not metadata.loss:
        trainable[written] = False
        if documents.prefix:
            conditioned = metadata.codes[spans["document"]] > 0  # of padding it does not matter
            trainable[_places(spans, (spans["kind"] == Kind.BOS) & conditioned)] = False
    predicted_apart = format.kind == "decompose" and format.variant == "released"
    if documents.every_piece and format.predicts_past_row and not predicted_apart:
        begins = np.cumsum(pieces.lengths) - pieces.lengths
        real = np.flatnonzero(pieces.documents >= 0)
        again = documents.repeated(pieces.documents[real], pieces.starts[real])
        trainable[(begins[real] + again)[again > 0]] = False
    return trainable


def _one_more(pieces: Pieces, documents: Documents, rows: int, length: int, goes_on: bool) -> Pieces:
    """The pieces with every row filled up to length + 1: by the next token of the document cut at its end, if the row
    `goes_on`, then by padding (a piece of document -1)."""
    lengths = pieces.lengths.copy()
    lasts = np.searchsorted(pieces.rows, np.arange(rows), side="right") - 1
    full = np.bincount(pieces.rows, lengths, rows).astype(np.int64)
    ends = pieces.starts[lasts] + lengths[lasts]
    if documents.every_piece:
        ends -= documents.repeated(pieces.documents[lasts], pieces.starts[lasts])
    cut = goes_on & (full == length) & (ends < documents.virtual_lengths(pieces.documents[lasts]))
    lengths[lasts[cut]] += 1
    missing = length + 1 - full - cut
    padded = np.flatnonzero(missing)
    after = lasts[padded] + 1
    return Pieces(
        np.insert(pieces.rows, after, padded),
        np.insert(pieces.documents, after, -1),
        np.insert(pieces.starts, after, 0),
        np.insert(lengths, after, missing[padded]),
    )


def _spans(pieces: Pieces, documents: Documents, source: int, row_tokens: int) -> np.ndarray:
    """SPAN [S]: each piece cut into its prefix, metadata, text and suffix; empty spans left out. The pieces fill rows of
    row_tokens."""
    real = pieces.documents >= 0
    starts, ends = pieces.starts, pieces.starts + pieces.lengths
    text, none = np.zeros(len(real), np.int64), np.zeros(len(real), np.int64)
    text[real] = documents.text_lengths(pieces.documents[real])
    before = none + len(documents.prefix)
    parts = [(Kind.BOS, none, before)]  # kind, and where in the document it begins and ends
    if documents.metadata is not None:
        written = none.copy()
        written[real] = documents.metadata.lengths(pieces.documents[real])
        parts.append((Kind.METADATA, before, before + written))
        before = before + written
    if documents.every_piece:
        again = np.zeros(len(real), bool)
        again[real] = documents.repeated(pieces.documents[real], starts[real]) > 0
        ends = ends - again * before
    parts += [(Kind.TEXT, before, before + text), (Kind.EOS, before + text, before + text + len(documents.suffix))]

    spans = np.zeros((len(real), len(parts)), SPAN)
    spans["row"] = pieces.rows[:, None]
    spans["source"] = source
    spans["document"] = pieces.documents[:, None]
    for column, (kind, begin, end) in enumerate(parts):
        first, last = np.maximum(starts, begin), np.minimum(ends, end)
        if documents.every_piece and kind in (Kind.BOS, Kind.METADATA):
            first, last = np.where(again, begin, first), np.where(again, end, last)
        spans["kind"][:, column] = kind
        spans["length"][:, column] = np.where(real, np.maximum(last - first, 0), 0)
        if kind in (Kind.TEXT, Kind.METADATA):
            spans["start"][:, column] = np.maximum(first - begin, 0)
    spans["kind"][~real, -2], spans["length"][~real, -2] = Kind.PADDING, pieces.lengths[~real]
    spans = spans.ravel().compress(
        spans["length"].ravel() > 0
    )  # a hundred times as fast as spans[…], which copies field by field
    spans["offset"] = (np.cumsum(spans["length"]) - spans["length"]) % row_tokens
    return spans


def _without_targets(spans: np.ndarray, length: int) -> np.ndarray:
    """The spans of the first `length` tokens of each row."""
    spans = spans.compress(spans["offset"] < length)
    spans["length"] = np.minimum(spans["length"], length - spans["offset"])
    return spans
