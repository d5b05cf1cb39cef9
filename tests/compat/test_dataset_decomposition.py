"""Numbers and orders that the released code of dataset decomposition and OLMo-core give for their own inputs."""

import numpy as np
import pytest

from mixlab.schedule import curriculum
from mixlab.schedule.curriculum import Curriculum, CurriculumConfig, batches_per_cycle

BUCKETS = [256, 512, 1024, 2048, 4096, 8192]
SHARD_TOKENS = 2**20
UNIT_TOKENS = SHARD_TOKENS * 8  # a shard for each of 8 GPUs
STEP_TOKENS = 64 * 8192


@pytest.mark.parametrize(
    ("shards", "factors", "odds", "sequences", "tokens", "weights"),
    [
        (  # DCLM-baseline
            [3560, 5996, 7410, 6309, 5157, 4513],
            [46, 78, 97, 82, 67, 60],
            "grow_p2",
            [1507328, 1277952, 794624, 335872, 137216, 61440],
            3_607_101_440,
            [1472, 1248, 776, 328, 134, 60],
        ),
        (  # Wikipedia
            [553, 779, 831, 690, 475, 291],
            [66, 92, 99, 82, 56, 34],
            "uniform",
            [2162688, 1507328, 811008, 335872, 114688, 34816],
            3_598_712_832,
            [66, 92, 99, 82, 56, 34],
        ),
    ],
)
def test_released_parameters(shards, factors, odds, sequences, tokens, weights):
    config = CurriculumConfig(
        mixture="custom",
        shares=tuple(map(float, factors)),
        cycles=8,
        rule="odds_times_batches",
        odds=odds,
        same_order=True,
    )
    held = {length: n * SHARD_TOKENS for length, n in zip(BUCKETS, shards, strict=True)}
    steps = 8 * tokens // STEP_TOKENS
    assert config.problems("curriculum", 6, steps) == []
    batches = batches_per_cycle(config, held, STEP_TOKENS, steps)
    assert [n * STEP_TOKENS // length for length, n in batches.items()] == sequences
    assert list(batches.values()) == [16 * factor for factor in factors]
    got = config.weights(list(batches.values()))
    assert [weight / 16 for weight in got] == weights
    if odds == "grow_p2":
        assert list(batches.values()) == [736, 1248, 1552, 1312, 1072, 960] and steps == 55_040
        shares = [weight / sum(got) for weight in got]
        assert shares == pytest.approx([0.366, 0.311, 0.193, 0.082, 0.033, 0.015], abs=0.0005)
        orders = [Curriculum(config, batches, seed).at(np.arange(200))[0] for seed in range(60)]
        first = [(np.array(orders) == length).mean() for length in BUCKETS]
        assert first == pytest.approx(shares, abs=0.02)


def test_natural_mixture_before_the_released_rounding_to_shards():
    shards = [3560, 5996, 7410, 6309, 5157, 4513]
    held = {length: n * SHARD_TOKENS for length, n in zip(BUCKETS, shards, strict=True)}
    steps = 28_795_904_000 // 8 // STEP_TOKENS * 8
    config = CurriculumConfig(cycles=8, odds="grow_p2")
    batches = batches_per_cycle(config, held, STEP_TOKENS, steps)
    ideal = [46.37, 78.09, 96.51, 82.17, 67.17, 58.78]
    assert [n * STEP_TOKENS / UNIT_TOKENS for n in batches.values()] == pytest.approx(ideal, abs=0.05)


def test_olmo_core_growth_order(monkeypatch):
    """With its own generator in place of ours, sub-cycles give the very order of OLMo-core (grow-p2, seed 1)."""
    generator = np.random.Generator(np.random.PCG64(1))
    monkeypatch.setattr(curriculum, "permute", lambda places, n, seed: generator.permutation(places))
    config = CurriculumConfig(rule="subcycles", odds="grow_p2", cycles=2, longest_first=True)
    got = Curriculum(config, {256: 4, 512: 4, 1024: 4}, 0).at(np.arange(24))[0]
    published = np.array([16, 1, 8, 0, 17, 2, 10, 9, 19, 3, 11, 18, 12, 20, 5, 4, 13, 6, 14, 21, 15, 7, 23, 22])
    assert got.tolist() == np.array([256, 512, 1024])[published // 8].tolist()


def test_olmo_core_natural_order():
    """Only the rule: one shuffle of all batches, with one of the longest first."""
    config = CurriculumConfig(rule="subcycles", longest_first=True)
    orders = {tuple(Curriculum(config, {1: 4, 2: 2, 4: 2}, seed).at(np.arange(8))[0]) for seed in range(50)}
    assert len(orders) > 25
    assert all(order[0] == 4 and sorted(order) == [1, 1, 1, 1, 2, 2, 4, 4] for order in orders)
