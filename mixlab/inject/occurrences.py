"""From groups of items to the occurrences that have to be placed: how often, how long, and in what order."""

from dataclasses import dataclass

import numpy as np

from mixlab.inject.grid import Grid
from mixlab.inject.items import Group, Items
from mixlab.seeds import seed_of


@dataclass(frozen=True, eq=False)
class Occurrences:
    """The occurrences of one group, in their order: all items of the first copy, then all of the second, …

    items: int64 [O], which item of the group.   copies: int64 [O].   lengths: int64 [O], tokens with the EOS added.
    window: steps [first, end) they may lie in.   whole_rows: each fills a row.
    positions: int64 [O] where they are given, else None.
    leads, trails: bool [K]; whether EOS is put before, and after, each item.
    """

    group: Group
    items: np.ndarray
    copies: np.ndarray
    lengths: np.ndarray
    window: tuple[int, int]
    whole_rows: bool
    positions: np.ndarray | None
    leads: np.ndarray
    trails: np.ndarray

    def __len__(self) -> int:
        return len(self.items)


def occurrences_of(
    name: str, group: Group, number: int, grid: Grid, seed: int, eos_id: int | None, vocab_size: int | None = None
) -> tuple[Occurrences | None, list[str]]:
    """What the group asks for, or what is wrong with it. name: of the experiment.   number: of the group within it.
    vocab_size: of the model, which every token id must be below; None: not checked."""
    items, where = group.items, group.where
    label = f"experiments.{name}: "
    problems = [label + problem for problem in where.problems("where")] + _item_problems(label, items, vocab_size)
    if where.add_eos and eos_id is None and where.unit == "span":
        problems.append(f"{label}where.add_eos: the tokenizer has no EOS; set add_eos=False")
    if problems:
        return None, problems
    chosen = _chosen(items, where.copies, seed_of(seed, "inject", name, number))
    if not len(chosen):
        what = (
            f"where.copies = {where.copies} of {len(items)} items is none; raise it" if len(items) else "has no items"
        )
        return None, [label + what]
    copies = max(int(where.copies), 1)
    which, copy = np.tile(chosen, copies), np.repeat(np.arange(copies), len(chosen))
    positions = rows = None
    window = (0, len(grid))
    if where.unit == "step" or where.positions is not None:
        positions, rows, problems = _explicit(label, group, len(which), grid)
    else:
        try:
            window = grid.window(where)
        except ValueError as error:
            problems = [f"{label}where: {error}"]
    if problems:
        return None, problems

    whole = where.unit != "span"
    room = np.full(len(items), grid.lengths[slice(*window)].max())
    if rows is not None:
        np.minimum.at(room, which, rows)
    leads, trails = _eos(items, room, eos_id if where.add_eos and not whole else None)
    lengths = (items.lengths + leads + trails)[which]
    fitting = rows if rows is not None else np.unique(grid.lengths[slice(*window)])
    problems = _length_problems(label, items, which, lengths, fitting, whole, positions, grid)
    found = Occurrences(group, which, copy, lengths, window, whole, positions, leads, trails)
    return (None, problems) if problems else (found, [])


def _item_problems(label: str, items: Items, vocab_size: int | None) -> list[str]:
    problems = []
    empty = np.flatnonzero(items.lengths == 0)
    if len(empty):
        problems.append(f"{label}item {items.ids[empty[0]]!r} is empty ({len(empty)} such); leave it out")
    if len(set(items.ids)) != len(items):
        seen: set[str] = set()
        twice = next((i for i in items.ids if i in seen or seen.add(i)), None)  # type: ignore[func-returns-value]
        told = (
            f"two items are called {twice!r}" if twice is not None else f"{len(items)} items have {len(items.ids)} ids"
        )
        problems.append(f"{label}{told}; give each item of a group a name of its own")
    if vocab_size is not None and len(items.tokens):
        outside = np.flatnonzero((items.tokens < 0) | (items.tokens >= vocab_size))
        if len(outside):
            item = int(np.searchsorted(items.offsets, outside[0], side="right")) - 1
            problems.append(
                f"{label}item {items.ids[item]!r} has token {int(items.tokens[outside[0]])}, but the vocabulary has "
                f"{vocab_size}; tokenize it with the run's tokenizer"
            )
    return problems


