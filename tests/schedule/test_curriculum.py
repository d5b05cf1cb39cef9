import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.draws import draws
from mixlab.errors import UserError
from mixlab.schedule.curriculum import (
    Curriculum,
    CurriculumConfig,
    batches_per_cycle,
    steps_without_repeats,
    subcycle_batches,
    subcycle_odds,
)
from mixlab.seeds import seed_of

BUCKETS = [256, 512, 1024, 2048, 4096, 8192]


def lengths_of(curriculum):
    return curriculum.at(np.arange(len(curriculum)))[0]


configs = st.builds(
    CurriculumConfig,
    cycles=st.integers(1, 4),
    rule=st.sampled_from(["odds", "odds_times_batches"]),
    odds=st.sampled_from(["uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100"]),
    same_order=st.booleans(),
    longest_first=st.booleans(),
) | st.builds(
    CurriculumConfig,
    cycles=st.integers(1, 4),
    rule=st.just("subcycles"),
    odds=st.sampled_from(["uniform", "grow_linear", "grow_p2"]),
    same_order=st.booleans(),
    longest_first=st.booleans(),
)
counts = st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any)


@given(configs, counts, st.integers(0, 2**64 - 1))
def test_odds_change_the_order_and_never_the_totals(config, counts, seed):
    batches = dict(zip(BUCKETS, counts, strict=False))
    curriculum = Curriculum(config, batches, seed)
    assert len(curriculum) == config.cycles * sum(counts)
    lengths, numbers = curriculum.at(np.arange(len(curriculum)))
    for length, count in batches.items():
        assert curriculum.batches(length) == count * config.cycles
        assert numbers[lengths == length].tolist() == list(range(count * config.cycles))  # none twice, in order
        steps = curriculum.step_of(length, np.arange(count * config.cycles))
        assert steps.tolist() == np.flatnonzero(lengths == length).tolist()
    cycles = lengths.reshape(config.cycles, -1)
    first = 1 if config.longest_first else 0  # the swap at the start stays within the first cycle
    for cycle in cycles:
        assert sorted(cycle.tolist()) == sorted(cycles[0].tolist())
    if config.same_order:
        assert all(cycle.tolist() == cycles[-1].tolist() for cycle in cycles[first:])
    if config.longest_first:
        assert lengths[0] == max(length for length, count in batches.items() if count)
    again = Curriculum(config, batches, seed)
    assert all(again.bucket_of(step) == (lengths[step], numbers[step]) for step in range(0, len(curriculum), 7))


@given(counts, st.integers(0, 2**64 - 1), st.sampled_from(["odds", "odds_times_batches"]), st.booleans())
def test_algorithm_1_step_by_step(counts, seed, rule, grow):
    config = CurriculumConfig(
        rule=rule, odds="grow_p2" if grow else "custom", custom_odds=() if grow else (3,) * len(counts)
    )
    curriculum = Curriculum(config, dict(zip(BUCKETS, counts, strict=False)), seed)
    weights = config.weights(counts)
    left, order = list(counts), []
    for number in draws(seed_of(seed, "cycle", 0), np.arange(sum(counts))).tolist():
        present = [i for i in range(len(counts)) if left[i]]
        point = number % sum(weights[i] for i in present)
        for bucket in present:
            point -= weights[bucket]
            if point < 0:
                break
        left[bucket] -= 1
        order.append(BUCKETS[bucket])
    assert lengths_of(curriculum).tolist() == order


@pytest.mark.parametrize(
    ("odds", "means", "last_quarter"),
    [
        ("uniform", [0.50, 0.50, 0.50, 0.50, 0.50, 0.50], [1 / 6] * 6),
        ("grow_linear", [0.29, 0.35, 0.42, 0.51, 0.63, 0.80], [0, 0.00, 0.03, 0.16, 0.32, 0.50]),
        ("grow_p2", [0.17, 0.29, 0.43, 0.57, 0.71, 0.83], [0, 0, 0, 0.10, 0.38, 0.52]),
        ("grow_p100", [0.08, 0.25, 0.42, 0.58, 0.75, 0.92], [0, 0, 0, 0, 0.34, 0.66]),
        ("shrink_p100", [0.92, 0.75, 0.58, 0.42, 0.25, 0.08], [0.66, 0.34, 0, 0, 0, 0]),
    ],
)
def test_where_in_a_cycle_buckets_are_read(odds, means, last_quarter):
    config = CurriculumConfig(odds=odds)
    runs = np.array([lengths_of(Curriculum(config, dict.fromkeys(BUCKETS, 64), seed)) for seed in range(400)])
    positions = np.broadcast_to(np.arange(384) / 383, runs.shape)
    assert [positions[runs == length].mean() for length in BUCKETS] == pytest.approx(means, abs=0.02)
    assert [(runs[:, 288:] == length).mean() for length in BUCKETS] == pytest.approx(last_quarter, abs=0.02)
    if odds == "grow_p2":  # before the shortest bucket can be used up
        shares = [(runs[:, :32] == length).mean() for length in BUCKETS]
        assert shares == pytest.approx([0.508, 0.254, 0.127, 0.063, 0.032, 0.016], abs=0.015)


