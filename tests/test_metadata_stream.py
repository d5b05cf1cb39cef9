"""Metadata in what the model reads: token by token, format by format (Gao et al. 2025, sections 2 and A.2)."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixlab.batch import finish, lay_out
from mixlab.inject.overlay import Insertion, overlay
from mixlab.schedule.fixed import FixedCut
from mixlab.schedule.stages import StageConfig, place_stages
from mixlab.sequences.best_fit import best_fit
from mixlab.sequences.complete import complete
from mixlab.sequences.concat_chunk import concat_chunk
from mixlab.sequences.decompose import decompose
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.metadata import Metadata, MetadataConfig
from mixlab.stream import Kind, Stream, render
from tests.conftest import MemoryStore

BOS, EOS, PAD = 1, 2, 0
HOST_A, HOST_B = np.array([11, 12, 13]), np.array([11, 14, 13])
D1, D2, D3 = [21, 22, 23, 24], [31, 32], [41, 42, 43, 44, 45]


def documents_of(texts, codes=None, strings=(HOST_A, HOST_B), loss=False, every_piece=False):
    metadata = None if codes is None else Metadata.of(np.array(codes), strings, loss)
    return Documents(MemoryStore(texts), np.arange(len(texts)), (BOS,), (EOS,), metadata, every_piece)


def read(documents, length, cut=complete, **settings):
    format = FormatConfig(bos=True, kind=cut.__name__, **settings)
    index = cut(documents.ids, documents.lengths, length)
    return render(index.pieces(np.arange(len(index))), documents, format, len(index), length, 0, PAD)


def targets(batch, row=0):
    """Position -> the target that is trained there."""
    where = np.flatnonzero(batch.loss_weights[row])
    return dict(zip(where.tolist(), batch.targets[row, where].tolist(), strict=True))


def test_two_documents_that_fill_a_row_exactly():
    batch = read(documents_of([D1, D2], [1, 2]), 16)
    assert batch.tokens.tolist() == [[1, 11, 12, 13, 21, 22, 23, 24, 2, 1, 11, 14, 13, 31, 32, 2]]
    assert batch.segment_ids.tolist() == [[1] * 9 + [2] * 7]
    assert batch.positions.tolist() == [[*range(9), *range(7)]]
    assert targets(batch) == {3: 21, 4: 22, 5: 23, 6: 24, 7: 2, 12: 31, 13: 32, 14: 2}
    spans = [(s["offset"], s["length"], Kind(s["kind"]).name, s["document"], s["start"]) for s in batch.spans]
    first = [(0, 1, "BOS", 0, 0), (1, 3, "METADATA", 0, 0), (4, 4, "TEXT", 0, 0), (8, 1, "EOS", 0, 0)]
    assert spans == first + [
        (9, 1, "BOS", 1, 0),
        (10, 3, "METADATA", 1, 0),
        (13, 2, "TEXT", 1, 0),
        (15, 1, "EOS", 1, 0),
    ]


def test_what_may_be_a_target_of_one_document():
    documents = documents_of([D1], [1])
    format = FormatConfig(bos=True, kind="complete")
    layout = lay_out(complete(documents.ids, documents.lengths, 9).pieces(np.arange(1)), documents, format, 1, 9)
    assert layout.trainable[0, :9].tolist() == [False] * 4 + [True] * 5
    assert finish(layout, format).loss_weights.sum() == 5


@pytest.mark.parametrize("across, terms", [(False, 8), (True, 9)])
def test_documents_without_metadata_bear_loss_as_ever(across, terms):
    batch = read(documents_of([D1, D2]), 10, loss_across_documents=across)
    assert batch.tokens.tolist() == [[1, 21, 22, 23, 24, 2, 1, 31, 32, 2]]
    assert batch.segment_ids.tolist() == [[1] * 6 + [2] * 4]
    assert batch.positions.tolist() == [[*range(6), *range(4)]]
    assert batch.loss_weights.sum() == terms
    assert targets(batch).get(5) == (1 if across else None)


def test_a_bos_before_metadata_is_no_target_even_across_documents():
    batch = read(documents_of([D1, D2], [1, 2]), 16, loss_across_documents=True)
    assert targets(batch) == {3: 21, 4: 22, 5: 23, 6: 24, 7: 2, 12: 31, 13: 32, 14: 2}
    mixed = read(documents_of([D1, D2], [1, 0]), 13, loss_across_documents=True)  # the second is a plain document
    assert mixed.tokens.tolist() == [[1, 11, 12, 13, 21, 22, 23, 24, 2, 1, 31, 32, 2]]
    assert targets(mixed) == {3: 21, 4: 22, 5: 23, 6: 24, 7: 2, 8: 1, 9: 31, 10: 32, 11: 2}


def test_what_does_not_fit_is_dropped_and_the_next_row_begins_with_a_document():
    batch = read(documents_of([D1, D2, D3, D3], [1, 2, 1, 1]), 12)
    assert batch.tokens.tolist() == [
        [1, 11, 12, 13, 21, 22, 23, 24, 2, 1, 11, 14],
        [1, 11, 12, 13, 41, 42, 43, 44, 45, 2, 1, 11],
    ]
    assert batch.segment_ids[0].tolist() == [1] * 9 + [2] * 3
    assert batch.loss_weights.sum(axis=1).tolist() == [5, 6]


def test_one_token_at_a_rows_end_is_padding():
    batch = read(documents_of([D1, D2], [1, 2]), 10)
    assert batch.tokens.tolist() == [[1, 11, 12, 13, 21, 22, 23, 24, 2, PAD]]
    assert batch.segment_ids.tolist() == [[1] * 9 + [0]]
    assert batch.loss_weights.sum() == 5


def test_a_long_document_is_cut_and_never_goes_on():
    batch = read(documents_of([list(range(100, 115)), D2], [1, 2]), 12)
    assert batch.tokens.tolist() == [[1, 11, 12, 13, *range(100, 108)]]
    assert targets(batch) == {3 + i: 100 + i for i in range(8)}


def test_best_fit_and_concat_chunk_carry_metadata_once():
    documents = documents_of([list(range(100, 115)), D2], [1, 2])
    chunked = read(documents, 9, concat_chunk, targets_past_row=False)
    assert chunked.tokens.tolist() == [
        [1, 11, 12, 13, *range(100, 105)],
        [*range(105, 114)],
        [114, 2, 1, 11, 14, 13, 31, 32, 2],
    ]
    assert chunked.loss_weights.sum(axis=1).tolist() == [5, 8, 4]
    packed = read(documents, 10, best_fit, targets_past_row=False)
    assert packed.tokens.tolist()[:2] == [[1, 11, 12, 13, *range(100, 106)], [*range(106, 115), 2]]
    assert packed.tokens.tolist()[2] == [1, 11, 14, 13, 31, 32, 2, PAD, PAD, PAD]
    assert packed.loss_weights.sum(axis=1).tolist() == [6, 9, 3]


def test_metadata_bear_loss_when_asked():
    batch = read(documents_of([D1, D2], [1, 2], loss=True), 16)
    assert targets(batch) == {i: t for i, t in enumerate(batch.targets[0].tolist()) if i not in (8, 15)}


def test_rows_may_weigh_alike():
    """Rows of 5 and 3 trained tokens with losses of 1 and 3: mean of the rows' means 2, mean of the tokens 1.75."""
    losses = np.array([[1.0], [3.0]])
    for normaliser, expected in (("rows", 2.0), ("tokens", 1.75)):
        weights = read(documents_of([D1, D2], [1, 2]), 9, best_fit, loss_normaliser=normaliser).loss_weights
        assert (weights > 0).sum(axis=1).tolist() == [5, 3]
        assert (weights * losses).sum() / weights.sum() == pytest.approx(expected)


