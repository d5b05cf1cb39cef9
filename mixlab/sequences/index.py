"""SequenceIndex: which pieces of which documents make up each row. One table for every sequence format."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

FORMAT = 1  # of the files; part of the name under which a table is cached
COLUMNS = ("documents", "starts", "lengths", "row_offsets")


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in reading order; all arrays are [P]. `rows` counts from 0 within what was asked for."""

    rows: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class SequenceIndex:
    """Row -> [(document, start, length)], as compressed sparse rows.

    documents: [pieces] document of the store.   starts, lengths: [pieces] virtual tokens within that document.
    row_offsets: int64 or uint32 [rows + 1]; row r is made of pieces row_offsets[r] up to row_offsets[r + 1].
    dropped_tokens: tokens of the documents that are in no row, by reason.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_offsets: np.ndarray
    dropped_tokens: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of these rows (int64 [R], any order, repeats allowed)."""
        first, last = (np.asarray(self.row_offsets[r], np.int64) for r in (rows, rows + 1))
        counts = last - first
        where = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return Pieces(
            np.repeat(np.arange(len(rows)), counts),
            np.asarray(self.documents[where], np.int64),
            np.asarray(self.starts[where], np.int64),
            np.asarray(self.lengths[where], np.int64),
        )

    def find(self, document: int) -> np.ndarray:
        """int64 [k]: the rows that hold a piece of this document, ascending."""
        found = np.flatnonzero(np.asarray(self.documents) == document)
        return np.unique(np.searchsorted(self.row_offsets, found, side="right") - 1)

    def save(self, directory: Path) -> None:
        """Writes the table; complete or absent, also when several processes write it at once."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=directory.name + ".partial-"))
        try:
            columns = {name: np.ascontiguousarray(getattr(self, name)) for name in COLUMNS}
            for name, column in columns.items():
                column.tofile(partial / f"{name}.bin")
            types = {name: column.dtype.str for name, column in columns.items()}
            described = {"types": types, "dropped_tokens": self.dropped_tokens}
            (partial / "index.json").write_text(json.dumps(described))
            os.rename(partial, directory)
        except OSError:
            if not directory.is_dir():
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, directory: Path) -> "SequenceIndex":
        """The table in `directory`, memory-mapped."""
        described = json.loads((directory / "index.json").read_text())
        columns = {name: _mapped(directory / f"{name}.bin", described["types"][name]) for name in COLUMNS}
        return cls(**columns, dropped_tokens=described["dropped_tokens"])


def _mapped(path: Path, kind: str) -> np.ndarray:
    """A file of numbers as an array. (np.load would parse its header with `ast`, which several threads at once must not do
    in Python 3.11: it can fail there with "AST constructor recursion depth mismatch".)"""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)
