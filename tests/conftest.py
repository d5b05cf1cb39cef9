"""What several test folders share."""

import hashlib

import numpy as np
import pytest


class MemoryStore:
    """A token store in memory, with what sequences and streams use of one."""

    def __init__(self, texts: list[list[int]]):
        self.texts = [np.asarray(text, np.int32) for text in texts]
        self.offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        self.flat = np.concatenate(self.texts) if texts else np.zeros(0, np.int32)
        self.fingerprint = hashlib.sha256(self.flat.tobytes() + self.offsets.tobytes()).hexdigest()

    def read(self, documents, starts, lengths, out):
        at = 0
        for document, start, length in zip(documents, starts, lengths, strict=True):
            first = self.offsets[document] + start
            out[at : at + length] = self.flat[first : first + length]
            at += length


@pytest.fixture(scope="session")
def memory_store():
    """Makes a store of documents whose tokens name their place: token = 100 + 1000 x document + position."""

    def make(lengths):
        return MemoryStore([[100 + 1000 * d + t for t in range(length)] for d, length in enumerate(lengths)])

    return make