tiny_texts = st.lists(st.integers(0, 40), min_size=2, max_size=25)


@settings(max_examples=60, deadline=None)
@given(tiny_texts, st.integers(1, 9), st.integers(2, 12), st.data())
def test_a_document_is_the_same_with_and_without_metadata(lengths, longest, length, data):
    """Whatever the format: without BOS and metadata the text is the plain one, in order, and trained as it was."""
    texts = [[1000 * d + t + 100 for t in range(n)] for d, n in enumerate(lengths)]
    strings = [np.arange(10, 10 + n) for n in range(1, longest + 1)]
    codes = data.draw(st.lists(st.integers(0, longest), min_size=len(texts), max_size=len(texts)))
    documents = documents_of(texts, codes, strings)
    cut = data.draw(st.sampled_from([complete, concat_chunk, best_fit]))
    batch = read(documents, length, cut)
    for d, text in enumerate(texts):
        here = [s for s in batch.spans if s["document"] == d and s["kind"] == Kind.TEXT]
        found = sorted((s["start"], s["row"], s["offset"], s["length"]) for s in here)
        tokens = [t for _, row, at, n in found for t in batch.tokens[row, at : at + n].tolist()]
        assert tokens == text[: len(tokens)] or cut is best_fit
        assert set(tokens) <= set(text) and len(set(tokens)) == len(tokens)
    _check_rows(batch, documents, cut is complete)


