"""Rows of several lengths, and rows packed once, through the stream: every claim of a bucketed stage."""

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.schedule.buckets import share_out, tokens_without_repeats
from mixlab.schedule.curriculum import CurriculumConfig, steps_without_repeats
from mixlab.schedule.stages import StageConfig, rereading_problems
from mixlab.sequences.format import FormatConfig
from mixlab.stream import Kind
from tests.test_stream import EOS, PAD, equal, run_of

TOKENS = 128
LENGTHS = (8, 16, 32, 64)
DECOMPOSED = FormatConfig(kind="decompose", min_length=8)
GROW = CurriculumConfig(cycles=2, odds="grow_p2")


def stage(steps=20, mixture=None, format=DECOMPOSED, curriculum=GROW, name="s", **more):
    settings = {"sequence_length": 64, "tokens_per_step": TOKENS} | more
    return StageConfig(name, steps, mixture=mixture or {"web": 1.0}, format=format, curriculum=curriculum, **settings)


@pytest.fixture(scope="module")
def stores(memory_store):
    rng = np.random.default_rng(0)
    return {
        "web": memory_store(rng.integers(3, 200, 80).tolist()),
        "code": memory_store(rng.integers(30, 300, 60).tolist()),
        "notes": memory_store(rng.integers(9, 40, 150).tolist()),  # none of it reaches the longest bucket
    }


def test_documents_are_masked_only_where_a_row_may_hold_two_that_must_not_meet(stores):
    concat = FormatConfig()
    packed = FormatConfig(kind="best_fit", mask_documents=False)
    each_once = CurriculumConfig("equal")
    parts = [
        stage(4, {"web": 1.0}, curriculum=each_once, name="a"),
        stage(1, {"code": 1.0}, concat, None, "b"),
        stage(1, {"notes": 1.0}, packed, None, "c"),
        stage(4, {"web": 1.0}, curriculum=each_once, name="d"),
    ]
    stream = run_of(parts, stores)
    shapes = [stream.shape(step) for step in range(len(stream))]
    assert [shape.masked for shape in shapes] == [False] * 4 + [True] + [False] * 5
    assert len(stream.shapes()) == len(set(stream.shapes())) and set(shapes) <= set(stream.shapes())
    found = [(shape.rows, shape.length, shape.masked) for shape in sorted(stream.shapes())]
    assert found == [(2, 64, False), (2, 64, True), (4, 32, False), (8, 16, False), (16, 8, False)]
    for step, shape in enumerate(shapes):
        ids = stream[step].segment_ids
        assert ids.shape == (shape.rows, shape.length) and (shape.masked or ids.max() == 1)
        assert ("segment_ids" in stream[step].arrays(shape.masked)) == shape.masked


def batches(stream):
    return [stream[step] for step in range(len(stream))]


