"""This process's rows, read ahead by grain. Reading ahead decides when a batch is made, never what is in it."""

from collections.abc import Iterator, Mapping

import grain
import numpy as np
from absl import flags

from mixlab.config import LoaderConfig
from mixlab.stream import Stream

Rows = Mapping[tuple[int, int], np.ndarray]


class _ProcessBatches:
    """Step -> the arrays of this process's rows; what grain indexes."""

    def __init__(self, stream: Stream, first_step: int, end_step: int, mine: Rows | None):
        self._stream, self._first, self._end, self._mine = stream, first_step, end_step, mine

    def __len__(self) -> int:
        return self._end - self._first

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step = self._first + int(index)
        shape = self._stream.shape(step)
        mine = np.arange(shape.rows) if self._mine is None else self._mine[shape.rows, shape.length]
        blocks = [
            self._stream.rows(step, int(block[0]), len(block)).arrays(shape.masked)
            for block in np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1)  # nearly always one
        ]
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def batches(
    stream: Stream,
    first_step: int,
    config: LoaderConfig,
    mine: Rows | None = None,
    end_step: int | None = None,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, arrays [rows of this process, L]) from `first_step` up to, and without, `end_step` (None: to the end of the
    run). Nothing from `end_step` on is read.

    mine: (rows, length) of a batch -> which rows this process supplies, ascending (`parallel.mesh.host_rows`); None: all.
    Segment ids are left out of a step that masks no documents. Any threads, workers and read-ahead give the same."""
    end = len(stream) if end_step is None else end_step
    source = grain.MapDataset.source(_ProcessBatches(stream, first_step, end, mine))
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch_batches)
    dataset = source.to_iter_dataset(options)
    if config.workers:
        flags.FLAGS.mark_as_parsed()  # grain reads its own flags, which no absl app parses here
        per_worker = max(1, config.prefetch_batches // config.workers)
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(config.workers, per_worker))
    return zip(range(first_step, end), dataset, strict=True)
