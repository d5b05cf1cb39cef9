"""Run folders read back: what a run wrote while it trained, as arrays and plain dicts.

Nothing here needs jax, and nothing needs the run to be over: one still going on has fewer lines and files.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from mixlab.errors import UserError

AVERAGES = ("macro", "micro")  # averages over the evaluation sets, not sets themselves
TASK_AVERAGE = "tasks"  # over the benchmarks
BREAKDOWNS = {"by_length": "length of the document", "by_position": "position in the context"}  # nor are these


@dataclass(frozen=True, eq=False)
class Series:
    """One metric of a run: float64 `values` [n], NaN where the run wrote null, recorded after int64 `steps`
    [n] (ascending) updates and float64 `tokens` [n] tokens."""

    steps: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The last recorded value; NaN when there is none."""
        return float(self.values[-1]) if len(self) else math.nan

    def at(self, step: int) -> float:
        """The value recorded at `step`; NaN when there is none."""
        place = np.searchsorted(self.steps, step)
        return float(self.values[place]) if place < len(self) and self.steps[place] == step else math.nan

    def smoothed(self) -> tuple[np.ndarray, int]:
        """(centred moving average [n], its window): the window is a fiftieth of the records, made odd. Values
        that are not finite are left out of the averages and stay gaps."""
        window = len(self) // 50 // 2 * 2 + 1
        if window == 1:
            return np.where(np.isfinite(self.values), self.values, np.nan), 1
        finite = np.isfinite(self.values)
        sums = np.convolve(np.where(finite, self.values, 0.0), np.ones(window), "same")
        counts = np.convolve(finite.astype(float), np.ones(window), "same")
        return np.where(finite, sums / np.maximum(counts, 1), np.nan), window


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder. Files that are absent (or unreadable, then named in `notes`) are empty dicts."""

    path: Path
    metrics: dict[str, Series]
    config: dict
    plan: dict
    samples: dict
    baselines: dict
    facts: dict  # run.json
    notes: tuple[str, ...]  # what could not be read, for the reader of the report

    @property
    def name(self) -> str:
        name = self.config.get("name")
        return name if isinstance(name, str) and name else self.path.resolve().name

    @property
    def last_step(self) -> int:
        return max((int(series.steps[-1]) for series in self.metrics.values()), default=0)

    @property
    def last_tokens(self) -> float:
        """Tokens read by the last record; NaN when nothing was recorded yet."""
        tokens = [series.tokens for series in self.metrics.values()]
        tokens = np.concatenate(tokens) if tokens else np.array([])
        return float(np.nanmax(tokens)) if np.isfinite(tokens).any() else math.nan

    @property
    def seconds(self) -> float:
        """Wall time between start and finish; NaN while the run has not finished."""
        try:
            times = [datetime.fromisoformat(self.facts[key]) for key in ("started", "finished")]
            return (times[1] - times[0]).total_seconds()
        except (KeyError, TypeError, ValueError):
            return math.nan

    def training_seconds(self, steps: np.ndarray) -> np.ndarray:
        """float64 [n]: time spent in training steps, without evaluation and saving, when so many were done; NaN where the run has
        recorded no times, or has not come that far."""
        taken = self.series("perf/step_seconds")
        if not len(taken):
            return np.full(len(steps), np.nan)
        first = taken.steps[0] - 1
        ends = np.concatenate([[0.0], np.nancumsum(taken.values)])
        return np.interp(steps, np.concatenate([[first], taken.steps]), ends, left=np.nan, right=np.nan)

    @property
    def stages(self) -> list[dict]:
        return [stage for stage in self.plan.get("stages") or [] if isinstance(stage, dict)]

    def series(self, key: str) -> Series:
        """The metric named `key`, of length 0 when the run has not recorded it."""
        return self.metrics.get(key) or Series(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))

    def evaluation_sets(self) -> list[str]:
        """Names of the sets of held-out text, in the order in which the run recorded them, without averages and breakdowns."""
        return [n for n in self._evaluated("bits_per_byte") if n not in (*AVERAGES, *self.tasks())]

    def tasks(self) -> list[str]:
        """Names of the benchmarks, in the order in which the run recorded them, without their average."""
        return [name for name in self._evaluated("score") if name != TASK_AVERAGE]

    def _evaluated(self, metric: str) -> list[str]:
        keys = [key.split("/") for key in self.metrics if key.startswith("eval/") and key.count("/") >= 2]
        names = dict.fromkeys("/".join(parts[1:-1]) for parts in keys if parts[-1] == metric)
        return [name for name in names if name.partition("/")[0] not in BREAKDOWNS]

    def evaluated(self, name: str, metric: str) -> tuple[float, float, int]:
        """(value, standard error, step) of the last evaluation of set `name`; NaN where not recorded."""
        series = self.series(f"eval/{name}/{metric}")
        step = int(series.steps[-1]) if len(series) else -1
        return series.last, self.series(f"eval/{name}/{metric}_se").at(step), step

    def baseline(self, kind: str, name: str) -> float:
        """Bits per byte that counting alone ("unigram", "bigram") reaches on set `name`; NaN if absent."""
        value = (self.baselines.get(kind) or {}).get(name)
        return float(value) if isinstance(value, int | float) else math.nan


def read_run(path: str | Path) -> Run:
    """Reads a run folder. Raises UserError when there is none at `path`."""
    path = Path(path)
    if not path.is_dir():
        what = "a file (seed-*/ with a slash names folders alone)" if path.is_file() else "no such folder"
        raise UserError(f"{path}: {what}; give the folder of a run (its --workdir)")
    if not any((path / name).is_file() for name in ("metrics.jsonl", "config.json")):
        raise UserError(f"{path}: not a run folder (neither metrics.jsonl nor config.json is in it)")
    notes: list[str] = []
    parts = {
        part: _read_json(path / file, notes)
        for part, file in {
            "config": "config.json",
            "plan": "plan.json",
            "samples": "samples.json",
            "baselines": "baselines.json",
            "facts": "run.json",
        }.items()
    }
    metrics = _read_metrics([path / "evaluations.jsonl", path / "metrics.jsonl"], notes)
    return Run(path=path, metrics=metrics, notes=tuple(notes), **parts)


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Reads several run folders. Raises UserError when a folder is given twice or is not a run."""
    runs = [read_run(path) for path in paths]
    if not runs:
        raise UserError("no run folder was given; give one or more")
    resolved = [run.path.resolve() for run in runs]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise UserError(f"{runs[index].path}: given twice; a run is compared with other runs")
    return runs


