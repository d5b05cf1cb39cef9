"""Experiments inside a run as rows and figures: what was inserted, what the probes found, and how far a treated run is from
its control."""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as parquet

from mixlab.report.runs import Run, Series
from mixlab.report.text import ABSENT, count, decimal, measure

DOSE = re.compile(r"^(?:(.*)-)?x(\d+)$")  # how labels of metrics end that tell copies apart: x4, whole-x10
RESAMPLES = 2000
LAST_SHARE = 0.1  # of the steps, which a run's end is judged by


@dataclass(frozen=True, eq=False)
class Exposure:
    """Where an experiment's tokens were inserted: int64 steps [S], ascending, and int64 tokens [S]; 0 where embeddings had its
    noise instead."""

    steps: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Family:
    """One metric of an experiment for several conditions: probe/<experiment>/<metric>/<label>, or without a label."""

    experiment: str
    metric: str
    labels: tuple[str, ...]

    def key(self, label: str) -> str:
        return "/".join(filter(None, ("probe", self.experiment, self.metric, label)))

    def error_key(self, label: str) -> str:
        return "/".join(filter(None, ("probe", self.experiment, f"{self.metric}_se", label)))

    def doses(self) -> dict[str, list[tuple[int, str]]]:
        """What is repeated -> (copies, label), ascending, where a label tells copies."""
        found: dict[str, list[tuple[int, str]]] = {}
        for label in self.labels:
            if match := DOSE.match(label):
                found.setdefault(match[1] or "", []).append((int(match[2]), label))
        return {name: sorted(doses) for name, doses in found.items() if len(doses) > 1}


def exposures(run: Run) -> dict[str, Exposure]:
    """Experiment -> where it was inserted, from the run's ledger, or which steps it noised, from its plan."""
    noised = {name: planned.get("noised_steps") for name, planned in (run.plan.get("experiments") or {}).items()}
    found = {n: Exposure(np.array(steps), np.zeros(len(steps), np.int64)) for n, steps in noised.items() if steps}
    path = run.path / "ledger.parquet"
    if not path.is_file():
        return found
    table = parquet.read_table(path, columns=["experiment", "step", "length"])
    names = np.array(table["experiment"].to_pylist(), object)
    steps, lengths = table["step"].to_numpy(), table["length"].to_numpy()
    for name in sorted(set(names.tolist())):
        own = names == name
        places, inverse = np.unique(steps[own], return_inverse=True)
        found[name] = Exposure(places.astype(np.int64), np.bincount(inverse, lengths[own]).astype(np.int64))
    return found


