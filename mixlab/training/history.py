"""What a model has read on the way to a checkpoint: stretches of steps, each within one stage of one stream.

A run's own stages tell only part of it once the run is a branch: what came before was read by other runs.
"""

import hashlib
import json

from mixlab.stream import Stream

Stretch = dict  # {"stage": name, "first_step", "last_step", "identity": hash of all that decides what the stage reads}


class History:
    """What has been read when a run that began at `first_step`, with `earlier` behind it, comes to a step."""

    def __init__(self, stream: Stream, first_step: int = 0, earlier: list[Stretch] | None = None):
        identities = [hashlib.sha256(json.dumps(i, sort_keys=True).encode()).hexdigest() for i in stream.identity()]
        self._stages = list(zip(stream.stages, identities, strict=True))
        self._first, self._earlier = first_step, earlier or []

    def until(self, end: int) -> list[Stretch]:
        """Stretches up to, and without, step `end`, in order; what two runs read of the same stage is one stretch."""
        stretches = list(self._earlier)
        for stage, identity in self._stages:
            first, last = max(stage.first_step, self._first), min(stage.last_step, end - 1)
            if first > last:
                continue
            before = stretches[-1] if stretches else None
            if before and before["identity"] == identity and before["last_step"] == first - 1:
                first = stretches.pop()["first_step"]
            stretches.append({"stage": stage.name, "first_step": first, "last_step": last, "identity": identity})
        return stretches


def first_difference(one: list[Stretch], other: list[Stretch]) -> int | None:
    """The first step at which two histories differ; None when they are the same."""
    for a, b in zip(one, other, strict=False):
        if (a["first_step"], a["identity"]) != (b["first_step"], b["identity"]):
            return min(a["first_step"], b["first_step"])
        if a["last_step"] != b["last_step"]:
            return min(a["last_step"], b["last_step"]) + 1
    longer = max(one, other, key=len)[min(len(one), len(other)) :]
    return longer[0]["first_step"] if longer else None
