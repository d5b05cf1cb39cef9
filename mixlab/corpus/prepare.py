"""Files of documents to a TokenStore: in parallel, resumable, the same store for any number of workers.

One process reads the files in order and cuts them into shards by the size of their raw text alone. Workers
parse and tokenise a shard each, write its files and, last, a note under preparing/ with the sha256 of the
shard's raw input. After an interruption the same command reads the input again and redoes only the shards
without such a note.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from mixlab.corpus import readers, shards, writer
from mixlab.corpus import tokenizer as tokenizers
from mixlab.corpus.cache import cache_folder, is_url
from mixlab.corpus.progress import Progress
from mixlab.corpus.readers import InputFile
from mixlab.corpus.records import Settings, note_skip, parse
from mixlab.corpus.store import TokenStore
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError

TRAINING_BYTES = 32_000_000  # text that a BPE is trained on
TRAINING_FILES = 64


def prepare(
    inputs: Sequence[str],
    tokenizer: str,
    output: str | os.PathLike,
    settings: Settings | None = None,
    workers: int | None = None,
    show_progress: bool = True,
    engine: Literal["local", "ray"] = "local",
    **specials: str | None,
) -> tuple[TokenStore, bool]:
    """Makes the store `output` of the files matching `inputs`; returns (store, whether it was there already).

    tokenizer: "bytes", "bpe:SIZE" (trained on the training documents of a fixed sample of the input), or the
    path of a tokenizer.json, for which bos, eos and pad may name its special tokens. workers: processes, one
    a CPU when None. output: a folder, or gs://… or s3://…, to which the store is copied when it is made.
    engine: "ray" makes the shards on a running Ray cluster.

    UserError: nothing to read, nothing usable in it, an output that holds something else or was made with
    other settings, an output that cannot be written (finished shards are kept; the same command goes on)."""
    settings = settings or Settings()
    if is_url(output):
        return _prepare_in_bucket(str(output), inputs, tokenizer, settings, workers, show_progress, engine, **specials)
    files, output = readers.find(inputs), Path(output)
    given, command = _command(tokenizer, settings, specials)
    if (output / "store.json").exists():
        return _finished(output, command, files), True
    try:
        with _claimed(output, command) as work:
            made = given or _train(files, settings, tokenizers.parse_bpe(tokenizer))
            notes = _make_shards(files, made, settings, output, workers, show_progress, engine)
            store = _finalise(output, made, notes, {"settings": command, "inputs": _identities(files)})
            shutil.rmtree(work)
    except OSError as error:
        raise UserError(
            f"--output={output}: cannot be written ({error.strerror or error}); put that right and run the "
            f"same command again: finished shards are kept"
        ) from None
    except KeyboardInterrupt:
        raise UserError(f"--output={output}: stopped; the same command goes on from the finished shards") from None
    return store, False


def _command(tokenizer: str, settings: Settings, specials: dict) -> tuple[Tokenizer | None, dict]:
    """The tokenizer, unless it is to be trained; and what decides the store besides the input, as it will be read back."""
    given = None if tokenizers.parse_bpe(tokenizer) else tokenizers.load(tokenizer, **specials)
    command = {**asdict(settings), "tokenizer": given.hash if given else tokenizer}
    return given, json.loads(json.dumps(command))


def _prepare_in_bucket(
    url: str, inputs, tokenizer: str, settings: Settings, workers, show_progress: bool, engine, **specials
) -> tuple[TokenStore, bool]:
    """Made below the cache folder, where an interrupted command goes on, and copied at the end."""
    from mixlab.corpus.bucket import Bucket
    from mixlab.corpus.bucket_store import upload_store

    bucket = Bucket(url)
    if "store.json" in bucket.names("store.json"):  # asked first: it also says when there is no such bucket
        return _finished(url, _command(tokenizer, settings, specials)[1], readers.find(inputs)), True
    local = cache_folder() / "outgoing" / hashlib.sha256(bucket.url.encode()).hexdigest()[:16]
    prepare(inputs, tokenizer, local, settings, workers, show_progress, engine, **specials)
    store = upload_store(local, url)
    shutil.rmtree(local)
    return store, False


def _finished(output: Path | str, command: dict, files: Sequence[InputFile]) -> TokenStore:
    store = TokenStore.open(output)
    preparation = store.manifest["preparation"]
    different = _different(preparation.get("settings", {}), command)
    if not different and preparation["inputs"] != _identities(files):
        different = ["input"]
    if different:
        raise UserError(
            f"--output={output}: holds a store made with another {', '.join(different)}; nothing was "
            f"changed. Choose another --output, or remove that folder"
        )
    if isinstance(output, Path):
        shutil.rmtree(output / "preparing", ignore_errors=True)
    return store


def _different(made: dict, command: dict) -> list[str]:
    """The settings in which `command` differs from what was made, perhaps before there were all of today's settings."""
    made = {"drop_repetitions": False} | made
    return [key for key in command if made.get(key) != command[key]]


def _identities(files: Sequence[InputFile]) -> list[dict]:
    return [{"name": file.name, "size": file.size, "sha256": readers.sha256(file)} for file in files]


