"""TokenStore: tokens on disk, addressed by document.

A store is a directory:

    store.json               counts, tokenizer, size and sha256 of every file; written last: complete or
    absent tokens/00000.bin ...     tokens one after the other, little-endian uint16 (vocabulary <= 65,536) or
    uint32 offsets.npy              int64 [documents + 1], in tokens over all shards; no document spans two
    shards metadata/00000.arrow ... Arrow IPC, a table a shard, a row a document: id, split, bytes and the
    source's own tokenizer.json           the tokenizer, whole

Files are memory-mapped. A store may also lie in a bucket, as gs://BUCKET/FOLDER or s3://BUCKET/FOLDER: see
bucket_store.py.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixlab.corpus import tokenizer as tokenizers
from mixlab.corpus.cache import is_url
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError

FORMAT = "mixlab-token-store"
VERSION = 1
SPLITS = ("train", "validation")


class TokenStore:
    """Read access to a store. Cheap to pickle: another process maps the files again when it first reads.

    path: Path; n_documents, n_tokens: int; dtype: of the tokens on disk; vocab_size: int; tokenizer_hash:
    str; fingerprint: sha256 (hex) over tokenizer, tokens, document boundaries and metadata; manifest:
    store.json as a dict.
    """

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.manifest = manifest
        self.n_documents: int = manifest["documents"]
        self.n_tokens: int = manifest["tokens"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_hash: str = manifest["tokenizer"]["hash"]
        self.fingerprint: str = manifest["fingerprint"]
        self._shard_starts = np.cumsum([0] + [shard["tokens"] for shard in manifest["shards"]])  # in tokens
        self._shards: list[np.ndarray] | None = None
        self._offsets: np.ndarray | None = None
        self._table: pa.Table | None = None

    @classmethod
    def open(cls, path: str | os.PathLike, verify: bool = False) -> "TokenStore":
        """Opens a store; sizes of all files are checked, contents (sha256) too with `verify`.

        UserError: missing, unfinished, not a store, another format version, a missing, truncated or damaged
        file."""
        if is_url(path):
            from mixlab.corpus.bucket_store import BucketStore

            return BucketStore.connect(str(path), verify)
        path = Path(path)
        if not path.exists():
            raise UserError(f"store {path}: no such folder; make it with tools/prepare_corpus.py --output={path}")
        if not (path / "store.json").is_file():
            if (path / "preparing").is_dir():
                raise UserError(f"store {path}: unfinished; run the prepare_corpus command that began it again")
            raise UserError(f"store {path}: not a token store (it has no store.json); give the folder of a store")
        try:
            text = (path / "store.json").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"store {path}: store.json is damaged ({error}); prepare the corpus again") from None
        store = cls(path, parse_manifest(path, text))
        store._check_files(verify)
        return store

    def _check_files(self, verify: bool) -> None:
        remedy = "copy the store again from where it came, or prepare the corpus again"
        for entry in files_of(self.manifest):
            file = self.path / entry["file"]
            try:
                size = file.stat().st_size
            except OSError:
                raise UserError(f"store {self.path}: {entry['file']} is missing; {remedy}") from None
            if size != entry["size"]:
                raise UserError(
                    f"store {self.path}: {entry['file']} has {size:,} bytes, not {entry['size']:,}; {remedy}"
                )
            if verify and sha256_of_file(file) != entry["sha256"]:
                raise UserError(f"store {self.path}: {entry['file']} is damaged (its sha256 differs); {remedy}")

    @property
    def offsets(self) -> np.ndarray:
        """int64 [documents + 1], memory-mapped: document d is the tokens offsets[d]:offsets[d + 1]."""
        if self._offsets is None:
            # Not np.load: it parses the header with `ast`, which threads must not do at once in Python 3.11.
            path, size = self._existing("offsets.npy"), 8 * (self.n_documents + 1)
            offsets = np.memmap(path, "<i8", "r", offset=path.stat().st_size - size)
            self._offsets = offsets.view(np.ndarray)  # plain arrays are faster to index than np.memmap
        return self._offsets

    def __len__(self) -> int:
        return self.n_documents

    def __getitem__(self, document: int) -> np.ndarray:
        """Tokens of one document, int32 [tokens]."""
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of a store of {self.n_documents}")
        length = int(self.offsets[document + 1] - self.offsets[document])
        out = np.empty(length, np.int32)
        self.read(np.array([document]), np.array([0]), np.array([length]), out)
        return out

    def read(
        self,
        documents: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        out: np.ndarray,
        places: np.ndarray | None = None,
    ) -> None:
        """Copies P pieces into `out` (int32), each from places[p] on; without `places`, one after the other.

        Piece p is tokens starts[p] : starts[p] + lengths[p] of document documents[p]; all int [P]. IndexError
        for a piece outside its document or a place outside `out`, ValueError when pieces one after the other
        are not as long as `out`."""
        documents, starts, lengths = (np.asarray(a, np.int64) for a in (documents, starts, lengths))
        if len(documents) == 0:
            if len(out) and places is None:
                raise ValueError(f"no pieces for {len(out)} tokens of out")
            return
        if documents.min() < 0 or documents.max() >= self.n_documents:
            raise IndexError(f"a piece names a document outside 0..{self.n_documents - 1}")
        begins = self.offsets[documents] + starts
        ends = begins + lengths
        if starts.min() < 0 or lengths.min() < 0 or (ends > self.offsets[documents + 1]).any():
            raise IndexError("a piece reaches outside its document")
        if places is None:
            if int(lengths.sum()) != len(out):
                raise ValueError(f"{int(lengths.sum())} tokens in the pieces, {len(out)} in out")
            places = np.cumsum(lengths) - lengths
        elif places.min() < 0 or int((places + lengths).max()) > len(out):
            raise IndexError(f"a piece goes outside the {len(out)} tokens of out")
        self._copy(begins, ends, out, places)

    def _copy(self, begins: np.ndarray, ends: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Tokens begins[p]:ends[p] of all shards laid end to end, each within one shard, to places[p] of out."""
        shards = self._shards if self._shards is not None else self._map_shards()
        # A plain loop of slice copies over Python ints: several times faster than fancy indexing.
        if len(shards) == 1:
            tokens = shards[0]
            for begin, end, at in zip(begins.tolist(), ends.tolist(), places.tolist(), strict=True):
                out[at : at + end - begin] = tokens[begin:end]
            return
        for (shard, begin, end), at in zip(self._within_shards(begins, ends), places.tolist(), strict=True):
            out[at : at + end - begin] = shards[shard][begin:end]

    def _within_shards(self, begins: np.ndarray, ends: np.ndarray) -> Iterable[tuple[int, int, int]]:
        """(shard, begin, end) of the same tokens, counted from the beginning of their shard."""
        shard_P = np.searchsorted(self._shard_starts, begins, "right") - 1
        shard_P = np.minimum(shard_P, len(self._shard_starts) - 2)  # an empty piece at the very end
        first_P = self._shard_starts[shard_P]
        return zip(shard_P.tolist(), (begins - first_P).tolist(), (ends - first_P).tolist(), strict=True)

    def _map_shards(self) -> list[np.ndarray]:
        # Kept only once whole: another thread that reads meanwhile must not meet a part of the list.
        shards = []
        for shard in self.manifest["shards"]:
            with pa.memory_map(str(self._existing(shard["file"]))) as file:  # the mapping outlives the file descriptor
                tokens = np.frombuffer(file.read_buffer(), self.dtype)
            if len(tokens) != shard["tokens"]:
                raise UserError(f"store {self.path}: {shard['file']} changed while in use; open the store again")
            shards.append(tokens)
        self._shards = shards
        return shards

    @property
    def column_names(self) -> list[str]:
        return self._metadata_table().column_names

    def column(self, name: str) -> pa.ChunkedArray:
        """One metadata column, [documents]. UserError names the nearest columns when there is no such one."""
        if name not in self.column_names:
            near = get_close_matches(name, self.column_names, 3) or self.column_names
            raise UserError(f"store {self.path}: no metadata column {name!r}; did you mean {', '.join(near)}?")
        return self._metadata_table().column(name)

    def metadata(self, document: int) -> dict:
        """The metadata of one document: id, split, bytes and what else the source gave; a missing value is
        None."""
        table = self._metadata_table()
        if not 0 <= document < self.n_documents:
            raise IndexError(f"document {document} of a store of {self.n_documents}")
        return {name: table.column(name)[int(document)].as_py() for name in table.column_names}

    def documents(self, split: str) -> np.ndarray:
        """Documents of a split ("train" or "validation"), int64, ascending."""
        if split not in SPLITS:
            raise UserError(f"split {split!r}: a store has the splits {' and '.join(SPLITS)}")
        return np.flatnonzero(pc.equal(self.column("split"), split).to_numpy()).astype(np.int64)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store, from the copy within it."""
        saved = self.manifest["tokenizer"]
        definition = self._existing("tokenizer.json").read_text(encoding="utf-8")
        specials = {role: saved[role] for role in ("bos", "eos", "pad")}
        tokenizer = tokenizers.from_definition(saved["name"], definition, **specials)
        if tokenizer.hash != self.tokenizer_hash:
            raise UserError(
                f"store {self.path}: tokenizer.json is not the one that made the store; copy the store again"
            )
        return tokenizer

    def _metadata_table(self) -> pa.Table:
        if self._table is None:
            tables = []
            for entry in self.manifest["metadata"]:
                with pa.memory_map(str(self._existing(entry["file"]))) as file:
                    tables.append(pa.ipc.open_file(file).read_all())
            self._table = pa.concat_tables(tables)
        return self._table

    def _existing(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise UserError(f"store {self.path}: {name} is missing; copy the store again from where it came")
        return self.path / name

    def __getstate__(self) -> dict:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"], state["manifest"])

    def __repr__(self) -> str:
        return f"TokenStore({str(self.path)!r}, documents={self.n_documents:,}, tokens={self.n_tokens:,})"


def parse_manifest(path: str | os.PathLike, text: str) -> dict:
    """store.json of the store at `path`. UserError when it is damaged or of another version."""
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ValueError("another format")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"store {path}: store.json is damaged ({error}); prepare the corpus again") from None
    if manifest["version"] != VERSION:
        raise UserError(
            f"store {path}: format version {manifest['version']}, this mixlab reads {VERSION}; "
            f"prepare the corpus again, or use the version of mixlab that wrote it"
        )
    return manifest


def token_dtype(vocab_size: int) -> np.dtype:
    """The type of tokens on disk, little-endian."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def sha256_of_file(path: Path) -> str:
    """sha256 (hex) of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(manifest: dict) -> Iterable[dict]:
    """ "file", "size" and "sha256" of every file of a store but store.json."""
    return [*manifest["shards"], *manifest["metadata"], manifest["offsets"], manifest["definition"]]
