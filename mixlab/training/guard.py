"""What becomes of a step whose loss or gradient is not finite, or far above those before it.

An update that is not finite was not made (the train step sees to that). A spike is seen when its update has been made: the run
goes back to its last checkpoint and comes again, without the batch. Steps are not renumbered: a batch that is gone past is a
step without an update. All of it is decided by what was computed and by what a checkpoint keeps, so that a run that is resumed
decides the same.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixlab.config import TrainingConfig

WATCHED = ("train/loss", "train/grad_norm")
LEAST_DEVIATION = 1e-10


class Diverged(Exception):
    """The policy says stop."""


class RollBack(Exception):
    """The policy says: back to the last checkpoint, and past this batch. `step`: its number; the message says why."""

    def __init__(self, step: int, why: str):
        super().__init__(why)
        self.step = step


class Guard:
    """The judge of a run's steps. meta: what `meta()` returned when the checkpoint was saved that the run goes on from; {} for
    a new run.

    roll_backs: so far, in order: {"step": of the batch at fault, "why", "checkpoint": gone back to, "first_step",
        "last_step": of the batches gone past}.
    """

    def __init__(self, settings: TrainingConfig, meta: Mapping[str, Any]):
        self._settings = settings
        self.roll_backs: list[dict] = list(meta.get("roll_backs", ()))
        self._skipped_in_a_row: int = meta.get("skipped_in_a_row", 0)
        recent = meta.get("recent", {})
        self._recent = {key: deque(recent.get(key, ()), settings.spike_window_steps) for key in WATCHED}

    @property
    def may_roll_back(self) -> bool:
        return self._settings.on_non_finite == "roll_back" or self._settings.spike_deviations is not None

    def meta(self) -> dict[str, Any]:
        """For a checkpoint: all that later decisions depend on."""
        kept = {"roll_backs": self.roll_backs, "skipped_in_a_row": self._skipped_in_a_row}
        if self._settings.spike_deviations is not None:
            kept["recent"] = {key: list(values) for key, values in self._recent.items()}
        return kept

    def passes(self, step: int) -> bool:
        """Whether the batch of `step` is gone past."""
        return any(entry["first_step"] <= step <= entry["last_step"] for entry in self.roll_backs)

    def judge(self, step: int, values: Mapping[str, float]) -> str | None:
        """values: the metrics of batch `step`. Returns what is to be told of it, if anything; raises Diverged or RollBack."""
        settings = self._settings
        if values["train/skipped"]:
            self._skipped_in_a_row += 1
            why = f"step {step + 1:,}: the loss or its gradient is not finite"
            if settings.on_non_finite == "stop":
                raise Diverged(
                    f"{why}; stopping, as training.on_non_finite says. The last checkpoint is from before it"
                )
            if settings.on_non_finite == "roll_back":
                self._ask_to_roll_back(step, why)
            if self._skipped_in_a_row >= settings.max_skipped_steps:
                raise Diverged(f"stopping after {self._skipped_in_a_row} skipped updates in a row")
            return f"{why}; the update is skipped ({self._skipped_in_a_row} in a row)"
        self._skipped_in_a_row = 0
        if settings.spike_deviations is not None:
            for key in WATCHED:
                if above := self._spikes(key, values[key]):
                    what = key.removeprefix("train/")
                    self._ask_to_roll_back(step, f"step {step + 1:,}: {what} {values[key]:.4g} is {above}")
            for key in WATCHED:
                self._recent[key].append(values[key])
        return None

    def after(self, fault: RollBack, checkpoint: int, meta: Mapping[str, Any]) -> "Guard":
        """The judge of what follows when the run has gone back to `checkpoint` because of `fault`. meta: what was kept there.

        The batch alone is gone past; where that has not helped since the same checkpoint, the weights had gone bad before,
        and all batches from there to this one are."""
        again = any(entry["checkpoint"] == checkpoint for entry in self.roll_backs)
        entry = {"step": fault.step, "why": str(fault), "checkpoint": checkpoint}
        entry |= {"first_step": checkpoint if again else fault.step, "last_step": fault.step}
        return Guard(self._settings, {**meta, "roll_backs": [*self.roll_backs, entry]})

    def _spikes(self, key: str, value: float) -> str:
        """How far above those before it `value` is, in words, if that is too far (OLMo-core's definition of a spike)."""
        before = self._recent[key]
        if len(before) < self._settings.spike_window_steps:
            return ""
        mean, deviation = np.mean(before), np.std(before)
        if deviation < LEAST_DEVIATION or value <= mean + self._settings.spike_deviations * deviation:
            return ""
        return f"{(value - mean) / deviation:.1f} standard deviations above the {len(before)} before it"

    def _ask_to_roll_back(self, step: int, why: str):
        if len(self.roll_backs) >= self._settings.max_roll_backs:
            raise Diverged(f"{why}; stopping after {len(self.roll_backs)} roll backs (training.max_roll_backs)")
        raise RollBack(step, why)
