import numpy as np
import pytest

from mixlab.corpus import tokenizer
from mixlab.corpus.filters import matches
from mixlab.corpus.writer import finalise, write_shard
from mixlab.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder, letters = tmp_path_factory.mktemp("store"), tokenizer.load("bytes")
    shards, texts = [], [f"text number {i}" for i in range(8)]
    for part in range(2):  # two shards: columns come in chunks
        rows = [
            {
                "id": str(i),
                "split": "train",
                "bytes": len(texts[i]) + i,
                "licence": [None, "mit", "gpl"][i % 3],
                "score": None if i == 5 else str(i / 4),
            }
            for i in range(4 * part, 4 * part + 4)
        ]
        tokens = letters.encode_batch(texts[4 * part : 4 * part + 4])
        shards.append(write_shard(folder, part, tokens, rows, ["licence", "score"], letters.vocab_size))
    return finalise(folder, letters, shards, {})


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, range(8)),
        ({"licence": "mit"}, [1, 4, 7]),
        ({"licence": ["mit", "gpl"]}, [1, 2, 4, 5, 7]),
        ({"score": {"min": 1.0}}, [4, 6, 7]),
        ({"score": {"min": 0.5, "max": 1}}, [2, 3, 4]),
        ({"bytes": {"max": 16}}, [0, 1, 2, 3]),
        ({"licence": "mit", "score": {"min": 1}}, [4, 7]),
        ({"licence": "none"}, []),
    ],
)
def test_conditions(store, where, expected):
    assert np.flatnonzero(matches(store, where, "w")).tolist() == list(expected)


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ({"license": "mit"}, "w.license.*licence"),
        ({"licence": []}, "at least one value"),
        ({"licence": {"min": 1}}, "need numbers"),
        ({"score": {"least": 1}}, "give min, max or both"),
        ({"bytes": "many"}, "not of the column's type"),
    ],
)
def test_conditions_that_cannot_be(store, where, told):
    with pytest.raises(UserError, match=told):
        matches(store, where, "w")
