"""What several test folders share."""

import hashlib
import os

import hypothesis
import numpy as np
import pytest

from tests.devices import PATIENCE

os.environ.setdefault("XLA_FLAGS", PATIENCE)  # before jax starts, here and in the processes of tests

# A busy machine is no reason to fail.
hypothesis.settings.register_profile(
    "unhurried",
    hypothesis.settings.default,
    deadline=None,
    suppress_health_check=[*hypothesis.settings.default.suppress_health_check, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("unhurried")


class MemoryStore:
    """A token store in memory, with what sequences and streams use of one."""

    def __init__(self, texts: list[list[int]]):
        self.texts = [np.asarray(text, np.int32) for text in texts]
        self.offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        self.flat = np.concatenate(self.texts) if texts else np.zeros(0, np.int32)
        self.fingerprint = hashlib.sha256(self.flat.tobytes() + self.offsets.tobytes()).hexdigest()

    def read(self, documents, starts, lengths, out, places=None):
        places = np.cumsum(lengths) - lengths if places is None else places
        for document, start, length, at in zip(documents, starts, lengths, places, strict=True):
            first = self.offsets[document] + start
            out[at : at + length] = self.flat[first : first + length]


@pytest.fixture(scope="session")
def trunk(tmp_path_factory):
    """The folder of a small run of 20 steps with checkpoints of steps 7, 14 and 20; beside it its store, config.py and
    a cache. Not to be changed."""
    from mixlab import errors, train
    from tests.stores import some_texts, write_config, write_store

    place = tmp_path_factory.mktemp("trunk")
    config = write_config(place / "config.py", write_store(place / "store", some_texts()), 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(place / "cache"))
        arguments = [f"--config={config}", f"--workdir={place / 'trunk'}", "--config.checkpoint.keep_last=9"]
        assert errors.run(train.main, arguments) == 0
    return place / "trunk"


@pytest.fixture(scope="session")
def memory_store():
    """Makes a store of documents whose tokens name their place: token = 100 + 1000 x document + position."""

    def make(lengths):
        return MemoryStore([[100 + 1000 * d + t for t in range(length)] for d, length in enumerate(lengths)])

    return make