def tokens_by_source(stream):
    counts = Counter()
    for batch in batches(stream):
        for span in batch.spans:
            counts[stream.names[span["source"]]] += int(span["length"])
    return counts


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["exact", "released", "overlap"]),
    st.sampled_from(["natural", "equal", "custom"]),
    st.sampled_from(["odds", "odds_times_batches", "subcycles"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_row_is_a_piece_of_one_document_in_rows_of_the_planned_lengths(
    stores, variant, mixture, rule, cycles, past_row, seed
):
    format = FormatConfig(kind="decompose", variant=variant, min_length=8, targets_past_row=past_row)
    shares = (0.5, 0, 0.25, 0.25) if mixture == "custom" else ()
    curriculum = CurriculumConfig(mixture, shares, cycles, rule, "grow_linear")
    stream = run_of([stage(28 * cycles, format=format, curriculum=curriculum)], stores, seed)
    placed = stream.stages[0]
    read, seen = [], Counter()
    for step, batch in enumerate(batches(stream)):
        assert batch.tokens.shape == placed.shape(step) and batch.tokens.size == TOKENS
        read.append(batch.tokens.shape[1])
        assert (batch.positions == np.arange(read[-1])).all() and (batch.segment_ids == 1).all()
        for row in range(len(batch.tokens)):
            spans = batch.spans[batch.spans["row"] == row]
            document = int(spans["document"][0])
            whole = [*stores["web"].texts[document].tolist(), EOS]
            tokens = batch.tokens[row].tolist()
            start = whole.index(tokens[0])
            assert tokens == whole[start : start + len(tokens)] and start == spans["start"][0]
            following = whole[start + 1 : start + len(tokens) + 1] if past_row else tokens[1:]
            trained = batch.loss_weights[row] > 0
            assert trained.tolist() == [True] * len(following) + [False] * (len(tokens) - len(following))
            assert batch.targets[row][trained].tolist() == following
            if variant == "released" and past_row:
                assert trained.all()
            seen[len(tokens), document, start] += 1
    cycle = len(read) // cycles
    counts = [Counter(read[c * cycle : (c + 1) * cycle]) for c in range(cycles)]
    assert all(count == counts[0] for count in counts)
    assert Counter(read) == {length: placed.batches(length) for length in placed.mixtures}
    if mixture == "equal":
        assert max(counts[0].values()) - min(counts[0].values()) <= 1 and set(counts[0]) == set(LENGTHS)
    if mixture == "custom":
        assert 16 not in counts[0]
    for length in placed.mixtures:  # nothing twice before all of a bucket is read, and then evenly
        index = stream.lanes[0][length]["web"].rows.index
        times = [n for (size, *_), n in seen.items() if size == length]
        full, rest = divmod(placed.rows_of(length)["web"], len(index))
        assert set(times) <= {full, full + 1} and sum(times) == placed.rows_of(length)["web"]
        assert times.count(full + 1) == rest


@pytest.mark.parametrize(
    ("mixture", "lengths"), [("natural", LENGTHS), ("equal", (8, 16)), ("custom", (8, 16))], ids=lambda v: str(v)
)
def test_sources_have_their_shares_of_tokens(stores, mixture, lengths):
    curriculum = CurriculumConfig(mixture, (1, 2) if mixture == "custom" else (), 4)
    wanted = {"web": 0.5, "code": 0.3, "notes": 0.2}
    config = stage(60, wanted, curriculum=curriculum, sequence_length=lengths[-1])
    stream = run_of([config], stores)
    counts, total = tokens_by_source(stream), 60 * TOKENS
    assert counts == stream.stages[0].tokens_of()
    for name, share in wanted.items():
        assert abs(counts[name] - share * total) < sum(lengths)  # a row of each length at most
    if mixture == "natural":
        assert stream.stages[0].rows_of(64)["notes"] == 0 and stream.stages[0].rows_of(8)["notes"] > 0


@pytest.mark.parametrize(("mixture", "shares"), [("natural", ()), ("equal", ()), ("custom", (0, 1, 2, 1))])
def test_up_to_a_number_of_steps_no_row_comes_again(stores, mixture, shares):
    curriculum = CurriculumConfig(mixture, shares)
    wanted = {"web": Fraction(3, 5), "code": Fraction(2, 5)}
    first = run_of([stage(40, wanted, curriculum=curriculum)], stores)
    held = {
        n: {size: lane[n].rows.cut.tokens()[size] for size in LENGTHS} for n in wanted for lane in [first.lanes[0][64]]
    }
    most = steps_without_repeats(curriculum, tokens_without_repeats(curriculum, wanted, held), TOKENS)

    def repeats(steps):
        """The most rows that any source reads of a bucket beyond what it holds."""
        stream = run_of([stage(steps, wanted, curriculum=curriculum)], stores)
        return max(
            stream.stages[0].rows_of(length)[name] - len(lane[name].rows.index)
            for length, lane in stream.lanes[0].items()
            for name in wanted
        )

    assert most > 20 and repeats(most) <= 1 and repeats(most + 8) > 0  # whole batches shift a row


@settings(deadline=None)
@example(held=[[1, 202885, 1], [262469, 140, 2]], weights=[1, 1, 1, 1])  # sources that hardly share a bucket
@given(
    st.lists(st.lists(st.integers(1, 10**6), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_whole_batches_do_not_shift_the_shares(held, weights):
    """Batches are whole, so buckets get a little more or less than the sources hold; the sources' shares stay exact."""
    names = "abcd"[: len(held)]
    shares = {n: Fraction(w, sum(weights[: len(held)])) for n, w in zip(names, weights, strict=False)}
    tokens = {
        n: {2**k: 2**k * 100 + t for k, t in zip((3, 4, 5), row, strict=True)}
        for n, row in zip(names, held, strict=True)
    }
    try:
        batches, by_bucket = share_out(CurriculumConfig(cycles=2), shares, tokens, 64, 200)
    except UserError as error:
        assert "too few for a batch" in str(error)  # a bucket that holds next to nothing
        return
    for name, share in shares.items():
        got = sum(float(w[name]) / sum(map(float, w.values())) * batches[length] for length, w in by_bucket.items())
        assert got == pytest.approx(float(share) * sum(batches.values()), rel=1e-3)


def test_any_step_by_itself_in_any_order_in_another_process(stores, tmp_path):
    config = stage(20, {"web": 0.6, "code": 0.4})
    forwards = batches(run_of([config], stores))
    cached = pickle.loads(pickle.dumps(run_of([config], stores, cache=tmp_path)))
    again = run_of([config], stores, cache=tmp_path)
    for step in reversed(range(20)):
        assert equal(cached[step], forwards[step]) and equal(again[step], forwards[step])
    assert len(list(tmp_path.iterdir())) == 8  # four buckets of two sources, cut once


@pytest.mark.parametrize("hosts", [1, 2])
def test_hosts_read_the_same_global_batch(stores, hosts):
    stream = run_of([stage(20, {"web": 0.6, "code": 0.4})], stores)
    for step, whole in enumerate(batches(stream)):
        share = stream.stages[0].shape(step)[0] // hosts
        parts = [stream.rows(step, host * share, share) for host in range(hosts)]
        for name, array in whole.arrays().items():
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), array)


@pytest.mark.parametrize("format", [DECOMPOSED, FormatConfig(kind="best_fit")], ids=["decompose", "best_fit"])
def test_provenance_and_find(stores, format):
    curriculum = GROW if format is DECOMPOSED else None
    plan = [
        stage(30, {"web": 0.5, "code": 0.5}, format, curriculum, "a"),
        stage(30, {"code": 1.0}, format, curriculum, "b"),
    ]
    stream = run_of(plan, stores)
    read = {}
    for step, batch in enumerate(batches(stream)):
        assert len(np.unique(batch.spans["row"])) == len(batch.tokens)
        for span in batch.spans[batch.spans["kind"] == Kind.TEXT]:
            name = stream.names[span["source"]]
            text = stores[name].texts[span["document"]][span["start"] : span["start"] + span["length"]]
            assert np.array_equal(batch.tokens[span["row"], span["offset"] : span["offset"] + span["length"]], text)
            read.setdefault((name, int(span["document"])), []).append((step, int(span["row"]), int(span["offset"])))
    assert max(map(len, read.values())) > 2  # documents of several pieces, or of a second epoch
    for name in ("web", "code"):
        for document, text in enumerate(stores[name].texts):
            found = [(p.step, p.row, p.offset) for p in stream.find(name, document) if p.start < len(text)]
            assert sorted(found) == sorted(read.get((name, document), []))


def test_a_later_stage_goes_on_in_every_bucket(stores):
    """Another curriculum, mixture or batch size: all that is left of a bucket is read before any row comes again."""
    first, second = stage(12, name="a"), stage(6, curriculum=CurriculumConfig(), name="b", tokens_per_step=2 * TOKENS)
    stream = run_of([first, second], stores)
    for length, lane in stream.lanes[1].items():
        assert lane["web"].first == stream.stages[0].rows_of(length)["web"]
        assert lane["web"].rows is stream.lanes[0][length]["web"].rows
    rows = Counter()
    for batch in batches(stream):
        for span in batch.spans[batch.spans["offset"] == 0]:
            rows[batch.tokens.shape[1], int(span["document"]), int(span["start"])] += 1
    assert max(rows.values()) == 1


def test_epochs_and_stage_seeds_have_orders_of_their_own(stores):
    rows = run_of([stage()], stores).lanes[0][16]["web"].rows
    count = len(rows.index)
    epochs = [rows.pieces(np.arange(count) + e * count) for e in (0, 1)]
    pairs = [list(zip(p.documents.tolist(), p.starts.tolist(), strict=True)) for p in epochs]
    assert pairs[0] != pairs[1] and sorted(pairs[0]) == sorted(pairs[1])
    across = rows.pieces(np.array([count, count - 1, 0]))
    assert [pairs[1][0], pairs[0][-1], pairs[0][0]] == list(
        zip(across.documents.tolist(), across.starts.tolist(), strict=True)
    )
    seeded = run_of([stage(seed=1)], stores).lanes[0][16]["web"].rows.pieces(np.arange(count))
    assert not np.array_equal(seeded.documents, epochs[0].documents)
    assert sorted(seeded.documents) == sorted(epochs[0].documents)


def test_packed_rows_are_padded_and_every_token_is_read_once_an_epoch(stores):
    format = FormatConfig(kind="best_fit")
    stream = run_of([stage(1, format=format, curriculum=None)], stores)
    rows = stream.readings[0]["web"].rows
    epoch = -(-len(rows.index) // 2)
    stream = run_of([stage(epoch + 3, format=format, curriculum=None)], stores)
    tokens = np.concatenate([batch.tokens.ravel() for batch in batches(stream)])[: len(rows.index) * 64]
    assert sorted(tokens[(tokens != EOS) & (tokens != PAD)]) == sorted(stores["web"].flat)
    assert np.count_nonzero(tokens == PAD) == rows.cut.padded_tokens() > 0


def test_what_decides_the_order_is_in_the_identity(stores):
    def fingerprint(steps=60, **changes):
        return run_of([stage(steps, **changes)], stores).fingerprint()

    same = fingerprint()
    assert same == fingerprint()
    others = [
        fingerprint(64),  # buckets get other numbers of batches
        fingerprint(curriculum=CurriculumConfig(cycles=2)),
        fingerprint(curriculum=None),
        fingerprint(format=FormatConfig(kind="decompose", min_length=8, variant="exact")),
        fingerprint(format=FormatConfig(kind="decompose", min_length=8, targets_past_row=False)),
        fingerprint(format=FormatConfig(kind="decompose", min_length=16)),
    ]
    assert len({same, *others}) == 7
    packed = [
        FormatConfig(kind="best_fit", long_documents=how, min_length=n)
        for how, n in (("split", 8), ("truncate", 8), ("split", 16))
    ]
    prints = [fingerprint(format=format, curriculum=None) for format in packed]
    assert prints[0] == prints[2] != prints[1]  # a key of another kind decides nothing


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": FormatConfig(kind="decompose", min_length=12)}, "stages.0.format.min_length = 12: must be a power of two; use 8 or 16"),
        ({"format": FormatConfig(kind="decompose", min_length=128)}, "stages.0.format.min_length = 128 is more than sequence_length = 64"),
        ({"tokens_per_step": 100}, "stages.0.sequence_length = 64 does not divide the 100 tokens of a step"),
        ({"curriculum": CurriculumConfig(cycles=3)}, "stages.0.curriculum.cycles = 3 does not divide the stage's 20 steps; use 2 or 4 cycles"),
        ({"curriculum": CurriculumConfig("custom", (1, 1))}, "stages.0.curriculum.shares = (1, 1): must have one entry a bucket, 4; it has 2"),
        ({"format": FormatConfig()}, "stages.0.curriculum: belongs to rows of several lengths"),
    ],
)  # fmt: skip
def test_stages_that_cannot_be(changes, told):
    found = stage(**changes).problems("stages.0", ("web",), None)
    assert len(found) == 1 and told in found[0]


@pytest.mark.parametrize(
    ("mixture", "changes", "told"),
    [
        ({"notes": 1.0}, {"curriculum": CurriculumConfig("equal")}, "stages.0.curriculum: no document gives a row to the bucket of length 64"),
        ({"web": 0.5, "notes": 0.5}, {"curriculum": CurriculumConfig("equal")}, "stages.0: no document of notes gives a row to the bucket of length 64"),
        ({"web": 1.0}, {"tokens_per_step": 2**13, "curriculum": CurriculumConfig("equal")}, "stages.0: the bucket of length 8 has"),
        ({"web": 1.0}, {"curriculum": CurriculumConfig(cycles=20)}, "too few for a batch in each cycle of 1 steps"),
        ({"web": 1.0, "notes": 1.0}, {"format": FormatConfig(kind="decompose", min_length=64)}, "stages.0: no document of notes gives a row of 64 tokens or more; lower format.min_length"),
        ({"web": 1.0, "code": 1e-7}, {}, "stages.0.mixture.code = 1e-07 of the tokens: too little for a single row"),
    ],
)  # fmt: skip
def test_texts_that_cannot_serve(stores, mixture, changes, told):
    with pytest.raises(UserError) as refused:
        run_of([stage(20, mixture, **changes)], stores)
    assert told in str(refused.value)


CUT_ONCE = [DECOMPOSED, FormatConfig(kind="best_fit")]


@pytest.mark.parametrize("format", CUT_ONCE, ids=lambda format: format.kind)
def test_what_is_left_of_a_source_is_known_or_the_run_is_refused(stores, format):
    def plan(*formats, **more):
        return tuple(
            stage(20, format=f, curriculum=None, name=f"s{i}", **(more if i else {})) for i, f in enumerate(formats)
        )

    assert rereading_problems(plan(format, format)) == []
    assert rereading_problems((*plan(format), stage(name="x", mixture={"code": 1.0}, format=FormatConfig()))) == []
    for configs in (plan(format, FormatConfig()), plan(FormatConfig(), format), plan(*CUT_ONCE)):
        (message,) = rereading_problems(configs)
        assert "stages.1.format cuts web otherwise than stages.0 did" in message and "(sources.web.part)" in message
        with pytest.raises(ValueError, match="which documents of 'web' are left"):
            run_of(configs, stores)
    (message,) = rereading_problems(plan(format, format, seed=3))
    assert "stages.1.seed = 3: web goes on in rows that are cut once" in message
