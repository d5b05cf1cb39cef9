"""Mixture: which source each row of a stage comes from, as a function of the row.

Rows are dealt in blocks. How many rows of a block a source gets is fixed so that at the end of *every* block each
source has been served its share of all rows so far to within one row; where in the block they lie is spread out and
seeded.

Why that can be done, for S sources. Let m = 1/(2 S), and a source's quota be its share of the rows so far. Its j-th row
may be served in a block that ends with a quota of j - 1 + m or more, and must be by the first that ends with a quota
above j - m. Then served and quota differ by at most 1 - m. What must be served within blocks a ... b is, of each
source, less than its quota of them + 2 m; of all, less than the rows of those blocks + 1, hence no more than there are.
By Hall's theorem a dealing exists, and serving the earliest deadline first finds it, as all rows are of one size. (With
blocks of one row this is Tijdeman's chairman assignment.)

All arithmetic is on integers: shares are numerators over one denominator.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import pairwise
from math import gcd, lcm

import numpy as np

from mixlab.schedule.shares import exact
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

GROUP_BLOCKS = 128  # between two rows of the table; the blocks in between are dealt again when asked for
BLOCKS_DEALT_QUICKLY = 2**17  # 2 to 3 seconds with 500 sources
ADDRESSES = 2**62
NEVER = 2**62


def mixing_block_steps(steps: int) -> int:
    """How many steps make a mixing block: one, or in stages of more than 131,072 steps the power of two that keeps the
    table quick to make. (So lengthening a stage past a power of two above that moves its rows about.)"""
    blocks = -(-steps // BLOCKS_DEALT_QUICKLY)
    return 1 << (blocks - 1).bit_length()


@dataclass(frozen=True)
class Mixture:
    """The rows 0 … rows - 1 of a stage, each of one source.

    weights: source -> share of the rows, up to a common factor; a float means the decimal number that it prints as.
    block_rows: at its multiples the counts hold exactly.   rows: of the stage; only the last block may be partial.
    seed: of the stage. Which rows of its own a source serves is none of the mixture's business: it counts them.

    Sources are numbered in the order of `names`, which is alphabetical: the order of `weights` is immaterial. Raises
    ValueError for weights that are negative, not finite or all zero, and for lengths out of bounds.
    """

    weights: dict[str, float | Fraction]
    block_rows: int
    rows: int
    seed: int = 0

    def __post_init__(self):
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"the weight of {name!r} is {weight}; it must be a number from 0 on")
        if not any(self.weights.values()):
            raise ValueError("a mixture needs a source whose weight is not 0")
        if not 1 <= self.block_rows <= 2**20 or not 1 <= self.rows <= 2**33 or len(self.weights) > 2**13:
            raise ValueError(
                f"{self.rows} rows of {len(self.weights)} sources in blocks of {self.block_rows}: there must be 1 to "
                "2^33 rows in blocks of 1 to 2^20, of at most 2^13 sources"
            )

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.weights))

    @property
    def shares(self) -> dict[str, Fraction]:
        """source -> the share that is dealt; they sum to 1."""
        shares = dict.fromkeys(self.names, Fraction(0))
        return shares | {
            self.names[s]: Fraction(int(n), self._whole) for s, n in zip(self._order, self._parts, strict=True)
        }

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where rows (int64 [R]) of the stage come from: int64 [R] number of the source, and int64 [R] how many rows of
        that source come before in this stage. Raises IndexError outside the stage."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} are not within the {self.rows} of the stage")
        blocks, places = np.divmod(rows, self.block_rows)
        numbers, ks = np.empty_like(rows), np.empty_like(rows)
        for block in np.unique(blocks):
            here = blocks == block
            sources, counters = self._block(int(block))
            numbers[here], ks[here] = self._order[sources[places[here]]], counters[places[here]]
        return numbers, ks

    def counts(self, row: int) -> np.ndarray:
        """int64 [S]: rows of each source among the first `row` rows of the stage."""
        if not 0 <= row <= self.rows:
            raise IndexError(f"{row} rows are not within the {self.rows} of the stage")
        block, place = divmod(row, self.block_rows)
        served = self._before(block)
        if place:
            served = served + np.bincount(self._block(block)[0][:place], minlength=len(served))
        counts = np.zeros(len(self.names), np.int64)
        counts[self._order] = served
        return counts

    def find(self, number: int, ks: np.ndarray) -> np.ndarray:
        """The inverse of `locate`: int64 [K], the rows of the stage that serve rows `ks` (int64 [K]) of a source.
        Raises IndexError for rows that the stage does not reach."""
        ks = np.asarray(ks, np.int64)
        total = int(self.counts(self.rows)[number])
        if ks.size and not 0 <= ks.min() <= ks.max() < total:
            raise IndexError(f"rows {ks.min()} to {ks.max()} of {self.names[number]!r}: the stage has {total}")
        if not ks.size:
            return ks
        source = int(np.flatnonzero(self._order == number)[0])
        per_cycle = int(self._parts[source]) * self._period * self.block_rows // self._whole
        starts = self._table[0][:, source]
        rows = np.empty_like(ks)
        for i, k in enumerate(ks.tolist()):
            cycle, k_in_cycle = divmod(k, per_cycle)
            group = int(np.searchsorted(starts, k_in_cycle, side="right")) - 1
            in_group = int(np.searchsorted(self._group(group)[:, source], k_in_cycle, side="right")) - 1
            block = cycle * self._period + group * GROUP_BLOCKS + in_group
            sources, counters = self._block(block)
            rows[i] = block * self.block_rows + np.flatnonzero((sources == source) & (counters == k))[0]
        return rows

    def unserved(self) -> list[str]:
        """The sources with a weight above 0 that get no row in the whole stage: their quota is below one row."""
        counts = self.counts(self.rows)
        return [name for name, count in zip(self.names, counts, strict=True) if self.weights[name] and not count]

    def problems(self, where: str) -> list[str]:
        """A message for each unserved source; `where` is the mixture's key, such as "stages.0.mixture"."""
        shares = self.shares
        return [
            f"{where}.{name}: a share of {float(shares[name]):.3g} is {float(shares[name] * self.rows):.3g} of the stage's "
            f"{self.rows} rows, so none is read; raise it to a share of at least {1 / self.rows:.3g}, lengthen the stage, or drop "
            "the source"
            for name in self.unserved()
        ]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in ("_group", "_block")}

    @cached_property
    def _order(self) -> np.ndarray:
        """int64 [P]: numbers of the sources of positive weight, in the order in which ties are broken (by seed)."""
        positive = [number for number, name in enumerate(self.names) if self.weights[name]]
        return np.array(sorted(positive, key=lambda s: (seed_of(self.seed, self.names[s]), s)), np.int64)

    @cached_property
    def _parts(self) -> np.ndarray:
        """int64 [P]: numerators of the shares. Exact when they fit, else off by less than one part in 2^52 (2^48 with
        2^13 sources): over the longest stage less than the 1/(2 S) of a row that is to spare."""
        weights = [exact(self.weights[self.names[s]]) for s in self._order]
        scale = lcm(*(w.denominator for w in weights))
        parts = [int(w * scale) for w in weights]
        common = gcd(*parts)
        parts = [part // common for part in parts]
        whole, limit = sum(parts), 1 << (62 - max(len(parts).bit_length(), 10))
        if whole > limit:
            edges = [0]
            for part in parts:
                edges.append(edges[-1] + part)
            edges = [edge * limit // whole for edge in edges]
            parts = [max(b - a, 1) for a, b in pairwise(edges)]
            parts[parts.index(max(parts))] += limit - sum(parts)
        return np.array(parts, np.int64)

    @cached_property
    def _whole(self) -> int:
        return int(self._parts.sum())

    @property
    def _period(self) -> int:
        """After so many blocks every quota is a whole number, hence served exactly, and the dealing repeats."""
        return self._whole // gcd(self._whole, self.block_rows)

    @cached_property
    def _steady(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P] each: rows that a source always gets in a block, and what remains of its quota a block, in parts. A
        row is held back from the former, since a source that is ahead may be due one less."""
        quotas = [int(part) * self.block_rows for part in self._parts]
        always = [max(quota // self._whole - 1, 0) for quota in quotas]
        rest = [quota - a * self._whole for quota, a in zip(quotas, always, strict=True)]
        return np.array(always, np.int64), np.array(rest, np.int64)

    def _deal(self, credit: np.ndarray, blocks: int) -> np.ndarray:
        """int64 [blocks + 1, P]: (quota - served) of each source, in parts, at each block's start, from `credit` on."""
        always, rest = self._steady
        whole, parts, ties = self._whole, self._parts, np.arange(len(rest))
        bits = len(rest).bit_length()
        low = -(-whole // (2 * len(rest)))  # from here on a row may be served,
        high = whole - low  # and above this it must
        spare = self.block_rows - int(always.sum())
        credits = np.empty((blocks + 1, len(rest)), np.int64)
        credits[0] = credit
        for block in range(blocks):
            now = credits[block + 1]
            np.add(credits[block], rest, out=now)
            due = (now > high).astype(np.int64)
            due += now > high + whole
            now -= due * whole
            left = spare - int(due.sum())
            if left:
                deadlines = (high - now) // parts  # in rows from here
                deadlines <<= bits
                deadlines |= ties
                deadlines[now < low] = NEVER
                now -= (deadlines <= np.partition(deadlines, left - 1)[left - 1]) * whole
        return credits

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """(served, credit): int64 [groups + 1, P] each, at the start of every group of blocks of a period."""
        groups = -(-min(self._period, -(-self.rows // self.block_rows)) // GROUP_BLOCKS)
        served = np.zeros((groups + 1, len(self._order)), np.int64)
        credit = np.zeros_like(served)
        for group in range(groups):
            credits = self._deal(credit[group], GROUP_BLOCKS)
            served[group + 1] = served[group] + self._dealt(credits)[-1]
            credit[group + 1] = credits[-1]
        return served, credit

    def _dealt(self, credits: np.ndarray) -> np.ndarray:
        """int64 [blocks + 1, P]: rows served up to each block's start, counted from the first."""
        always, rest = self._steady
        blocks = np.arange(len(credits))[:, None]
        return blocks * always + (blocks * rest + credits[0] - credits) // self._whole

    @cached_property
    def _group(self):
        return lru_cache(4)(self._make_group)

    def _make_group(self, group: int) -> np.ndarray:
        """int64 [GROUP_BLOCKS + 1, P]: rows served at the start of each block of a group of the first period."""
        served, credit = self._table
        return served[group] + self._dealt(self._deal(credit[group], GROUP_BLOCKS))

    def _before(self, block: int) -> np.ndarray:
        """int64 [P]: rows of each source before `block`."""
        cycle, block = divmod(block, self._period)
        group, block = divmod(block, GROUP_BLOCKS)
        if not block:  # known without dealing; also the stage's end, where no group begins
            served = self._table[0][group]
        else:
            served = self._group(group)[block]
        return served + self._parts * (cycle * (self._period * self.block_rows // self._whole))

    @cached_property
    def _block(self):
        return lru_cache(4)(self._make_block)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(place of the source in `_order`, row of that source): int64 [block_rows] each, for every row of a block.

        A source with n rows here has one, at random, in each n-th of the block; the randomness of a row depends on the
        source's name and on which row of that source it is."""
        before = self._before(block)
        served = self._before(block + 1) - before
        sources = np.repeat(np.arange(len(served)), served)
        nth = np.arange(self.block_rows) - np.repeat(np.cumsum(served) - served, served)
        ks = before[sources] + nth
        if np.count_nonzero(served) == 1:
            return sources, ks
        random = permute((self._addresses[sources] + ks) % ADDRESSES, ADDRESSES, self.seed)
        bits = 62 - self.block_rows.bit_length()
        order = np.argsort(((nth << bits) + (random >> (62 - bits))) // served[sources], kind="stable")
        return sources[order], ks[order]

    @cached_property
    def _addresses(self) -> np.ndarray:
        """int64 [P]: each source's own place in the numbers that randomness is drawn from."""
        return np.array([seed_of(self.seed, self.names[s]) % (ADDRESSES // 2) for s in self._order], np.int64)
