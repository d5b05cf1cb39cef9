"""Curves of runs as PNG pictures, for light and for dark pages. Colour stands for the run, everywhere.

Figures are made without pyplot, so neither the backend nor the settings of the calling program are touched.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mixlab.report.charts import Chart
from mixlab.report.runs import Run
from mixlab.report.text import count

INCHES = {True: (5.6, 3.5), False: (4.3, 3.1)}  # (width, height) of large and of small charts
DPI = 200
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))
LOST = "#d11149"  # marks of values that are not finite


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. Those of the runs follow Okabe and Ito, whose colours colour-blind readers can
    tell apart."""

    suffix: str
    paper: str
    ink: str
    soft: str
    grid: str
    band: str
    runs: tuple[str, ...]


LIGHT = Theme(
    "", "#ffffff", "#1d2430", "#667085", "#e7e9ee", "#f2f4f8",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2430"),
)  # fmt: skip
DARK = Theme(
    "-dark", "#171b22", "#e6e9ef", "#98a2b3", "#2a303b", "#1f252f",
    ("#56b4e9", "#f08a3c", "#2fc99a", "#e39bc4", "#f0e442", "#8ea2ff", "#e6e9ef"),
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")  # tell the runs apart when the colours come round again


@dataclass(frozen=True, eq=False)
class _Curve:
    """A run's numbers in a chart: x [n], tokens or seconds; values [n] as recorded, line [n] (smoothed where asked)."""

    run: int
    x: np.ndarray
    values: np.ndarray
    line: np.ndarray
    errors: np.ndarray
    color: str
    dashes: str
    width: float


def draw(chart: Chart, runs: list[Run], labels: list[str], theme: Theme) -> bytes:
    """The picture of `chart` as PNG."""
    with matplotlib.rc_context(style(theme)):
        figure, axes = canvas(chart.title, chart.large)
        curves = list(_curves(chart, runs, theme))
        positive = any(np.nanmax(curve.line) > 0 for curve in curves)
        axes.set_yscale(chart.scale if positive else "linear")
        for curve in curves:
            _draw_curve(axes, chart, curve)
        references = _references(chart, runs)
        _across_axis(axes, curves, chart.by_time, alone=len(runs) == 1)
        _values_axis(axes, chart, curves, list(references.values()) if len(runs) == 1 else [], theme)
        _draw_references(axes, references, curves, theme)
        bands = _by_time(runs) if chart.by_time else stages(runs, "tokens")
        draw_stages(axes, bands, theme)
        if len(runs) > 1:
            _draw_legend(figure, curves, labels)
        else:
            _draw_last_value(axes, chart, curves[0], theme)
        return png(figure)


def style(theme: Theme) -> dict:
    """matplotlib's settings for a picture."""
    return {
        "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
        "text.color": theme.ink, "axes.edgecolor": theme.soft, "axes.labelcolor": theme.soft,
        "xtick.color": theme.soft, "ytick.color": theme.soft, "grid.color": theme.grid, "grid.linewidth": 0.8,
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.major.size": 3, "ytick.major.size": 0, "axes.axisbelow": True, "text.parse_math": False,
    }  # fmt: skip


def canvas(title: str, large: bool) -> tuple[Figure, Axes]:
    """A figure of a report with its title, and its axes."""
    figure = Figure(figsize=INCHES[large], dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.02, ha="left", fontsize=12.5, fontweight="bold")
    axes = figure.add_subplot()
    axes.grid(axis="y")
    return figure, axes


def png(figure: Figure) -> bytes:
    figure.draw_without_rendering()  # the ticks change with the layout, so it needs a second round
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "mixlab report"})
    return buffer.getvalue()


