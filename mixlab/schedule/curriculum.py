"""Which length bucket is read at which step.

A step reads rows of one bucket only. How often a bucket is read is the mixture's matter
(`batches_per_cycle`); when, is the curriculum's (`Curriculum`): odds change the order, never the totals
(Pouransari et al. 2024, section 2.2).
"""

from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from typing import Literal

import numpy as np

from mixlab.draws import draws
from mixlab.errors import UserError
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of


@dataclass(frozen=True)
class CurriculumConfig:
    """How the buckets of a stage follow one another. Lists have one entry a bucket, the shortest first.

    mixture: the shares of tokens. "natural": as the buckets hold them; "equal"; or "custom": `shares`, of
        which 0 leaves a bucket out.
    cycles: equal parts of the stage, each with the same number of batches of every bucket.
    rule: the order within a cycle.
        "odds": a bucket is drawn by the odds of those that still have batches (the paper's algorithm 1).
        "odds_times_batches": by odds times the bucket's batches a cycle (the released code).
        "subcycles": a cycle is cut into as many sub-cycles as buckets, a bucket's batches are spread over
            them by fixed odds, and each sub-cycle is shuffled (OLMo-core). With uniform odds the cycle is
            shuffled whole.
    odds: "uniform" (1 1 1), "grow_linear" (3 2 1), "grow_p2" (4 2 1), "grow_p100" (10000 100 1),
        "shrink_p100" (1 100 10000) or "custom": `custom_odds`. What grows is the length.
    same_order: all cycles repeat the order of the first (the released code); the rows differ.
    longest_first: the first batch of the longest bucket changes places with the very first batch, so that
        what does not fit in memory shows at once.
    """

    mixture: Literal["natural", "equal", "custom"] = "natural"
    shares: tuple[float, ...] = ()
    cycles: int = 1
    rule: Literal["odds", "odds_times_batches", "subcycles"] = "odds"
    odds: Literal["uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100", "custom"] = "uniform"
    custom_odds: tuple[int, ...] = ()
    same_order: bool = False
    longest_first: bool = False

    def problems(self, where: str, buckets: int, steps: int) -> list[str]:
        """What is wrong with it for so many buckets in a stage of so many steps; one line each."""
        found = []
        if self.cycles < 1:
            found.append(f"{where}.cycles = {self.cycles}: must be at least 1")
        elif steps % self.cycles:
            divisors = [n for n in range(1, steps + 1) if steps % n == 0]
            fewer, more = [n for n in divisors if n < self.cycles], [n for n in divisors if n > self.cycles]
            below = steps // self.cycles * self.cycles
            cycles = " or ".join(str(n) for n in [*fewer[-1:], *more[:1]])
            lengths = " or ".join(str(n) for n in (below, below + self.cycles) if n)
            found.append(
                f"{where}.cycles = {self.cycles} does not divide the stage's {steps} steps; "
                f"use {cycles} cycles, or {lengths} steps"
            )
        found += _list_problems(where, "mixture", self.mixture, "shares", self.shares, buckets)
        found += _list_problems(where, "odds", self.odds, "custom_odds", self.custom_odds, buckets)
        if self.mixture == "custom" and self.shares:
            if not all(isfinite(share) and share >= 0 for share in self.shares):
                found.append(f"{where}.shares = {self.shares}: must not be negative; use 0 to leave a bucket out")
            elif not any(self.shares):
                found.append(f"{where}.shares = {self.shares}: one at least must be above 0")
        if self.odds == "custom" and any(odd < 1 for odd in self.custom_odds):
            found.append(f"{where}.custom_odds = {self.custom_odds}: must be whole numbers from 1 on")
        if self.rule == "subcycles" and self.odds not in ("uniform", "grow_linear", "grow_p2"):
            found.append(
                f"{where}.odds = {self.odds!r} has no sub-cycles; use 'uniform', 'grow_linear' or 'grow_p2', "
                f"or rule='odds'"
            )
        if not found and self.rule != "subcycles":
            total = sum(self.bucket_odds(buckets)) * (steps if self.rule == "odds_times_batches" else 1)
            if total >= 2**63:
                found.append(f"{where}.odds: they add up to {total:.2g}, which must be below 2^63; use smaller ratios")
        return found

    def bucket_odds(self, buckets: int) -> list[int]:
        """One whole number a bucket, the shortest first."""
        shorter = range(buckets)
        return {
            "uniform": [1 for _ in shorter],
            "grow_linear": [buckets - i for i in shorter],
            "grow_p2": [2 ** (buckets - 1 - i) for i in shorter],
            "grow_p100": [100 ** (buckets - 1 - i) for i in shorter],
            "shrink_p100": [100**i for i in shorter],
            "custom": list(self.custom_odds),
        }[self.odds]

    def weights(self, batches: list[int]) -> list[int]:
        """What buckets with so many batches a cycle are drawn by, as long as all of them have batches left."""
        odds = self.bucket_odds(len(batches))
        if self.rule == "odds_times_batches":
            return [odd * count for odd, count in zip(odds, batches, strict=True)]
        return odds


