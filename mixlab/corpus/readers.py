"""Documents as they lie on disk: JSON lines (plain, gzip, zstd), Parquet, text files. Order and blocks are
those of the files alone.

A file is read in blocks of raw records, which stay bytes until a worker parses them."""

import glob
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mixlab.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".html", ".py")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUPPORTED = f"{' '.join(JSON_SUFFIXES)} and {' '.join(TEXT_SUFFIXES)}, also with .gz or .zst, and .parquet"


@dataclass(frozen=True)
class InputFile:
    """path: where it lies; name: relative to what all inputs have in common; kind: json, parquet or text;
    size: bytes."""

    path: str
    name: str
    kind: str
    size: int


class Block(NamedTuple):
    """Consecutive records of one file. kind is json (a record is one JSON object) or text (a record is a
    whole file); first: number of the first record, from 1; position: bytes of the file read up to its end."""

    name: str
    kind: str
    first: int
    records: list[bytes]
    position: int


def find(patterns: Sequence[str]) -> list[InputFile]:
    """The files of the globs in `patterns`, sorted by path; a folder stands for all supported files beneath
    it.

    UserError: a pattern that matches nothing, a file of an unsupported kind."""
    paths = set()
    for pattern in patterns:
        matches = glob.glob(os.path.expanduser(pattern), recursive=True)
        found = {m for m in matches if os.path.isfile(m)}
        for folder in set(matches) - found:
            beneath = (os.path.join(root, f) for root, _, files in os.walk(folder) for f in files)
            found |= {path for path in beneath if _kind(path)}
        if not found:
            raise UserError(f"input {pattern!r}: no file matches; give a path, a quoted glob or a folder ({SUPPORTED})")
        paths |= {os.path.abspath(path) for path in found}
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = []
    for path in sorted(paths):
        kind = _kind(path)
        if kind is None:
            raise UserError(f"input {path}: unsupported kind of file; supported are {SUPPORTED}")
        files.append(InputFile(path, Path(path).relative_to(common).as_posix(), kind, os.path.getsize(path)))
    return files


def sha256(file: InputFile) -> str:
    """sha256 (hex) of the file as it lies on disk. UserError when it cannot be read."""
    try:
        with open(file.path, "rb") as raw:
            return hashlib.file_digest(raw, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"input {file.path}: cannot be read ({error.strerror or error})") from None


def blocks(file: InputFile, fields: Sequence[str], block_bytes: int) -> Iterator[Block]:
    """The records of one file in blocks of about `block_bytes`; of Parquet only the columns that `fields`
    (dotted paths) need. UserError: unreadable, truncated or damaged file."""
    last = 0
    try:
        parquet = file.kind == "parquet"
        for block in _parquet_blocks(file, fields, block_bytes) if parquet else _blocks(file, block_bytes):
            yield block
            last = block.first + len(block.records) - 1
    except (OSError, pa.ArrowException) as error:
        reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
        raise UserError(
            f"input {file.path}: damaged after record {last:,} ({reason}); replace it or leave it out"
        ) from None


def lookup(record: object, path: str) -> object:
    """The value at a dotted path such as meta.url; a key that holds the dots itself comes first. None when
    absent."""
    if not isinstance(record, dict):
        return None
    if path in record:
        return record[path]
    head, dot, rest = path.partition(".")
    return lookup(record.get(head), rest) if dot else None


def _kind(path: str) -> str | None:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    elif suffix == ".parquet":
        return "parquet"
    return "json" if suffix in JSON_SUFFIXES else "text" if suffix in TEXT_SUFFIXES else None


def _blocks(file: InputFile, block_bytes: int) -> Iterator[Block]:
    codec = COMPRESSIONS.get(os.path.splitext(file.path.lower())[1])
    if file.size == 0:
        return
    with pa.OSFile(file.path) as raw:
        # Arrow's decompression tells a truncated stream, which the zstandard module does not.
        stream = io.BufferedReader(pa.CompressedInputStream(raw, codec) if codec else raw, 1 << 20)
        if file.kind == "text":
            yield Block(file.name, "text", 1, [stream.read()], file.size)
            return
        first = 1
        while lines := stream.readlines(block_bytes):
            yield Block(file.name, "json", first, lines, raw.tell())
            first += len(lines)


def _parquet_blocks(file: InputFile, fields: Sequence[str], block_bytes: int) -> Iterator[Block]:
    """Rows as JSON objects, so that a worker sees one kind of record."""
    with pq.ParquetFile(file.path) as parquet:
        wanted = {name for field in fields for name in (field, field.partition(".")[0])}
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        n_rows = parquet.metadata.num_rows
        first, records, size = 1, [], 0
        for batch in parquet.iter_batches(batch_size=256, columns=columns):
            for record in _rows(batch):
                records.append(record)
                size += len(record)
                if size >= block_bytes:
                    done = first + len(records) - 1
                    yield Block(file.name, "json", first, records, file.size * done // n_rows)
                    first, records, size = done + 1, [], 0
        if records:
            yield Block(file.name, "json", first, records, file.size)


def _rows(batch: pa.RecordBatch) -> Iterator[bytes]:
    for i in range(batch.num_rows):
        try:
            (row,) = batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError:  # a string column need not hold UTF-8
            yield b"\xff"
            continue
        yield json.dumps(row, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
