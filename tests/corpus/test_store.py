"""TokenStore: what is written is what is read, piece by piece; damage is told by file."""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.corpus import store as S
from mixlab.corpus import tokenizer as T
from mixlab.corpus import writer as W
from mixlab.errors import UserError

BYTES = T.load("bytes")


def build(directory, lengths_by_shard, seed=0, tokenizer=BYTES):
    """A store of random tokens; returns it and its documents."""
    rng = np.random.Generator(np.random.PCG64(seed))
    summaries, documents = [], []
    for index, lengths in enumerate(lengths_by_shard):
        tokens = [rng.integers(0, 256, n).astype(np.int32) for n in lengths]
        rows = [
            {
                "id": f"d{len(documents) + i}",
                "split": "validation" if (len(documents) + i) % 4 == 1 else "train",
                "bytes": n,
                "url": None if i % 2 else f"https://example.org/{index}/{i}",
            }
            for i, n in enumerate(lengths)
        ]
        documents += tokens
        summaries.append(W.write_shard(directory, index, tokens, rows, ["url"], tokenizer.vocab_size))
    return W.finalise(directory, tokenizer, summaries, {"made": "for a test"}), documents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build(tmp_path_factory.mktemp("stores") / "three", [[5, 1, 300], [17], [2, 64, 9, 1]])


def test_documents_come_back(made):
    store, documents = made
    assert (len(store), store.n_documents, store.n_tokens) == (8, 8, 399)
    assert store.dtype == np.dtype("<u2")
    assert store.offsets.dtype == np.int64
    assert store.offsets.tolist() == [0, 5, 6, 306, 323, 325, 389, 398, 399]
    for d, tokens in enumerate(documents):
        assert store[d].dtype == np.int32
        np.testing.assert_array_equal(store[d], tokens)
    with pytest.raises(IndexError):
        store[8]
    with pytest.raises(IndexError):
        store[-1]


@settings(max_examples=60)
@given(data=st.data())
def test_read_is_the_concatenation_of_its_pieces(made, data):
    store, documents = made
    pieces = []
    for d in data.draw(st.lists(st.integers(0, 7), max_size=12)):
        start = data.draw(st.integers(0, len(documents[d])))
        pieces.append((d, start, data.draw(st.integers(0, len(documents[d]) - start))))
    out = np.full(sum(length for _, _, length in pieces) + 2, -7, np.int32)
    columns = np.array(pieces, np.int32).reshape(-1, 3).T
    store.read(*columns, out[1:-1])
    expected = [documents[d][start : start + length] for d, start, length in pieces]
    np.testing.assert_array_equal(out[1:-1], np.concatenate([[], *expected]))
    assert out[0] == out[-1] == -7
    lengths = columns[
        2
    ]  # … and each piece goes to a place of its own: here the last comes first, one token lies between
    places = 1 + (np.cumsum(lengths[::-1] + 1) - lengths[::-1] - 1)[::-1]
    out = np.full(lengths.sum() + len(lengths) + 1, -7, np.int32)
    store.read(*columns, out, places)
    np.testing.assert_array_equal(out, np.concatenate([[-7], *([*one, -7] for one in expected[::-1])]))


def test_read_refuses_what_is_not_there(made):
    store, _ = made
    out = np.empty(5, np.int32)
    for document, start, length in [(0, 1, 5), (0, -1, 5), (8, 0, 5), (-1, 0, 5), (2, 300, 5), (2, 6, -1)]:
        with pytest.raises(IndexError):
            store.read(np.array([document]), np.array([start]), np.array([length]), out)
    with pytest.raises(ValueError):
        store.read(np.array([2]), np.array([0]), np.array([6]), out)
    with pytest.raises(ValueError):
        store.read(np.array([], int), np.array([], int), np.array([], int), out)
    for place in (-1, 3):
        with pytest.raises(IndexError, match="outside the 5 tokens"):
            store.read(np.array([2]), np.array([0]), np.array([3]), out, np.array([place]))


def test_metadata(made):
    store, _ = made
    assert store.column_names == ["id", "split", "bytes", "url"]
    assert store.metadata(3) == {
        "id": "d3",
        "split": "train",
        "bytes": 17,
        "url": "https://example.org/1/0",
    }
    assert store.metadata(5)["url"] is None
    assert store.column("bytes").to_pylist() == [5, 1, 300, 17, 2, 64, 9, 1]
    assert store.documents("validation").tolist() == [1, 5]
    assert store.documents("train").tolist() == [0, 2, 3, 4, 6, 7]
    assert store.documents("train").dtype == np.int64
    assert store.manifest["splits"]["validation"] == {"documents": 2, "tokens": 65, "bytes": 65}
    with pytest.raises(UserError, match=r"'ulr'.*url"):
        store.column("ulr")
    with pytest.raises(UserError, match="train and validation"):
        store.documents("test")


