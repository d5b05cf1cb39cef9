"""Whether reading holds on to memory: what the process has after some batches, against what it has after ten times as many."""

import gc
import re
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from mixlab.corpus.store import TokenStore
from mixlab.schedule.fixed import FixedCut
from mixlab.schedule.stages import StageConfig, place_stages
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.metadata import Metadata
from mixlab.stream import Stream

SETTINGS = {
    "concat_chunk": FormatConfig(),
    "concat_chunk, instance filter, weights by row": FormatConfig(mask_repetitions=True, loss_normaliser="rows"),
    "complete": FormatConfig("complete"),
    "best_fit": FormatConfig("best_fit"),
    "decompose": FormatConfig("decompose"),
}


def growth(
    store: TokenStore, ids, suffix: tuple[int, ...], metadata: Metadata, tokens: int, insertions: Callable
) -> dict[str, float]:
    """Bytes a million tokens, for every kind of rows and with insertions ((stream, steps) -> Placements). `tokens` are read, an
    eleventh of them before it counts."""
    found = {}
    for name, format in SETTINGS.items():
        for what in (None, metadata):
            documents = Documents(store, ids, (), suffix, what)
            steps = max(11, tokens // 2**14)
            stage = StageConfig("main", steps, sequence_length=1024, tokens_per_step=2**14, format=format)

            def by_length(name, format, longest, documents=documents):
                return FixedCut(name, documents, format, longest, 0, None).tokens()

            stages = place_stages((stage,), lambda *_, d=documents: int(d.lengths.sum()), 0, None, by_length)
            stream = Stream(stages, lambda *_, d=documents: d)
            named = name + (", metadata" if what else "")
            streams = {named: stream}
            if name == "concat_chunk":
                streams[f"{named}, insertions"] = stream.with_insertions(insertions(stream, steps - 1))
            for told, read in streams.items():
                grown = _growth(read)
                found |= {f"{told}: {kind}, growth in bytes per million tokens": grown[kind] for kind in grown}
    return found


def _growth(stream: Stream) -> dict[str, float]:
    steps = len(stream)
    first = steps // 11
    tracemalloc.start()
    for step in range(steps):
        if step == first:
            began = _held()
        stream[step]
    ended = _held()
    tracemalloc.stop()
    tokens = (steps - first) * stream.stages[0].tokens_per_step
    return {kind: (ended[kind] - began[kind]) / tokens * 1e6 for kind in ended}


def _held() -> dict[str, int]:
    """Bytes: allocated by Python and numpy; resident, without what files are mapped to (where the system tells, else the
    most so far)."""
    gc.collect()
    status = Path("/proc/self/status")
    told = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    resident = int(told[1]) if told else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"allocated memory": tracemalloc.get_traced_memory()[0], "resident memory": resident * 1024}
