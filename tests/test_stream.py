import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.schedule.fixed import FixedCut
from mixlab.schedule.stages import StageConfig, place_stages
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces
from mixlab.stream import Kind, Stream, render

BOS, EOS, PAD = 1, 2, 9


def documents_of(store, format, ids=None):
    ids = np.arange(len(store.offsets) - 1) if ids is None else ids
    return Documents(store, ids, (BOS,) if format.bos else (), (EOS,) if format.eos else ())


def make_stream(store, steps=50, length=16, rows=4, seed=0, format=None, cache=None, name="text", ids=None):
    stage = StageConfig(
        "main",
        steps,
        tokens_per_step=rows * length,
        sequence_length=length,
        mixture={name: 1.0},
        format=format or FormatConfig(),
    )
    return run_of([stage], {name: store}, seed, cache, ids)


def run_of(configs, stores, seed=0, cache=None, ids=None):
    """The stream of these stages over stores by name."""

    def documents(name, format):
        return documents_of(stores[name], format, ids)

    def epoch_tokens(name, format):
        return int(documents(name, format).lengths.sum())

    def bucket_tokens(name, format, longest):
        return FixedCut(name, documents(name, format), format, longest, seed, cache).tokens()

    stages = place_stages(tuple(configs), epoch_tokens, seed, bucket_tokens=bucket_tokens)
    return Stream(stages, documents, seed, cache, PAD)


def rows_of(stream, name="text", stage=0):
    return stream.readings[stage][name].rows


def equal(a, b):
    one, other = a.arrays() | {"spans": a.spans}, b.arrays() | {"spans": b.spans}
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


formats = st.builds(
    FormatConfig,
    bos=st.booleans(),
    eos=st.just(True),
    mask_documents=st.booleans(),
    restart_positions=st.booleans(),
    loss_across_documents=st.booleans(),
)
corpora = st.lists(st.integers(1, 40), min_size=4, max_size=40)


def naive_row(store, documents, format, pieces, length):
    """One row, token by token, from the definitions."""
    tokens, owner, places = [], [], []
    for document, start, count in pieces:
        whole = [*documents.prefix, *store.texts[document].tolist(), *documents.suffix]
        tokens += whole[start : start + count]
        owner += [document] * count
        places += range(count)
    following = tokens[1:]
    document, start, count = pieces[-1]
    whole = [*documents.prefix, *store.texts[document].tolist(), *documents.suffix]
    cut = start + count < len(whole) and len(tokens) == length
    following.append(whole[start + count] if cut else PAD)
    weights = [1.0 if format.loss_across_documents or a == b else 0.0 for a, b in itertools.pairwise(owner)]
    weights.append(1.0 if cut else 0.0)
    missing = length - len(tokens)
    numbers = {}
    segments = [numbers.setdefault(d, len(numbers) + 1) for d in owner]
    return {
        "tokens": tokens + [PAD] * missing,
        "targets": following + [PAD] * missing,
        "loss_weights": weights + [0.0] * missing,
        "segment_ids": (segments if format.mask_documents else [1] * len(tokens)) + [0] * missing,
        "positions": places if format.restart_positions else list(range(len(tokens))),
    }


@settings(deadline=None)
@given(corpora, formats, st.integers(3, 24), st.integers(0, 5))
def test_batches_equal_the_definition(memory_store, lengths, format, length, seed):
    store = memory_store(lengths)
    rows = 2
    if sum(n + format.bos + 1 for n in lengths) < length:
        return
    stream = make_stream(store, 6, length, rows, seed, format)
    source = rows_of(stream)
    for step in (0, 3, 5):
        batch = stream[step]
        pieces = source.pieces(np.arange(step * rows, (step + 1) * rows))
        for r in range(rows):
            mine = pieces.rows == r
            row = list(zip(pieces.documents[mine], pieces.starts[mine], pieces.lengths[mine], strict=True))
            expected = naive_row(store, source.documents, format, row, length)
            for name, value in expected.items():
                assert getattr(batch, name)[r].tolist()[: len(value)] == value, name


@settings(deadline=None)
@given(corpora, formats, st.integers(0, 5))
def test_every_token_has_its_provenance(memory_store, lengths, format, seed):
    store = memory_store(lengths)
    length = 8
    stream = make_stream(store, 4, length, 3, seed, format)
    for step in range(4):
        batch = stream[step]
        covered = np.zeros_like(batch.tokens)
        for span in batch.spans:
            here = (span["row"], slice(span["offset"], span["offset"] + span["length"]))
            covered[here] += 1
            found = batch.tokens[here]
            if span["kind"] == Kind.TEXT:
                begin = span["start"]
                assert np.array_equal(found, store.texts[span["document"]][begin : begin + span["length"]])
            else:
                assert (found == {Kind.BOS: BOS, Kind.EOS: EOS, Kind.PADDING: PAD}[span["kind"]]).all()
        assert (covered == 1).all()


