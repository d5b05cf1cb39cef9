"""What is inserted where, looked up in both directions: what is in this row, and where is this item?"""

import hashlib
from bisect import bisect
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mixlab.inject.grid import Grid
from mixlab.inject.items import Group


class Tries(NamedTuple):
    """What it took to place an experiment: places drawn again because they were taken, occurrences that took the first free
    place instead, and how many redraws were to be expected."""

    redraws: int = 0
    fallbacks: int = 0
    expected_redraws: float = 0.0


@dataclass(frozen=True, eq=False)
class Content:
    """All items of an experiment, numbered through its groups.

    leads, trails: of each group bool [K]; whether EOS is put before, and after, each item."""

    groups: tuple[Group, ...] = ()
    leads: tuple[np.ndarray, ...] = ()
    trails: tuple[np.ndarray, ...] = ()

    def add(self, group: Group, leads: np.ndarray, trails: np.ndarray) -> "Content":
        return Content((*self.groups, group), (*self.leads, leads), (*self.trails, trails))

    @cached_property
    def firsts(self) -> list[int]:
        """The number of each group's first item; the last is how many there are."""
        return list(accumulate((len(group.items) for group in self.groups), initial=0))

    @property
    def count(self) -> int:
        return self.firsts[-1]

    def locate(self, item: int) -> tuple[int, int]:
        """(group, item within it)."""
        group = bisect(self.firsts, item) - 1
        return group, item - self.firsts[group]

    def id(self, item: int) -> str:
        group, within = self.locate(item)
        return self.groups[group].items.ids[within]

    def tokens(self, item: int, eos_id: int | None) -> np.ndarray:
        """int32; with the EOS around it."""
        group, within = self.locate(item)
        tokens, lead, trail = self.groups[group].items[within], self.leads[group][within], self.trails[group][within]
        if not (lead or trail):
            return tokens
        eos = np.array([eos_id], np.int32)
        return np.concatenate([eos[: int(lead)], tokens, eos[: int(trail)]])

    def isolated(self) -> np.ndarray:
        """bool [count]."""
        return np.repeat([group.where.isolated for group in self.groups], np.diff(self.firsts)).astype(bool)

    def numbers(self, id: str) -> list[int]:
        """The items of this name; several groups may have one."""
        return [
            first + i
            for first, group in zip(self.firsts, self.groups, strict=False)
            for i, name in enumerate(group.items.ids)
            if name == id
        ]