def labels(runs: list[Run]) -> list[str]:
    """One distinct label a run: its name, and as much of its folder as tells it from runs of that name."""
    names = [run.name for run in runs]
    result = []
    for run, name in zip(runs, names, strict=True):
        rivals = [other.path.resolve().parts for other in runs if other is not run and other.name == name]
        parts, depth = run.path.resolve().parts, 1
        while any(parts[-depth:] == rival[-depth:] for rival in rivals):
            depth += 1
        folder = "/".join(parts[-depth:])
        result.append(f"{name} ({folder})" if rivals and folder != name else name)
    return result


def _read_json(path: Path, notes: list[str]) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        notes.append(f"{path.name} could not be read")
        return {}
    return value


def _read_metrics(paths: list[Path], notes: list[str]) -> dict[str, Series]:
    """Columns of evaluations.jsonl and metrics.jsonl. Where a step's number stands in several lines (a resumed run records
    again the steps after its checkpoint), the last one counts. A last line without an end is one being written; other
    unreadable lines are counted in `notes`."""
    columns: dict[str, dict[int, tuple[float, float]]] = {}
    for path in paths:
        unreadable = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            try:
                record = json.loads(line)
                step, tokens = int(record["step"]), _number(record.get("tokens"))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                unreadable += bool(line.strip()) and line.endswith(b"\n")
                continue
            for key, value in record.items():
                if key in ("step", "tokens") or not (value is None or isinstance(value, int | float)):
                    continue
                columns.setdefault(key, {})[step] = (tokens, _number(value))
        if unreadable:
            notes.append(f"{path.name}: {unreadable} line{'s' * (unreadable > 1)} could not be read")
    result = {}
    for key, column in columns.items():
        steps = np.array(sorted(column), np.int64)
        tokens, values = np.array([column[step] for step in steps.tolist()], np.float64).T
        result[key] = Series(steps, tokens, values)
    return result


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
