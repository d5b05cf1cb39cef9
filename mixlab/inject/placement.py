"""Where every occurrence of every item goes: exact counts, no overlap, the same for ever.

An occurrence's place is a function of (seed, experiment's name, number of the occurrence, attempt) alone; the attempt goes up
as long as the place is taken by something placed before. So an experiment that is added or removed moves others only where
they meet. The order is: whole batches and given positions, whole rows, then all else; within these, as the experiments are
given. The result is that of placing one occurrence after the other, but only what meets something is looked at one by one.
"""

import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mixlab.errors import UserError
from mixlab.inject.grid import Grid
from mixlab.inject.items import Group
from mixlab.inject.ledger import Content, Placements, Tries
from mixlab.inject.occurrences import Occurrences, occurrences_of
from mixlab.inject.places import Places, draw, first_draws

ATTEMPTS = 10_000  # then the first free place of the window is taken
CHUNK = 2**19  # occurrences drawn at a time, to hold little memory


class _Asked(NamedTuple):
    """A group on its way: the number of its experiment, of its first occurrence and first item within the experiment."""

    experiment: int
    occurrence: int
    item: int
    group: Occurrences

    @property
    def rank(self) -> int:
        return 0 if self.group.positions is not None else 1 if self.group.whole_rows else 2


def place(
    experiments: Mapping[str, Sequence[Group]],
    grid: Grid,
    seed: int,
    eos_id: int | None,
    vocab_size: int | None = None,
    before: Placements | None = None,
    decided_at: int | None = None,
) -> Placements:
    """Places the groups of all experiments, in the order of the mapping.

    before: what is placed already and stays where it is. The items of experiments that are in it are numbered on.
    decided_at: step at which the run decided this; its draws differ from those of other steps.
    Raises UserError, all problems at once: items that are empty, too long or not of the vocabulary, windows and positions
    outside the run, given positions that overlap; and where no free place is left."""
    before = before or Placements.none(grid, eos_id)
    names = tuple(dict.fromkeys([*before.names, *experiments]))
    contents = [*before.contents, *[Content()] * (len(names) - len(before.names))]
    placed = [0] * len(names)
    asked: list[_Asked] = []
    problems: list[str] = []
    for number, name in enumerate(names):
        for group in experiments.get(name, ()):
            content = contents[number]
            found, wrong = occurrences_of(name, group, len(content.groups), grid, seed, eos_id, vocab_size)
            problems += wrong
            if found is not None:
                asked.append(_Asked(number, placed[number], content.count, found))
                placed[number] += len(found)
                contents[number] = content.add(group, found.leads, found.trails)
    if problems:
        raise _refusal(problems)
    asked.sort(key=lambda one: one.rank)  # stable: within a rank the experiments' order
    keys = [name if decided_at is None else f"{name}@{decided_at}" for name in names]
    positions, tries = _Placing(names, keys, asked, grid, seed, before).positions()

    counts = [len(one.group) for one in asked]
    empty = np.zeros(0, np.int32)
    columns = [
        np.repeat(np.array([one.experiment for one in asked], np.int32), counts),
        np.concatenate([empty, *((one.item + one.group.items).astype(np.int32) for one in asked)]),
        np.concatenate([empty, *(one.group.copies.astype(np.int32) for one in asked)]),
        np.concatenate([empty, *(one.group.lengths.astype(np.int32) for one in asked)]),
        positions,
    ]
    old = [before.experiment, before.item, before.copy, before.length, before.position]
    columns = [np.concatenate(pair) for pair in zip(old, columns, strict=True)]
    order = np.argsort(columns[-1], kind="stable")
    return Placements(grid, eos_id, names, tuple(contents), tuple(tries), *(column[order] for column in columns))


