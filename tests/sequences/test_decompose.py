import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.sequences.decompose import LEFT_OVER, MOSTLY_HEAD, TARGET_ONLY, decompose, length_problems
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import SequenceIndex
from mixlab.stream import render

# length: (exact without floor and cap; exact 256..8192, dropped; released 256..8192 less its extra token, left over)
LADDER = [4096, 2048, 1024, 512, 256]
WORKED = {
    10: ([8, 2], [], 10, [], 10),
    37: ([32, 4, 1], [], 37, [], 37),
    255: ([128, 64, 32, 16, 8, 4, 2, 1], [], 255, [], 255),
    256: ([256], [256], 0, [], 256),
    257: ([256, 1], [256], 1, [256], 0),
    511: ([256, 128, 64, 32, 16, 8, 4, 2, 1], [256], 255, [256], 254),
    512: ([512], [512], 0, [256], 255),
    513: ([512, 1], [512], 1, [512], 0),
    600: ([512, 64, 16, 8], [512], 88, [512], 87),
    1000: ([512, 256, 128, 64, 32, 8], [512, 256], 232, [512, 256], 230),
    8191: ([4096 >> i for i in range(13)], LADDER, 255, LADDER, 250),
    8192: ([8192], [8192], 0, LADDER, 251),
    8193: ([8192, 1], [8192], 1, [8192], 0),
    8448: ([8192, 256], [8192, 256], 0, [8192], 255),
    8450: ([8192, 256, 2], [8192, 256], 2, [8192, 256], 0),
    16384: ([16384], [8192] * 2, 0, [8192, *LADDER], 250),
    16385: ([16384, 1], [8192] * 2, 1, [8192, *LADDER], 251),
    20000: (
        [16384, 2048, 1024, 512, 32],
        [8192, 8192, 2048, 1024, 512],
        32,
        [8192, 8192, 2048, 1024, 512],
        27,
    ),
    24576: ([16384, 8192], [8192] * 3, 0, [8192, 8192, *LADDER], 249),
    40000: (
        [32768, 4096, 2048, 1024, 64],
        [8192] * 4 + [4096, 2048, 1024],
        64,
        [8192] * 4 + [4096, 2048, 1024],
        57,
    ),
}


def pieces_by_document(buckets, documents):
    """document -> [(start, length)] by start; also checks that every row is one whole piece of the bucket's length."""
    found = {int(document): [] for document in documents}
    for length, index in buckets.items():
        pieces = index.pieces(np.arange(len(index)))
        assert pieces.rows.tolist() == list(range(len(index)))
        assert set(pieces.lengths.tolist()) <= {length}
        for document, start in zip(pieces.documents.tolist(), pieces.starts.tolist(), strict=True):
            found[document].append((start, length))
    return {document: sorted(pieces) for document, pieces in found.items()}


def lengths_of_one(length, *settings):
    buckets = decompose(np.array([5]), np.array([length]), *settings)
    dropped = buckets[min(buckets)].dropped_tokens
    return [n for _, n in pieces_by_document(buckets, [5])[5]], dropped


@pytest.mark.parametrize("length", WORKED)
def test_worked_examples(length):
    whole, exact, dropped, released, left_over = WORKED[length]
    assert lengths_of_one(length, "exact", 1, 2**15) == (whole, {})
    assert lengths_of_one(length, "exact", 256, 8192) == (exact, {LEFT_OVER: dropped} if dropped else {})
    got, counted = lengths_of_one(length, "released", 256, 8192)
    assert got == released
    assert counted == {k: n for k, n in ((LEFT_OVER, left_over), (TARGET_ONLY, len(released))) if n}


