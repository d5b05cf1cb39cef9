"""Runs of several stages and sources, through the stream: what is delivered is what was asked for, exactly."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.schedule.shares import SourceRequest
from mixlab.schedule.stages import StageConfig
from mixlab.sequences.format import FormatConfig
from mixlab.stream import Kind
from tests.test_stream import run_of

SOURCES = ("books", "code", "web")


def stage(name, steps, mixture, length=16, rows=4, **more):
    return StageConfig(name, steps, sequence_length=length, tokens_per_step=rows * length, mixture=mixture, **more)


@pytest.fixture(scope="module")
def stores(memory_store):
    rng = np.random.default_rng(0)
    return {name: memory_store(rng.integers(3, 60, 60 + 40 * i).tolist()) for i, name in enumerate(SOURCES)}


def rows_read(stream, number):
    """source -> rows of a stage, counted from its batches."""
    counts = dict.fromkeys(stream.names, 0)
    placed = stream.stages[number]
    for step in range(placed.first_step, placed.last_step + 1):
        spans = stream[step].spans
        sources = {int(row): int(source) for row, source in zip(spans["row"], spans["source"], strict=True)}
        for source in sources.values():
            counts[stream.names[source]] += 1
    return counts


weights = st.dictionaries(st.sampled_from(SOURCES), st.integers(0, 50), min_size=1).filter(
    lambda w: sum(w.values()) > 0
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(8, 20), weights, st.sampled_from([8, 16, 32])), min_size=1, max_size=3),
    st.integers(0, 3),
)
def test_every_source_delivers_its_share_and_nothing_twice(stores, plans, seed):
    try:
        stream = run_of(
            [stage(f"s{i}", steps, mixture, length, 64 // length) for i, (steps, mixture, length) in enumerate(plans)],
            stores,
            seed,
        )
    except UserError as error:
        assert "none is read" in str(error)  # a weight so small that the stage has no row for it
        return
    for number, placed in enumerate(stream.stages):
        counts, total = rows_read(stream, number), placed.steps * placed.rows_per_step
        assert sum(counts.values()) == total
        for name, share in placed.shares.items():
            assert counts[name] == placed.rows_of()[name] and abs(counts[name] - float(share.share) * total) < 1
    for source, name in enumerate(stream.names):
        seen: dict[tuple, set] = {}
        for number, placed in enumerate(stream.stages):
            if name not in stream.readings[number]:
                continue
            rows, first = stream.readings[number][name]
            ks = np.arange(first, first + placed.rows_of()[name])
            if not len(ks):
                continue
            epochs = rows._locate(ks)[0]
            pieces = rows.pieces(ks)
            for r, d, s, n in zip(pieces.rows, pieces.documents, pieces.starts, pieces.lengths, strict=True):
                tokens = seen.setdefault((source, int(epochs[r])), set())
                fresh = {(int(d), t) for t in range(s, s + n)}
                assert not fresh & tokens
                tokens |= fresh


def test_another_format_goes_on_with_untouched_documents(stores):
    """Rows cut in another way begin where no document has been touched: what a cooldown without metadata needs."""
    stream = run_of([stage("trunk", 20, {"web": 1.0}, 16), stage("end", 5, {"web": 1.0}, 32, 2)], stores)
    assert stream.readings[0]["web"].rows.epochs_read(20 * 4) < 0.9  # within one epoch
    trunk, end = (
        {int(d) for step in range(s.first_step, s.last_step + 1) for d in stream[step].spans["document"]}
        for s in stream.stages
    )
    assert not trunk & end and stream.readings[1]["web"].rows.start.position > 0


def test_the_same_format_goes_on_in_the_same_rows(stores):
    """Two stages of one mixture read what one long stage reads; a larger batch changes only how rows are grouped."""
    one = run_of([stage("a", 12, {"web": 1.0})], stores)
    two = run_of([stage("a", 6, {"web": 1.0}), stage("b", 3, {"web": 1.0}, rows=8)], stores)
    tokens = [np.concatenate([s[i].tokens for i in range(len(s))]) for s in (one, two)]
    assert np.array_equal(*tokens)


def test_a_variant_of_the_second_stage_leaves_the_first_alone(stores):
    trunk = stage("trunk", 10, {"web": 0.7, "books": 0.3})
    runs = [
        run_of([trunk, second], stores)
        for second in (
            stage("end", 5, {"web": 1.0}),
            stage("end", 9, {"code": 0.5, "web": 0.5}),
            stage("other", 3, {"books": 1.0}, 32, 2, format=FormatConfig(bos=True)),
        )
    ]
    for step in range(10):
        for other in runs[1:]:  # sources are numbered within a run, so provenance is compared by what it names
            ours, theirs = runs[0][step].arrays(), other[step].arrays()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert not np.array_equal(runs[0][10].tokens, runs[1][10].tokens)


def test_a_stages_seed_reorders_what_is_left_and_nothing_else(stores):
    """Microanneals from one trunk: the same trunk, other orders after it, and no document of the trunk read again."""
    trunk = stage("trunk", 20, {"web": 0.8, "code": 0.2})
    runs = [
        run_of([trunk, stage("anneal", 8, {"web": 0.5, "books": 0.5}, seed=seed)], stores) for seed in (None, 1, 2, 1)
    ]
    plain, first, second, again = ([run[step].tokens for step in range(20, 28)] for run in runs)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second) and not np.array_equal(first, plain)
    for run in runs[1:]:
        assert run.identity()[0] == runs[0].identity()[0]
        assert all(np.array_equal(run[step].tokens, runs[0][step].tokens) for step in range(20))
        before, after = (run.readings[i]["web"].rows.pieces(np.arange(n)) for i, n in enumerate((64, 16)))
        assert not set(before.documents) & set(after.documents)
    assert len({run.fingerprint() for run in runs}) == 3


def test_a_whole_epoch_in_another_order_is_the_same_text(stores):
    """With or without a seed, and after a stage that reordered before, an epoch holds every document once."""
    for seeds in ((None, None), (1, None), (1, 2), (None, 2)):
        stages = [stage("a", 10, {"web": 1.0}, seed=seeds[0]), stage("b", 10, {"web": 1.0}, 32, 2, seed=seeds[1])]
        rows = run_of(stages, stores).readings[1]["web"].rows
        start = rows.start
        assert start.epoch == 0 and start.position > 0
        unread, whole = rows._order(0), rows._order(1)
        read = run_of(stages[:1], stores).readings[0]["web"].rows._order(0)[: start.position]
        count = len(stores["web"].texts)
        assert sorted([*read, *unread]) == sorted(whole) == list(range(count))


def test_one_sources_weight_changes_no_other_sources_order(stores):
    def order(mixture, name):
        stream = run_of([stage("s", 30, mixture)], stores)
        read = []
        for step in range(30):
            batch = stream[step]
            mine = np.unique(batch.spans["row"][batch.spans["source"] == stream.names.index(name)])
            read += [batch.tokens[row].tolist() for row in mine]
        return read

    alone, beside = order({"web": 1.0}, "web"), order({"web": 0.5, "code": 0.3, "books": 0.2}, "web")
    assert beside == alone[: len(beside)] and len(beside) == 60


def test_provenance_and_find_in_mixtures(stores):
    stream = run_of([stage("a", 6, {"web": 0.5, "code": 0.5}), stage("b", 6, {"code": 1.0}, 32, 2)], stores)
    read = {}
    for step in range(12):
        batch = stream[step]
        for span in batch.spans[batch.spans["kind"] == Kind.TEXT]:
            name = stream.names[span["source"]]
            text = stores[name].texts[span["document"]][span["start"] : span["start"] + span["length"]]
            here = batch.tokens[span["row"], span["offset"] : span["offset"] + span["length"]]
            assert np.array_equal(here, text)
            read.setdefault((name, int(span["document"])), []).append((step, int(span["row"]), int(span["offset"])))
    for name in ("web", "code"):
        for document in range(0, len(stores[name].texts), 5):
            length = len(stores[name].texts[document])
            found = [(p.step, p.row, p.offset) for p in stream.find(name, document) if p.start < length]
            assert sorted(found) == sorted(read.get((name, document), []))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_mixed_batches(stores, hosts):
    stream = run_of([stage("a", 6, {"web": 0.5, "code": 0.3, "books": 0.2})], stores)
    for step in range(6):
        parts = [stream.rows(step, host * 4 // hosts, 4 // hosts) for host in range(hosts)]
        for name, whole in stream[step].arrays().items():
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), whole)


def test_amounts_copies_and_limits(stores):
    small = int(np.diff(stores["books"].offsets).sum() + len(stores["books"].texts))
    tokens = 4 * 16 * 100
    stream = run_of([stage("s", 100, {"books": SourceRequest(epochs=2), "web": 1.0})], stores)
    assert stream.stages[0].rows_of()["books"] == pytest.approx(2 * small / 16, abs=1)
    with pytest.raises(UserError, match=r"stages\.0\.mixture\.books"):
        run_of([stage("s", 100, {"books": SourceRequest(weight=1.0, max_epochs=1), "web": 1.0})], stores)
    held = run_of(
        [stage("s", 100, {"books": SourceRequest(weight=1.0, max_epochs=1, over_limit="renormalise"), "web": 1.0})],
        stores,
    )
    assert held.stages[0].rows_of()["books"] * 16 == pytest.approx(small, abs=16)
    assert held.stages[0].shares["books"].limited and held.stages[0].tokens == tokens


def test_repetitions_bear_no_loss_and_are_counted(memory_store):
    store = memory_store([40, 40, 40])
    store.texts[1][:] = 7
    store.flat = np.concatenate(store.texts)
    masked = run_of(
        [stage("s", 1, {"web": 1.0}, 40, 3, format=FormatConfig(eos=False, mask_repetitions=True))], {"web": store}
    )
    plain = run_of([stage("s", 1, {"web": 1.0}, 40, 3, format=FormatConfig(eos=False))], {"web": store})
    bad = (plain[0].tokens == 7).all(axis=1)
    assert bad.sum() == 1 and (masked[0].loss_weights[bad] == 0).all()
    assert np.array_equal(masked[0].loss_weights[~bad], plain[0].loss_weights[~bad])
    assert np.array_equal(masked[0].tokens, plain[0].tokens)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (StageConfig("s", 5, tokens=100), "give its length as one of steps, tokens and fraction"),
        (StageConfig("s"), "given: none"),
        (StageConfig("s", fraction=0.5), "fraction: of what?"),
        (StageConfig("s", tokens=100_000), "use tokens=98304 or tokens=131072"),
        (StageConfig("s", 0), "steps = 0: must be at least 1"),
        (StageConfig("s", 5, mixture={"nix": 1.0}), "'nix', which is not among the sources"),
        (StageConfig("s", 5, mixture={}), "mixture is empty"),
    ],
)
def test_lengths_and_names_that_cannot_be(config, told):
    assert any(told in problem for problem in config.problems("stages.0", SOURCES, None))


@pytest.mark.parametrize("mixture", [{"web": 0.0, "code": 0.0}, {"web": -1.0}, {"web": SourceRequest()}])
def test_weights_that_cannot_be(stores, mixture):
    with pytest.raises(UserError, match=r"stages\.0\.mixture"):
        run_of([stage("s", 5, mixture)], stores)


def test_fractions_of_the_run():
    config = StageConfig("s", fraction=0.1, sequence_length=16, tokens_per_step=64)
    assert config.length_steps(6400) == 10 and config.length_steps(6401) == 0
    assert any("not whole ones" in p for p in config.problems("stages.0", ("text",), 6401))