@dataclass(frozen=True, eq=False)
class Placements:
    """Every insertion of a run, in training order; made by `place`.

    names: the experiments.   contents, tries: of each.
    experiment, item, copy, length: int32 [P]; item counts through the experiment's groups, length includes EOS.
    position: int64 [P]; of the first token, in tokens of the run (see Grid).
    """

    grid: Grid
    eos_id: int | None
    names: tuple[str, ...]
    contents: tuple[Content, ...]
    tries: tuple[Tries, ...]
    experiment: np.ndarray
    item: np.ndarray
    copy: np.ndarray
    length: np.ndarray
    position: np.ndarray

    @classmethod
    def none(cls, grid: Grid, eos_id: int | None) -> "Placements":
        empty = np.zeros(0, np.int32)
        return cls(grid, eos_id, (), (), (), empty, empty, empty, empty, empty.astype(np.int64))

    def __len__(self) -> int:
        return len(self.position)

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [P] each: step, row of the global batch, offset in the row."""
        return self.grid.locate(self.position)

    @cached_property
    def first_of_step(self) -> np.ndarray:
        """int64 [steps + 1]: the number of each step's first insertion; the last is P."""
        return np.searchsorted(self.position, self.grid.begins)

    @cached_property
    def isolated(self) -> np.ndarray:
        """bool [P]: whether it is a document of its own."""
        found = np.zeros(len(self), bool)
        for number, content in enumerate(self.contents):
            own = self.experiment == number
            found[own] = content.isolated()[self.item[own]]
        return found

    def isolates(self, step: int) -> bool:
        """Whether a step has an insertion that is a document of its own."""
        return self._isolating.item(step)

    @cached_property
    def _isolating(self) -> np.ndarray:
        """bool [steps]."""
        found = np.zeros(len(self.grid), bool)
        found[self.places[0][self.isolated]] = True
        return found

    def within_rows(self, step: int, first: int, count: int) -> slice:
        """The numbers of the insertions in rows `first` up to `first + count` of a step, by row and offset."""
        here = slice(self.first_of_step.item(step), self.first_of_step.item(step + 1))
        if not first and count == self.grid.rows.item(step):
            return here
        row_tokens = self.grid.lengths.item(step)
        begin = self.grid.begins.item(step) + first * row_tokens
        low, high = np.searchsorted(self.position[here], [begin, begin + count * row_tokens]).tolist()
        return slice(here.start + low, here.start + high)

    def of_rows(self, step: int, first: int, count: int) -> np.ndarray:
        """int64: the same as an array."""
        here = self.within_rows(step, first, count)
        return np.arange(here.start, here.stop)

    def tokens(self, number: int) -> np.ndarray:
        """int32 [length]: what an insertion puts into its row."""
        return self.tokens_of(slice(number, number + 1))[0]

    def tokens_of(self, numbers: slice) -> list[np.ndarray]:
        """int32 [length] of each: what these insertions put into their rows."""
        pools, group, first, count, lead = self._sources
        ends = list(accumulate(self.length[numbers].tolist(), initial=0))
        joined = np.full(ends[-1], self.eos_id or 0, np.int32)
        read = zip(ends, *(column[numbers].tolist() for column in (group, first, count, lead)), strict=False)
        for begin, pool, start, tokens, before in read:  # where there is no token of the item, EOS stays
            joined[begin + before : begin + before + tokens] = pools[pool][start : start + tokens]
        return [joined[begin:end] for begin, end in pairwise(ends)]

    @cached_property
    def _sources(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(tokens of the groups of all experiments; and [P] each: int32 which of them, int64 where the item begins there, int32
        how many tokens it has, int8 whether EOS comes before them)."""
        groups = [group for content in self.contents for group in content.groups]
        which, first, count, lead = (np.empty(len(self), kind) for kind in (np.int32, np.int64, np.int32, np.int8))
        before = 0
        for number, content in enumerate(self.contents):
            own = self.experiment == number
            items = self.item[own]
            of_items = (
                np.repeat(before + np.arange(len(content.groups)), np.diff(content.firsts)),
                np.concatenate([np.zeros(0, np.int64), *(group.items.offsets[:-1] for group in content.groups)]),
                np.concatenate([np.zeros(0, np.int64), *(group.items.lengths for group in content.groups)]),
                np.concatenate([np.zeros(0, np.int64), *content.leads]),
            )
            for column, values in zip((which, first, count, lead), of_items, strict=True):
                column[own] = values[items]
            before += len(content.groups)
        return [group.items.tokens for group in groups], which, first, count, lead

    def find(self, name: str, item: str | None = None) -> np.ndarray:
        """int64: numbers of an experiment's insertions, or of one of its items (by name), in training order."""
        number = self.names.index(name)
        own = self.experiment == number
        if item is not None:
            own &= np.isin(self.item, self.contents[number].numbers(item))
        return np.flatnonzero(own)

    def entry(self, number: int) -> dict:
        """A line of the ledger."""
        step, row, offset = (int(column[number]) for column in self.places)
        name = self.names[self.experiment[number]]
        return {
            "experiment": name,
            "item": self.contents[self.experiment[number]].id(int(self.item[number])),
            "copy": int(self.copy[number]),
            "step": step,
            "row": row,
            "offset": offset,
            "length": int(self.length[number]),
            "stage": next(stage for stage, first, steps in self.grid.stages if first <= step < first + steps),
        }

    def table(self) -> pa.Table:
        """The ledger: experiment, item, copy, step, row, offset, length, stage of every insertion, in training order."""
        items = np.empty(len(self), object)
        for number, content in enumerate(self.contents):
            ids = np.array([id for group in content.groups for id in group.items.ids], object)
            own = self.experiment == number
            items[own] = ids[self.item[own]]
        steps, rows, offsets = self.places
        stage = np.searchsorted([first for _, first, _ in self.grid.stages], steps, side="right") - 1
        return pa.table(
            {
                "experiment": _names(self.experiment, self.names),
                "item": pa.array(items, pa.string()),
                "copy": pa.array(self.copy, pa.int32()),
                "step": pa.array(steps, pa.int32()),
                "row": pa.array(rows, pa.int32()),
                "offset": pa.array(offsets, pa.int32()),
                "length": pa.array(self.length, pa.int32()),
                "stage": _names(stage, [name for name, _, _ in self.grid.stages]),
            }
        )

    def summary(self) -> dict[str, dict]:
        """Of each experiment: items, insertions, tokens (EOS included) and their share of the run, what it took to place
        them, and, if there are any, first and last step."""
        found, steps = {}, self.places[0]
        for number, name in enumerate(self.names):
            own, content = np.flatnonzero(self.experiment == number), self.contents[number]
            tokens = int(self.length[own].sum(dtype=np.int64))
            eos = np.concatenate(
                [np.zeros(0, int), *(a.astype(int) + b for a, b in zip(content.leads, content.trails, strict=True))]
            )
            found[name] = {
                "items": len(np.unique(self.item[own])),
                "insertions": len(own),
                "tokens": tokens,
                "share": tokens / self.grid.tokens,
                "eos_tokens": int(eos[self.item[own]].sum()),
                **self.tries[number]._asdict(),
            }
            if len(own):
                found[name] |= {"first_step": int(steps[own[0]]), "last_step": int(steps[own[-1]])}
        return found

    @cached_property
    def fingerprints(self) -> tuple[dict[str, str], ...]:
        """Of each stage: experiment -> hash of all that it puts there, what and where; without those that put nothing."""
        return tuple(self._fingerprints(first, first + steps) for _, first, steps in self.grid.stages)

    def _fingerprints(self, first_step: int, end_step: int) -> dict[str, str]:
        here = slice(self.first_of_step[first_step], self.first_of_step[end_step])
        found = {}
        for number in np.unique(self.experiment[here]).tolist():
            own = np.arange(here.start, here.stop)[self.experiment[here] == number]
            hashed = hashlib.sha256()
            places = [column[own] for column in self.places]
            for column in (*places, self.length[own], self.item[own], self.copy[own], self.isolated[own]):
                hashed.update(np.ascontiguousarray(column, "<i8").tobytes())
            for item in np.unique(self.item[own]).tolist():
                hashed.update(np.ascontiguousarray(self.contents[number].tokens(item, self.eos_id), "<i4").tobytes())
            found[self.names[number]] = hashed.hexdigest()
        return dict(sorted(found.items()))

    def without(self, names: set[str]) -> "Placements":
        """The same without some experiments' insertions; all others stay where they are."""
        keep = ~np.isin(self.experiment, [i for i, name in enumerate(self.names) if name in names])
        columns = ("experiment", "item", "copy", "length", "position")
        return replace(self, **{column: getattr(self, column)[keep] for column in columns})


def write_ledger(placements: Placements, path: Path) -> None:
    """Writes the ledger as a Parquet file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    parquet.write_table(placements.table(), partial, compression="zstd")
    partial.replace(path)


def _names(numbers: np.ndarray, names) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), pa.array(list(names), pa.string()))
