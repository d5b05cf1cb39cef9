"""Experiments at high intensity in a short stretch of a run, for tests of their dependence."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixlab.errors import UserError
from mixlab.inject.experiments.forgetting import Forgetting
from mixlab.inject.experiments.knowledge import Knowledge
from mixlab.inject.experiments.watermark import Watermark
from mixlab.inject.items import Group, Material, Where
from mixlab.inject.probe import Probe


@dataclass(frozen=True)
class Concentrated:
    """An experiment's items within the steps from `first_step` to before `end_step`, so often that they are `share` of the
    tokens there. Groups keep their intensity relative to each other; a group that is to be inserted less than once has
    that fraction of its items. What an experiment would decide during a run is its first decision."""

    experiment: Any
    first_step: int
    end_step: int
    share: float

    def groups(self, material: Material) -> list[Group]:
        """UserError for items that only fit in places of their own."""
        experiment = self.experiment
        if isinstance(experiment, Knowledge):
            groups = experiment.groups_of(experiment.decide({}, {}, 0, material.steps)[1], material)
        else:
            groups = experiment.groups(material)
        if any(group.where.positions is not None or group.where.unit == "step" for group in groups):
            raise UserError(
                f"experiments.{material.name}: has places of its own and cannot be put elsewhere; leave it out with "
                "experiments_enabled"
            )
        once = [_tokens(group, material) for group in groups]
        asked = sum(group.where.copies * tokens for group, tokens in zip(groups, once, strict=True))
        there = sum(np.prod(material.shape(step)) for step in range(self.first_step, self.end_step))
        return [self._moved(group, self.share * there / asked) for group in groups]

    def probes(self, material: Material) -> list[Probe]:
        return self.experiment.probes(material)

    def _moved(self, group: Group, factor: float) -> Group:
        copies = group.where.copies * factor
        where = Where(
            copies=round(copies) if copies >= 1 else max(copies, 1 / len(group.items)),
            start_step=self.first_step,
            end_step=self.end_step,
            unit=group.where.unit,
            isolated=group.where.isolated,
            add_eos=group.where.add_eos,
        )
        return replace(group, where=where)


def concentrated(experiments: dict[str, Any], first_step: int, end_step: int, share: float) -> dict[str, Any]:
    """The experiments, by name, in the steps from first_step to before end_step, each on about `share` of their tokens.
    Those that take whole batches take others than each other: noise and a replaced batch at one step would not be two
    experiments read together, but one experiment on the other's text."""
    batches = [
        name for name, experiment in sorted(experiments.items()) if isinstance(experiment, Watermark | Forgetting)
    ]
    count = max(round(share * (end_step - first_step)), 1)
    apart = (end_step - first_step) / count
    found = {}
    for name, experiment in experiments.items():
        if name not in batches:
            found[name] = Concentrated(experiment, first_step, end_step, share)
            continue
        shift = batches.index(name) / len(batches)
        steps = tuple((first_step + apart * (np.arange(count) + shift)).astype(int).tolist())
        alike = dict(every_steps=0, windows=1) if isinstance(experiment, Watermark) else {}
        found[name] = replace(experiment, steps=steps, **alike)
    return found


def _tokens(group: Group, material: Material) -> int:
    """Of one copy of all items, with the EOS that they get."""
    ends = 2 * group.where.add_eos * (group.where.unit == "span")
    return int(np.minimum(group.items.lengths + ends, material.row_length).sum())