@settings(deadline=None)
@given(corpora, st.integers(4, 16), st.integers(0, 3))
def test_an_epoch_delivers_every_token_once(memory_store, lengths, length, seed):
    store = memory_store(lengths)
    if sum(lengths) + len(lengths) < length:
        return
    stream = make_stream(store, 1, length, 1, seed)
    source = rows_of(stream)
    for epoch in (0, 1, 2):
        ks = np.arange(source.rows_per_epoch) + epoch * source.rows_per_epoch
        batch = render(source.pieces(ks), source.documents, source.format, len(ks), length)
        seen = np.sort(batch.tokens[batch.tokens != EOS])
        everything = np.sort(store.flat)
        assert len(np.unique(seen)) == len(seen) and np.isin(seen, everything).all()
        dropped = source.index(epoch).dropped_tokens["last partial row"]
        assert batch.tokens.size + dropped == source.epoch_tokens and dropped < length


def test_epochs_differ_in_order_and_seeds_too(memory_store):
    store = memory_store(list(range(5, 45)))
    source = rows_of(make_stream(store))
    other = rows_of(make_stream(store, seed=1))
    first, second = source.index(0), source.index(1)
    assert not np.array_equal(first.documents, second.documents)
    assert not np.array_equal(first.documents, other.index(0).documents)
    assert np.array_equal(first.documents, rows_of(make_stream(store)).index(0).documents)


@settings(deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 40))
def test_hosts_read_the_same_global_batch(memory_store, hosts, step):
    stream = make_stream(memory_store(list(range(3, 30))), rows=12)
    whole, share = stream[step], 12 // hosts
    parts = [stream.rows(step, host * share, share) for host in range(hosts)]
    for name in whole.arrays():
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    spans = np.concatenate([part.spans for part in parts])
    spans["row"] += np.repeat(np.arange(hosts) * share, [len(part.spans) for part in parts]).astype(np.int32)
    assert np.array_equal(spans, whole.spans)


def test_batches_cross_epochs_and_do_not_depend_on_what_was_read_before(memory_store, tmp_path):
    store = memory_store([5, 9, 3, 14, 8])  # 44 tokens with EOS: 5 rows of 8 an epoch, 4 a step
    stream = make_stream(store, 20, 8, 4)
    forwards = [stream[step] for step in range(20)]
    fresh = pickle.loads(pickle.dumps(make_stream(store, 20, 8, 4, cache=tmp_path)))
    for step in reversed(range(20)):
        assert equal(fresh[step], forwards[step])
        assert equal(make_stream(store, 20, 8, 4, cache=tmp_path)[step], forwards[step])


def test_a_longer_run_reads_the_same_first(memory_store):
    store = memory_store(list(range(3, 30)))
    short, long = make_stream(store, 5), make_stream(store, 50)
    assert all(equal(short[step], long[step]) for step in range(5))
    assert short.fingerprint() == long.fingerprint()
    assert short.fingerprint() != make_stream(store, 5, seed=1).fingerprint()
    assert short.fingerprint() != make_stream(memory_store(list(range(4, 31))), 5).fingerprint()


@settings(deadline=None)
@given(corpora, st.integers(0, 3))
def test_documents_are_found_where_they_are_read(memory_store, lengths, seed):
    stream = make_stream(memory_store(lengths + [30]), 6, 8, 3, seed)
    read = {}
    for step in range(6):
        for span in stream[step].spans:
            if span["kind"] == Kind.TEXT:
                entry = (step, int(span["row"]), int(span["offset"]), int(span["start"]))
                read.setdefault(int(span["document"]), []).append(entry)
    for document in range(len(lengths) + 1):
        text = [
            (p.step, p.row, p.offset, p.start)
            for p in stream.find("text", document)
            if p.start < rows_of(stream).documents.text_lengths(np.array([document]))[0]
        ]
        assert sorted(text) == sorted(read.get(document, []))


def test_only_the_chosen_documents_are_read(memory_store):
    ids = np.array([1, 3, 4])
    stream = make_stream(memory_store([20, 20, 20, 20, 20, 20]), 10, ids=ids)
    assert set(np.unique(np.concatenate([stream[s].spans["document"] for s in range(10)]))) == set(ids)


def test_rows_that_are_not_full_end_in_padding(memory_store):
    store = memory_store([5, 4])
    format = FormatConfig()
    pieces = Pieces(np.array([0, 1]), np.array([0, 1]), np.array([0, 1]), np.array([6, 4]))
    batch = render(pieces, documents_of(store, format), format, 2, 8, pad=PAD)
    assert batch.tokens[0].tolist() == [100, 101, 102, 103, 104, EOS, PAD, PAD]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0] * 2, [1] * 4 + [0] * 4]
    assert batch.loss_weights.tolist() == [[1] * 5 + [0] * 3, [1] * 3 + [0] * 5]
    assert batch.spans["kind"].tolist() == [Kind.TEXT, Kind.EOS, Kind.PADDING, Kind.TEXT, Kind.EOS, Kind.PADDING]


def test_too_little_text_is_refused(memory_store):
    with pytest.raises(UserError, match=r"sources\.text.*3 tokens"):
        make_stream(memory_store([2]), length=16)


def test_steps_outside_the_run_are_refused(memory_store):
    with pytest.raises(IndexError, match="outside the run"):
        make_stream(memory_store([50]), steps=5)[5]
