"""The documents of one source as formats see them: special tokens and metadata, then text, then special tokens."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixlab.corpus.store import TokenStore
from mixlab.sequences.metadata import Metadata


@dataclass(frozen=True)
class Documents:
    """A chosen set of a store's documents with the virtual tokens around each one's text.

    A *virtual document* is prefix + metadata + text + suffix. Only the text is on disk. Positions within a virtual document
    are what pieces (`document, start, length`) refer to.

    store: where the text is.   ids: int64 [n], documents of the store, ascending.
    prefix, suffix: token ids put before and after every text.   metadata: what else stands before texts, or None.
    every_piece: a piece that begins after a document's metadata has prefix and metadata of its own. They count in its
        length: the piece (d, start, length) is they, and then the document's tokens from `start` on.
    """

    store: TokenStore
    ids: np.ndarray
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    metadata: Metadata | None = None
    every_piece: bool = False

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]: virtual tokens of each document of `ids`."""
        return self.virtual_lengths(self.ids)

    def text_lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P]: text tokens of the given documents of the store."""
        offsets = self.store.offsets
        return np.asarray(offsets[documents + 1]) - np.asarray(offsets[documents])

    def virtual_lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P]: virtual tokens of the given documents of the store."""
        around = self.text_lengths(documents) + len(self.prefix) + len(self.suffix)
        return around if self.metadata is None else around + self.metadata.lengths(documents)

    def identity(self) -> dict:
        """What decides them: the store's content, the documents chosen, what surrounds them. JSON types."""
        found = {
            "store": self.store.fingerprint,
            "documents": hashlib.sha256(self.ids.tobytes()).hexdigest(),
            "around": [list(self.prefix), list(self.suffix)],
        }
        return found if self.metadata is None else found | {"metadata": self.metadata.fingerprint}

    def heads(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P]: tokens of prefix and metadata of documents that have metadata, else 0."""
        if self.metadata is None:
            return np.zeros(len(documents), np.int64)
        lengths = self.metadata.lengths(documents)
        return np.where(lengths > 0, lengths + len(self.prefix), 0)

    def repeated(self, documents: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """int64 [P]: tokens of prefix and metadata that a piece has although it begins after them."""
        return self.heads(documents) * (self.every_piece & (starts > 0))