def _check_rows(batch, documents, by_document):
    kinds = np.zeros(batch.tokens.shape, int)
    conditioned = np.zeros(batch.tokens.shape, bool)
    for s in batch.spans:
        here = slice(s["offset"], s["offset"] + s["length"])
        kinds[s["row"], here] = s["kind"]
        conditioned[s["row"], here] = s["document"] >= 0 and documents.metadata.codes[s["document"]] > 0
    for row in range(len(kinds)):
        segments, positions = batch.segment_ids[row], batch.positions[row]
        starts = np.flatnonzero(np.diff(segments, prepend=0) & (segments > 0))
        assert (positions[starts] == 0).all()
        inside = np.setdiff1d(np.flatnonzero(segments), starts)
        assert (positions[inside] == positions[inside - 1] + 1).all()
        if by_document:
            assert kinds[row, 0] == Kind.BOS and (kinds[row, starts] == Kind.BOS).all()
            assert (kinds[row] == Kind.BOS).sum() == segments.max(initial=0)
    # Within a row, a target bears loss exactly if it is text or EOS of the same document, or BOS of none.
    following, same = kinds[:, 1:], batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
    allowed = same & (following != Kind.PADDING) & ~np.isin(following, [Kind.BOS, Kind.METADATA])
    assert np.array_equal(batch.loss_weights[:, :-1] > 0, allowed)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 150), min_size=1, max_size=12),
    st.sampled_from(["exact", "released", "overlap"]),
    st.booleans(),
    st.data(),
)
def test_every_piece_of_a_decomposed_document_has_its_metadata(lengths, variant, past, data):
    texts = [[1000 * d + t + 100 for t in range(n)] for d, n in enumerate(lengths)]
    strings = [np.arange(10, 10 + n) for n in range(1, 8)]
    codes = data.draw(st.lists(st.integers(0, 7), min_size=len(texts), max_size=len(texts)))
    documents = documents_of(texts, codes, strings, every_piece=True)
    format = FormatConfig(bos=True, kind="decompose", variant=variant, targets_past_row=past)
    buckets = decompose(documents.ids, documents.lengths, variant, 4, 32, 7, documents.heads(documents.ids))
    read_tokens, repeated, predicted = 0, 0, []
    for length, index in buckets.items():
        batch = render(index.pieces(np.arange(len(index))), documents, format, len(index), length, 0, PAD)
        assert batch.tokens.shape == (len(index), length) and (batch.segment_ids == 1).all()
        read_tokens += batch.tokens.size
        for row in range(len(index)):
            document = int(index.documents[row])
            head = [BOS, *strings[codes[document] - 1]] if codes[document] else []
            whole = [*(head or [BOS]), *texts[document], EOS]
            own = batch.tokens[row].tolist()
            if head or index.starts[row] == 0:
                assert own[: len(head)] == head
            begin = max(int(index.starts[row]), len(head))
            assert own[len(head) :] == whole[begin : begin + length - len(head)]
            repeated += len(head) * (index.starts[row] > 0)
            predicted += [(document, t) for t in targets(batch, row).values()]
    assert read_tokens - repeated + sum(n for i in buckets.values() for n in i.dropped_tokens.values()) == int(
        documents.lengths.sum()
    )
    assert len(set(predicted)) == len(predicted)  # no token of a document is predicted twice
    if variant == "overlap" and past:
        for d in np.unique(np.concatenate([i.documents for i in buckets.values()])):
            count = len([1 for document, _ in predicted if document == d])
            pieces = [(n, int(s)) for n, i in buckets.items() for s in i.starts[i.documents == d]]
            head = 1 + len(strings[codes[d] - 1]) if codes[d] else 0
            own = sum(n - head for n, _ in pieces)
            assert count == own + (1 if head else 0)  # all that is read, and the token after the last


