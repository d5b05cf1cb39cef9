"""Writing a TokenStore: shards in any order and any process, then one call that makes them a store."""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mixlab.corpus.store import FORMAT, SPLITS, VERSION, TokenStore, token_dtype
from mixlab.corpus.tokenizer import Tokenizer


def write_shard(
    directory: Path,
    index: int,
    tokens: Sequence[np.ndarray],
    rows: Sequence[dict],
    columns: Sequence[str],
    vocab_size: int,
) -> dict:
    """Writes tokens/NNNNN.bin and metadata/NNNNN.arrow of one shard, each complete or absent, and returns its
    summary.

    `tokens` and `rows` are parallel, one entry a document, at least one; a row is a dict with id, split,
    bytes and `columns` (str or None). The summary (JSON types, except `lengths`, int64 [documents]) is what
    `finalise` takes."""
    lengths = np.array([len(t) for t in tokens], np.int64)
    flat = np.concatenate(tokens).astype(token_dtype(vocab_size), copy=False)
    fields = [
        ("id", pa.string()),
        ("split", pa.string()),
        ("bytes", pa.int64()),
        *((c, pa.string()) for c in columns),
    ]
    table = pa.Table.from_pylist(list(rows), pa.schema(fields))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    contents = hashlib.sha256()  # of the values: the bytes of an Arrow file differ between versions of Arrow
    for row in rows:
        contents.update(json.dumps([row[name] for name, _ in fields], ensure_ascii=False).encode())
    splits = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    for row, length in zip(rows, lengths.tolist(), strict=True):
        counts = splits[row["split"]]
        counts["documents"] += 1
        counts["tokens"] += length
        counts["bytes"] += row["bytes"]
    return {
        "tokens": {
            **write_file(directory, f"tokens/{index:05d}.bin", memoryview(flat).cast("B")),
            "documents": len(rows),
            "tokens": len(flat),
        },
        "metadata": {
            **write_file(directory, f"metadata/{index:05d}.arrow", sink.getvalue()),
            "documents": len(rows),
        },
        "contents": contents.hexdigest(),
        "splits": splits,
        "lengths": lengths,
    }


def finalise(directory: Path, tokenizer: Tokenizer, shards: Sequence[dict], preparation: dict) -> TokenStore:
    """Makes the shards written to `directory` a store: offsets, tokenizer and, last, store.json.

    `shards` are the summaries of `write_shard` in order; `preparation` (JSON) is kept in store.json."""
    lengths = np.concatenate([shard["lengths"] for shard in shards])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    buffer = io.BytesIO()
    np.save(buffer, offsets)
    dtype = token_dtype(tokenizer.vocab_size)
    offsets_sha256 = hashlib.sha256(offsets.astype("<i8").tobytes()).hexdigest()
    contents = [[shard["tokens"]["sha256"], shard["contents"]] for shard in shards]
    identity = json.dumps([FORMAT, VERSION, tokenizer.hash, dtype.name, offsets_sha256, contents])
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "documents": len(lengths),
        "tokens": int(offsets[-1]),
        "bytes": sum(counts["bytes"] for shard in shards for counts in shard["splits"].values()),
        "splits": {
            split: {
                key: sum(shard["splits"][split][key] for shard in shards) for key in ("documents", "tokens", "bytes")
            }
            for split in SPLITS
        },
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {
            "name": tokenizer.name,
            "hash": tokenizer.hash,
            **{role: None if i is None else tokenizer.token(i) for role, i in roles.items()},
        },
        "shards": [shard["tokens"] for shard in shards],
        "metadata": [shard["metadata"] for shard in shards],
        "offsets": write_file(directory, "offsets.npy", buffer.getvalue()),
        "definition": write_file(directory, "tokenizer.json", tokenizer.definition.encode()),
        "preparation": preparation,
    }
    write_file(directory, "store.json", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    return TokenStore.open(directory)


def write_file(directory: Path, name: str, contents: bytes | memoryview | pa.Buffer) -> dict:
    """Writes one file of a store, complete or absent; returns {"file", "size", "sha256"}."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": name, "size": len(memoryview(contents)), "sha256": hashlib.sha256(contents).hexdigest()}
