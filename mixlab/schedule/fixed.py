"""FixedRows: rows that are cut once for all epochs, of one source; every epoch reads them in an order of its own."""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import numpy as np

from mixlab.schedule.shuffle import permute, permute_nearby, unpermute
from mixlab.seeds import seed_of
from mixlab.sequences.best_fit import best_fit
from mixlab.sequences.decompose import bucket_lengths, decompose
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import FORMAT, Pieces, SequenceIndex


class FixedCut:
    """All rows of one source, by their length: of one length when they are packed (best_fit), of each bucket's when
    documents are decomposed.

    name: of the source; seeds derive from it.   row_length: of the longest rows.   seed: of the run.
    cache: folder for indices (None: memory only).
    """

    def __init__(
        self, name: str, documents: Documents, format: FormatConfig, row_length: int, seed: int, cache: Path | None
    ):
        self.name, self.documents, self.format, self.row_length = name, documents, format, row_length
        self.seed, self._cache = seed_of(seed, "source", name), cache
        decomposed = format.kind == "decompose"
        self.lengths = bucket_lengths(format.min_length, row_length) if decomposed else [row_length]
        self.epoch_tokens = int(documents.lengths.sum())

    @cached_property
    def indices(self) -> dict[int, SequenceIndex]:
        """Row length -> rows before they are shuffled, the shortest first; from the cache folder when they are there."""
        paths = (
            {length: self._cache / f"{self._fingerprint}-{length}" for length in self.lengths} if self._cache else {}
        )
        if not paths or not all(path.is_dir() for path in paths.values()):
            made = self._cut()
            for length, path in paths.items():
                made[length].save(path)
            if not paths:
                return made
        return {length: SequenceIndex.load(path) for length, path in paths.items()}

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "indices"}

    def tokens(self) -> dict[int, int]:
        """Row length -> positions of all rows of that length."""
        return {length: length * len(index) for length, index in self.indices.items()}

    def dropped_tokens(self) -> dict[str, int]:
        """Tokens of the documents that are in no row, by reason."""
        return {reason: n for index in self.indices.values() for reason, n in index.dropped_tokens.items()}

    def padded_tokens(self) -> int:
        """Positions of all rows that no document fills."""
        return sum(self.tokens().values()) - sum(int(i.lengths.sum(dtype=np.int64)) for i in self.indices.values())

    def identity(self) -> dict:
        """What decides the rows: the store's content, the documents chosen, what surrounds them, how rows are cut."""
        return {
            **self.documents.identity(),
            "cut": list(self.format.cut(self.row_length)),
            "seed": self.seed,
        }

    def _cut(self) -> dict[int, SequenceIndex]:
        ids, lengths = self.documents.ids, self.documents.lengths
        if self.format.kind == "decompose":
            seed = seed_of(self.seed, "decompose")
            heads = self.documents.heads(ids) if self.documents.every_piece else None
            return decompose(ids, lengths, self.format.variant, self.format.min_length, self.row_length, seed, heads)
        order = permute(np.arange(len(ids)), len(ids), seed_of(self.seed, "documents"))
        return {self.row_length: best_fit(ids[order], lengths[order], self.row_length, self.format.long_documents)}

    @property
    def _fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, self.identity()], sort_keys=True).encode()).hexdigest()[:32]


class FixedRows:
    """The endless sequence of the rows of one length of a cut, read at any k: all of them, shuffled, then all of them
    again in another order, and so on. order: seed of an order of the stage's own, or None."""

    def __init__(self, cut: FixedCut, row_length: int, order: int | None = None):
        self.cut, self.row_length, self.order = cut, row_length, order
        self.documents = cut.documents

    @property
    def index(self) -> SequenceIndex:
        return self.cut.indices[self.row_length]

    def pieces(self, ks: np.ndarray) -> Pieces:
        """The pieces of rows `ks` (int64 [R]) of the endless sequence, in that order."""
        epochs, places = np.divmod(np.asarray(ks, np.int64), len(self.index))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = permute_nearby(places[here], len(self.index), self._seed(epoch))
        return self.index.pieces(rows)

    def find(self, document: int, rows: int) -> np.ndarray:
        """int64 [n]: every k below `rows` whose row holds a piece of `document`, ascending."""
        held, count = self.index.find(document), len(self.index)
        epochs = range(-(-rows // count) if len(held) else 0)
        found = [epoch * count + unpermute(held, count, self._seed(epoch)) for epoch in epochs]
        ks = np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
        return ks[ks < rows]

    def documents_read(self, first: int, last: int) -> np.ndarray:
        """bool [documents of the store]: which have a piece in one of the rows first … last - 1."""
        touched = np.zeros(len(self.documents.store.offsets) - 1, bool)
        if last - first >= 2 * len(self.index) - 1:  # a whole epoch, wherever it begins
            touched[self.index.documents] = True
        else:
            touched[self.pieces(np.arange(first, last)).documents] = True
        return touched

    def identity(self) -> dict:
        """What decides the rows and their order."""
        return self.cut.identity() | {"row_length": self.row_length, "order": self.order}

    def _seed(self, epoch: int) -> int:
        return seed_of(self.cut.seed, "rows", self.row_length, epoch, *(() if self.order is None else (self.order,)))
