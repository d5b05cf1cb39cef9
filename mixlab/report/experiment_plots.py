"""Pictures of experiments: probes over the run with marks where something was inserted, doses and responses, exposure.

Colour stands for the condition, the kind of line for the run."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from mixlab.report.experiments import Exposure, Family, exposures, families
from mixlab.report.plots import DASHES, STEPS, Theme, canvas, draw_stages, legend_below, png, stages, style
from mixlab.report.runs import Run
from mixlab.report.text import count

BINS = 50  # of the run, that inserted tokens are counted in
BOUNDS = ("_low", "_high")  # of intervals: in the table, but no pictures of their own
MOST_LINES = 12  # in a picture of probes: of more conditions the first


@dataclass(frozen=True)
class Picture:
    """kind: "probe", "dose" or "exposure".   family: what is shown; None for exposure."""

    stem: str
    title: str
    kind: str
    family: Family | None = None
    caption: str = ""
    large: bool = False


def pictures(runs: list[Run]) -> list[Picture]:
    """The pictures for which the runs have numbers: exposure, then doses, then probes over the run."""
    found, told = [], [family for family in families(runs) if not family.metric.endswith(BOUNDS)]
    if any(exposure.tokens.any() for run in runs for exposure in exposures(run).values()):
        found.append(
            Picture(
                "exposure", "Inserted tokens", "exposure", large=True,
                caption=f"Tokens of each experiment in each {BINS}th of the run, the darker the more, on a logarithmic scale; marks: steps "
                "with noise. By the first run that has them.",
            )
        )  # fmt: skip
    for i, family in enumerate(told):
        name = f"{family.experiment}: {family.metric}"
        if family.doses():
            caption = "The last value of each dose; shaded: one standard error, where the probe gives one."
            found.append(Picture(f"dose_{i:03d}", f"{name} by copies", "dose", family, caption))
    for i, family in enumerate(told):
        if max(len(run.series(family.key(label))) for run in runs for label in family.labels) < 2:
            continue
        caption = "Marks at the bottom: steps with insertions, or noise." if _seen(runs, family.experiment) else ""
        if len(family.labels) > MOST_LINES:
            caption += f" The first {MOST_LINES} of {len(family.labels)} conditions."
        found.append(
            Picture(f"probe_{i:03d}", f"{family.experiment}: {family.metric}", "probe", family, caption.strip())
        )
    return found


def draw(picture: Picture, runs: list[Run], theme: Theme) -> bytes:
    """PNG. Which kind of line is which run's, the page says once for all pictures."""
    with matplotlib.rc_context(style(theme)):
        figure, axes = canvas(picture.title, picture.large)
        drawing = {"exposure": _draw_exposure, "dose": _draw_doses, "probe": _draw_probe}[picture.kind]
        lines = drawing(axes, picture, runs, theme)
        if len(lines) > 1:
            legend_below(figure, [handle for _, handle in lines], [name for name, _ in lines])
        return png(figure)


def _draw_probe(axes: Axes, picture: Picture, runs: list[Run], theme: Theme) -> list[tuple[str, Line2D]]:
    family, handles = picture.family, []
    assert family is not None
    labels = family.labels[:MOST_LINES]
    for j, label in enumerate(labels):
        color = theme.runs[j % len(theme.runs)]
        for i, run in enumerate(runs):
            series, errors = run.series(family.key(label)), run.series(family.error_key(label))
            error = np.array([errors.at(step) for step in series.steps.tolist()])
            axes.fill_between(
                series.steps, series.values - error, series.values + error, color=color, alpha=0.15, linewidth=0
            )
            marker = "o" if len(series) <= 30 else None
            axes.plot(series.steps, series.values, _dashes(i), color=color, linewidth=2, marker=marker, markersize=3.5)
        if len(labels) > 1:
            handles.append((label or picture.title, Line2D([], [], color=color, linewidth=2)))
    for exposure in _seen(runs, family.experiment):
        bottom = axes.get_xaxis_transform()
        shown = exposure.steps[:: max(len(exposure.steps) // 400, 1)]
        axes.plot(shown, np.full(len(shown), 0.015), "|", color=theme.soft, markersize=8, transform=bottom, alpha=0.6)
    axes.margins(y=0.12)
    _steps_axis(axes, runs, theme)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    return handles


def _draw_doses(axes: Axes, picture: Picture, runs: list[Run], theme: Theme) -> list[tuple[str, Line2D]]:
    family, handles = picture.family, []
    assert family is not None
    for j, (name, doses) in enumerate(family.doses().items()):
        color = theme.runs[j % len(theme.runs)]
        copies = np.array([copies for copies, _ in doses])
        for i, run in enumerate(runs):
            values = np.array([run.series(family.key(label)).last for _, label in doses])
            errors = np.array([run.series(family.error_key(label)).last for _, label in doses])
            axes.fill_between(copies, values - errors, values + errors, color=color, alpha=0.15, linewidth=0)
            axes.plot(copies, values, _dashes(i), color=color, linewidth=2, marker="o", markersize=4.5)
        if len(family.doses()) > 1:
            handles.append((name or family.metric, Line2D([], [], color=color, linewidth=2)))
    ticks = sorted({copies for doses in family.doses().values() for copies, _ in doses})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("copies", loc="right")
    axes.margins(y=0.12)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
    return handles


def _draw_exposure(axes: Axes, picture: Picture, runs: list[Run], theme: Theme) -> list[tuple[str, Line2D]]:
    """A strip an experiment, the darker the more; steps with noise are marks."""
    names = sorted({name for run in runs for name in exposures(run)})
    steps, shown = _steps(runs), [_seen(runs, name)[0] for name in names]
    bins = np.stack([np.histogram(one.steps, BINS, (0, steps), weights=one.tokens)[0] for one in shown])
    strips = np.zeros((*bins.shape, 4))
    strips[..., :3] = to_rgb(theme.runs[0])
    strips[..., 3] = np.where(bins > 0, 0.15 + 0.85 * np.log1p(bins) / np.log1p(bins.max()), 0)
    axes.imshow(strips, extent=(0, steps, len(names) - 0.5, -0.5), aspect="auto", interpolation="nearest")
    for row, one in enumerate(shown):
        if not one.tokens.any():
            axes.plot(one.steps, np.full(len(one.steps), row), "|", color=theme.runs[1], markersize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    axes.grid(False)
    axes.grid(axis="y", which="minor")
    axes.tick_params(which="minor", length=0)
    _steps_axis(axes, runs, theme)
    return []


def _seen(runs: list[Run], experiment: str) -> list[Exposure]:
    """Where an experiment was inserted, in the first run that has it."""
    return [found[experiment] for run in runs if experiment in (found := exposures(run))][:1]


def _steps(runs: list[Run]) -> int:
    return max(1, *(run.plan.get("total_steps") or run.last_step for run in runs))


def _steps_axis(axes: Axes, runs: list[Run], theme: Theme) -> None:
    axes.set_xlim(-0.02 * _steps(runs), 1.02 * _steps(runs))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlabel("steps", loc="right")
    draw_stages(axes, stages(runs, "steps"), theme)


def _dashes(run: int) -> str:
    return DASHES[run % len(DASHES)]