class _Placing:
    """Finds the positions of new occurrences; arrays are over them, in the order in which they are placed."""

    def __init__(
        self,
        names: tuple[str, ...],
        keys: list[str],
        asked: list[_Asked],
        grid: Grid,
        seed: int,
        before: Placements,
    ):
        self.names, self.keys, self.asked = names, keys, asked
        self.grid, self.seed, self.before = grid, seed, before
        self.begins = np.cumsum([0, *(len(one.group) for one in asked)])  # of each group
        self.given = sum(len(one.group) for one in asked if one.rank == 0)
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(one.group.lengths for one in asked)])
        self.at = np.concatenate([np.zeros(0, np.int64), *map(self._first, asked)])

    def positions(self) -> tuple[np.ndarray, list[Tries]]:
        """int64 [P]; and what it took, by experiment."""
        self._check_given()
        redraws, fallbacks = self._resolve()
        expected = _expected_redraws(self.asked, self.grid, self.before, len(self.names))
        old = [*self.before.tries, *[Tries()] * (len(self.names) - len(self.before.names))]
        new = zip(redraws.tolist(), fallbacks.tolist(), expected.tolist(), strict=True)
        return self.at, [Tries(*(a + b for a, b in zip(*pair, strict=True))) for pair in zip(old, new, strict=True)]

    def _first(self, one: _Asked) -> np.ndarray:
        """Where a group's occurrences go if nothing is in their way."""
        group = one.group
        if group.positions is not None:
            return group.positions
        places, found = Places(self.grid, group.window, group.whole_rows), []
        for begin in range(0, len(group), CHUNK):
            lengths = group.lengths[begin : begin + CHUNK]
            draws = first_draws(self.seed, self.keys[one.experiment], one.occurrence + begin, len(lengths))
            found.append(places.many(lengths, draws))
        return np.concatenate(found)

    def _check_given(self) -> None:
        """UserError where given positions overlap one another, or what was placed before."""
        taken = len(self.before)
        starts = np.concatenate([self.before.position, self.at[: self.given]])
        ends = starts + np.concatenate([self.before.length, self.lengths[: self.given]])
        order = np.argsort(starts, kind="stable")
        over = np.flatnonzero(starts[order][1:] < ends[order][:-1])
        if len(over):
            one, other = (self._told(int(i) - taken) for i in order[over[0] : over[0] + 2])
            raise _refusal([f"{one} and {other} overlap ({len(over)} such pairs); give them other positions or steps"])

    def _resolve(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws again for every occurrence that overlaps one placed before it. Returns redraws and fallbacks by experiment.

        All first places lie in one sorted table. What overlaps nothing in it stays; the others are taken up in their order,
        and whatever lies, placed later, where one of them moves to is taken up too."""
        redraws, fallbacks = np.zeros((2, len(self.names)), np.int64)
        table = _Table(
            np.concatenate([self.before.position, self.at]),
            np.concatenate([self.before.length, self.lengths]),
            first_number=-len(self.before),
        )
        waiting = [number for number in table.meeting().tolist() if number >= self.given]  # sorted: a heap
        queued, moved = set(waiting), set()
        moved_to: dict[int, list[tuple[int, int]]] = {}  # a row's begin -> (begin, end) of what has moved there
        places = [Places(self.grid, one.group.window, one.group.whole_rows) for one in self.asked]

        def taken_until(row: int, at: int, number: int, length: int) -> int:
            """Up to where the place is taken by what is placed before `number`; 0 if it is free."""
            ends = [end for begin, end in moved_to.get(row, ()) if begin < at + length and at < end]
            ends += [end for other, end in table.under(at, at + length) if other < number and other not in moved]
            return max(ends, default=0)

        while waiting:
            number = heapq.heappop(waiting)
            i = int(np.searchsorted(self.begins, number, side="right")) - 1
            experiment, length = self.asked[i].experiment, int(self.lengths[number])
            occurrence = self.asked[i].occurrence + number - int(self.begins[i])
            for attempt in range(ATTEMPTS):
                row, at = places[i].at(length, *draw(self.seed, self.keys[experiment], occurrence, attempt))
                if not taken_until(row, at, number, length):
                    break
            else:
                attempt += 1
                fallbacks[experiment] += 1
                row, at = self._scan(places[i], number, taken_until)
            redraws[experiment] += attempt
            if at == self.at[number]:
                continue
            self.at[number] = at
            moved.add(number)
            moved_to.setdefault(row, []).append((at, at + length))
            for other, _ in table.under(at, at + length):
                if other > number and other not in queued:
                    queued.add(other)
                    heapq.heappush(waiting, other)
        return redraws, fallbacks

    def _scan(self, places: Places, number: int, taken_until) -> tuple[int, int]:
        """The first free place in training order, as (begin of its row, position)."""
        length = int(self.lengths[number])
        for row, row_length in places.rows(length):
            at = row
            while at + length <= row + row_length and (not places.whole_rows or at == row):
                until = taken_until(row, at, number, length)
                if not until:
                    return row, at
                at = until
        told = self._told(number).partition(", at ")[0]
        raise _refusal([f"{told}: no free place for its {length} tokens is left; insert less, or widen the window"])

    def _told(self, number: int) -> str:
        """An occurrence in words; below 0, counted from the end, one that was placed before."""
        if number < 0:
            entry = self.before.entry(len(self.before) + number)
            name, item, copy = entry["experiment"], entry["item"], entry["copy"]
            place = (entry["step"], entry["row"], entry["offset"])
        else:
            i = int(np.searchsorted(self.begins, number, side="right")) - 1
            group, within = self.asked[i].group, number - int(self.begins[i])
            name, item = self.names[self.asked[i].experiment], group.group.items.ids[group.items[within]]
            copy = int(group.copies[within])
            step, row, offset = (int(x[0]) for x in self.grid.locate(self.at[number : number + 1]))
            place = (step, row, offset)
        return f"experiments.{name}: item {item!r}, copy {copy}, at (step, row, offset) = {place}"


class _Table:
    """Intervals that may overlap, all within rows; numbered from `first_number` on in the order given."""

    def __init__(self, begins: np.ndarray, lengths: np.ndarray, first_number: int):
        order = np.argsort(begins, kind="stable")
        self.begins, self.numbers = begins[order], order + first_number
        self.ends = self.begins + lengths[order]
        self.furthest = np.maximum.accumulate(self.ends)  # end of all up to here; no interval leaves its row

    def meeting(self) -> np.ndarray:
        """Numbers of all that overlap another, ascending."""
        over = self.begins[1:] < self.furthest[:-1]  # what begins here overlaps one before it
        hit = np.zeros(len(self.begins), bool)
        hit[1:] |= over
        hit[:-1] |= self.begins[1:] < self.ends[:-1]
        return np.sort(self.numbers[hit])

    def under(self, begin: int, end: int) -> list[tuple[int, int]]:
        """(number, end) of all that overlap [begin, end)."""
        found = []
        i = int(np.searchsorted(self.begins, end)) - 1
        while i >= 0 and self.furthest[i] > begin:
            if self.ends[i] > begin:
                found.append((int(self.numbers[i]), int(self.ends[i])))
            i -= 1
        return found


def _expected_redraws(asked: list[_Asked], grid: Grid, before: Placements, experiments: int) -> np.ndarray:
    """By experiment, to first order: m occurrences of mean length n in T tokens meet one another m^2 / 2 x (2n - 1) / T
    times, and what is placed before accordingly."""
    expected = np.zeros(experiments)
    placed: list[tuple[float, float, int, int]] = []  # (occurrences, tokens, from position, to position), spread evenly
    given = [one.group for one in asked if one.rank == 0]
    at = np.concatenate([before.position, *(group.positions for group in given)])
    lengths = np.concatenate([before.length, *(group.lengths for group in given)])
    order = np.argsort(at, kind="stable")
    at, tokens_before = at[order], np.concatenate([[0], np.cumsum(lengths[order])])
    for one in asked:
        group = one.group
        if group.positions is not None:
            continue
        low, high = (int(grid.begins[step]) for step in group.window)
        count, tokens, room = len(group), int(group.lengths.sum()), high - low
        first, last = np.searchsorted(at, [low, high])
        others, other_tokens = float(last - first), float(tokens_before[last] - tokens_before[first])
        for n, t, begin, end in placed:
            part = max(min(high, end) - max(low, begin), 0) / (end - begin)
            others, other_tokens = others + part * n, other_tokens + part * t
        own = count * (2 * tokens - count) / 2
        expected[one.experiment] += (own + count * other_tokens + others * (tokens - count)) / room
        placed.append((count, tokens, low, high))
    return expected


def _refusal(problems: list[str]) -> UserError:
    return UserError("the experiments cannot be placed:\n" + "\n".join(f"  - {p}" for p in dict.fromkeys(problems)))
