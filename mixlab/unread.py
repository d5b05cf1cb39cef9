"""Text of the run's own sources that the run does not read: for experiments that need fresh text of the same kind."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mixlab.batch import lay_out
from mixlab.errors import UserError
from mixlab.inject.ngrams import Ngrams
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of
from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import SequenceIndex
from mixlab.stream import Stream


class _Source(NamedTuple):
    """A source's unread documents, end to end, cut into rows."""

    documents: Documents
    index: SequenceIndex
    share: float


class Unread:
    """Fresh rows: documents that no step of the run touches, a row of one source, sources in proportion to the tokens that
    the run reads of them (of those that are read whole there is nothing).

    Every purpose of every experiment draws rows of its own, by name; what others take changes them only where they meet, so
    all must be asked for in the same order in every run: `groups` of all experiments, by name, whether enabled or not.

    kept_out: strings that no row may hold.
    """

    kept_out: tuple[Ngrams, ...] = ()

    def __init__(self, stream: Stream, documents: Callable[[str, FormatConfig], Documents], seed: int):
        self._stream, self._documents, self._seed = stream, documents, seed
        self._length = int(stream.grid.lengths.max())
        self._given: dict[tuple[str, str], np.ndarray] = {}

    def rows(self, experiment: str, count: int, length: int, purpose: str) -> np.ndarray:
        """int32 [count, length]; see Material.unseen."""
        in_a_cell = self._length // length
        cells = self._cells_of(experiment, -(-count // in_a_cell), purpose, f"{count} rows of {length} tokens")
        return self._tokens(cells)[:, : in_a_cell * length].reshape(-1, length)[:count]

    def _tokens(self, cells: np.ndarray) -> np.ndarray:
        """int32 [len(cells), longest row]."""
        rows = np.empty((len(cells), self._length), np.int32)
        for number, source in enumerate(self._sources):
            here = np.flatnonzero(self._cells[cells, 0] == number)
            if len(here):
                pieces = source.index.pieces(self._cells[cells[here], 1])
                rows[here] = lay_out(pieces, source.documents, FormatConfig(), len(here), self._length).tokens[:, :-1]
        return rows

    def _cells_of(self, experiment: str, count: int, purpose: str, wanted: str) -> np.ndarray:
        """int64 [count]: rows of `_cells` that are this purpose's alone."""
        total = len(self._cells)
        taken = np.zeros(total, bool)
        for other, cells in self._given.items():
            taken[cells] = taken[cells] | (other != (experiment, purpose))
        drawn = permute(np.arange(total), max(total, 1), seed_of(self._seed, "unread", experiment, purpose))
        mine = self._first_allowed(drawn[~taken[drawn]], count)
        if len(mine) < count:
            raise UserError(
                f"experiments.{experiment} needs {wanted} of text that the run does not read ({purpose}); of {self._length} tokens "
                f"each, {len(mine)} are left. Train for fewer steps, ask for less, or give the sources more text"
            )
        self._given[experiment, purpose] = mine
        return mine

    def _first_allowed(self, cells: np.ndarray, count: int) -> np.ndarray:
        """The first `count` of the cells without any string that is kept out; fewer where there are no more."""
        if not self.kept_out:
            return cells[:count]
        found, first = np.zeros(0, np.int64), 0
        while len(found) < count and first < len(cells):
            some = cells[first : first + count - len(found)]
            first += len(some)
            rows = self._tokens(some)
            holding = np.any([strings.within(rows) for strings in self.kept_out], axis=0)
            found = np.concatenate([found, some[~holding]])
        return found

    @cached_property
    def _sources(self) -> list[_Source]:
        touched: dict[str, np.ndarray] = {}  # by store: two sources may read the same
        tokens: dict[str, int] = {}
        for number, stage in enumerate(self._stream.stages):
            for name, count in stage.tokens_of().items():
                tokens[name] = tokens.get(name, 0) + count
            for store, read in self._stream.documents_read(number).items():
                touched[store] = read | touched[store] if store in touched else read
        formats = {name: stage.format for stage in reversed(self._stream.stages) for name in stage.shares}
        found = []
        for name in self._stream.names:
            whole = self._documents(name, formats[name])
            read = touched.get(whole.store.fingerprint)
            left = whole.ids if read is None else whole.ids[~read[whole.ids]]
            left = left[permute(np.arange(len(left)), max(len(left), 1), seed_of(self._seed, "unread", name))]
            documents = Documents(whole.store, left, whole.prefix, whole.suffix)
            if tokens[name] and documents.lengths.sum() >= self._length:
                index = concat_chunk(left, documents.lengths, self._length)
                found.append(_Source(documents, index, tokens[name] / self._stream.grid.tokens))
        return found

    @cached_property
    def _cells(self) -> np.ndarray:
        """int64 [cells, 2]: (source, row), as many of each source as its share lets all go on together."""
        if not self._sources:
            return np.zeros((0, 2), np.int64)
        least = min(len(source.index) / source.share for source in self._sources)
        counts = [int(least * source.share) for source in self._sources]
        return np.array([(number, row) for number, count in enumerate(counts) for row in range(count)]).reshape(-1, 2)
