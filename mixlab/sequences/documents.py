"""The documents of one source as formats see them: special tokens, then text, then special tokens."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixlab.corpus.store import TokenStore


@dataclass(frozen=True)
class Documents:
    """A chosen set of a store's documents with the virtual tokens around each one's text.

    A *virtual document* is prefix + text + suffix. Only the text is on disk. Positions within a virtual document are what
    pieces (`document, start, length`) refer to.

    store: where the text is.   ids: int64 [n], documents of the store, ascending.
    prefix, suffix: token ids put before and after every text.
    """

    store: TokenStore
    ids: np.ndarray
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n]: virtual tokens of each document of `ids`."""
        return self.text_lengths(self.ids) + len(self.prefix) + len(self.suffix)

    def text_lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P]: text tokens of the given documents of the store."""
        offsets = self.store.offsets
        return np.asarray(offsets[documents + 1]) - np.asarray(offsets[documents])

    def virtual_lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P]: virtual tokens of the given documents of the store."""
        return self.text_lengths(documents) + len(self.prefix) + len(self.suffix)