def families(runs: list[Run]) -> list[Family]:
    """What the probes of any of the runs have recorded, in the order of the experiments' names and of recording."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        for key in run.metrics:
            parts = key.split("/")
            if parts[0] == "probe" and len(parts) >= 3 and parts[2:] != ["failed"]:
                found.setdefault((parts[1], parts[2]), {})["/".join(parts[3:])] = None
    errors = {(name, f"{metric}_se") for name, metric in found}
    kept = {key: labels for key, labels in found.items() if key not in errors}
    return [Family(*key, tuple(kept[key])) for key in sorted(kept, key=lambda key: key[0])]


def inserted(run: Run) -> list[dict]:
    """A row an experiment: kind, items, insertions, tokens, their share, first and last step. By the ledger, which knows
    what was decided during the run, where there is one; else by the plan."""
    seen, total = exposures(run), run.plan.get("total_tokens") or np.nan
    rows = []
    for name, planned in (run.plan.get("experiments") or {}).items():
        exposure = seen.get(name)
        tokens = int(exposure.tokens.sum()) if exposure else planned.get("tokens", 0)
        steps = [f"{exposure.steps[end]:,}" for end in (0, -1)] if exposure else [ABSENT]
        rows.append(
            {
                "name": name,
                "kind": planned.get("kind", ABSENT),
                "enabled": bool(planned.get("enabled")),
                "items": count(planned.get("items")),
                "tokens": f"noise, steps: {count(len(exposure.steps))}" if exposure and not tokens else count(tokens),
                "share": f"{100 * tokens / total:.3g}%" if tokens else ABSENT,
                "steps": " to ".join(dict.fromkeys(steps)),
                "failures": int(np.nansum(run.series(f"probe/{name}/failed").values)),
            }
        )
    return rows


def probed(runs: list[Run]) -> list[dict]:
    """A row a metric of a probe: its last value in every run, with its standard error where the probe gives one, and the
    difference from the first run."""
    rows = []
    for family in families(runs):
        for label in family.labels:
            values = []
            for run in runs:
                series, errors = run.series(family.key(label)), run.series(family.error_key(label))
                values.append((series.last, errors.at(int(series.steps[-1])) if len(series) else np.nan))
            differences = [value - values[0][0] for value, _ in values[1:]]
            rows.append(
                {
                    "name": family.key(label).removeprefix("probe/"),
                    "values": [measure(*value) for value in values],
                    "differences": [decimal(difference, sign=True) for difference in differences],
                }
            )
    return rows


def paired_losses(runs: list[Run]) -> list[dict]:
    """How the second run's training loss differs from the first's at the same steps: over all steps, the last tenth, and
    those into which neither inserted anything, and which neither noised. Rows of text."""
    first, second = (run.series("train/loss") for run in runs[:2])
    steps, a, b = _common(first, second)
    if len(steps) < 2:
        return []
    touched = [exposure.steps for run in runs[:2] for exposure in exposures(run).values()]
    end = np.arange(len(steps)) >= (1 - LAST_SHARE) * len(steps)
    untouched = ~np.isin(steps, np.concatenate(touched) + 1) if touched else np.zeros(len(steps), bool)
    rows = []
    for name, chosen in (("all steps", slice(None)), ("last tenth", end), ("steps without insertions", untouched)):
        one, other = a[chosen], b[chosen]
        if len(one) < 2:
            continue
        low, high = block_bootstrap(other - one)
        alike = np.corrcoef(one, other)[0, 1] if one.std() and other.std() else np.nan
        rows.append(
            {
                "steps": f"{name} ({count(len(one))})",
                "difference": decimal(float((other - one).mean()), 5, sign=True),
                "interval": f"{decimal(low, 5, sign=True)} to {decimal(high, 5, sign=True)}",
                "deviation": decimal(float((other - one).std()), 5),
                "correlation": decimal(float(alike), 4),
            }
        )
    return rows


def weight_norms(runs: list[Run]) -> list[dict]:
    """A row a layer group: the last recorded norm in every run, and its ratio to the first run's."""
    keys = dict.fromkeys(key for run in runs for key in run.metrics if key.startswith("train/weight_norm/"))
    rows = []
    for key in keys:
        values = [run.series(key).last for run in runs]
        rows.append(
            {
                "name": key.rsplit("/", 1)[1],
                "values": [decimal(value) for value in values],
                "ratios": [decimal(value / values[0]) for value in values[1:]],
            }
        )
    return rows


def block_bootstrap(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of a series of dependent values: the circular block bootstrap (Politis and Romano 1992) with
    blocks of the root of their number."""
    n = len(differences)
    block = int(np.ceil(np.sqrt(n)))
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([differences, differences[:block]]))])
    block_sums = sums[block : block + n] - sums[:n]
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, max(n // block, 1)))
    low, high = np.quantile(block_sums[drawn].mean(axis=1) / block, [0.025, 0.975])
    return float(low), float(high)


def _common(first: Series, second: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, values of the first, of the second) where both are finite."""
    steps, one, other = np.intersect1d(first.steps, second.steps, assume_unique=True, return_indices=True)
    a, b = first.values[one], second.values[other]
    finite = np.isfinite(a) & np.isfinite(b)
    return steps[finite], a[finite], b[finite]
