"""Held-out documents as fixed rows: chosen, cut and packed once, the same for every model of a tokenizer."""

from dataclasses import dataclass

import numpy as np

from mixlab.corpus.store import TokenStore
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces
from mixlab.stream import Batch, render

ISOLATED = FormatConfig(bos=False, eos=True)  # documents never see one another, whatever the model was trained with


@dataclass(frozen=True)
class EvaluationSet:
    """One domain's held-out text.

    rows: the five [R, L] arrays of a batch; a loss weight is 1 exactly where a token of text is scored: all of a document
        but its first token, which nothing precedes (unless there is a BOS).
    documents: int32 [R, L], the number (from 0) of the document that the position belongs to.
    bytes: int32 [R, L], UTF-8 bytes of the scored token, 0 where none is.
    document_ids: int64 [documents], which documents of the store they are.
    lengths: int64 [documents], tokens of each whole document with its BOS and EOS, of which the rows may hold less.
    """

    name: str
    rows: Batch
    documents: np.ndarray
    bytes: np.ndarray
    document_ids: np.ndarray
    lengths: np.ndarray


def make_set(
    name: str, store: TokenStore, ids: np.ndarray, tokenizer: Tokenizer, bos: bool, length: int, tokens: int
) -> EvaluationSet | None:
    """About `tokens` tokens of the documents `ids`, in an order given by the set's name alone.

    Documents are cut every `length` tokens, and pieces put side by side where they fit; the last position of a piece is
    scored on the token after the cut. A document contributes at most an eighth of `tokens` (at least one row). None if
    nothing can be scored."""
    prefix = (tokenizer.bos_id,) if bos else ()
    ids = ids[permute(np.arange(len(ids)), len(ids), seed_of("evaluation", name))] if len(ids) else ids
    documents = Documents(store, ids, prefix, (tokenizer.eos_id,))
    counted = np.minimum(documents.lengths, max(length, tokens // 8))
    chosen = np.searchsorted(np.cumsum(counted), tokens) + 1
    ids, counted = ids[:chosen], counted[:chosen]
    counts = -(-counted // length)
    which = np.repeat(np.arange(len(ids)), counts)
    starts = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    pieces, rows = pack(ids[which], starts, np.minimum(counted[which] - starts, length), length)
    batch = render(pieces, documents, ISOLATED, rows, length, pad=tokenizer.pad_id or 0)
    return as_set(name, batch, ids, documents, tokenizer)


def as_set(
    name: str, batch: Batch, ids: np.ndarray, documents: Documents, tokenizer: Tokenizer
) -> EvaluationSet | None:
    """The set of a batch of the documents `ids`, in which all text is scored that bears loss; None if there is none."""
    owner = np.zeros(batch.tokens.shape, np.int32)
    number = {int(d): i for i, d in enumerate(ids)}
    for span in batch.spans:
        if span["document"] >= 0:
            owner[span["row"], span["offset"] : span["offset"] + span["length"]] = number[int(span["document"])]
    sizes = tokenizer.byte_lengths()[batch.targets] * (batch.loss_weights > 0)
    scored = (sizes > 0).astype(np.float32)
    if not scored.any():
        return None
    arrays = batch.arrays() | {"loss_weights": scored}
    rows_and_spans = Batch(**arrays, provenance=batch.provenance)
    lengths = documents.virtual_lengths(ids)
    return EvaluationSet(name, rows_and_spans, owner, sizes.astype(np.int32), ids, lengths)


def pack(ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, length: int) -> tuple[Pieces, int]:
    """(pieces, rows): each of at most `length` tokens, whole in the first row with room for it of the last few opened. All
    int [P]: a piece's document, where it begins there, its tokens."""
    row_of, room = [], []
    for size in lengths.tolist():
        row = next((r for r in range(max(0, len(room) - 8), len(room)) if room[r] >= size), len(room))
        if row == len(room):
            room.append(length)
        room[row] -= size
        row_of.append(row)
    order = np.argsort(row_of, kind="stable")
    return Pieces(*(np.asarray(column, np.int64)[order] for column in (row_of, ids, starts, lengths))), len(room)
