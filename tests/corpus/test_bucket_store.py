"""Stores in buckets, over the clouds' own protocols, from servers on this machine."""

import gzip
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab import errors, train
from mixlab.corpus import bucket, tokenizer
from mixlab.corpus.bucket import NEAR_BYTES, Bucket
from mixlab.corpus.bucket_store import BucketStore, upload_store
from mixlab.corpus.prepare import prepare
from mixlab.corpus.store import TokenStore
from mixlab.corpus.writer import finalise, write_shard
from mixlab.errors import UserError
from mixlab.training.checkpoint import Checkpoints
from tests.buckets import buckets, troubled
from tests.stores import some_texts, write_config, write_store

URLS = ["s3://texts/web", "gs://texts/some/web"]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A store of three shards, by far too long to be read at once."""
    folder, letters = tmp_path_factory.mktemp("bucket") / "store", tokenizer.load("bytes")
    shards = []
    for index in range(3):
        texts = some_texts(40)
        texts[7] = "long " * NEAR_BYTES
        ids = [f"{index}-{i}" for i in range(40)]
        rows = [{"id": n, "split": "train", "bytes": len(t), "domain": "a"} for n, t in zip(ids, texts, strict=True)]
        shards.append(write_shard(folder, index, letters.encode_batch(texts), rows, ["domain"], letters.vocab_size))
    return finalise(folder, letters, shards, {})


@pytest.fixture(scope="module", autouse=True)
def places(local, tmp_path_factory):
    with buckets(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        for url in URLS:
            upload_store(local.path, url)
        yield


@pytest.mark.parametrize("url", URLS)
def test_the_same_store(local, url):
    store = TokenStore.open(url, verify=True)
    assert isinstance(store, BucketStore) and str(store.path) == url
    assert (len(store), store.n_tokens, store.fingerprint) == (len(local), local.n_tokens, local.fingerprint)
    assert np.array_equal(store.offsets, local.offsets) and store.metadata(5) == local.metadata(5)
    assert np.array_equal(store.documents("train"), local.documents("train"))
    assert store.tokenizer().hash == local.tokenizer().hash
    assert np.array_equal(pickle.loads(pickle.dumps(store))[47], local[47])


@pytest.mark.parametrize("url", URLS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_pieces(local, url, data):
    store = TokenStore.open(url)
    pieces = []
    for document in data.draw(st.lists(st.integers(0, len(local) - 1), max_size=6)):
        length = int(local.offsets[document + 1] - local.offsets[document])
        start = data.draw(st.integers(0, length))
        pieces.append((document, start, data.draw(st.integers(0, length - start))))
    documents, starts, lengths = np.array(pieces, np.int64).reshape(-1, 3).T
    out, expected = np.full((2, lengths.sum()), -1, np.int32)
    store.read(documents, starts, lengths, out)
    local.read(documents, starts, lengths, expected)
    assert np.array_equal(out, expected)
    places = (np.cumsum(lengths[::-1]) - lengths[::-1])[::-1]
    for one, read in ((store, out), (local, expected)):
        one.read(documents, starts, lengths, read, places)
    assert np.array_equal(out, expected)


def test_what_is_not_tokens_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path))
    with troubled(os.environ["AWS_ENDPOINT_URL"]) as (front, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", front)
        for _ in range(2):
            store = TokenStore.open(URLS[0])
            store.metadata(3), store.offsets, store.tokenizer()
        fetched = [path for path in asked if "store.json" not in path and "list-type" not in path]
        assert len(fetched) == len(set(fetched)) == 5  # offsets, tokenizer, metadata of three shards


def test_a_busy_server_is_asked_again(local, monkeypatch):
    with troubled(os.environ["AWS_ENDPOINT_URL"]) as (front, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", front)
        assert np.array_equal(TokenStore.open(URLS[0])[3], local[3])
        assert sum("tokens/00000.bin" in path for path in asked) == 3


def refused(url):
    with pytest.raises(UserError) as told:
        TokenStore.open(url)
    return str(told.value)


def test_places_that_cannot_be_read(tmp_path, monkeypatch):
    assert "no token store (no store.json); make it with tools/prepare_corpus.py" in refused("s3://texts/nothing")
    assert "no token store (no store.json)" in refused("gs://texts/nothing")
    assert "s3://none/x: there is no such bucket" in refused("s3://none/x")
    assert "write gs://BUCKET/FOLDER or s3://BUCKET/FOLDER" in refused("ftp://texts/web")
    with troubled(os.environ["AWS_ENDPOINT_URL"]) as (front, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", front)
        assert "s3://texts/private: access is refused; log in" in refused("s3://texts/private")


def test_damage(local, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path))
    url = "s3://texts/damaged"
    upload_store(local.path, url)
    bucket = Bucket(url)
    whole = bucket.read("tokens/00001.bin")
    bucket.write("tokens/00001.bin", whole[:-7] + b"1234567")
    with pytest.raises(UserError, match=r"tokens/00001.bin is damaged \(its sha256 differs\)"):
        TokenStore.open(url, verify=True)
    bucket.write("tokens/00001.bin", whole[:100])
    with pytest.raises(UserError, match=r"tokens/00001\.bin is missing or cut short"):
        TokenStore.open(url)[60]
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "another"))
    bucket.write("offsets.npy", bucket.read("offsets.npy")[:-1] + b"x")
    with pytest.raises(UserError, match=r"offsets\.npy is damaged"):
        TokenStore.open(url)[60]
    bucket.write("store.json", b"{}")
    with pytest.raises(UserError, match=r"store\.json is damaged"):
        TokenStore.open(url)


@pytest.mark.parametrize("url", ["s3://texts/made", "gs://texts/made"])
def test_prepared_into_a_bucket(tmp_path, monkeypatch, url):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(some_texts(50)))
    inputs = [str(tmp_path / "*.gz")]
    here, _ = prepare(inputs, "bytes", tmp_path / "here", workers=1, show_progress=False)
    there, was_there = prepare(inputs, "bytes", url, workers=1, show_progress=False)
    assert there.fingerprint == here.fingerprint and not was_there and len(there) == 50
    assert not any((tmp_path / "cache" / "outgoing").iterdir())
    assert prepare(inputs, "bytes", url, workers=1, show_progress=False)[1]
    with pytest.raises(UserError, match=f"--output={url}: holds a store made with another tokenizer"):
        prepare(inputs, "bpe:300", url, workers=1, show_progress=False)
    with pytest.raises(UserError, match="there is no such bucket"):
        prepare(inputs, "bytes", "s3://none/made", workers=1, show_progress=False)
    with pytest.raises(UserError, match="holds another store; nothing was changed"):
        upload_store(write_store(tmp_path / "other", some_texts()), url)


def run_that_loses_its_bucket(tmp_path, monkeypatch, capsys):
    """The losses of a run whose bucket is down on the way: told in one message, and gone on with when it answers again."""
    upload_store(tmp_path / "store", "s3://texts/train")
    config = write_config(tmp_path / "down.py", "s3://texts/train", 6)
    command = [f"--config={config}", f"--workdir={tmp_path / 'down'}", "--config.checkpoint.every_steps=2"]
    command += ["--config.loader.prefetch_batches=1", "--config.loader.threads=1", "--allow-change=sources.text.store"]
    honest = Checkpoints.save
    with troubled(os.environ["AWS_ENDPOINT_URL"]) as (front, asked), monkeypatch.context() as patch:
        patch.setattr(bucket, "RETRIES", {"max_retries": 3, "initial_delay": "10ms", "max_delay": "20ms"})
        patch.setenv("AWS_ENDPOINT_URL", front)
        patch.setattr(Checkpoints, "save", lambda *given: (asked.append("down"), honest(*given)))
        assert errors.run(train.main, command) == errors.EXIT_AGAIN
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "s3://texts/train: the bucket does not answer" in told[0]
    assert errors.run(train.main, command) == 0
    lines = (tmp_path / "down" / "metrics.jsonl").read_text().splitlines()
    return [record.get("train/loss") for record in map(json.loads, lines)]


def test_training_from_a_bucket_is_training_from_a_disk(tmp_path, monkeypatch, capsys):
    """The same losses, also when the bucket is down for a while."""
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    store = write_store(tmp_path / "store", some_texts())
    upload_store(store, "gs://texts/train")
    losses = []
    for name, place in ("disk", str(store)), ("bucket", "gs://texts/train"):
        config = write_config(tmp_path / f"{name}.py", place, 6)
        assert errors.run(train.main, [f"--config={config}", f"--workdir={tmp_path / name}"]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([record.get("train/loss") for record in map(json.loads, lines)])
    assert losses[0] == losses[1]
    assert run_that_loses_its_bucket(tmp_path, monkeypatch, capsys) == losses[1]
    plan = json.loads((tmp_path / "bucket" / "plan.json").read_text())
    assert plan["sources"]["text"]["store"] == "gs://texts/train"
