import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.schedule.mixture import GROUP_BLOCKS, Mixture, mixing_block_steps


def exact_shares(weights):
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    return [exact[name] / sum(exact.values()) for name in sorted(weights)]


def check_every_block(mixture):
    """Counts sum, grow, and stay within one row of the exact quota (of the weights as written), at every block."""
    shares = exact_shares(mixture.weights)
    before = np.zeros(len(shares), np.int64)
    for row in range(0, mixture.rows + 1, mixture.block_rows):
        counts = mixture.counts(row)
        assert counts.sum() == row and (counts >= before).all()
        assert all(abs(int(count) - share * row) < 1 for count, share in zip(counts, shares, strict=True))
        before = counts


ADVERSARIAL = {
    "many equal tiny ones": ({"web": 1.0} | {f"tiny{i}": 1e-4 for i in range(60)}, 48),
    "thirds": ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 7),
    "equal parts": ({str(i): 1.0 for i in range(31)}, 8),
    "geometric": ({str(i): 2.0**-i for i in range(25)}, 64),
    "steeply geometric": ({str(i): 13.0**-i for i in range(12)}, 5),
    "hundreds at random": ({str(i): w for i, w in enumerate(np.random.default_rng(0).random(300))}, 40),
    "a heavy one among slow ones": ({"heavy": 0.9, "a": 0.05, "b": 0.0333, "c": 0.0167, "none": 0.0}, 3),
    "one": ({"text": 1.0}, 32),
}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_within_one_row_at_every_block(case):
    weights, block_rows = ADVERSARIAL[case]
    check_every_block(Mixture(weights, block_rows, block_rows * (3 * GROUP_BLOCKS + 5)))


WEIGHTS = st.one_of(
    st.floats(1e-9, 1.0), st.sampled_from([0.0, 1.0, 1 / 3, 0.1, 0.5, 1e-3]), st.integers(1, 9).map(float)
)
MIXTURES = st.builds(
    lambda weights, block, blocks, seed: Mixture(
        {f"s{i}": w for i, w in enumerate([*weights, 1.0])}, block, block * blocks, seed
    ),
    st.lists(WEIGHTS, max_size=12),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(0, 3),
)


@settings(max_examples=40, deadline=None)
@given(MIXTURES)
def test_within_one_row_for_any_weights(mixture):
    check_every_block(mixture)


@settings(max_examples=15, deadline=None)
@given(MIXTURES, st.randoms(use_true_random=False))
def test_every_row_of_every_source_once_in_order_at_random_places(mixture, random):
    rows = np.arange(mixture.rows)
    numbers, ks = mixture.locate(rows)
    for number in range(len(mixture.names)):
        mine = ks[numbers == number]
        assert mine.tolist() == list(range(len(mine)))
        assert mixture.find(number, mine).tolist() == rows[numbers == number].tolist()
    some = np.array(random.choices(range(mixture.rows), k=20))
    here = pickle.loads(pickle.dumps(mixture)).locate(some)
    assert np.array_equal(here[0], numbers[some]) and np.array_equal(here[1], ks[some])
    row = random.randrange(mixture.rows + 1)
    assert mixture.counts(row).tolist() == np.bincount(numbers[:row], minlength=len(mixture.names)).tolist()


def test_the_order_is_pinned_for_good():
    """Runs resume across versions of everything, so this must never change."""
    mixture = Mixture({"web": 0.5, "books": 0.3, "code": 0.2}, 10, 30, seed=1)
    assert [mixture.names[n][0] for n in mixture.locate(np.arange(30))[0]] == list("bwwcbwwcbwbwwbccwbwwwwbcwcbwbw")
    many = Mixture({str(i): math.sqrt(i + 1) for i in range(90)}, 64, 64 * 3000)
    numbers, ks = many.locate(np.arange(64 * 2000, 64 * 2000 + 64))
    assert (numbers[:8].tolist(), int(numbers @ np.arange(64)), int(ks.sum())) == (
        [25, 59, 80, 46, 89, 72, 37, 26],
        104002,
        103432,
    )


def test_a_stage_made_longer_begins_the_same():
    weights = {"a": 0.61, "b": 0.3, "c": 0.09}
    short, long = Mixture(weights, 16, 1000), Mixture(weights, 16, 9000)
    assert all(map(np.array_equal, short.locate(np.arange(1000)), long.locate(np.arange(1000))))


def test_neither_the_order_of_weights_nor_their_scale_matters():
    one = Mixture({"a": 0.1, "b": 0.2, "c": 0.7}, 32, 640).locate(np.arange(640))
    other = Mixture({"c": 7, "a": 1, "b": 2}, 32, 640).locate(np.arange(640))
    assert all(map(np.array_equal, one, other))


