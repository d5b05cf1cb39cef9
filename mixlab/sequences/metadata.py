"""Metadata in front of documents: a line such as "URL: en.wikipedia.org" as virtual tokens (MeCo, Gao et al. 2025).

Where the text of a document begins, its metadata stand before it: prefix + value + suffix, tokenised as one string, once
for every distinct one. The token store is not touched, so a document's own tokens are the same with and without.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from publicsuffixlist import PublicSuffixList

from mixlab.corpus.filters import id_hashes
from mixlab.corpus.store import TokenStore
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.draws import draws
from mixlab.errors import UserError

UNKNOWN = "unknown"
HASH_CHARACTERS = 12  # of 5 bits each: of a million values two meet with a probability of one in two million


@dataclass(frozen=True)
class MetadataConfig:
    """What stands before a document, and whether it is trained on. The defaults are the paper's main setting.

    columns: of the store; the values of several are joined by `separator`, those that are missing left out.
    reduce: what is kept of the first column's value, a URL. "domain": all before the first slash, without the scheme
        (en.wikipedia.org); "registered_domain": by the list of public suffixes (wikipedia.org, bbc.co.uk); "suffix": (org,
        co.uk); "url": all but the scheme; None: the value as it is stored. A host that has no public suffix stays whole.
    prefix, suffix: written around the value.
    hashed: the value is replaced by a code of twelve letters and digits that is a function of the value alone.
    allowed: a JSON file with a list of values; others become "unknown".   min_documents: values of fewer training
        documents of the source become "unknown". Neither is hashed.
    missing: a document without a value (an empty one is none) has no metadata ("none") and is read as a plain one, or
        has the value "unknown", or is an error.
    share: of the documents that have metadata; the others are read as plain ones. Who has is a function of the run's seed
        and the document's id.
    loss: metadata bear loss like text (the paper's ablation). Off: neither they nor the BOS before them do.
    every_piece: where documents are decomposed, BOS and metadata stand before every piece; off: before the first alone.
    """

    columns: tuple[str, ...] = ("url",)
    reduce: Literal["domain", "registered_domain", "suffix", "url"] | None = "domain"
    separator: str = " "
    prefix: str = "URL: "
    suffix: str = "\n\n"
    hashed: bool = False
    allowed: str | None = None
    min_documents: int = 0
    missing: Literal["none", "unknown", "error"] = "none"
    share: float = 1.0
    loss: bool = False
    every_piece: bool = True

    def text(self, value: str) -> str:
        """What is written for a value: the same in training, evaluation and sampling."""
        return self.prefix + value + self.suffix

    def identity(self) -> dict:
        """What decides what is read. The file of allowed values counts by what it makes of the documents."""
        return {key: value for key, value in vars(self).items() if key != "allowed"} | {"columns": list(self.columns)}

    def problems(self, where: str) -> list[str]:
        found = []
        if not self.columns:
            found.append(f"{where}.columns is empty; name a metadata column of the store")
        if not 0 < self.share <= 1:
            found.append(
                f"{where}.share = {self.share}: must be above 0 and at most 1; without metadata: metadata=None"
            )
        if self.min_documents < 0:
            found.append(f"{where}.min_documents = {self.min_documents}: must be at least 0")
        return found


@dataclass(frozen=True)
class Metadata:
    """The metadata of a store's documents, as tokens.

    codes: unsigned [documents of the store]; number of the string before each, 0 for none.
    tokens: int32; the strings one after the other.   offsets: int64; string c is tokens[offsets[c] : offsets[c + 1]], that
        of number 0 is empty.
    loss: whether they are trained on.
    """

    codes: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    loss: bool = False

    @classmethod
    def of(cls, codes: np.ndarray, strings: Sequence[np.ndarray], loss: bool = False) -> "Metadata":
        """codes: int [documents], 0 for none, c for strings[c - 1]."""
        offsets = np.cumsum([0, 0, *(len(string) for string in strings)]).astype(np.int64)
        tokens = np.concatenate([np.zeros(0, np.int32), *strings]).astype(np.int32)
        return cls(codes.astype(np.min_scalar_type(len(strings))), tokens, offsets, loss)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """int64 [P]: tokens of metadata of the given documents of the store."""
        codes = self.codes[documents]
        return self.offsets[1:][codes] - self.offsets[codes]

    def read(self, documents: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int32 [sum of lengths]: parts of the metadata of documents, one after the other; all int [P]."""
        return self.tokens[runs(self.offsets[self.codes[documents]] + starts, lengths)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what stands before which document."""
        digest = hashlib.sha256()
        for array in (self.codes, self.tokens, self.offsets):
            digest.update(str(array.dtype).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def runs(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64: begins[0], begins[0] + 1, … `lengths[0]` of them, then those of the next, and so on."""
    ends = np.cumsum(lengths, dtype=np.int64)
    found = np.repeat(begins - ends + lengths, lengths)
    found += np.arange(len(found))
    return found


class Values(NamedTuple):
    """codes: int64 [documents of the store], 0 for a document without metadata, c for names[c - 1]."""

    codes: np.ndarray
    names: list[str]


def make_metadata(
    store: TokenStore, config: MetadataConfig, train: np.ndarray, tokenizer: Tokenizer, seed: int, where: str
) -> Metadata:
    """The metadata of all documents of a store, held-out ones too.

    train: int64, the documents that min_documents counts.   seed: of the choice that `share` makes.
    where: that messages name. Raises UserError: see `values_of`; no document has a value."""
    codes, names = values_of(store, config, train, where)
    if config.share < 1:
        drawn = draws(seed, id_hashes(store)) >> np.uint64(11)  # 53 bits: exact as a float
        codes = np.where(drawn < config.share * 2**53, codes, 0)
    return Metadata.of(codes, tokenizer.encode_batch([config.text(name) for name in names]), config.loss)


def values_of(store: TokenStore, config: MetadataConfig, train: np.ndarray, where: str) -> Values:
    """What each document's metadata say, before they become text.

    Raises UserError: no such column (with the nearest ones), no document with a value, a missing value where that is an
    error, a file of allowed values that is not a list."""
    codes, names = _read(store, config, where)
    if not names:
        raise UserError(f"{where}: no document has a value in {', '.join(config.columns)}; name another column")
    lacking = np.flatnonzero(codes == 0)
    if len(lacking) and config.missing == "error":
        raise UserError(
            f"{where}: {len(lacking):,} of {len(codes):,} documents have no value in {', '.join(config.columns)} (the "
            f"first is {store.metadata(int(lacking[0]))['id']!r}); set missing to 'none' or 'unknown', or leave them out"
        )
    counts = np.bincount(codes[train], minlength=len(names) + 1)
    allowed = _allowed(config, where)
    kept = {n for n, count in zip(names, counts[1:].tolist(), strict=True) if count >= config.min_documents}
    if allowed is not None:
        kept &= allowed
    code = _code if config.hashed else str
    new = {name: code(name) if name in kept else UNKNOWN for name in names}
    if config.hashed and len({new[name] for name in kept}) < len(kept):
        raise UserError(f"{where}.hashed: two values have one code; set hashed=False")
    codes, names = _map(codes, names, new.get)
    if config.missing == "unknown" and len(lacking):
        names = names if UNKNOWN in names else [*names, UNKNOWN]
        codes = np.where(codes == 0, names.index(UNKNOWN) + 1, codes)
    return Values(codes, names)


def reduced(url: str, how: str | None) -> str:
    """A URL by the rules of `MetadataConfig.reduce`; schemes are removed as the paper's code does, wherever they stand."""
    if how is None:
        return url
    bare = url.replace("http://", "").replace("https://", "")
    if how == "url":
        return bare
    domain = bare.split("/", 1)[0]
    if how == "domain":
        return domain
    host = domain.split(":", 1)[0]
    found = {"registered_domain": _suffixes().privatesuffix, "suffix": _suffixes().publicsuffix}[how](
        host, accept_unknown=False
    )
    return found or host


def _read(store: TokenStore, config: MetadataConfig, where: str) -> tuple[np.ndarray, list[str]]:
    """(codes, names) of the columns, the first reduced and all joined."""
    try:
        columns = [store.column(name).cast(pa.string()) for name in config.columns]
    except UserError as error:
        raise UserError(f"{where}.columns: {error}") from None
    parts = [_encoded(column) for column in columns]
    parts[0] = _map(*parts[0], lambda name: reduced(name, config.reduce))
    parts = [_map(codes, names, lambda name: name.strip() or None) for codes, names in parts]
    if len(parts) == 1:
        return parts[0]
    together, codes = np.unique(np.stack([codes for codes, _ in parts], axis=1), axis=0, return_inverse=True)
    joined = [
        config.separator.join(names[c - 1] for c, (_, names) in zip(row, parts, strict=True) if c)
        for row in together.tolist()
    ]
    return _map(codes.reshape(-1) + 1, joined, lambda name: name or None)


def _encoded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """(codes, names) of a column of strings."""
    whole = pc.dictionary_encode(column).unify_dictionaries()
    names = whole.chunk(0).dictionary.to_pylist() if whole.num_chunks else []
    codes = [np.asarray(pc.fill_null(chunk.indices, -1)) for chunk in whole.chunks]
    return np.concatenate([np.zeros(0, np.int64), *codes]) + 1, names


def _map(codes: np.ndarray, names: list[str], new: Callable[[str], str | None]) -> tuple[np.ndarray, list[str]]:
    """(codes, names) with every name replaced; names that become one are one, those that become None are no value."""
    numbers: dict[str, int] = {}
    replaced = [new(name) for name in names]
    table = [0] + [0 if name is None else numbers.setdefault(name, len(numbers) + 1) for name in replaced]
    return np.array(table, np.int64)[codes], list(numbers)


def _allowed(config: MetadataConfig, where: str) -> set[str] | None:
    if config.allowed is None:
        return None
    try:
        values = json.loads(Path(config.allowed).read_text(encoding="utf-8"))
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError("it holds something else")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}.allowed = {config.allowed!r}: cannot be used ({error}); give a JSON file with a list of values"
        ) from None
    return set(values)


def _code(value: str) -> str:
    digits = base64.b32encode(hashlib.sha256(value.encode()).digest()).decode().lower()[:HASH_CHARACTERS]
    return f"{digits[:8]}-{digits[8:]}"


@cache
def _suffixes() -> PublicSuffixList:
    """The list that comes with the library, without the suffixes of private owners such as blogspot.com."""
    return PublicSuffixList(only_icann=True)