def batches_per_cycle(
    config: CurriculumConfig,
    tokens: dict[int, int],
    tokens_per_step: int,
    steps: int,
    where: str = "curriculum",
) -> dict[int, int]:
    """Bucket length -> batches read of it in each cycle; they add up to steps / cycles.

    tokens: bucket length -> tokens in its rows.   where: the config's name in messages.
    Shares are met to the nearest whole batch. The natural mixture reads no row twice while the stage is short
    enough for that (`steps_without_repeats`); other mixtures may run through a bucket more than once.
    Raises UserError when a bucket that has a share would never be read, or has no row.
    """
    lengths = sorted(tokens)
    per_cycle = steps // config.cycles
    shares = {
        "natural": [Fraction(tokens[length]) for length in lengths],
        "equal": [Fraction(1) for _ in lengths],
        "custom": [Fraction(str(share)) for share in config.shares],  # 0.1 is a tenth
    }[config.mixture]
    empty = [length for length, share in zip(lengths, shares, strict=True) if share and not tokens[length]]
    if empty or not any(shares):
        names = ", ".join(map(str, empty or lengths))
        raise UserError(
            f"{where}: no document gives a row to the bucket of length {names}; give it no share "
            f"(curriculum.mixture='custom'), choose other bucket lengths, or use more text"
        )
    most = [tokens[length] // (tokens_per_step * config.cycles) for length in lengths]
    capped = config.mixture == "natural" and per_cycle <= sum(most)
    counts = _largest_remainder(shares, per_cycle, most if capped else None)
    for length, share, count in zip(lengths, shares, counts, strict=True):
        if share and not count:
            served = -int(-sum(shares) // share)
            raise UserError(
                f"{where}: the bucket of length {length} has {float(share / sum(shares)):.3g} of the tokens, "
                f"too few for a batch in each cycle of {per_cycle} steps; use fewer cycles, about {served} "
                f"steps a cycle, or leave the bucket out (curriculum.mixture='custom' and its share 0)"
            )
    return dict(zip(lengths, counts, strict=True))


def steps_without_repeats(config: CurriculumConfig, tokens: dict[int, int], tokens_per_step: int) -> int:
    """The most steps that read no row twice, mixture and cycles being what they are: OLMo-core's epoch."""
    lengths = sorted(tokens)
    most = [tokens[length] // (tokens_per_step * config.cycles) for length in lengths]
    if config.mixture == "natural":
        return sum(most) * config.cycles
    shares = [Fraction(str(share)) for share in (config.shares or [1] * len(lengths))]
    scale = min(Fraction(n) / share for n, share in zip(most, shares, strict=True) if share)
    return int(scale * sum(shares)) * config.cycles


class Curriculum:
    """The bucket of every step of a stage, and back: five bytes a step in memory.

    batches_per_cycle: bucket length -> batches in each cycle.   seed: of the stage.
    """

    def __init__(self, config: CurriculumConfig, batches_per_cycle: dict[int, int], seed: int):
        self.config, self.batches_per_cycle, self.seed = config, batches_per_cycle, seed
        self.lengths = np.array(sorted(batches_per_cycle), np.int64)
        counts = [batches_per_cycle[length] for length in self.lengths.tolist()]
        seeds = [seed_of(seed, "cycle", 0 if config.same_order else cycle) for cycle in range(config.cycles)]
        cycles = [_cycle(config, counts, cycle_seed) for cycle_seed in dict.fromkeys(seeds)]
        self._buckets = np.tile(cycles[0], config.cycles) if config.same_order else np.concatenate(cycles)
        if config.longest_first and len(self._buckets):
            swapped = np.array([0, np.argmax(self._buckets == self._buckets.max())])
            self._buckets[swapped] = self._buckets[swapped[::-1]]
        self._steps = np.argsort(self._buckets, kind="stable").astype(np.uint32)  # by bucket, then by step
        self._firsts = np.concatenate([[0], np.cumsum(np.multiply(counts, config.cycles))]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._buckets)

    def identity(self) -> dict:
        """What decides the order; JSON types."""
        batches = {str(length): count for length, count in sorted(self.batches_per_cycle.items())}
        return {**vars(self.config), "batches_per_cycle": batches, "seed": self.seed}

    def batches(self, length: int) -> int:
        """Batches of this bucket in the stage."""
        return len(self._steps_of(length))

    def at(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each step its bucket's length, and the number of its batch among the bucket's: two int64 arrays.

        steps: integers of any shape, 0 the stage's first. Raises IndexError outside the stage.
        """
        steps = np.asarray(steps, np.int64)
        if steps.size and not 0 <= int(steps.min()) <= int(steps.max()) < len(self):
            raise IndexError(f"steps {steps.min()} to {steps.max()} are not all within the stage's {len(self)}")
        buckets = np.asarray(self._buckets[steps])
        numbers = np.empty(steps.shape, np.int64)
        for bucket in np.unique(buckets):
            here = buckets == bucket
            numbers[here] = np.searchsorted(self._steps_of(int(self.lengths[bucket])), steps[here])
        return self.lengths[buckets], numbers

    def bucket_of(self, step: int) -> tuple[int, int]:
        """`at` for one step."""
        length, number = self.at(np.array(step))
        return int(length), int(number)

    def step_of(self, length: int, numbers: np.ndarray) -> np.ndarray:
        """int64: the steps that read the batches `numbers` of this bucket."""
        return self._steps_of(length)[numbers].astype(np.int64)

    def _steps_of(self, length: int) -> np.ndarray:
        bucket = int(np.searchsorted(self.lengths, length))
        return self._steps[self._firsts[bucket] : self._firsts[bucket + 1]]


def subcycle_odds(odds: str, bucket: int, buckets: int) -> list[int]:
    """One number a sub-cycle, for bucket number `bucket` from the shortest (OLMo-core's growth curricula).

    odds: "grow_linear" or "grow_p2".
    """
    start = buckets - bucket
    exponents = [start + c if start + c <= buckets else start - (start + c) % buckets for c in range(buckets)]
    return exponents if odds == "grow_linear" else [2 ** (exponent - 1) for exponent in exponents]


def subcycle_batches(odds: str, batches: list[int]) -> list[list[int]]:
    """Batches [sub-cycle][bucket] of a cycle that has `batches` [bucket].

    OLMo-core rounds each share to the nearest and gives what is missing to the last sub-cycle, which fails when
    the sum overshoots. Here the largest remainders are rounded up.
    """
    rows = [subcycle_odds(odds, bucket, len(batches)) for bucket in range(len(batches))]
    return np.transpose([_largest_remainder(row, n) for row, n in zip(rows, batches, strict=True)]).tolist()


def _cycle(config: CurriculumConfig, counts: list[int], seed: int) -> np.ndarray:
    """uint8 [batches of a cycle]: the bucket of each, as its rank from the shortest."""
    if config.rule == "subcycles":
        return _subcycles(config, counts, seed)
    return _drawn(counts, np.array(config.weights(counts), np.int64), seed)


def _drawn(counts: list[int], weights: np.ndarray, seed: int) -> np.ndarray:
    """Algorithm 1: step after step a bucket is drawn by the weights of those that have batches left."""
    left = np.array(counts)
    order = np.empty(left.sum(), np.uint8)
    numbers = draws(seed, np.arange(len(order)))
    at = 0
    while at < len(order):
        present = np.flatnonzero(left)
        ends = np.cumsum(weights[present])
        points = (numbers[at:] % np.uint64(ends[-1])).astype(np.int64)
        drawn = present.astype(np.uint8)[np.searchsorted(ends, points, side="right")]
        # This holds until the first bucket is used up; the later draws are then made again without it.
        last = len(drawn)
        for bucket in present:
            places = np.flatnonzero(drawn[:last] == bucket)
            if len(places) >= left[bucket]:
                last = int(places[left[bucket] - 1]) + 1
        order[at : at + last] = drawn[:last]
        left -= np.bincount(drawn[:last], minlength=len(left))
        at += last
    return order


def _subcycles(config: CurriculumConfig, counts: list[int], seed: int) -> np.ndarray:
    """OLMo-core's rule: sub-cycle after sub-cycle, each shuffled."""
    parts = [counts] if config.odds == "uniform" else subcycle_batches(config.odds, counts)
    orders = []
    for number, part in enumerate(parts):
        batches = np.repeat(np.arange(len(counts), dtype=np.uint8), part)
        places = np.arange(len(batches))
        orders.append(batches[permute(places, len(batches), seed_of(seed, "subcycle", number))])
    return np.concatenate(orders)


def _largest_remainder(shares: list[int] | list[Fraction], total: int, most: list[int] | None = None) -> list[int]:
    """Whole numbers in proportion to `shares`, adding up to `total`; none above its `most`. The first wins ties."""
    whole = sum(shares)
    exact = [Fraction(total * share) / whole for share in shares]
    counts = [int(value) for value in exact]
    while missing := total - sum(counts):
        wanting = [i for i in range(len(counts)) if shares[i] and (most is None or counts[i] < most[i])]
        wanting.sort(key=lambda i: counts[i] - exact[i])
        for i in wanting[:missing]:
            counts[i] += 1
    return counts


def _list_problems(where: str, choice: str, chosen: str, key: str, values: tuple, buckets: int) -> list[str]:
    if chosen == "custom" and len(values) != buckets:
        return [f"{where}.{key} = {values}: must have one entry a bucket, {buckets}; it has {len(values)}"]
    if chosen != "custom" and values:
        return [f"{where}.{key} is set, but {choice} = {chosen!r} does not use it; use {choice}='custom'"]
    return []
