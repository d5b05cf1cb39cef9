"""What an experiment puts into the run: items, and where they go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixlab.corpus.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Items:
    """K token sequences with names.

    tokens: int32 [T], one item after the other (may be memory-mapped).   offsets: int64 [K + 1], where each begins.
    ids: K names, unique within the group; probes and the ledger speak of items by them.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ids: tuple[str, ...]

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray | list[int]] | np.ndarray, ids: Sequence[str] | None = None) -> "Items":
        """From token arrays; ids: their names, by default their numbers "0", "1", …"""
        arrays = [np.asarray(sequence, np.int32) for sequence in sequences]
        offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int64)
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
        return cls(tokens, offsets, tuple(ids) if ids is not None else tuple(map(str, range(len(arrays)))))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, item: int) -> np.ndarray:
        """int32 tokens of an item."""
        return self.tokens[self.offsets[item] : self.offsets[item + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [K]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Where:
    """Where items go; by default each once, anywhere in the run, every place that can hold it being equally likely.

    copies: how often each item is inserted, a whole number; below 1, that fraction of the items, chosen by the seed.
    stage: only within the stage of this name; what follows then counts from its beginning.
    start_step, end_step | start_tokens, end_tokens | start_share, end_share: only within these steps (the end excluded),
        given as steps, as tokens, or as shares of the run (or stage); rounded down to whole steps.
    unit: "span" puts an item anywhere in a row that holds it; "row": it fills a whole row of just its length; "step": the
        items fill the whole batches of `steps`, row by row, in their order, as many as there are rows.
    steps: of the run, for unit "step".
    positions: (step, row, offset) of every occurrence: all items of the first copy, then all of the second, …; steps count
        over the run, rows over the global batch. None: drawn.
    isolated: the item is a document of its own: its own segment, positions from 0, and what is left of the host after it
        is a segment of its own; as separate from its host as the format keeps documents. Off: it stands in the middle of
        its host, whose segment and positions go on.
    add_eos: EOS after the item, and before it, as far as they are not there and the row has space (Bordt and Pawelczyk
        2025). They count as part of the item.
    """

    copies: float = 1
    stage: str | None = None
    start_step: int | None = None
    end_step: int | None = None
    start_tokens: int | None = None
    end_tokens: int | None = None
    start_share: float | None = None
    end_share: float | None = None
    unit: Literal["span", "row", "step"] = "span"
    steps: tuple[int, ...] = ()
    positions: tuple[tuple[int, int, int], ...] | None = None
    isolated: bool = True
    add_eos: bool = True

    @property
    def bounds(self) -> list[str]:
        """The window's keys that are set."""
        keys = [f"{end}_{what}" for what in ("step", "tokens", "share") for end in ("start", "end")]
        return [key for key in keys if getattr(self, key) is not None]

    def problems(self, where: str) -> list[str]:
        """What is wrong with the settings by themselves; `where` is their key."""
        found = []
        if not self.copies > 0 or (self.copies >= 1 and self.copies != int(self.copies)):
            found.append(
                f"{where}.copies = {self.copies}: use a whole number, or a fraction of the items above 0 and below 1"
            )
        if len({key.partition("_")[2] for key in self.bounds}) > 1:
            found.append(
                f"{where}: {', '.join(self.bounds)} are given; say the window in steps, in tokens or in shares"
            )
        for start, end in (("start_step", "end_step"), ("start_tokens", "end_tokens"), ("start_share", "end_share")):
            low, high = getattr(self, start), getattr(self, end)
            found += [
                f"{where}.{key} = {v}: must not be negative" for key, v in ((start, low), (end, high)) if (v or 0) < 0
            ]
            if high is not None and (low or 0) >= high:
                found.append(f"{where}: the window from {start} = {low or 0} to {end} = {high} is empty; raise {end}")
        if (self.end_share or 0) > 1 or (self.start_share or 0) >= 1:
            found.append(f"{where}: the window's shares must lie between 0 and 1")
        placed = [*self.bounds, *(["stage"] if self.stage is not None else [])]
        if self.unit == "step":
            if not self.steps:
                found.append(f"{where}.steps: unit 'step' needs the steps whose batches are filled")
            if len(set(self.steps)) != len(self.steps):
                found.append(f"{where}.steps: the same step is named twice; a batch is filled once")
            if self.positions is not None:
                found.append(f"{where}.positions: unit 'step' fills whole batches; set positions=None or another unit")
        elif self.steps:
            found.append(f"{where}.steps: belongs to unit 'step'; set it, or steps=()")
        if placed and (self.positions is not None or self.unit == "step"):
            what = "steps" if self.unit == "step" else "positions"
            found.append(f"{where}: {', '.join(placed)} have no meaning beside {what}; leave one out")
        for i, position in enumerate(self.positions or ()):
            if len(position) != 3 or min(position) < 0:
                found.append(f"{where}.positions.{i} = {position}: must be (step, row, offset), none negative")
        return found


@dataclass(frozen=True)
class Group:
    """Items that are placed by one rule; an experiment is a list of groups."""

    items: Items
    where: Where = Where()


@dataclass(frozen=True)
class Material:
    """What an experiment may make its items and probes from. They are functions of its settings and of this alone.

    name: of the experiment.   seed: of the run.
    row_length: tokens of the longest rows of the run.   eos_id, bos_id: None where the tokenizer has none.
    steps, rows_per_step, tokens: of the whole run (rows_per_step: of its first step).
    shape: step -> (rows, length) of its global batch.
    read: step -> int32 [rows, length + 1], the tokens of its global batch without any experiment; the last column is the
        target of the last position.
    unseen: (count, length, purpose) -> int32 [count, length], fresh rows of text from the run's own sources that the run
        does not read; the same for the same purpose, and no text twice among all purposes of all experiments. UserError
        where there is not enough.
    """

    name: str
    seed: int
    tokenizer: Tokenizer
    row_length: int
    eos_id: int | None
    bos_id: int | None
    steps: int
    rows_per_step: int
    tokens: int
    shape: Callable[[int], tuple[int, int]]
    read: Callable[[int], np.ndarray]
    unseen: Callable[[int, int, str], np.ndarray]
