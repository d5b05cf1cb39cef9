"""The data path by itself, one thread: from a token store on disk to the batches that are trained on."""

import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from mixlab.corpus import tokenizer
from mixlab.corpus.writer import finalise, write_shard
from mixlab.inject.items import Group, Items, Where
from mixlab.inject.placement import place
from mixlab.schedule.shuffle import permute
from mixlab.schedule.stages import StageConfig, place_stages
from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.documents import Documents
from mixlab.sequences.metadata import MetadataConfig, make_metadata
from mixlab.stream import Stream
from speed import memory

FAR = 10**6  # a step to read at once
ROUNDS = 12  # of readings in turns, of which medians count


def reading(tokens: int) -> dict:
    """Reading, with and without metadata and insertions; the first batch of step one million."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, tokens // 500), 8, 100_000).astype(int)
    result: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = [rng.integers(0, 256, n).astype(np.int32) for n in lengths]
        hosts = rng.zipf(1.5, len(lengths)) % 5000
        rows = [
            {"id": str(i), "split": "train", "bytes": int(n), "url": f"https://www.host{host}.org/{i}"}
            for i, (n, host) in enumerate(zip(lengths, hosts, strict=True))
        ]
        letters = tokenizer.load("bytes")
        shard = write_shard(Path(folder), 0, texts, rows, ["url"], letters.vocab_size)
        store = finalise(Path(folder), letters, [shard], {})
        every = np.arange(len(store))
        result["documents"], result["mean_document_tokens"] = len(lengths), float(lengths.mean())
        began = time.process_time()
        metadata = make_metadata(store, MetadataConfig(), every, letters, 0, "url")
        result["metadata: read and tokenised, CPU-seconds"] = time.process_time() - began
        result["metadata: bytes a document"] = metadata.codes.itemsize
        result["metadata: bytes of all strings"] = metadata.tokens.nbytes + metadata.offsets.nbytes
        for length, rows in ((1024, 256), (8192, 32)):
            streams = {}
            for named, what in ((f"length {length}", None), (f"length {length}, metadata", metadata)):
                documents = Documents(store, every, (), (257,), what)
                stage = StageConfig("main", FAR + 1, sequence_length=length, tokens_per_step=rows * length)
                began = time.process_time()
                stages = place_stages((stage,), lambda *_, d=documents: int(d.lengths.sum()), 0)
                streams[named] = stream = Stream(stages, lambda *_, d=documents: d)
                stream[0]
                result[f"{named}: index, CPU-seconds"] = time.process_time() - began
                began = time.process_time()
                stream[FAR]
                result[f"{named}: first batch at step {FAR:,}, CPU-seconds"] = time.process_time() - began
            steps = -(-tokens // (rows * length))
            seconds = _in_turns(list(streams.values()), steps)
            cpu = seconds[:, :, 0]
            for (named, stream), (of_cpu, of_wall) in zip(streams.items(), np.median(seconds, axis=0), strict=True):
                result[f"{named}: tokens per CPU-second"] = float(steps * rows * length / of_cpu)
                result[f"{named}: tokens per second"] = float(steps * rows * length / of_wall)
                for mean in (300, 711):  # 711 is the mean of Bordt and Pawelczyk (2025)
                    treated = stream.with_insertions(_insertions(stream, steps, mean, letters.eos_id))
                    result[f"{named}: more CPU time with items of {mean} tokens over 1.8 % of them"] = _more(
                        stream, treated, steps
                    )
            result[f"length {length}, metadata: more CPU time than without"] = (
                float(np.median(cpu[:, 1] / cpu[:, 0])) - 1
            )
        few = every[
            : max(200, len(every) // 20)
        ]  # read for many epochs: of each there are indices, which must go again
        insertions = partial(_insertions, mean_tokens=300, eos_id=letters.eos_id)
        result |= memory.growth(store, few, (257,), metadata, tokens // 4, insertions)
    return result


def _more(plain, treated, steps: int) -> float:
    """The share of CPU time that batches of one stream take more than those of another; of each the best of ten."""
    seconds = [[[_reading(s, step)[0] for s in (plain, treated)] for _ in range(10)] for step in range(1, steps)]
    without, with_them = np.median(np.min(seconds, axis=1), axis=0)
    return float(with_them / without) - 1


def _in_turns(streams: list[Stream], steps: int) -> np.ndarray:
    """float64 [ROUNDS, streams, 2]: seconds of CPU and of wall time to read some steps of each, a step of one after the same
    step of the others, so that whatever else the machine does meets them all alike."""
    seconds = np.zeros((ROUNDS, len(streams), 2))
    for turn in range(ROUNDS):
        for step in range(1, 1 + steps):
            for number, stream in enumerate(streams):
                seconds[turn, number] += _reading(stream, step)
    return seconds


def _reading(stream: Stream, step: int) -> tuple[float, float]:
    """Seconds of CPU and of wall time to read a step."""
    began, began_wall = time.process_time(), time.perf_counter()
    stream[step]
    return time.process_time() - began, time.perf_counter() - began_wall


def _insertions(stream, steps: int, mean_tokens: int, eos_id: int):
    """Items of `mean_tokens`, a hundred more or fewer, over 1.8 % of the first steps."""
    count = int(0.018 * steps * stream.stages[0].tokens_per_step / (mean_tokens + 2))
    items = Items.of([np.full(mean_tokens - 100 + i % 201, 7) for i in range(count)])
    return place({"texts": [Group(items, Where(end_step=steps + 1))]}, stream.grid, 0, eos_id)


def index(documents: int, row_length: int = 2048) -> dict:
    """The table of one epoch's rows over so many documents: their order drawn, rows cut."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.2, documents), 8, 100_000).astype(np.int64)
    began = time.process_time()
    order = permute(np.arange(documents), documents, 0)
    table = concat_chunk(order, lengths[order], row_length)
    seconds = time.process_time() - began
    held = sum(column.nbytes for column in (table.documents, table.starts, table.lengths, table.row_offsets))
    return {
        f"index of {documents:,} documents, CPU-seconds": seconds,
        "index: CPU-seconds for 100 million documents": seconds * 1e8 / documents,
        "index: bytes a document": held / documents,
        "index: peak memory of the process, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
