import numpy as np
import pytest

from mixlab.config import LoaderConfig
from mixlab.loader import batches
from mixlab.schedule.stages import StageConfig, place_stages
from mixlab.sequences.documents import Documents
from mixlab.stream import Stream


@pytest.fixture(scope="module")
def stream(memory_store):
    store = memory_store(list(range(5, 40)))
    documents = Documents(store, np.arange(35), (), (2,))
    config = StageConfig("main", 30, sequence_length=16, tokens_per_step=64)
    stages = place_stages((config,), lambda *_: int(documents.lengths.sum()), 0)
    return Stream(stages, lambda *_: documents)


def check(stream, config, first_step=0, mine=None):
    steps = []
    for step, arrays in batches(stream, first_step, config, None if mine is None else {(4, 16): np.array(mine)}):
        steps.append(step)
        whole = stream.rows(step, 0, 4).arrays()
        assert arrays.keys() == whole.keys()
        expected = {name: array if mine is None else array[mine] for name, array in whole.items()}
        assert all(np.array_equal(arrays[name], expected[name]) for name in whole)
    assert steps == list(range(first_step, 30))


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("first_step", [0, 17, 29])
def test_any_threads_from_any_step(stream, threads, first_step):
    check(stream, LoaderConfig(threads=threads, prefetch_batches=3), first_step)


@pytest.mark.parametrize("mine", [[0, 1], [3], [0, 3], [0, 2, 3]])
def test_a_process_reads_its_rows_of_the_same_batch(stream, mine):
    check(stream, LoaderConfig(threads=1), 3, mine)


def test_worker_processes_change_nothing(stream):
    check(stream, LoaderConfig(workers=2, prefetch_batches=4), 5)