def test_seeds_differ_in_where_not_in_how_many():
    one, other = (Mixture({"a": 0.5, "b": 0.5}, 64, 640, seed) for seed in (1, 2))
    assert not np.array_equal(one.locate(np.arange(640))[0], other.locate(np.arange(640))[0])
    assert one.counts(640).tolist() == other.counts(640).tolist() == [320, 320]


def test_sources_are_spread_within_a_block():
    """In 4096 rows every source keeps near its share at every row, yet no two blocks are dealt alike."""
    mixture = Mixture({str(i): w for i, w in enumerate([0.4, 0.3, 0.2, 0.05, 0.03, 0.02])}, 4096, 8192)
    numbers, _ = mixture.locate(np.arange(8192))
    served = np.cumsum(numbers[:, None] == np.arange(6), axis=0)
    quotas = np.arange(1, 8193)[:, None] * np.array([0.4, 0.3, 0.2, 0.05, 0.03, 0.02])
    assert np.abs(served - quotas).max() < 3
    assert 0.2 < (numbers[:4096] == numbers[4096:]).mean() < 0.45  # chance: 0.294


def test_tiny_weights_are_served_evenly():
    """Row k is read when the quota is between k and k + 1, give or take where it lies in its block."""
    mixture = Mixture({"web": 1.0, "rare": 1e-6, "rarer": 3e-7}, 10**5, 10**7)
    assert mixture.unserved() == []
    for number, at_least in [(0, 9), (1, 2)]:
        ks = np.arange(mixture.counts(10**7)[number])
        quotas = mixture.find(number, ks) * float(mixture.shares[mixture.names[number]])
        assert len(ks) >= at_least and np.abs(quotas - ks - 0.5).max() < 0.5 + 0.1


def test_what_is_never_served_is_named():
    mixture = Mixture({"web": 1.0, "rare": 1e-5, "off": 0.0}, 32, 32_000)
    assert mixture.unserved() == ["rare"] and mixture.counts(32_000).tolist() == [0, 0, 32_000]
    (problem,) = mixture.problems("stages.0.mixture")
    assert problem.startswith("stages.0.mixture.rare: a share of 1e-05 is 0.32 of the stage's 32000 rows")
    (problem,) = Mixture({"web": Fraction(21, 26), "rare": Fraction(5, 26)}, 2, 2).problems("stages.0.mixture")
    assert problem.startswith("stages.0.mixture.rare: a share of 0.192 is 0.385 of the stage's 2 rows")
    assert Mixture({"web": 1.0, "rare": 1e-4}, 32, 32_000).problems("stages.0.mixture") == []


def test_shares_are_exact_when_they_can_be():
    assert Mixture({"a": 0.1, "b": 0.2, "c": 0.0}, 1, 1).shares == {
        "a": Fraction(1, 3),
        "b": Fraction(2, 3),
        "c": Fraction(0),
    }
    weights = {"web": math.pi, "rare": 1e-300, "code": math.e}
    shares = Mixture(weights, 1, 1).shares
    assert sum(shares.values()) == 1 and shares["rare"] > 0
    assert shares["web"] == pytest.approx(math.pi / (math.pi + math.e), rel=1e-15)


def test_a_long_stage_of_many_sources_is_reached_anywhere():
    """A billion rows; the dealing repeats, so no table of them is made."""
    mixture = Mixture({f"s{i}": 1 + i % 7 for i in range(300)}, 1000, 10**9)
    last = np.arange(10**9 - 50, 10**9)
    numbers, ks = mixture.locate(last)
    shares = np.array([float(mixture.shares[name]) for name in mixture.names])
    assert np.abs(mixture.counts(10**9) - shares * 1e9).max() < 1
    assert all(mixture.find(n, [k]).tolist() == [row] for n, k, row in zip(numbers, ks, last, strict=True))


def test_a_long_stage_that_does_not_repeat():
    weights = {str(i): w for i, w in enumerate(np.random.default_rng(1).random(20) ** 4)}
    mixture = Mixture(weights, 10**5, 10**9)
    for row in (5 * 10**8, 10**9):
        counts = mixture.counts(row)
        assert all(abs(int(c) - s * row) < 1 for c, s in zip(counts, exact_shares(weights), strict=True))


def test_rows_outside_are_refused():
    mixture = Mixture({"a": 1.0, "b": 1.0}, 4, 10)
    for bad in (lambda: mixture.locate([10]), lambda: mixture.locate([-1]), lambda: mixture.counts(11)):
        with pytest.raises(IndexError):
            bad()
    with pytest.raises(IndexError, match="the stage has 5"):
        mixture.find(0, [5])


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": math.nan}, {"a": math.inf}])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match=r"'a'|needs a source"):
        Mixture(weights, 8, 80)


def test_blocks_of_a_step_until_there_are_too_many():
    assert [mixing_block_steps(n) for n in (1, 2**17, 2**17 + 1, 10**6)] == [1, 1, 2, 8]