@contextmanager
def _claimed(output: Path, command: dict) -> Iterator[Path]:
    """The folder for unfinished work, held by this process alone."""
    work = output / "preparing"
    if output.exists() and not work.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: exists and is not a token store; choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output={output}: another process is preparing it; wait for that one") from None
        settings = work / "settings.json"
        begun = json.loads(settings.read_text()) if any(work.glob("[0-9]*.json")) else command
        different = _different(begun, command)
        if different:
            raise UserError(
                f"--output={output}: holds unfinished work made with another {', '.join(different)}; nothing "
                f"was changed. Choose another --output, or remove that folder"
            )
        writer.write_file(work, "settings.json", json.dumps(command).encode())
        yield work


def _train(files: Sequence[InputFile], settings: Settings, vocab_size: int) -> Tokenizer:
    """A BPE of the training documents at the beginnings of at most 64 files, evenly spaced over the input."""
    chosen = [files[i * len(files) // TRAINING_FILES] for i in range(TRAINING_FILES)]
    chosen = list(dict.fromkeys(chosen))

    def texts() -> Iterator[str]:
        for file in chosen:
            left = TRAINING_BYTES // len(chosen)
            for block in readers.blocks(file, settings.paths, 1 << 20):
                for text, row in parse([block], settings, {}, Counter()):
                    if row["split"] == "train":
                        yield text
                left -= sum(map(len, block.records))
                if left <= 0:
                    break

    return tokenizers.train_bpe(texts(), vocab_size)


def _make_shards(
    files: Sequence[InputFile],
    tokenizer: Tokenizer,
    settings: Settings,
    output: Path,
    workers: int | None,
    show: bool,
    engine: str,
) -> list[dict]:
    """The notes of all shards, in order."""
    notes: dict[int, dict] = {}
    running: dict[Future, shards.Task] = {}
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("prepare", sum(file.size for file in files), show))
        if engine == "ray":
            from mixlab.corpus.ray_pool import RayPool

            pool = RayPool(output, tokenizer, settings)
            workers = workers or pool.workers
        else:
            workers = workers or _cpus()
            pool = shards.start_pool(workers, output, tokenizer, settings)
        stack.callback(pool.shutdown, cancel_futures=True)

        def collect() -> None:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    note = future.result()
                except BrokenProcessPool:
                    raise UserError(
                        "a worker process died, probably for want of memory; run the same command again with "
                        "fewer --workers; finished shards are kept"
                    ) from None
                notes[task.index] = note
                progress.add(task.input_bytes, note["text_bytes"], note["documents"])

        for task in shards.cut(files, settings):
            note = shards.read_note(output, task, tokenizer)
            if note:
                notes[task.index] = note
                progress.skip(task.input_bytes)
                continue
            running[pool.submit(shards.make_shard, task)] = task
            while len(running) > workers + 1:  # bounds the memory: so many shards of raw text at most
                collect()
        while running:
            collect()
    return [notes[index] for index in range(len(notes))]


def _finalise(output: Path, tokenizer: Tokenizer, notes: Sequence[dict], preparation: dict) -> TokenStore:
    skipped: dict[str, dict] = {}
    summaries, ids = [], []
    for index, note in enumerate(notes):
        for reason, entry in note["skipped"].items():
            note_skip(skipped, reason, entry["first"], entry["count"])
        if note["shard"]:
            arrays = np.fromfile(output / "preparing" / f"{index:05d}.bin", np.uint64).reshape(2, -1)
            summaries.append({**note["shard"], "lengths": arrays[0].astype(np.int64)})
            ids.append(arrays[1])
    known = {entry["file"] for summary in summaries for entry in (summary["tokens"], summary["metadata"])}
    for folder in ("tokens", "metadata"):  # of an interrupted run, perhaps on other input
        for path in (output / folder).glob("*"):
            if f"{folder}/{path.name}" not in known:
                path.unlink()
    if not summaries:
        for folder in ("tokens", "metadata", "preparing"):
            shutil.rmtree(output / folder, ignore_errors=True)
        raise UserError(f"no usable document in the input: {describe_skips(skipped) or 'the files are empty'}")
    preparation |= {
        "skipped": skipped,
        "duplicate_ids": sum(map(len, ids)) - len(np.unique(np.concatenate(ids))),
        "ids_made": sum(note["ids_made"] for note in notes),
        "without_value": _without_value([output / summary["metadata"]["file"] for summary in summaries]),
    }
    return writer.finalise(output, tokenizer, summaries, preparation)


def _without_value(files: Sequence[Path]) -> dict[str, int]:
    """Column -> documents that have none, of the columns that some lack."""
    lacking: Counter[str] = Counter()
    for path in files:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
            lacking.update({name: table.column(name).null_count for name in table.column_names})
    return {name: count for name, count in lacking.items() if count}


def describe_skips(skipped: dict[str, dict]) -> str:
    """ "3 not JSON (first: a.jsonl:7); 1 empty (first: a.jsonl:9)"."""
    return "; ".join(f"{entry['count']:,} {reason} (first: {entry['first']})" for reason, entry in skipped.items())


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
