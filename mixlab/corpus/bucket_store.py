"""A TokenStore in a bucket: tokens are read by ranges, all else is copied to the cache folder once."""

import hashlib
from pathlib import Path

import numpy as np

from mixlab.corpus.bucket import COPIED_BYTES, Bucket
from mixlab.corpus.cache import cache_folder
from mixlab.corpus.store import TokenStore, files_of, parse_manifest, sha256_of_file
from mixlab.errors import UserError


class BucketStore(TokenStore):
    """As TokenStore; `path` is the URL. Offsets, metadata and tokenizer are kept below the cache folder by the store's
    fingerprint, and compared with their checksums when they arrive."""

    def __init__(self, path: str, manifest: dict):
        super().__init__(path, manifest)  # type: ignore[arg-type]
        self._bucket = Bucket(path)
        self._files = {entry["file"]: entry for entry in files_of(manifest)}

    @classmethod
    def connect(cls, url: str, verify: bool = False) -> "BucketStore":
        """Opens the store at `url`; with `verify`, all of it is read and compared with its checksums.

        UserError: no such bucket, no right to read it, no store there, a file that is missing or damaged."""
        bucket = Bucket(url)
        text = bucket.read("store.json")
        if text is None:
            bucket.names("store.json")  # says so when the bucket itself is not there
            raise UserError(
                f"store {url}: there is no token store (no store.json); make it with tools/prepare_corpus.py --output={url}"
            )
        store = cls(bucket.url, parse_manifest(url, text.decode(errors="replace")))
        store._check_files(verify)
        return store

    def _check_files(self, verify: bool) -> None:
        if missing := sorted(self._files.keys() - set(self._bucket.names())):
            raise UserError(f"store {self.path}: {missing[0]} is missing; copy the store there again")
        for shard in self.manifest["shards"] if verify else ():
            digest = hashlib.sha256()
            for first in range(0, shard["size"], COPIED_BYTES):
                part = (shard["file"], first, min(first + COPIED_BYTES, shard["size"]))
                digest.update(self._bucket.read_ranges([part])[0])
            if digest.hexdigest() != shard["sha256"]:
                raise UserError(
                    f"store {self.path}: {shard['file']} is damaged (its sha256 differs); copy it there again"
                )

    def _copy(self, begins: np.ndarray, ends: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        size, shards, some = self.dtype.itemsize, self.manifest["shards"], ends > begins
        within = self._within_shards(begins[some], ends[some])
        parts = self._bucket.read_ranges([(shards[s]["file"], b * size, e * size) for s, b, e in within])
        for at, part in zip(places[some].tolist(), parts, strict=True):
            tokens = part.view(self.dtype)
            out[at : at + len(tokens)] = tokens

    def _existing(self, name: str) -> Path:
        """The copy of an object, fetched when it is first asked for."""
        entry, path = self._files[name], cache_folder() / "stores" / self.fingerprint / name
        if not path.is_file():
            self._bucket.download(name, path, entry["size"])
            if sha256_of_file(path) != entry["sha256"]:
                path.unlink()
                raise UserError(
                    f"store {self.path}: {name} is damaged (its sha256 differs); copy the store there again"
                )
        return path


def upload_store(folder: Path, url: str) -> BucketStore:
    """Copies a store to a bucket, store.json last, so that it is complete or not there. UserError when there is another."""
    store, bucket = TokenStore.open(folder), Bucket(url)
    if there := bucket.read("store.json"):
        if parse_manifest(url, there.decode(errors="replace"))["fingerprint"] != store.fingerprint:
            raise UserError(f"--output={url}: holds another store; nothing was changed. Choose another --output")
    else:
        for entry in files_of(store.manifest):
            bucket.upload(folder / entry["file"], entry["file"])
        bucket.upload(folder / "store.json", "store.json")
    return BucketStore.connect(url)