@pytest.mark.parametrize(
    ("length", "settings", "expected", "left_over"),
    [
        (10, ("released", 1, 2**15), [8], 1),
        (37, ("released", 1, 2**15), [32, 2], 1),
        (37, ("released", 4, 16), [16, 16], 3),
        (37, ("exact", 4, 16), [16, 16, 4], 1),
        (15, ("exact", 2, 8), [8, 4, 2], 1),
        (1000, ("exact", 256, 512), [512, 256], 232),
        (8193, ("exact", 256, 8192), [8192], 1),
        (256, ("exact", 256, 256), [256], 0),
        (8193, ("overlap", 256, 8192), [8192], 0),
        (8192, ("overlap", 256, 8192), LADDER, 255),
        (256, ("overlap", 256, 8192), [], 256),
    ],
)
def test_small_ranges_and_edges(length, settings, expected, left_over):
    got, dropped = lengths_of_one(length, *settings)
    assert got == expected and dropped.get(LEFT_OVER, 0) == left_over


def test_olmo_core_instances():
    buckets = decompose(np.arange(3), np.array([9, 6, 11]), "exact", 2, 8)
    assert {length: len(index) for length, index in buckets.items()} == {2: 2, 4: 1, 8: 2}
    assert pieces_by_document(buckets, range(3)) == {0: [(0, 8)], 1: [(0, 4), (4, 2)], 2: [(0, 8), (8, 2)]}
    assert buckets[2].dropped_tokens == {LEFT_OVER: 2}


def oracle(length, variant, low, high):
    """[(start, length)] by the papers' loops, one document at a time."""
    pieces, start = [], 0
    spent = {"exact": 0, "released": 1, "overlap": 0}[variant]  # tokens a piece takes besides those it reads
    need = {"exact": 0, "released": 1, "overlap": 1}[variant]  # tokens that must follow a piece
    while length - start - need >= low:
        size = min(high, 2 ** ((length - start - need).bit_length() - 1))
        pieces.append((start, size))
        start += size + spent
    return pieces


