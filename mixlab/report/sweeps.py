"""The table of a sweep: every setting's metrics and their distance from the first's, as mean and 95 % interval over seeds."""

import difflib
import math
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from mixlab.errors import UserError
from mixlab.report.runs import read_run
from mixlab.report.text import decimal
from mixlab.sweep import Run


def sweep_table(runs: Sequence[Run], metrics: Sequence[str]) -> list[dict]:
    """One entry a setting, in the order of the runs: {"setting", "seeds": seed -> outcome, "metrics": name -> {"mean",
    "interval95", "values": seed -> last recorded value, "from_first": the same of the differences from the first setting's
    value of the same seed}}.

    Only complete runs count; interval95 is half the width of Student's interval, None for fewer than two seeds. UserError,
    naming the nearest, for a metric that none of the complete runs has recorded."""
    settings: dict[tuple, list[Run]] = {}
    for run in runs:
        settings.setdefault(tuple(run.setting.items()), []).append(run)
    read = {run.folder: read_run(run.folder) for run in runs if run.outcome() == "complete"}
    recorded = sorted({name for run in read.values() for name in run.metrics})
    for name in metrics:
        if read and name not in recorded:
            near = difflib.get_close_matches(name, recorded, 3) or recorded
            raise UserError(f"--metrics={name}: no run has recorded it; did you mean {', '.join(near)}?")
    rows = [
        {
            "setting": dict(setting),
            "seeds": {str(run.seed): run.outcome() or "not started" for run in members},
            "metrics": {
                name: _over_seeds({str(r.seed): read[r.folder].series(name).last for r in members if r.folder in read})
                for name in metrics
            },
        }
        for setting, members in settings.items()
    ]
    for row in rows:
        for name, told in row["metrics"].items():
            told["from_first"] = _from(rows[0]["metrics"][name]["values"], told["values"])
    return rows


def _from(first: dict[str, float | None], values: dict[str, float | None]) -> dict:
    """Differences seed by seed: what a seed does to all settings alike is not in them."""
    pairs = {seed: (values[seed], first[seed]) for seed in values if seed in first}
    return _over_seeds({seed: a - b for seed, (a, b) in pairs.items() if a is not None and b is not None})


def _over_seeds(values: dict[str, float]) -> dict:
    finite = np.array([value for value in values.values() if math.isfinite(value)])
    n = len(finite)
    half = float(stats.t.ppf(0.975, n - 1) * finite.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    listed = {seed: value if math.isfinite(value) else None for seed, value in values.items()}
    return {"mean": float(finite.mean()) if n else None, "interval95": half, "values": listed}


def as_text(rows: Sequence[dict]) -> str:
    """The table for people: the keys that differ, how many seeds are complete, mean ± interval, and the same of the difference
    from the first setting, seed by seed."""
    varied = [key for key in rows[0]["setting"] if len({row["setting"][key] for row in rows}) > 1]
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="")
    for key in varied:
        table.add_column(key, no_wrap=True)
    table.add_column("seeds", justify="right", no_wrap=True)
    for name in rows[0]["metrics"]:
        table.add_column(name, justify="right", no_wrap=True)
        if len(rows) > 1:
            table.add_column("from the first", justify="right", no_wrap=True)
    for row in rows:
        outcomes = list(row["seeds"].values())
        complete, diverged = outcomes.count("complete"), outcomes.count("diverged")
        seeds = f"{complete} of {len(outcomes)}" + (f", {diverged} diverged" if diverged else "")
        cells = []
        for told in row["metrics"].values():
            cells.append(_interval(told))
            if len(rows) > 1:
                cells.append("" if row is rows[0] else _interval(told["from_first"], sign=True))
        table.add_row(*(row["setting"][key] for key in varied), seeds, *cells)
    console = Console(width=1000, highlight=False, markup=False, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _interval(value: dict, sign: bool = False) -> str:
    mean, half = (math.nan if value[key] is None else value[key] for key in ("mean", "interval95"))
    return decimal(mean, sign=sign) + (f" ± {decimal(half)}" if math.isfinite(half) else "")
