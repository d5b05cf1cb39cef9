"""The work of preparing a corpus, shard by shard, and the processes that do it."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_handles
from pathlib import Path

import numpy as np

from mixlab.corpus import readers, writer
from mixlab.corpus.readers import Block, InputFile
from mixlab.corpus.records import Settings, note_skip, parse
from mixlab.corpus.repetition import repeats
from mixlab.corpus.tokenizer import Tokenizer

BATCH_CHARACTERS = 1_000_000
REPETITION = "with 1 to 13 tokens 32 times or more in a row"


@dataclass(frozen=True)
class Task:
    """A shard to make. input: sha256 (hex) of its raw records and where they lie; input_bytes: of the files
    that it stands for."""

    index: int
    blocks: list[Block]
    input: str
    input_bytes: int


def cut(files: Sequence[InputFile], settings: Settings) -> Iterator[Task]:
    """The records of the files, in order, cut into shards by their size alone."""
    block_bytes = max(1, min(1 << 20, settings.shard_bytes(0) // 4))
    pending: list[Block] = []
    index = size = input_bytes = 0
    for file in files:
        position = 0
        for block in readers.blocks(file, settings.paths, block_bytes):
            pending.append(block)
            size += sum(map(len, block.records))
            input_bytes += block.position - position
            position = block.position
            if size >= settings.shard_bytes(index):
                yield Task(index, pending, _digest(pending), input_bytes)
                index, pending, size, input_bytes = index + 1, [], 0, 0
    if pending:
        yield Task(index, pending, _digest(pending), input_bytes)


def _digest(blocks: Sequence[Block]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        lengths = list(map(len, block.records))
        digest.update(json.dumps([block.name, block.kind, block.first, lengths]).encode())
        digest.update(b"".join(block.records))
    return digest.hexdigest()


def start_pool(workers: int, output: Path, tokenizer: Tokenizer, settings: Settings):
    """An executor of `make_shard`: `workers` processes, or this one when workers == 1."""
    if workers == 1:
        return _Inline(output, tokenizer, settings)
    context = multiprocessing.get_context("spawn")  # fork does not go with threads
    return ProcessPoolExecutor(workers, context, _start_worker, (output, tokenizer, settings))


class _Inline:
    def __init__(self, *state):
        _set_state(*state)

    def submit(self, function, task: Task) -> Future:
        future = Future()
        future.set_result(function(task))
        return future

    def shutdown(self, cancel_futures: bool) -> None:
        """Nothing is running."""


def _start_worker(*state) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def end_with_parent() -> None:  # even when it is killed and can tell nobody
        wait_for_handles([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _set_state(*state)


def _set_state(output: Path, tokenizer: Tokenizer, settings: Settings) -> None:
    global _state
    _state = output, tokenizer, settings


def make_shard(task: Task) -> dict:
    """Parses, tokenises and writes one shard; its note, also left on disk, is the last file written."""
    output, tokenizer, settings = _state
    skipped: dict[str, dict] = {}
    counts: Counter = Counter()
    tokens, rows, texts, waiting = [], [], [], 0

    def flush() -> None:
        nonlocal waiting
        encoded = tokenizer.encode_batch(texts)
        repeated = np.zeros(len(encoded), bool)
        if settings.drop_repetitions and encoded:
            repeated = repeats(np.concatenate(encoded), np.cumsum([len(ids) for ids in encoded]))
        for row, ids, repeating in zip(rows[len(tokens) :], encoded, repeated, strict=True):
            if len(ids) == 0 or repeating:  # a tokenizer may drop characters
                note_skip(skipped, REPETITION if repeating else "no tokens", row["id"])
                row["bytes"] = None
            tokens.append(ids)
        texts.clear()
        waiting = 0

    for text, row in parse(task.blocks, settings, skipped, counts):
        texts.append(text)
        rows.append(row)
        waiting += len(text)
        if waiting >= BATCH_CHARACTERS:
            flush()
    flush()
    kept = [i for i, row in enumerate(rows) if row["bytes"] is not None]
    note = {
        "input": task.input,
        "tokenizer": tokenizer.hash,
        "documents": len(kept),
        "text_bytes": sum(rows[i]["bytes"] for i in kept),
        "ids_made": counts["ids made"],
        "skipped": skipped,
        "shard": None,
    }
    arrays = np.zeros((2, len(kept)), np.uint64)
    if kept:
        rows = [rows[i] for i in kept]
        tokens = [tokens[i] for i in kept]
        shard = writer.write_shard(output, task.index, tokens, rows, settings.columns, tokenizer.vocab_size)
        arrays[0] = shard.pop("lengths")
        arrays[1] = [int(hashlib.sha256(row["id"].encode()).hexdigest()[:16], 16) for row in rows]
        note["shard"] = shard
    writer.write_file(output, f"preparing/{task.index:05d}.bin", arrays.tobytes())
    writer.write_file(output, f"preparing/{task.index:05d}.json", json.dumps(note).encode())
    return note


def read_note(output: Path, task: Task, tokenizer: Tokenizer) -> dict | None:
    """The note of a shard made earlier of the same records with the same tokenizer, if its files are
    there."""
    note_file = output / "preparing" / f"{task.index:05d}.json"
    try:
        note = json.loads(note_file.read_text())
        expected = {note_file.with_suffix(".bin"): 16 * note["documents"]}
        if note["shard"]:
            expected |= {output / entry["file"]: entry["size"] for entry in _files(note["shard"])}
        sound = all(path.stat().st_size == size for path, size in expected.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if sound and note["input"] == task.input and note["tokenizer"] == tokenizer.hash else None


def _files(shard: dict) -> list[dict]:
    return [shard["tokens"], shard["metadata"]]
