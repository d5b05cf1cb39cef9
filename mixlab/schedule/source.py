"""SourceRows: row k of one source, for any k, epoch after epoch."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from mixlab.errors import UserError
from mixlab.schedule.shuffle import permute, unpermute
from mixlab.seeds import seed_of
from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces, SequenceIndex

KEPT_EPOCHS = 2  # indices held open: around an epoch boundary a batch reads two


class SourceRows:
    """The endless sequence of a source's rows, read at any place.

    Every epoch has a document order of its own, from which rows are cut, and a row order of its own, so that the rows of a
    long document are not read one after the other. Within an epoch no row is served twice.

    name: of the source; seeds derive from it, so other sources have no influence.
    row_length: tokens a row.   seed: of the run.   cache: folder for indices (None: memory only).
    Raises UserError when the source cannot fill a single row.
    """

    def __init__(
        self, name: str, documents: Documents, format: FormatConfig, row_length: int, seed: int, cache: Path | None
    ):
        self.name, self.documents, self.format, self.row_length = name, documents, format, row_length
        self._seed, self._cache = seed_of(seed, "source", name), cache
        self.epoch_tokens = int(documents.lengths.sum())
        self.rows_per_epoch = self.epoch_tokens // row_length
        if not self.rows_per_epoch:
            raise UserError(
                f"sources.{name}: its {len(documents.ids)} training documents hold {self.epoch_tokens} tokens, less than "
                f"one row of {row_length}; use a shorter sequence_length or more text"
            )
        self.index = lru_cache(KEPT_EPOCHS)(self._index)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "index"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.index = lru_cache(KEPT_EPOCHS)(self._index)

    def _index(self, epoch: int) -> SequenceIndex:
        """The epoch's rows before they are shuffled; from the cache folder when they are there."""
        path = self._cache / self._fingerprint(epoch) if self._cache else None
        if path and path.is_dir():
            return SequenceIndex.load(path)
        order = permute(np.arange(len(self.documents.ids)), len(self.documents.ids), self._epoch_seed("documents", epoch))
        index = concat_chunk(self.documents.ids[order], self.documents.lengths[order], self.row_length)
        if not path:
            return index
        index.save(path)
        return SequenceIndex.load(path)

    def pieces(self, ks: np.ndarray) -> Pieces:
        """The pieces of rows `ks` (int64 [R]) of the endless sequence, in that order."""
        epochs, places = np.divmod(ks, self.rows_per_epoch)
        parts = []
        for epoch in np.unique(epochs):
            here = np.flatnonzero(epochs == epoch)
            seed = self._epoch_seed("rows", int(epoch))
            part = self.index(int(epoch)).pieces(permute(places[here], self.rows_per_epoch, seed))
            parts.append((here[part.rows], part))
        if len(parts) == 1:
            return parts[0][1]
        rows = np.concatenate([rows for rows, _ in parts])
        order = np.argsort(rows, kind="stable")
        columns = [np.concatenate([getattr(p, c) for _, p in parts])[order] for c in ("documents", "starts", "lengths")]
        return Pieces(rows[order], *columns)

    def find(self, document: int, epoch: int) -> np.ndarray:
        """int64 [n]: the k of every row of this epoch that holds a piece of `document`, ascending."""
        rows = self.index(epoch).find(document)
        places = unpermute(rows, self.rows_per_epoch, self._epoch_seed("rows", epoch))
        return np.sort(places) + epoch * self.rows_per_epoch

    def identity(self) -> dict:
        """What decides the rows: the store's content, the documents chosen, what surrounds them, how rows are cut, the order."""
        return {
            "store": self.documents.store.fingerprint,
            "documents": hashlib.sha256(np.ascontiguousarray(self.documents.ids)).hexdigest(),
            "around": [list(self.documents.prefix), list(self.documents.suffix)],
            "kind": self.format.kind,
            "row_length": self.row_length,
            "seed": self._seed,
        }

    def _epoch_seed(self, what: str, epoch: int) -> int:
        return seed_of(self._seed, what, epoch)

    def _fingerprint(self, epoch: int) -> str:
        return hashlib.sha256(json.dumps([self.identity(), epoch], sort_keys=True).encode()).hexdigest()[:32]