@given(
    st.lists(st.integers(0, 300), max_size=40),
    st.sampled_from(["exact", "released", "overlap"]),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_pieces_and_counts_of_every_variant(lengths, variant, low, more):
    low, high = 2**low, 2 ** (low + more)
    documents, lengths = np.arange(len(lengths))[::-1] * 7, np.array(lengths, np.int64)
    buckets = decompose(documents, lengths, variant, low, high)
    found = pieces_by_document(buckets, documents)
    for document, length in zip(documents.tolist(), lengths.tolist(), strict=True):
        assert found[document] == oracle(length, variant, low, high)
    check_conservation(buckets, lengths)
    for index in buckets.values():  # rows in reading order: by document as given, then by start
        order = -np.asarray(index.documents, np.int64) * 1000 + index.starts
        assert (np.diff(order) > 0).all()


def check_conservation(buckets, lengths):
    read = sum(int(index.lengths.sum()) for index in buckets.values())
    dropped = sum(sum(index.dropped_tokens.values()) for index in buckets.values())
    assert read + dropped == lengths.sum()


def test_documents_that_no_bucket_takes_for_their_metadata_are_counted_apart():
    heads, lengths = np.array([17, 16, 0]), np.array([100, 100, 3])
    buckets = decompose(np.arange(3), lengths, "exact", 4, 32, heads=heads)
    assert set(buckets[32].documents.tolist()) == {1} and sum(map(len, buckets.values())) == 5
    assert buckets[4].dropped_tokens == {MOSTLY_HEAD: 100, LEFT_OVER: 4 + 3}


def test_in_blocks_as_in_one(monkeypatch):
    rng = np.random.default_rng(0)
    documents, lengths = rng.permutation(500), rng.integers(1, 900, 500)
    for variant, seed in (("exact", None), ("released", 3), ("overlap", None)):
        whole = decompose(documents, lengths, variant, 8, 64, seed)
        with monkeypatch.context() as patched:
            patched.setattr("mixlab.sequences.decompose.BLOCK", 7)
            parts = decompose(documents, lengths, variant, 8, 64, seed)
        for length in whole:
            assert whole[length].documents.tolist() == parts[length].documents.tolist()
            assert whole[length].starts.tolist() == parts[length].starts.tolist()


@given(st.lists(st.integers(0, 2000), max_size=12), st.integers(0, 2**63))
def test_drawn_pieces_lie_end_to_end(lengths, seed):
    low, high = 4, 16
    documents, lengths = np.arange(len(lengths)), np.array(lengths, np.int64)
    buckets = decompose(documents, lengths, "released", low, high, seed)
    for document, pieces in pieces_by_document(buckets, documents).items():
        starts = [0, *(start + length + 1 for start, length in pieces)]
        assert [start for start, _ in pieces] == starts[:-1] and starts[-1] <= lengths[document]
        assert lengths[document] - starts[-1] <= low  # nothing that a bucket could still hold
        # From where the longest bucket holds what is left, the longest piece that fits is taken.
        length = int(lengths[document])
        tail = [(start, n) for start, n in pieces if length - start <= 2 * high]
        if tail:
            first = tail[0][0]
            assert [(s - first, n) for s, n in tail] == oracle(length - first, "released", low, high)
    check_conservation(buckets, lengths)


def test_drawn_pieces_share_tokens_equally_among_buckets():
    documents = np.arange(20)
    buckets = decompose(documents, np.full(20, 1_000_001), "released", 256, 8192, seed=1)
    tokens = np.array([int(index.lengths.sum()) for index in buckets.values()])
    # Of a million tokens a draw of 8192 takes much: about 20 of 20 x 20 draws; hence the tolerance of a fifth.
    assert np.abs(tokens / tokens.sum() * 6 - 1).max() < 0.2
    again = decompose(documents[::-1], np.full(20, 1_000_001), "released", 256, 8192, seed=1)
    assert pieces_by_document(again, documents) == pieces_by_document(buckets, documents)
    other = decompose(documents, np.full(20, 1_000_001), "released", 256, 8192, seed=2)
    assert pieces_by_document(other, documents) != pieces_by_document(buckets, documents)


def test_no_documents_no_rows():
    nothing = np.zeros(0, np.int64)
    for variant in ("exact", "released", "overlap"):
        buckets = decompose(nothing, nothing, variant, 2, 8)
        assert {length: len(index) for length, index in buckets.items()} == {2: 0, 4: 0, 8: 0}


def test_survives_the_disk(tmp_path):
    buckets = decompose(np.arange(50), np.arange(50) * 3, "released", 4, 32)
    for length, index in buckets.items():
        index.save(tmp_path / str(length))
        again = SequenceIndex.load(tmp_path / str(length))
        for name, values in vars(index.pieces(np.arange(len(index)))).items():
            assert np.array_equal(getattr(again.pieces(np.arange(len(index))), name), values)


@pytest.mark.parametrize(("variant", "predicted"), [("released", 4 * 8 + 4), ("overlap", 60 - 1 - 3)])
def test_a_row_predicts_as_many_tokens_as_it_reads(memory_store, variant, predicted):
    documents = Documents(memory_store([41 if variant == "released" else 60]), np.array([0]))
    buckets = decompose(documents.ids, documents.lengths, variant, 4, 8)
    targets = []
    for length, index in buckets.items():
        batch = render(index.pieces(np.arange(len(index))), documents, FormatConfig(), len(index), length)
        assert (batch.loss_weights == 1).all() and (batch.segment_ids == 1).all()
        assert (batch.targets == batch.tokens + 1).all()
        targets += batch.targets.ravel().tolist()
    assert len(set(targets)) == len(targets) == predicted
    if variant == "overlap":
        assert sorted(targets) == list(range(101, 101 + predicted))  # all but the first, up to the last


def test_problems_name_the_key_and_what_works():
    assert length_problems("stages.0.format", 256, 8192, 2**19) == []
    assert "stages.0.format.min_length = 300: must be a power of two; use 256 or 512" in length_problems(
        "stages.0.format", 300, 8192, 2**19
    )
    assert "swap" in length_problems("f", 512, 256, 512)[0]
    assert "tokens_per_step=8192 or 16384" in length_problems("f", 256, 8192, 10000)[0]
    assert "use 1 or more" in length_problems("f", 0, 8192, 8192)[0]
