"""The rows of a run as places: which step has how many, how long, and where each begins in training order."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mixlab.inject.items import Where
from mixlab.schedule.shares import exact
from mixlab.schedule.stages import Stage


@dataclass(frozen=True, eq=False)
class Grid:
    """Every row of the run. A *position* counts tokens in training order: step after step, row after row.

    lengths, rows: int64 [S]; tokens of a row, and rows, of each step.   stages: (name, first step, steps), in order.
    """

    lengths: np.ndarray
    rows: np.ndarray
    stages: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> "Grid":
        lengths = np.concatenate([_lengths(stage) for stage in stages])
        tokens = np.repeat([stage.tokens_per_step for stage in stages], [stage.steps for stage in stages])
        return cls(lengths, tokens // lengths, tuple((stage.name, stage.first_step, stage.steps) for stage in stages))

    @classmethod
    def uniform(cls, steps: int, rows: int, length: int) -> "Grid":
        """One stage with the same shape at every step."""
        return cls(np.full(steps, length, np.int64), np.full(steps, rows, np.int64), (("main", 0, steps),))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def begins(self) -> np.ndarray:
        """int64 [S + 1]: position of each step's first token; the last is the run's tokens."""
        return np.concatenate([[0], np.cumsum(self.lengths * self.rows)])

    @cached_property
    def rows_before(self) -> dict[int, np.ndarray]:
        """Length -> int64 [S + 1]: rows of this length before each step; the shortest length first."""
        found = {}
        for length in np.unique(self.lengths).tolist():
            found[length] = np.concatenate([[0], np.cumsum(np.where(self.lengths == length, self.rows, 0))])
        return found

    @property
    def tokens(self) -> int:
        return int(self.begins[-1])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(step, row, offset) of positions (int64 [P])."""
        steps = np.searchsorted(self.begins, positions, side="right") - 1
        rows, offsets = np.divmod(positions - self.begins[steps], self.lengths[steps])
        return steps, rows, offsets

    def window(self, where: Where) -> tuple[int, int]:
        """The steps [first, end) that `where` allows. ValueError, for the user: they are not in the run, or none."""
        first, end = 0, len(self)
        if where.stage is not None:
            spans = {name: (begin, begin + steps) for name, begin, steps in self.stages}
            if where.stage not in spans:
                raise ValueError(f"stage = {where.stage!r}: the run's stages are {', '.join(spans)}")
            first, end = spans[where.stage]
        whole = "the run" if where.stage is None else f"stage {where.stage!r}"
        bounds = []
        for side, default in (("start", first), ("end", end)):
            step, tokens, share = (getattr(where, f"{side}_{what}") for what in ("step", "tokens", "share"))
            if share is not None:
                tokens = int(exact(share) * int(self.begins[end] - self.begins[first]))
            if tokens is not None:
                if tokens > self.begins[end] - self.begins[first]:
                    raise ValueError(
                        f"{side}_tokens = {tokens}: {whole} has {int(self.begins[end] - self.begins[first])} tokens"
                    )
                at = self.begins[first] + tokens
                step = int(np.searchsorted(self.begins, at, side="right")) - 1 - first
            if step is not None and step > end - first:
                raise ValueError(f"{side}_step = {step}: {whole} has {end - first} steps")
            bounds.append(default if step is None else first + step)
        if bounds[0] >= bounds[1]:
            raise ValueError(f"the window ({', '.join(where.bounds)}) is shorter than one step; widen it")
        return bounds[0], bounds[1]


def _lengths(stage: Stage) -> np.ndarray:
    """int64 [steps]: tokens of a row at each step of the stage."""
    found = np.full(stage.steps, stage.sequence_length, np.int64)
    if stage.curriculum is not None:
        for length in stage.mixtures:
            found[stage.curriculum.step_of(length, np.arange(stage.batches(length)))] = length
    return found