def test_cycles_differ_unless_told_otherwise():
    batches = dict.fromkeys(BUCKETS, 16)
    halves = lengths_of(Curriculum(CurriculumConfig(cycles=2, odds="grow_p2"), batches, 1)).reshape(2, -1)
    assert halves[0].tolist() != halves[1].tolist()
    same = CurriculumConfig(cycles=2, odds="grow_p2", same_order=True)
    repeated = lengths_of(Curriculum(same, batches, 1)).reshape(2, -1)
    assert repeated.tolist() == [halves[0].tolist()] * 2


def test_odds_of_sub_cycles():
    p2 = [[4, 2, 1], [2, 4, 1], [1, 2, 4]]
    assert [subcycle_odds("grow_p2", b, 3) for b in range(3)] == p2
    assert [subcycle_odds("grow_p2", b, 4) for b in range(4)] == [
        [8, 4, 2, 1],
        [4, 8, 2, 1],
        [2, 4, 8, 1],
        [1, 2, 4, 8],
    ]
    assert [subcycle_odds("grow_linear", b, 4) for b in range(4)] == [
        [4, 3, 2, 1],
        [3, 4, 2, 1],
        [2, 3, 4, 1],
        [1, 2, 3, 4],
    ]
    assert [subcycle_odds("grow_p2", b, 6) for b in range(6)] == [
        [32, 16, 8, 4, 2, 1],
        [16, 32, 8, 4, 2, 1],
        [8, 16, 32, 4, 2, 1],
        [4, 8, 16, 32, 2, 1],
        [2, 4, 8, 16, 32, 1],
        [1, 2, 4, 8, 16, 32],
    ]
    assert [subcycle_odds("grow_linear", b, 6) for b in (0, 1, 2, 5)] == [
        [6, 5, 4, 3, 2, 1],
        [5, 6, 4, 3, 2, 1],
        [4, 5, 6, 3, 2, 1],
        [1, 2, 3, 4, 5, 6],
    ]


def test_batches_of_sub_cycles():
    assert subcycle_batches("grow_p2", [4, 4, 4]) == [[2, 1, 1], [1, 2, 1], [1, 1, 2]]
    for batches, expected in ((7, [4, 2, 1]), (10, [6, 3, 1]), (16, [9, 5, 2])):
        assert [part[0] for part in subcycle_batches("grow_p2", [batches, 0, 0])] == expected
    # Each share rounded to the nearest would be 6 4 2, one batch more than there is.
    assert [part[0] for part in subcycle_batches("grow_linear", [11, 0, 0])] == [5, 4, 2]


def test_sub_cycles_follow_one_another():
    config = CurriculumConfig(rule="subcycles", odds="grow_linear")
    batches = [50, 40, 30]
    parts = subcycle_batches("grow_linear", batches)
    lengths = lengths_of(Curriculum(config, dict(zip(BUCKETS, batches, strict=False)), 3))
    cuts = np.cumsum([sum(part) for part in parts])
    for part, read in zip(parts, np.split(lengths, cuts[:-1]), strict=True):
        assert [(read == length).sum() for length in BUCKETS[:3]] == part
        assert read.tolist() != sorted(read.tolist())