def test_another_process_reads_a_pickled_store(made, tmp_path):
    store, documents = made
    store[2]  # opens the maps, which must not travel
    pickled = pickle.dumps(store)
    assert len(pickled) < 20_000
    (tmp_path / "store.pickle").write_bytes(pickled)
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb'))[2].tolist())"
    command = [sys.executable, "-c", code, tmp_path / "store.pickle"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(shown.stdout) == documents[2].tolist()


def test_tokenizer_travels_within_the_store(tmp_path):
    trained = T.train_bpe(["some text to merge " * 20], 300)
    renamed = T.from_definition(
        "own", trained.definition.replace("<|eos|>", "<stop>").replace("<|pad|>", "<hole>"), eos="<stop>"
    )
    store, _ = build(tmp_path / "s", [[3, 4]], tokenizer=renamed)
    assert store.tokenizer() == renamed
    assert store.tokenizer_hash == renamed.hash
    assert store.vocab_size == renamed.vocab_size
    (tmp_path / "s" / "tokenizer.json").write_text(BYTES.definition.replace("<|eos|>", "<stop>"))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        open_unchecked(tmp_path / "s").tokenizer()


def open_unchecked(path):
    return S.TokenStore(path, json.loads((path / "store.json").read_text()))


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    tokens = [np.array([70_000, 1, 65_536], np.int32)]
    rows = [{"id": "a", "split": "train", "bytes": 3}]
    summary = W.write_shard(tmp_path, 0, tokens, rows, [], 70_001)
    raw = np.fromfile(tmp_path / summary["tokens"]["file"], "<u4")
    assert raw.tolist() == [70_000, 1, 65_536]
    assert [S.token_dtype(v).itemsize for v in (65_536, 65_537)] == [2, 4]


def test_fingerprint_is_that_of_the_content(tmp_path):
    first = build(tmp_path / "a", [[5, 1], [9]])[0].fingerprint
    assert build(tmp_path / "b", [[5, 1], [9]])[0].fingerprint == first
    assert build(tmp_path / "c", [[5, 1], [9]], seed=1)[0].fingerprint != first
    assert build(tmp_path / "d", [[4, 2], [9]])[0].fingerprint != first
    longer = T.train_bpe(["aa"], 300)
    assert build(tmp_path / "e", [[5, 1], [9]], tokenizer=longer)[0].fingerprint != first


DAMAGE = ["tokens/00001.bin", "offsets.npy", "metadata/00000.arrow", "tokenizer.json"]


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_names_the_file(tmp_path, name):
    build(tmp_path / "s", [[50, 10], [90]])
    file = tmp_path / "s" / name
    whole = file.read_bytes()
    S.TokenStore.open(tmp_path / "s", verify=True)
    file.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=name):
        S.TokenStore.open(tmp_path / "s")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    S.TokenStore.open(tmp_path / "s")  # sizes alone do not tell
    with pytest.raises(UserError, match=f"{name}.*sha256"):
        S.TokenStore.open(tmp_path / "s", verify=True)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        S.TokenStore.open(tmp_path / "s")


def test_what_is_not_a_store(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        S.TokenStore.open(tmp_path / "absent")
    with pytest.raises(UserError, match="not a token store"):
        S.TokenStore.open(tmp_path)
    with pytest.raises(UserError, match="write gs://BUCKET/FOLDER"):
        S.TokenStore.open("ftp://bucket/corpus")
    (tmp_path / "preparing").mkdir()
    with pytest.raises(UserError, match="unfinished"):
        S.TokenStore.open(tmp_path)
    for damaged in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "store.json").write_text(damaged)
        with pytest.raises(UserError, match=r"store\.json is damaged"):
            S.TokenStore.open(tmp_path)
    build(tmp_path / "s", [[3]])
    manifest = json.loads((tmp_path / "s" / "store.json").read_text())
    (tmp_path / "s" / "store.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="format version 99, this mixlab reads 1"):
        S.TokenStore.open(tmp_path / "s")


def test_a_write_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    W.write_file(tmp_path, "a.bin", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(W.os, "fsync", full)
    with pytest.raises(OSError):
        W.write_file(tmp_path, "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_thread_that_reads_while_another_opens_the_files_reads_the_same(made, monkeypatch):
    store, documents = S.TokenStore.open(made[0].path), made[1]
    existing, read = store._existing, []

    def meanwhile(name):
        if name == store.manifest["shards"][1]["file"] and not read:  # one of three shards is open by now
            read.append(None)
            with ThreadPoolExecutor(1) as other:
                read[0] = other.submit(store.__getitem__, 6).result(timeout=60)
        return existing(name)

    monkeypatch.setattr(store, "_existing", meanwhile)
    np.testing.assert_array_equal(store[3], documents[3])
    np.testing.assert_array_equal(read[0], documents[6])
