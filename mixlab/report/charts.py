"""Which pictures a report has."""

from dataclasses import dataclass, replace

import numpy as np

from mixlab.report import tables
from mixlab.report.runs import Run


@dataclass(frozen=True)
class Chart:
    """What a picture shows: the metric `key` of every run against tokens or, by_time, against the time spent in training steps."""

    stem: str  # file name without suffix
    title: str
    key: str
    caption: str = ""
    baselines_of: str | None = None  # evaluation set whose unigram and bigram lines are drawn
    smooth: bool = False
    scale: str = "linear"
    from_zero: bool = False
    large: bool = False
    by_time: bool = False


def charts(runs: list[Run]) -> list[Chart]:
    """The general pictures for which at least one run has numbers."""
    headline = tables.headline_set(runs) or ""
    bits = f"Validation bits per byte, {headline}"
    caption = "Shaded: one standard error."
    if len(runs) == 1 and np.isfinite(runs[0].baseline("unigram", headline)):
        caption += " Dashed: what counting tokens (unigram) and pairs (bigram) reaches."
    window = max(run.series("train/loss").smoothed()[1] for run in runs)
    means = f"Faint: as recorded. Strong: mean of up to {window} neighbouring records." if window > 1 else ""
    bits_key, speed_key = f"eval/{headline}/bits_per_byte", "perf/tokens_per_second"
    found = [
        Chart("bits_per_byte", bits, bits_key, caption, baselines_of=headline, large=True),
        Chart("loss", "Training loss, nats per token", "train/loss", means, smooth=True, large=True),
        Chart("learning_rate", "Learning rate", "train/learning_rate", from_zero=True),
        Chart("gradient_norm", "Gradient norm", "train/grad_norm", means, smooth=True, scale="log"),
        Chart("speed", "Tokens per second", speed_key, means, smooth=True, from_zero=True),
    ]
    found += [
        replace(chart, stem=f"{chart.stem}_by_time", title=f"{chart.title}, by time", large=False, by_time=True)
        for chart in found[:2]
        if any(len(run.series("perf/step_seconds")) for run in runs)
    ]
    return [_with_crosses_explained(runs, chart) for chart in found if _has_numbers(runs, chart.key)]


def set_charts(runs: list[Run]) -> list[Chart]:
    """One picture of bits per byte an evaluation set, when there is more than one set."""
    names = list(dict.fromkeys(name for run in runs for name in run.evaluation_sets()))
    found = [
        Chart(f"set_{i:03d}", name, f"eval/{name}/bits_per_byte", baselines_of=name) for i, name in enumerate(names)
    ]
    return [chart for chart in found if _has_numbers(runs, chart.key)] if len(names) > 1 else []


def task_charts(runs: list[Run]) -> list[Chart]:
    """Two pictures a benchmark that was asked more than once: its score, and the bits per byte of the right answer."""
    names = list(dict.fromkeys(name for run in runs for name in run.tasks()))
    found = []
    for i, name in enumerate(names):
        found += [
            Chart(f"task_{i:03d}", f"{name}, score", f"eval/{name}/score"),
            Chart(f"task_{i:03d}_bits", f"{name}, bits per byte", f"eval/{name}/bits_per_byte"),
        ]
    return [chart for chart in found if any(np.isfinite(run.series(chart.key).values).sum() > 1 for run in runs)]


def _with_crosses_explained(runs: list[Run], chart: Chart) -> Chart:
    lost = any(not np.isfinite(run.series(chart.key).values).all() for run in runs)
    return replace(chart, caption=f"{chart.caption} Crosses: not a finite number.".strip()) if lost else chart


def _has_numbers(runs: list[Run], key: str) -> bool:
    return any(np.isfinite(run.series(key).values).any() for run in runs)
