"""How fast is a batch forgotten that was read once? Whole batches are replaced by text that the run does not read otherwise
(Bordt and Pawelczyk 2025, appendix E.8; Pagliardini et al. 2025), and their loss is followed, here and in the control run."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixlab.errors import UserError
from mixlab.inject.checks import at_least
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.probe import Model, Probe


@dataclass(frozen=True)
class Forgetting:
    """steps: whose batches are replaced.
    after: updates done since such a step began at which its batch's loss is measured; 0 is just before it is read.
    probe_every_steps: and at the multiples of this; 0 for the beginning and the end alone.
    rows: of every batch that are measured; None for all.
    """

    kind: Literal["forgetting"] = "forgetting"
    steps: tuple[int, ...] = ()
    after: tuple[int, ...] = (0, 1, 2, 5, 10, 25, 50, 100, 200)
    probe_every_steps: int = 0
    rows: int | None = None

    def problems(self, where: str) -> list[str]:
        found = []
        if not self.steps or len(set(self.steps)) != len(self.steps) or min(self.steps) < 0:
            found.append(f"{where}.steps: must be some different steps, from 0 on, whose batches are replaced")
        if min(self.after, default=0) < 0:
            found.append(f"{where}.after: must not be negative; 0 is just before the batch is read")
        return found + at_least(self, where, probe_every_steps=0, **({} if self.rows is None else {"rows": 1}))

    def groups(self, material: Material) -> list[Group]:
        return [
            Group(
                Items.of(list(batch), [f"{step}:{row}" for row in range(len(batch))]), Where(unit="step", steps=(step,))
            )
            for step, batch in self._batches(material).items()
        ]

    def probes(self, material: Material) -> list[Probe]:
        """loss/batch_<step>: nats a token of the batch of that step (tokens 2 to L of its rows). `outcome`: minus the loss of
        every row."""
        batches = {step: batch[: self.rows] for step, batch in self._batches(material).items()}

        def losses(model: Model) -> dict[int, np.ndarray]:
            rows = [row for batch in batches.values() for row in batch]
            answers = model.log_probabilities([row[:1] for row in rows], [row[1:] for row in rows])
            means = np.array([-np.mean(answer, dtype=np.float64) for answer in answers])
            ends = np.cumsum([len(batch) for batch in batches.values()])[:-1]
            return dict(zip(batches, np.split(means, ends), strict=True))

        def run(model: Model) -> dict[str, float]:
            return {f"loss/batch_{step}": float(values.mean()) for step, values in losses(model).items()}

        def details(model: Model) -> dict[str, np.ndarray]:
            found = losses(model)
            numbers = np.repeat(list(found), [len(values) for values in found.values()])
            return {"outcome": -np.concatenate(list(found.values())), "step": numbers}

        at = sorted({step + t for step in batches for t in self.after})
        return [Probe("batches", run, self.probe_every_steps, tuple(at), details=details)]

    def _batches(self, material: Material) -> dict[int, np.ndarray]:
        """step -> int32 [rows, length]. UserError for a step that the run does not have."""
        check_steps(self.steps, material)
        return {step: material.unseen(*material.shape(step), f"batch {step}") for step in sorted(self.steps)}


def check_steps(steps: tuple[int, ...], material: Material) -> None:
    """UserError when the run has not all of the steps of an experiment."""
    if beyond := [step for step in steps if step >= material.steps]:
        raise UserError(
            f"experiments.{material.name}.steps: {beyond[0]} is not a step of the run, which has 0 to {material.steps - 1}; "
            "leave it out or train longer"
        )
