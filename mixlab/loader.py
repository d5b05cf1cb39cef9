"""This host's rows, read ahead by grain. Reading ahead decides when a batch is made, never what is in it."""

from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from mixlab.config import LoaderConfig
from mixlab.stream import Stream


class _HostBatches:
    """Step -> the arrays of this host's rows; what grain indexes."""

    def __init__(self, stream: Stream, first_step: int, end_step: int, host: int, hosts: int):
        self._stream, self._first, self._end, self._host, self._hosts = stream, first_step, end_step, host, hosts

    def __len__(self) -> int:
        return self._end - self._first

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step = self._first + int(index)
        shape = self._stream.shape(step)
        share = shape.rows // self._hosts
        return self._stream.rows(step, self._host * share, share).arrays(shape.masked)


def batches(
    stream: Stream, first_step: int, config: LoaderConfig, host: int = 0, hosts: int = 1, end_step: int | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, arrays [B / hosts, L]) from `first_step` up to, and without, `end_step` (None: to the end of the run): the
    contiguous block of rows of `host`. Nothing from `end_step` on is read.

    Segment ids are left out of a step that masks no documents. The number of rows of every step must be a multiple of
    `hosts`. Any threads, workers and read-ahead give the same."""
    end = len(stream) if end_step is None else end_step
    source = grain.MapDataset.source(_HostBatches(stream, first_step, end, host, hosts))
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch_batches)
    dataset = source.to_iter_dataset(options)
    if config.workers:
        flags.FLAGS.mark_as_parsed()  # grain reads its own flags, which no absl app parses here
        per_worker = max(1, config.prefetch_batches // config.workers)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.workers, per_worker))
    return zip(range(first_step, end), dataset, strict=True)