def _chosen(items: Items, copies: float, seed: int) -> np.ndarray:
    """int64, ascending: the items to insert. A fraction takes those whose names come first in an order of hashes, so that
    a larger one contains a smaller one, and other items have no influence but by their number."""
    if copies >= 1:
        return np.arange(len(items))
    hashes = np.array([seed_of(seed, item) for item in items.ids], np.uint64)
    return np.sort(np.argsort(hashes, kind="stable")[: int(copies * len(items) + 1e-9)])


def _eos(items: Items, room: np.ndarray, eos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """bool [K], bool [K]: whether EOS is put before and after each item, which must fit in `room` tokens: after it unless
    it ends with one or fills the row; then before it likewise (Bordt and Pawelczyk 2025)."""
    lengths = items.lengths
    if eos_id is None:
        return np.zeros(len(items), bool), np.zeros(len(items), bool)
    trails = (lengths < room) & (items.tokens[items.offsets[1:] - 1] != eos_id)
    leads = (lengths < room) & (lengths + trails < room) & (items.tokens[items.offsets[:-1]] != eos_id)
    return leads, trails


def _explicit(label: str, group: Group, count: int, grid: Grid) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(position, length of its row) of each of `count` occurrences, where the group says them; or what is wrong."""
    where, none = group.where, np.zeros(0, np.int64)
    if where.positions is not None:
        places = np.array(where.positions, np.int64).reshape(-1, 3)
        key, last = "where.positions", f"the run's steps are 0 to {len(grid) - 1}"
    else:
        steps = np.array(where.steps, np.int64)
        key, last = "where.steps", f"the run's steps are 0 to {len(grid) - 1}"
    asked = places[:, 0] if where.positions is not None else steps
    if len(outside := asked[(asked >= len(grid)) | (asked < 0)]):
        return none, none, [f"{label}{key} names step {outside[0]}; {last}"]
    if where.positions is None:
        rows = grid.rows[steps]
        within = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        places = np.stack([np.repeat(steps, rows), within, np.zeros_like(within)], axis=1)
    if len(places) != count:
        what = "positions are given" if where.positions is not None else "rows have the batches of where.steps"
        return none, none, [f"{label}{key}: {len(places)} {what} for {count} occurrences of items; make them as many"]
    step, row, offset = places.T
    lengths = grid.lengths[step]
    bad = np.flatnonzero((row >= grid.rows[step]) | (offset >= lengths))
    if len(bad):
        place = tuple(places[bad[0]].tolist())
        shape = f"{grid.rows[place[0]]} rows of {grid.lengths[place[0]]} tokens"
        return none, none, [f"{label}{key}: (step, row, offset) = {place} does not exist; that step has {shape}"]
    return grid.begins[step] + row * lengths + offset, lengths, []


def _length_problems(
    label: str,
    items: Items,
    which: np.ndarray,
    lengths: np.ndarray,
    fitting: np.ndarray,
    whole: bool,
    positions: np.ndarray | None,
    grid: Grid,
) -> list[str]:
    """What does not fit: `fitting` is the length of each occurrence's row, or else the lengths there are to choose from."""
    if positions is not None:
        offsets = grid.locate(positions)[2]
        bad = np.flatnonzero(((offsets > 0) | (lengths != fitting)) if whole else (offsets + lengths > fitting))
    else:
        bad = np.flatnonzero(~np.isin(lengths, fitting) if whole else lengths > fitting.max())
    if not len(bad):
        return []
    first = bad[0]
    told = f"{label}item {items.ids[which[first]]!r} has {lengths[first]} tokens"
    many = f" ({len(np.unique(which[bad]))} such items)" if len(bad) > 1 else ""
    if positions is not None:
        row = f"its row has {fitting[first]}, from offset {offsets[first]} on"
    else:
        row = f"the rows it may go to have {', '.join(map(str, fitting.tolist()))}"
    rule = "it must fill a whole row" if whole else "and no item crosses a row"
    return [f"{told}, {row}; {rule}{many}. Shorten it, or lengthen the rows"]
