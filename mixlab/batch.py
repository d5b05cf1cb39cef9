"""Batch: what the model gets of some rows, with the provenance of every token; and how pieces become one.

Pieces are first laid out as tokens (`lay_out`); only then is it decided what is attended to and trained on (`finish`), so that
whatever overwrites tokens in between is masked, numbered and filtered like all others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

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


class _Part(NamedTuple):
    """What a section of every document (its text, say) gives to each of some pieces: all int64 [P]. From `starts` on,
    `lengths` tokens of the section of `documents`, which go to `places` and behind."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    places: np.ndarray


def lay_out(
    pieces: Pieces, documents: Documents, format: FormatConfig, rows: int, length: int, source: int = 0, pad: int = 0
) -> Layout:
    """Pieces to tokens; all at once, no loop over rows.

    The token after a row's last is the next one of the document that is cut there, if the format has targets past the row,
    else padding.
    """
    pieces = _one_more(pieces, documents, rows, length, format.predicts_past_row)
    begins = np.cumsum(pieces.lengths) - pieces.lengths
    parts = _parts(pieces, begins, documents)
    flat = np.full(rows * (length + 1), pad, np.int32)
    text = parts[Kind.TEXT]
    documents.store.read(text.documents, text.starts, text.lengths, flat, text.places)
    for kind, id in ((Kind.BOS, documents.prefix[:1]), (Kind.EOS, documents.suffix[:1])):
        if id:
            flat[parts[kind].places[parts[kind].lengths > 0]] = id
    trainable = None
    if documents.metadata is not None:
        written = parts[Kind.METADATA]
        places = runs(written.places, written.lengths)
        flat[places] = documents.metadata.read(written.documents, written.starts, written.lengths)
        trainable = _trainable(pieces, begins, parts, places, documents, documents.metadata, format)

    firsts = np.searchsorted(pieces.rows, np.arange(rows))
    per_piece = np.where(pieces.documents >= 0, np.arange(len(begins)) - firsts[pieces.rows] + 1, 0)
    positions = np.arange(rows * (length + 1), dtype=np.int32)
    positions -= np.repeat(begins.astype(np.int32), pieces.lengths)
    return Layout(
        tokens=flat.reshape(rows, length + 1),
        numbers=np.repeat(per_piece.astype(np.int32), pieces.lengths).reshape(rows, length + 1),
        positions=positions.reshape(rows, length + 1),
        provenance=lambda: _without_targets(_spans(pieces, parts, source, length + 1), length),
        trainable=None if trainable is None else trainable.reshape(rows, length + 1),
    )


def finish(layout: Layout, format: FormatConfig) -> Batch:
    """What is attended to and trained on, of tokens as they lie."""
    rows, length = layout.tokens.shape[0], layout.tokens.shape[1] - 1
    tokens = np.ascontiguousarray(layout.tokens[:, :-1])
    own, following = layout.numbers[:, :-1], layout.numbers[:, 1:]
    trained = following > 0 if format.loss_across_documents else own == following
    trained &= own > 0
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


def _trainable(
    pieces: Pieces,
    begins: np.ndarray,
    parts: dict[Kind, _Part],
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
            bos = parts[Kind.BOS]
            trainable[bos.places[(bos.lengths > 0) & (metadata.codes[bos.documents] > 0)]] = False
    predicted_apart = format.kind == "decompose" and format.variant == "released"
    if documents.every_piece and format.predicts_past_row and not predicted_apart:
        again = documents.repeated(parts[Kind.TEXT].documents, pieces.starts)
        trainable[(begins + again)[again > 0]] = False
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
    if not len(padded):
        return replace(pieces, lengths=lengths)
    after = lasts[padded] + 1
    return Pieces(
        np.insert(pieces.rows, after, padded),
        np.insert(pieces.documents, after, -1),
        np.insert(pieces.starts, after, 0),
        np.insert(lengths, after, missing[padded]),
    )


def _parts(pieces: Pieces, begins: np.ndarray, documents: Documents) -> dict[Kind, _Part]:
    """What each section of documents (prefix, metadata, text, suffix, in this order) gives to pieces whose tokens lie from
    `begins` on."""
    known = np.maximum(pieces.documents, 0)  # nothing is read of what stands in for padding
    sizes: dict[Kind, int | np.ndarray] = {}  # of the sections that there are
    if documents.prefix:
        sizes[Kind.BOS] = len(documents.prefix)
    if documents.metadata is not None:
        sizes[Kind.METADATA] = documents.metadata.lengths(known)
    sizes[Kind.TEXT] = documents.text_lengths(known)
    if documents.suffix:
        sizes[Kind.EOS] = len(documents.suffix)

    starts, ends = pieces.starts, pieces.starts + np.where(pieces.documents >= 0, pieces.lengths, 0)
    again = None
    if documents.every_piece:
        repeated = documents.repeated(known, starts)
        again, ends = repeated > 0, ends - repeated
    parts, places, end = {}, begins, np.zeros_like(starts)
    for kind, size in sizes.items():
        begin, end = end, end + size
        first, last = np.maximum(starts, begin), np.minimum(ends, end)
        if again is not None and kind in (Kind.BOS, Kind.METADATA):
            first, last = np.where(again, begin, first), np.where(again, end, last)
        lengths = np.maximum(last - first, 0)
        parts[kind] = _Part(known, np.maximum(first - begin, 0), lengths, places)
        places = places + lengths
    return parts


def _spans(pieces: Pieces, parts: dict[Kind, _Part], source: int, row_tokens: int) -> np.ndarray:
    """SPAN [S]: the parts of all pieces in order, and padding; empty ones left out. The pieces fill rows of row_tokens."""
    spans = np.zeros((len(pieces.rows), len(parts)), SPAN)
    spans["row"] = pieces.rows[:, None]
    spans["source"] = source
    spans["document"] = pieces.documents[:, None]
    for column, (kind, part) in enumerate(parts.items()):
        spans["kind"][:, column] = kind
        spans["length"][:, column] = part.lengths
        if kind in (Kind.TEXT, Kind.METADATA):
            spans["start"][:, column] = part.starts
    padding = pieces.documents < 0
    spans["kind"][padding, 0], spans["length"][padding, 0] = Kind.PADDING, pieces.lengths[padding]
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
