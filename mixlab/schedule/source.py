"""SourceRows: row k of one source, for any k, epoch after epoch."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixlab.errors import UserError
from mixlab.schedule.shuffle import permute, permute_nearby, unpermute
from mixlab.seeds import seed_of
from mixlab.sequences import index
from mixlab.sequences.complete import complete, row_begins
from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces, SequenceIndex

KEPT_EPOCHS = 2  # indices held open: around an epoch boundary a batch reads two
WINDOWS_PER_EPOCH = 16
WINDOW_ROWS = 2**16  # at most


class Cursor(NamedTuple):
    """A place in a source's endless sequence of documents: all before it have been touched, none from it on."""

    epoch: int = 0
    position: int = 0  # in the epoch's document order


class SourceRows:
    """The endless sequence of a source's rows, cut in one way, from a place in its documents on; read at any k.

    Every epoch has a document order of its own, which depends on the source alone, not on how rows are cut nor on what
    stands before documents. Rows are cut
    from the documents in that order and shuffled within windows of a sixteenth of an epoch, so that the rows of a long
    document are not read one after the other, and yet the documents touched by the first k rows are, but for one window,
    the first of the order: `cursor_after` tells where other rows of the same source may begin so that no document is read
    twice in an epoch. Rows that begin with a document ("complete") are more in one order than in another: how many an epoch
    has is counted when it is reached.

    name: of the source; seeds derive from it, so other sources have no influence.
    row_length: tokens a row.   seed: of the run.   cache: folder for indices (None: memory only).
    reordered: (place, seed) of every stage that read on in an order of its own: from that place on, the documents left
        are read in an order given by this seed, and so are those of later epochs.
    Raises UserError when an epoch cannot fill a single row.
    """

    def __init__(
        self,
        name: str,
        documents: Documents,
        format: FormatConfig,
        row_length: int,
        seed: int,
        cache: Path | None,
        start: Cursor = Cursor(),
        reordered: tuple[tuple[Cursor, int], ...] = (),
    ):
        self.name, self.documents, self.format, self.row_length = name, documents, format, row_length
        self.start, self.reordered = start, reordered
        self._seed, self._cache = seed_of(seed, "source", name), cache
        self._by_document = format.kind == "complete"
        self._counted: dict[int, int] = {}  # rows of epochs, where they are not all alike
        self.epoch_tokens = int(documents.lengths.sum())
        most_rows = self.epoch_tokens // row_length
        single = int(np.count_nonzero(documents.lengths == 1)) if self._by_document else 0
        if self.epoch_tokens - single < row_length:
            raise UserError(
                f"sources.{name}: its {len(documents.ids)} training documents hold {self.epoch_tokens} tokens, less than "
                f"one row of {row_length}; use a shorter sequence_length or more text"
            )
        self._window = min(WINDOW_ROWS, -(-most_rows // WINDOWS_PER_EPOCH))
        if not self._by_document:
            self._later_rows = most_rows
            self._first_rows = most_rows if start.position == 0 else self._tokens_from_start() // row_length
        self.index = lru_cache(KEPT_EPOCHS)(self._index)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "index"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.index = lru_cache(KEPT_EPOCHS)(self._index)

    @property
    def rows_per_epoch(self) -> int:
        """Of the first whole epoch."""
        return self._rows_in(self.start.epoch + (self.start.position > 0))

    def pieces(self, ks: np.ndarray) -> Pieces:
        """The pieces of rows `ks` (int64 [R]) of the endless sequence, in that order."""
        epochs, places = self._locate(np.asarray(ks, np.int64))
        parts = []
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            part = self.index(epoch).pieces(self._shuffled(epoch, places[here], permute_nearby))
            parts.append((here[part.rows], part))
        if len(parts) == 1:
            return parts[0][1]
        rows = np.concatenate([rows for rows, _ in parts])
        order = np.argsort(rows, kind="stable")
        columns = [np.concatenate([getattr(p, c) for _, p in parts])[order] for c in ("documents", "starts", "lengths")]
        return Pieces(rows[order], *columns)

    def find(self, document: int, rows: int) -> np.ndarray:
        """int64 [n]: every k below `rows` whose row holds a piece of `document`, ascending."""
        found = []
        for epoch in range(self.start.epoch, self._locate(np.array([max(rows - 1, 0)]))[0][0] + 1):
            places = self._shuffled(epoch, self.index(epoch).find(document), unpermute)
            found.append(places + (0 if epoch == self.start.epoch else self._before(epoch)))
        ks = np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)
        return ks[ks < rows]

    def cursor_after(self, rows: int) -> Cursor:
        """The first place from which no document has been touched by rows 0 … rows - 1. Whole windows count as read."""
        if rows == 0:
            return self.start
        epochs, places = self._locate(np.array([rows - 1]))
        epoch, place = int(epochs[0]), int(places[0])
        touched = min((place // self._window + 1) * self._window, self._rows_in(epoch))
        lengths = self.documents.lengths[self._order(epoch)]
        if self._by_document:
            position = int(row_begins(lengths, self.row_length)[touched])
        else:
            begins = np.concatenate([[0], np.cumsum(lengths)])
            position = int(np.searchsorted(begins, touched * self.row_length))
        position += self._first_position(epoch)
        return Cursor(epoch, position) if position < len(self.documents.ids) else Cursor(epoch + 1, 0)

    def documents_read(self, first: int, last: int) -> np.ndarray:
        """bool [documents of the store]: which have a piece in one of the rows first … last - 1 (at least one)."""
        touched = np.zeros(len(self.documents.store.offsets) - 1, bool)
        (first_epoch, last_epoch), (begin, last_place) = (x.tolist() for x in self._locate(np.array([first, last - 1])))
        for epoch in range(first_epoch, last_epoch + 1):
            end = last_place + 1 if epoch == last_epoch else self._rows_in(epoch)
            index, window = self.index(epoch), self._window
            whole = -(-begin // window) * window, end if end == self._rows_in(epoch) else end // window * window
            if whole[0] < whole[1]:  # whatever the order within a window
                touched[index.documents[index.row_offsets[whole[0]] : index.row_offsets[whole[1]]]] = True
                edges = np.concatenate([np.arange(begin, whole[0]), np.arange(whole[1], end)])
            else:
                edges = np.arange(begin, end)
            touched[index.pieces(self._shuffled(epoch, edges, permute)).documents] = True
            begin = 0
        return touched

    def epochs_read(self, rows: int) -> float:
        """How many passes over the source's text `rows` rows are."""
        if self._by_document:
            return rows / self.rows_per_epoch
        return rows * self.row_length / self.epoch_tokens

    def identity(self) -> dict:
        """What decides the rows: the store's content, the documents chosen, what surrounds them, how rows are cut, order."""
        reordered = {"reordered": [[*place, seed] for place, seed in self.reordered]} if self.reordered else {}
        return reordered | {
            **self.documents.identity(),
            "kind": self.format.kind,
            "row_length": self.row_length,
            "seed": self._seed,
            "start": list(self.start),
        }

    def _locate(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, place within the epoch's rows) of each k."""
        if self._by_document:
            begins = [0]
            while begins[-1] <= ks.max(initial=0):
                begins.append(begins[-1] + self._rows_in(self.start.epoch + len(begins) - 1))
            later = np.searchsorted(begins, ks, side="right") - 1
            return later + self.start.epoch, ks - np.array(begins)[later]
        later, places = np.divmod(ks - self._first_rows, self._later_rows)
        first = ks < self._first_rows
        return np.where(first, 0, later + 1) + self.start.epoch, np.where(first, ks, places)

    def _before(self, epoch: int) -> int:
        """Rows of all epochs before a later one."""
        if self._by_document:
            return sum(self._rows_in(earlier) for earlier in range(self.start.epoch, epoch))
        return self._first_rows + (epoch - self.start.epoch - 1) * self._later_rows

    def _rows_in(self, epoch: int) -> int:
        if self._by_document:
            if epoch not in self._counted:
                self._counted[epoch] = len(self.index(epoch))
            return self._counted[epoch]
        return self._first_rows if epoch == self.start.epoch else self._later_rows

    def _first_position(self, epoch: int) -> int:
        return self.start.position if epoch == self.start.epoch else 0

    def _shuffled(self, epoch: int, places: np.ndarray, how) -> np.ndarray:
        """`places` of an epoch, each moved within its window; by `how`: permute or unpermute."""
        windows, within = np.divmod(places, self._window)
        out = np.empty_like(places)
        for window in np.unique(windows).tolist():
            here = windows == window
            size = min(self._window, self._rows_in(epoch) - window * self._window)
            out[here] = window * self._window + how(within[here], size, self._epoch_seed("rows", epoch, window))
        return out

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's document order from the start on: numbers into `documents.ids`."""
        count = len(self.documents.ids)
        order = permute(np.arange(count), count, self._epoch_seed("documents", epoch))
        for place, seed in self.reordered:
            if place.epoch <= epoch:
                left = order[place.position if place.epoch == epoch else 0 :]
                left[:] = left[permute(np.arange(len(left)), len(left), self._epoch_seed("reordered", seed, epoch))]
        return order[self._first_position(epoch) :]

    def _tokens_from_start(self) -> int:
        return int(self.documents.lengths[self._order(self.start.epoch)].sum())

    def _index(self, epoch: int) -> SequenceIndex:
        """The epoch's rows before they are shuffled; from the cache folder when they are there."""
        path = self._cache / self._fingerprint(epoch) if self._cache else None
        if path and path.is_dir():
            return SequenceIndex.load(path)
        order = self._order(epoch)
        cut = complete if self._by_document else concat_chunk
        table = cut(self.documents.ids[order], self.documents.lengths[order], self.row_length)
        if not path:
            return table
        table.save(path)
        return SequenceIndex.load(path)

    def _epoch_seed(self, what: str, *numbers: int) -> int:
        return seed_of(self._seed, what, *numbers)

    def _fingerprint(self, epoch: int) -> str:
        identity = json.dumps([index.FORMAT, self.identity(), epoch], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:32]
