"""Repeated n-grams: text in which 1 to 13 tokens come again and again, 32 times or more in a row.

Such text makes the loss spike (OLMo 2, sections 2.4.1 and 3.1). It is dropped by document when a corpus is prepared, or
by row when it is read: a row with such a run bears no loss at all.

Everything rests on one fact: tokens[a : b] has period p where tokens[t] == tokens[t - p] for all t in [a + p, b).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SAMPLES = (
    6  # places looked at in a run that would be long enough; more cost time, fewer let more text through to the check
)


@dataclass(frozen=True)
class RepetitionConfig:
    """An n-gram of min_period to max_period tokens that stands `count` times in a row, or more, is too much."""

    min_period: int = 1
    max_period: int = 13
    count: int = 32

    def problems(self, where: str) -> list[str]:
        found = []
        if not 1 <= self.min_period <= self.max_period:
            found.append(
                f"{where}: min_period = {self.min_period} and max_period = {self.max_period}; "
                "periods go from 1 on, and from the smaller to the larger"
            )
        if self.count < 3:
            found.append(f"{where}.count = {self.count}: must be at least 3; the papers use 32")
        return found


class Repeat(NamedTuple):
    """tokens[start : end] has the given period, and holds its first n-gram `times` whole times."""

    start: int
    end: int
    period: int
    times: int


def find_repeats(tokens: np.ndarray, min_period: int = 1, max_period: int = 13, min_count: int = 3) -> list[Repeat]:
    """Every longest stretch of tokens (int [N]) that repeats at least min_count times, by period and then by place.

    A stretch also shows up under multiples of its period, with smaller counts.
    """
    found = []
    for period in range(min_period, min(max_period, len(tokens) // max(min_count, 1)) + 1):
        starts, lengths = _equal_runs(tokens, period)
        long = lengths >= (min_count - 1) * period
        found += [
            Repeat(int(start), int(start + length + period), period, int(length // period + 1))
            for start, length in zip(starts[long], lengths[long], strict=True)
        ]
    return found


def repeats(tokens: np.ndarray, ends: np.ndarray, config: RepetitionConfig = RepetitionConfig()) -> np.ndarray:
    """bool [documents]: which documents hold a repetition that is too long, as `find_repeats` would say.

    tokens: int [N], documents end to end.   ends: int64 [documents], where each ends, ascending.
    A run across two documents is none.
    """
    ends = np.asarray(ends, np.int64)
    begins = np.concatenate([[0], ends[:-1]])
    found = np.zeros(len(ends), bool)
    for period in range(config.min_period, config.max_period + 1):
        need = (config.count - 1) * period
        places = _candidates(tokens, period, need)
        documents = np.unique(np.searchsorted(ends, places, side="right"))
        for document in documents[(documents < len(ends))].tolist():
            if not found[document]:
                _, lengths = _equal_runs(tokens[begins[document] : ends[document]], period)
                found[document] = bool((lengths >= need).any())
    return found


def repeats_in_rows(
    tokens: np.ndarray, lengths: np.ndarray | None = None, config: RepetitionConfig = RepetitionConfig()
) -> np.ndarray:
    """bool [B]: which rows of tokens (int [B, L]) hold a repetition that is too long: those to take out of the loss.

    lengths: int [B] tokens of each row before its padding; padding is no repetition. None: the rows are full.
    """
    if lengths is None:
        return repeats(tokens.ravel(), np.arange(1, len(tokens) + 1) * tokens.shape[1], config)
    inside = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
    return repeats(tokens[inside], np.cumsum(lengths), config)


def _candidates(tokens: np.ndarray, period: int, need: int) -> np.ndarray:
    """int64 [k]: places in runs that may hold `need` tokens equal to the one a period before; one or more of every run
    that does. Of `need` neighbours at least `samples` lie on the stride, so a run shows as that many hits in a row."""
    samples = min(SAMPLES, need)
    stride = need // samples
    hits = tokens[period::stride] == tokens[: max(len(tokens) - period, 0) : stride]
    if len(hits) < samples:
        return np.zeros(0, np.int64)
    reach = 1  # hits[i] says that samples i ... i + reach - 1 are all equal
    while reach < samples:
        step = min(reach, samples - reach)
        hits = hits[:-step] & hits[step:]
        reach += step
    return np.flatnonzero(hits) * stride + period


def _equal_runs(tokens: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, lengths), int64 [k]: maximal runs of t with tokens[t + period] == tokens[t]; some may be empty."""
    differs = np.flatnonzero(tokens[period:] != tokens[: max(len(tokens) - period, 0)])
    edges = np.concatenate([[-1], differs, [max(len(tokens) - period, 0)]])
    return edges[:-1] + 1, np.diff(edges) - 1