def _curves(chart: Chart, runs: list[Run], theme: Theme) -> Iterator[_Curve]:
    for index, run in enumerate(runs):
        series, errors = run.series(chart.key), run.series(f"{chart.key}_se")
        if np.isfinite(series.values).any():
            line = series.smoothed()[0] if chart.smooth else series.values
            error = np.array([errors.at(step) for step in series.steps.tolist()])
            color = theme.runs[index % len(theme.runs)]
            dashes = DASHES[index // len(theme.runs) % len(DASHES)]
            later = (other.series(chart.key).values for other in runs[index + 1 :])
            hiding = sum(np.array_equal(series.values, values, equal_nan=True) for values in later)
            width = 2.2 + 2.4 * min(hiding, 2)  # a curve below its equals shows at their sides
            x = run.training_seconds(series.steps) if chart.by_time else series.tokens
            if np.isfinite(x).any():
                yield _Curve(index, x, series.values, line, error, color, dashes, width)


def _draw_curve(axes: Axes, chart: Chart, curve: _Curve) -> None:
    if chart.smooth:
        axes.plot(curve.x, curve.values, color=curve.color, linewidth=0.8, alpha=0.3)
    lower, upper = curve.line - curve.errors, curve.line + curve.errors
    axes.fill_between(curve.x, lower, upper, color=curve.color, alpha=0.2, linewidth=0)
    few = np.isfinite(curve.line).sum() <= 30  # each evaluation, or a single record, is seen as a dot
    marker = "o" if few else None
    axes.plot(
        curve.x,
        curve.line,
        curve.dashes,
        color=curve.color,
        linewidth=curve.width,
        marker=marker,
        markersize=4,
    )
    lost = curve.x[~np.isfinite(curve.values)]
    bottom = axes.get_xaxis_transform()
    axes.plot(lost, np.full(len(lost), 0.03), "x", color=LOST, markersize=6, transform=bottom)


def _across_axis(axes: Axes, curves: list[_Curve], by_time: bool, alone: bool) -> None:
    last = max(float(np.nanmax(curve.x, initial=0.0)) for curve in curves) or 1.0
    axes.set_xlim(0, last * (1.17 if alone else 1.03))  # room for the last value, written beside the curve
    unit, name = (
        next((size, name) for size, name in UNITS if last >= 2 * size or size == 1) if by_time else (1, "tokens")
    )
    axes.xaxis.set_major_locator(_Multiples(unit))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value / unit)))
    axes.set_xlabel(f"{name} of training" if by_time else name, loc="right")


class _Multiples(MaxNLocator):
    """Round numbers of a unit."""

    def __init__(self, unit: float):
        super().__init__(5, steps=STEPS)
        self._unit = unit

    def tick_values(self, vmin, vmax):
        return self._unit * super().tick_values(vmin / self._unit, vmax / self._unit)