def stream_of(configs, texts, codes, seed=0, cache=None):
    def documents(name, format):
        if format.metadata is None:
            return documents_of(texts)
        every_piece = format.kind == "decompose" and format.metadata.every_piece
        return documents_of(texts, codes, loss=format.metadata.loss, every_piece=every_piece)

    stages = place_stages(
        tuple(configs),
        lambda name, format: int(documents(name, format).lengths.sum()),
        seed,
        bucket_tokens=lambda n, format, longest: FixedCut(
            n, documents(n, format), format, longest, seed, cache
        ).tokens(),
    )
    return Stream(stages, documents, seed, cache, PAD)


def stage(name, steps, format, length=16, rows=2, **more):
    return StageConfig(
        name, steps, sequence_length=length, tokens_per_step=rows * length, format=format, mixture={"text": 1.0}, **more
    )


def corpus(count=200, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, count)
    return [[1000 * d + t + 100 for t in range(n)] for d, n in enumerate(lengths)], rng.integers(1, 3, count)


CONDITIONED = MetadataConfig()


@pytest.mark.parametrize("kind", ["complete", "concat_chunk"])
def test_a_cooldown_goes_on_with_documents_that_the_trunk_has_not_touched(kind):
    texts, codes = corpus()
    with_metadata = FormatConfig(bos=True, kind=kind, metadata=CONDITIONED)
    stages = [
        stage("conditioned", 36, with_metadata),
        stage("cooldown", 4, FormatConfig(bos=True, kind=kind)),
    ]
    stream = stream_of(stages, texts, codes)
    trunk = {int(d) for step in range(36) for d in stream[step].spans["document"]} - {-1}
    cooldown = {int(d) for step in range(36, 40) for d in stream[step].spans["document"]} - {-1}
    assert len(trunk) > 50 and len(cooldown) > 3 and not trunk & cooldown
    assert sum(Kind.METADATA in stream[step].spans["kind"] for step in range(36)) > 30
    assert all(Kind.METADATA not in stream[step].spans["kind"] for step in range(36, 40))
    for number, documents in ((0, trunk), (1, cooldown)):
        (touched,) = stream.documents_read(number).values()
        assert set(np.flatnonzero(touched).tolist()) == documents
    start = stream.readings[1]["text"]
    assert start.first == 0 and start.rows.start.position > 0  # row 0 of its own order
    for document in (min(trunk), min(cooldown)):
        assert [p.step for p in stream.find("text", document)] == [
            step
            for step in range(40)
            for s in np.unique(stream[step].spans[stream[step].spans["document"] == document]["row"])
        ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=8, max_size=60), st.integers(2, 24), st.integers(0, 5))
def test_rows_that_begin_with_a_document_are_found_whatever_the_epoch(lengths, length, seed):
    texts = [[1000 * d + t + 100 for t in range(n)] for d, n in enumerate(lengths)]
    if sum(len(t) + 2 for t in texts) < length:
        return
    stream = stream_of([stage("main", 60, FormatConfig(bos=True, kind="complete"), length)], texts, None, seed)
    rows = stream.readings[0]["text"].rows
    every = rows.pieces(np.arange(120))
    assert (every.starts == 0).all()
    for k in (0, 1, 59, 119):
        assert np.array_equal(rows.pieces(np.array([k])).documents, every.documents[every.rows == k])
    assert [(p.step * 2 + p.row, p.length) for p in stream.find("text", 0)] == [
        (int(r), int(n)) for r, d, n in zip(every.rows, every.documents, every.lengths, strict=True) if d == 0
    ]
    taken = 7
    cursor = rows.cursor_after(taken)
    touched = set(rows.pieces(np.arange(taken)).documents.tolist()) if cursor.epoch == 0 else set()
    left = set(rows.documents.ids[rows._order(cursor.epoch)[cursor.position :]].tolist())
    assert not touched & left


