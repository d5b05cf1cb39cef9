"""The control log: what was decided during a run, in order, and never changed afterwards.

A line of JSON a decision: {"step", "experiment", "probe", "state", "decision"}, and "failed" with a reason where the
controller could not answer and its last decision holds on. A checkpoint knows how many lines there were and their hash; what a
run wrote after the checkpoint it goes on from is cut off, and decided again from the same weights.
"""

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixlab.errors import UserError

Entry = dict[str, Any]


@dataclass(frozen=True)
class ControlLog:
    """lines: of JSON, without line ends."""

    lines: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.lines)

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """As they are read from the file: whoever decides sees the same before and after a resume."""
        return tuple(json.loads(line) for line in self.lines)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self._text().encode()).hexdigest()

    def append(self, entry: Entry) -> "ControlLog":
        """The log with one entry more, of JSON types; NaN and infinities become null."""
        return ControlLog((*self.lines, json.dumps(_finite(entry), sort_keys=True, allow_nan=False)))

    def of(self, experiment: str) -> list[Entry]:
        """The entries of one experiment."""
        return [entry for entry in self.entries if entry["experiment"] == experiment]

    def meta(self) -> dict[str, Any]:
        """What a checkpoint remembers."""
        return {"entries": len(self), "sha256": self.sha256}

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all; on disk when this returns."""
        part = path.with_name(path.name + ".partial")
        with part.open("w", encoding="utf-8") as file:
            file.write(self._text())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _text(self) -> str:
        return "".join(line + "\n" for line in self.lines)


def read_log(path: Path, meta: dict[str, Any]) -> ControlLog:
    """The log as it was when a checkpoint with this `meta` was saved; later lines are left out. UserError when the file does
    not begin with it."""
    if not meta["entries"]:
        return ControlLog()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    log = ControlLog(tuple(lines[: meta["entries"]]))
    if log.meta() != meta:
        raise UserError(
            f"{path}: is not the record of decisions that the checkpoint was trained with ({meta['entries']} of them); put "
            "it back, or name another --workdir"
        )
    return log


def whole_log(folder: Path) -> ControlLog:
    """All that has been decided in the run of this folder; an empty log where nothing was."""
    path = folder / "control.jsonl"
    log = ControlLog(tuple(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ())
    try:
        log.entries  # noqa: B018
    except ValueError as error:
        raise UserError(f"{path}: is no record of decisions ({error}); name the folder of a run") from None
    return log


def decide(
    log: ControlLog, name: str, experiment: Any, probe: dict[str, float] | None, step: int, steps: int
) -> ControlLog:
    """The log with what `experiment` decides at `step` of `steps`.

    probe: its probe's result; None when the probe failed. Then, or when the experiment fails itself, its last decision and
    state stay in force, whatever happened; before any decision nothing is inserted (decision None)."""
    state, decision = _last(log, name)
    entry = {"step": step, "experiment": name, "probe": probe, "state": state, "decision": decision}
    if probe is None:
        return log.append(entry | {"failed": "its probe failed"})
    try:
        state, decision = experiment.decide(state, probe, step, steps)
        return log.append(entry | {"state": state, "decision": decision})
    except Exception as error:
        return log.append(entry | {"failed": f"{type(error).__name__}: {error}"})


def insert_nothing(
    log: ControlLog, name: str, probe: dict[str, float] | None, step: int, error: Exception
) -> ControlLog:
    """The log where a decision could not be carried out: none is in force, and the state is as before."""
    entry = {"step": step, "experiment": name, "probe": probe, "state": _last(log, name)[0], "decision": None}
    return log.append(entry | {"failed": f"{type(error).__name__}: {error}"})


def _last(log: ControlLog, name: str) -> tuple[dict, Any]:
    """State and decision in force of an experiment."""
    earlier = log.of(name)
    return (earlier[-1]["state"], earlier[-1]["decision"]) if earlier else ({}, None)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