def test_natural_equal_and_custom_mixtures():
    tokens = {256: 100 * 512, 512: 300 * 512, 1024: 50 * 512 + 500}
    assert batches_per_cycle(CurriculumConfig(), tokens, 512, 450) == {256: 100, 512: 300, 1024: 50}
    assert batches_per_cycle(CurriculumConfig(cycles=2), tokens, 512, 90) == {256: 10, 512: 30, 1024: 5}
    assert batches_per_cycle(CurriculumConfig(mixture="equal"), tokens, 512, 10) == {256: 4, 512: 3, 1024: 3}
    tenths = CurriculumConfig(mixture="custom", shares=(0.1, 0.2, 0.7))
    assert batches_per_cycle(tenths, tokens, 512, 10) == {256: 1, 512: 2, 1024: 7}
    custom = CurriculumConfig(mixture="custom", shares=(0.0, 1.0, 3.0))
    assert batches_per_cycle(custom, tokens, 512, 400) == {256: 0, 512: 100, 1024: 300}
    assert steps_without_repeats(CurriculumConfig(), tokens, 512) == 450
    assert steps_without_repeats(CurriculumConfig(cycles=8), tokens, 512) == 8 * (12 + 37 + 6)
    assert steps_without_repeats(CurriculumConfig(mixture="equal", cycles=8), tokens, 512) == 8 * 18
    assert steps_without_repeats(custom, tokens, 512) == 66


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=6),
    st.integers(1, 5),
    st.sampled_from(["natural", "equal"]),
)
def test_an_epoch_repeats_nothing_and_serves_shares_to_a_batch(batches, cycles, mixture):
    tokens = {length: n * 8192 for length, n in zip(BUCKETS, batches, strict=False)}
    config = CurriculumConfig(mixture=mixture, cycles=cycles)
    steps = steps_without_repeats(config, tokens, 8192)
    assert steps % cycles == 0
    if min(batches) < cycles:
        return
    got = batches_per_cycle(config, tokens, 8192, steps)
    assert sum(got.values()) * cycles == steps
    assert all(count * cycles <= n for count, n in zip(got.values(), batches, strict=True))
    whole = [n // cycles for n in batches]
    assert list(got.values()) == (whole if mixture == "natural" else [min(whole)] * len(batches))


def test_what_cannot_be_served_is_refused():
    tokens = {256: 1000 * 512, 512: 10 * 512}
    with pytest.raises(UserError, match=r"stages\.1\.curriculum: the bucket of length 512 .* about 101 steps"):
        batches_per_cycle(CurriculumConfig(cycles=4), tokens, 512, 80, "stages.1.curriculum")
    with pytest.raises(UserError, match="bucket of length 1024"):
        batches_per_cycle(CurriculumConfig(mixture="equal"), tokens | {1024: 0}, 512, 80)
    assert batches_per_cycle(CurriculumConfig(), tokens | {1024: 0}, 512, 202)[1024] == 0
    with pytest.raises(UserError, match="no document"):
        batches_per_cycle(CurriculumConfig(), {256: 0, 512: 0}, 512, 80)


def test_problems_name_the_key_and_what_works():
    def problems(**settings):
        return CurriculumConfig(**settings).problems("c", 3, 1000)

    assert problems(cycles=8, odds="grow_p2") == []
    assert "use 2 or 4 cycles, or 999 or 1002 steps" in problems(cycles=3)[0]
    assert "c.cycles = 0" in problems(cycles=0)[0]
    assert "one entry a bucket, 3; it has 2" in problems(mixture="custom", shares=(1.0, 1.0))[0]
    assert "mixture = 'natural' does not use it" in problems(shares=(1.0, 1.0, 1.0))[0]
    assert "c.shares" in problems(mixture="custom", shares=(1.0, -1.0, 0.0))[0]
    assert "above 0" in problems(mixture="custom", shares=(0.0, 0.0, 0.0))[0]
    assert "one entry a bucket, 3; it has 0" in problems(odds="custom")[0]
    assert "c.custom_odds" in problems(odds="custom", custom_odds=(1, 0, 2))[0]
    assert "has no sub-cycles" in problems(rule="subcycles", odds="grow_p100")[0]
    assert "below 2^63" in problems(odds="custom", custom_odds=(1, 1, 2**63))[0]
    assert problems(rule="odds_times_batches", odds="custom", custom_odds=(1, 1, 2**54))


def test_outside_the_stage():
    curriculum = Curriculum(CurriculumConfig(), {256: 3}, 0)
    for step in (-1, 3):
        with pytest.raises(IndexError):
            curriculum.bucket_of(step)
    assert curriculum.bucket_of(2) == (256, 2)


def test_the_order_is_the_same_for_good():
    """Written down from a first run: a change here means that published runs no longer repeat."""
    batches = {256: 4, 512: 4, 1024: 4}
    name = {256: "s", 512: "m", 1024: "l"}
    drawn = Curriculum(CurriculumConfig(odds="grow_p2", cycles=2), batches, 0)
    assert "".join(name[n] for n in lengths_of(drawn).tolist()) == "smsllsslmlmmssmsmslmlllm"
    shuffled = Curriculum(CurriculumConfig(odds="grow_p2", rule="subcycles"), batches, 0)
    assert "".join(name[n] for n in lengths_of(shuffled).tolist()) == "slmssmlmlsml"