def test_the_order_of_documents_does_not_depend_on_metadata():
    texts, codes = corpus()
    for kind in ("complete", "concat_chunk"):
        plain, conditioned = (
            stream_of([stage("main", 20, FormatConfig(bos=True, kind=kind, metadata=m))], texts, codes)
            for m in (None, CONDITIONED)
        )
        orders = [s.readings[0]["text"].rows._order(0) for s in (plain, conditioned)]
        assert np.array_equal(*orders)
    for cut in (complete, concat_chunk):  # and rows hold them in it
        for codes_of in (None, codes):
            documents = documents_of(texts, codes_of)
            index = cut(documents.ids, documents.lengths, 64)
            assert (np.diff(index.documents.astype(np.int64)) >= 0).all()


def test_without_metadata_the_stream_is_what_it_was():
    """Fingerprints written down before there were metadata."""
    texts, _ = corpus(40)
    expected = {
        "concat_chunk": "e6c856f9b023823b9c7966e2a4ace30cad2af83510b16ce39edd05024b5d62af",
        "best_fit": "c20f0a4062008059a0d190678f6acaf094647724934d879e6bdbf2e5581fe4b3",
        "decompose": "634643af23c0399827294f63fc596c27af54bb87cb252e9cd50883675cbc3a34",
    }
    for kind, fingerprint in expected.items():
        stream = stream_of([stage("main", 5, FormatConfig(kind=kind, min_length=4))], texts, None)
        assert stream.fingerprint() == fingerprint, kind
        assert (
            stream_of([stage("main", 5, FormatConfig(kind=kind, min_length=4))], texts, [1] * 40).fingerprint()
            == fingerprint
        )


def test_metadata_are_part_of_what_is_read():
    texts, codes = corpus(60)
    names = set()
    for kind in ("complete", "concat_chunk", "best_fit", "decompose"):
        for metadata in (None, CONDITIONED, MetadataConfig(loss=True)):
            format = FormatConfig(bos=True, kind=kind, min_length=4, metadata=metadata)
            names.add(stream_of([stage("main", 5, format)], texts, codes).fingerprint())
    assert len(names) == 12
    other = stream_of([stage("main", 5, FormatConfig(bos=True, metadata=CONDITIONED))], texts, 3 - codes)
    assert other.fingerprint() not in names


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["complete", "concat_chunk", "best_fit", "decompose"]), st.integers(0, 5), st.booleans())
def test_hosts_read_the_rows_of_one_batch(kind, seed, every_piece):
    texts, codes = corpus(80, seed)
    format = FormatConfig(bos=True, kind=kind, min_length=8, metadata=MetadataConfig(every_piece=every_piece))
    stream = stream_of([stage("main", 6, format, 32)], texts, codes, seed)
    for step in range(6):
        rows = stream.stage(step).shape(step)[0]
        for r in range(rows):
            part, whole = stream.rows(step, r, 1), stream[step]
            for name, array in part.arrays().items():
                assert np.array_equal(array[0], getattr(whole, name)[r])


def test_what_is_inserted_over_metadata_bears_loss():
    documents = documents_of([D1, D2], [1, 2])
    format = FormatConfig(bos=True, kind="complete")
    layout = lay_out(complete(documents.ids, documents.lengths, 16).pieces(np.arange(1)), documents, format, 1, 16)
    item = Insertion(row=0, offset=2, tokens=np.array([91, 92], np.int32), isolated=False)
    batch = finish(overlay(layout, [item]), format)
    assert batch.tokens[0, :6].tolist() == [1, 11, 91, 92, 21, 22]
    assert {1: 91, 2: 92, 3: 21}.items() <= targets(batch).items() and 0 not in targets(batch)


@settings(max_examples=30, deadline=None)
@example("decompose", 12, 20, 3)
@given(
    st.sampled_from(["complete", "concat_chunk", "best_fit", "decompose"]),
    st.integers(12, 40),
    st.integers(12, 20),
    st.integers(0, 3),
)
def test_the_documents_that_a_stage_reads_are_told(kind, steps, more, seed):
    texts, _ = corpus(30, seed)
    format = FormatConfig(bos=True, kind=kind, min_length=4)
    stream = stream_of([stage("one", steps, format, 8), stage("two", more, format, 8)], texts, None, seed)
    for number, first in ((0, 0), (1, steps)):
        read_here = {int(d) for s in range(first, first + (steps, more)[number]) for d in stream[s].spans["document"]}
        (touched,) = stream.documents_read(number).values()
        assert set(np.flatnonzero(touched).tolist()) == read_here - {-1}