def _values_axis(axes: Axes, chart: Chart, curves: list[_Curve], shown: list[float], theme: Theme) -> None:
    """Limits and ticks. The beginning of a run may leave the picture at the top, where the fall from the
    untrained model would flatten all that follows; the picture then says where the curves start."""
    x = np.concatenate([curve.x for curve in curves])
    lines = np.concatenate([curve.line for curve in curves])
    x, lines = x[np.isfinite(lines) & np.isfinite(x)], lines[np.isfinite(lines) & np.isfinite(x)]
    if chart.from_zero and lines.min() >= 0:
        axes.set_ylim(0, max(float(lines.max()) * 1.12, 1e-12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    elif axes.get_yscale() == "log":
        wide = lines.max() > 4 * lines.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12) if wide else MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    else:
        settled = lines[x > (0.05 if len(curves) == 1 else 0.15) * x.max()]
        if len(settled) < 4 * len(curves):  # too little would be left
            settled = lines
        low = min([float(lines.min()), *shown])
        high = max([float(settled.max()), *shown])
        room = (high - low) * 0.14 or 0.1
        axes.set_ylim(low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        if high > 1e4:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        if lines.max() > high + room:
            # Beside the curves down to the note's foot.
            entry = max(_entry(curve, high + 0.2 * room) for curve in curves)
            axes.annotate(
                f"↖ from {_short(lines.max(), 2)}", (entry, 0.99), xycoords=axes.get_xaxis_transform(),
                xytext=(3, 0), textcoords="offset points", va="top", color=theme.soft, fontsize=10,
            )  # fmt: skip


def _entry(curve: _Curve, top: float) -> float:
    """Where a curve that begins above `top` comes into the picture, on the straight line between two records."""
    known = np.isfinite(curve.line) & np.isfinite(curve.x)
    x, line = curve.x[known], curve.line[known]
    first = int(np.argmax(line < top))
    if not first:
        return float(x[0])
    return float(np.interp(top, line[[first, first - 1]], x[[first, first - 1]]))


def _references(chart: Chart, runs: list[Run]) -> dict[str, float]:
    """The first run's baselines in bits per byte."""
    values = {kind: runs[0].baseline(kind, chart.baselines_of or "") for kind in ("unigram", "bigram")}
    return {kind: value for kind, value in values.items() if np.isfinite(value)}


def _draw_references(axes: Axes, references: dict[str, float], curves: list[_Curve], theme: Theme) -> None:
    low, high = axes.get_ylim()
    ends = np.array([curve.line[np.isfinite(curve.line)][-1] for curve in curves])
    for kind, value in references.items():
        if not low < value < high:
            continue
        axes.axhline(value, color=theme.soft, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1.5)
        place = {"va": "bottom", "xytext": (0, 2)} if kind == "unigram" else {"va": "top", "xytext": (0, -3)}
        crowded = (abs(ends - value) < 0.12 * (high - low)).any()  # where the curves end
        axes.annotate(
            f"{kind} {value:.2f}", (0.02 if crowded else 1, value), xycoords=("axes fraction", "data"),
            ha="left" if crowded else "right", textcoords="offset points", color=theme.soft, fontsize=10, **place,
        )  # fmt: skip


def _draw_last_value(axes: Axes, chart: Chart, curve: _Curve, theme: Theme) -> None:
    end = np.flatnonzero(np.isfinite(curve.line))[-1]
    value = float(curve.line[end])
    axes.annotate(
        _short(value, 0 if chart.from_zero else 3), (curve.x[end], value),
        xytext=(5, 0), textcoords="offset points", va="bottom" if chart.from_zero else "center",
        color=curve.color, fontweight="bold", annotation_clip=False,
        path_effects=[withStroke(linewidth=3, foreground=theme.paper)],  # legible where it meets a reference
    )  # fmt: skip


def stages(runs: list[Run], unit: str) -> list[tuple[str, float]]:
    """(name, length) of the stages, in "tokens" or "steps"; none where the runs' stages differ, as none is true of all then."""
    plans = [[(str(stage.get("name", "")), stage.get(unit) or 0) for stage in run.stages] for run in runs]
    return plans[0] if all(plan == plans[0] for plan in plans) else []


def _by_time(runs: list[Run]) -> list[tuple[str, float]]:
    """The stages of a run alone, in seconds; runs take their own time."""
    if len(runs) > 1:
        return []
    plan = stages(runs, "steps")
    ends = np.cumsum([steps for _, steps in plan])
    reached = np.nan_to_num(runs[0].training_seconds(np.minimum(ends, runs[0].last_step)))
    return [(name, seconds) for (name, _), seconds in zip(plan, np.diff(reached, prepend=0.0).tolist(), strict=True)]


def draw_stages(axes: Axes, lengths: list[tuple[str, float]], theme: Theme) -> None:
    """Stages as bands with their names, on the axis that goes across; nothing where there is one stage."""
    if len(lengths) < 2:
        return
    first, right = 0.0, axes.get_xlim()[1]
    for index, (name, length) in enumerate(lengths):
        last = min(first + length, right)
        if first >= right:
            break
        if length <= 0:  # of a branch: what its trunk went through
            continue
        if index % 2 == 0:
            axes.axvspan(first, last, color=theme.band, linewidth=0, zorder=0)
        per_inch = axes.figure.get_figwidth() * 0.85 / right
        narrow = (last - first) * per_inch < 0.075 * len(name)
        axes.text(
            first if narrow else (first + last) / 2, 1.01, name, transform=axes.get_xaxis_transform(),
            ha="left" if narrow else "center", va="bottom", color=theme.soft, fontsize=10,
            rotation=30 if narrow else 0, rotation_mode="anchor",
        )  # fmt: skip
        first += length


def _draw_legend(figure: Figure, curves: list[_Curve], labels: list[str]) -> None:
    handles = [Line2D([], [], color=curve.color, linestyle=curve.dashes, linewidth=2.2) for curve in curves]
    legend_below(figure, handles, [labels[curve.run] for curve in curves])


def legend_below(figure: Figure, handles: list[Line2D], names: list[str]) -> None:
    columns = max(1, min(len(names), int(figure.get_figwidth() / (0.09 * max(map(len, names)) + 0.6))))
    placeholders = [" "] * len(names)  # named afterwards, as a legend drops labels that begin with "_"
    legend = figure.legend(handles, placeholders, loc="outside lower left", ncols=columns, frameon=False, fontsize=10.5)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _short(value: float, digits: int = 0) -> str:
    """`value` with `digits` decimals, or as a count where it is too large, or without `digits`."""
    if digits and abs(value) < 1e4:
        return f"{value:.{digits}f}"
    return f"{value:.3g}" if abs(value) < 10 else count(float(value))
