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


def check(stream, config, first_step=0, host=0, hosts=1):
    steps = []
    for step, arrays in batches(stream, first_step, config, host, hosts):
        steps.append(step)
        share = 4 // hosts
        expected = stream.rows(step, host * share, share).arrays()
        assert arrays.keys() == expected.keys()
        assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    assert steps == list(range(first_step, 30))


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("first_step", [0, 17, 29])
def test_any_threads_from_any_step(stream, threads, first_step):
    check(stream, LoaderConfig(threads=threads, prefetch_batches=3), first_step)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_take_blocks_of_the_same_rows(stream, hosts):
    for host in range(hosts):
        check(stream, LoaderConfig(threads=1), 3, host, hosts)


def test_worker_processes_change_nothing(stream):
    check(stream, LoaderConfig(workers=2, prefetch_batches=4), 5)
