"""The matrix of dependence between experiments as a picture and as tables."""

import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from mixlab.inject.analysis.dependence import Dependence
from mixlab.report.plots import DARK, DPI, LIGHT, Theme
from mixlab.report.text import ABSENT, decimal


def write_dependence(matrix: Dependence, facts: dict[str, Any], output: Path) -> None:
    """dependence.json, dependence.md, dependence.png (and dependence-dark.png) and index.html in `output`.

    facts: run, step, steps, share, outcomes {name: {"accuracy": bool, "items", "before", "baseline"}}, losses."""
    values = facts | {"matrix": json.loads(matrix.to_json())}
    (output / "dependence.json").write_text(json.dumps(values, indent=1) + "\n")
    (output / "dependence.md").write_text(as_markdown(matrix, facts) + "\n")
    for theme in (LIGHT, DARK):
        (output / f"dependence{theme.suffix}.png").write_bytes(heat_map(matrix, facts, theme))
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mixlab", "report"), autoescape=True)
    page = environment.get_template("dependence.html").render(
        facts=facts, matrix=matrix, rows=table(matrix, facts), tests=tests(matrix, facts), findings=findings(matrix)
    )
    (output / "index.html").write_text(page, encoding="utf-8")


def table(matrix: Dependence, facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """(what was read, (effect, standard error, flagged) on each outcome) of every row."""
    rows = []
    for j, name in enumerate([*matrix.names, "ALL"]):
        cells = []
        for i in range(len(matrix.names)):
            scale, digits = _scale(facts, matrix.names[i])
            effect, error = scale * matrix.effects[j, i], scale * matrix.standard_errors[j, i]
            told = f"± {decimal(error, digits)}" if np.isfinite(error) else ""
            cells.append((decimal(effect, digits, sign=True), told, bool(matrix.flagged[j, i])))
        rows.append((name, cells))
    return rows


def tests(matrix: Dependence, facts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Of every outcome: can its effect be read from the joint run, and do experiments act other than one by one?"""

    def both(values: np.ndarray, p_values: np.ndarray) -> list[str]:
        shown = []
        for value, p, name in zip(values, p_values, matrix.names, strict=True):
            scale, digits = _scale(facts, name)
            shown.append(
                f"{decimal(scale * value, digits, sign=True)} (p {decimal(p, 3)})" if np.isfinite(p) else ABSENT
            )
        return shown

    return [
        ("ALL less the diagonal", both(matrix.joint_differences, matrix.joint_adjusted_p_values)),
        ("ALL less the sum of its column", both(matrix.interactions, matrix.interaction_adjusted_p_values)),
    ]


def findings(matrix: Dependence) -> list[str]:
    """The result in sentences."""
    tested = int(np.isfinite(matrix.adjusted_p_values).sum())
    flagged = [(matrix.names[j], matrix.names[i]) for j, i in np.argwhere(matrix.flagged)]
    small = int(matrix.equivalent.sum())
    said = [
        f"{len(flagged)} of {tested} cells off the diagonal differ from zero (level {matrix.level:g}, Holm)"
        + (": " + ", ".join(f"{a} on {b}" for a, b in flagged) if flagged else ""),
        f"{small} of {tested} are shown to be below {matrix.bound:.0%} of the outcome's own effect",
    ]
    apart = [n for n, p in zip(matrix.names, matrix.joint_adjusted_p_values, strict=True) if p < matrix.level]
    said.append(
        f"read together, the effect on {', '.join(apart) or 'no outcome'} differs from that of reading it alone"
    )
    return said


def as_markdown(matrix: Dependence, facts: dict[str, Any]) -> str:
    """Rows: what was read; columns: outcomes, accuracies in percentage points. Bold: differs from zero."""
    names = [f"{name} (pp)" if _accuracy(facts, name) else name for name in matrix.names]
    lines = ["| read | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, cells in table(matrix, facts):
        shown = [f"**{effect}** {error}" if flagged else f"{effect} {error}" for effect, error, flagged in cells]
        lines.append(f"| {name} | " + " | ".join(cell.strip() for cell in shown) + " |")
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in tests(matrix, facts)]
    return "\n".join([*lines, "", *(f"- {finding}" for finding in findings(matrix))])


def heat_map(matrix: Dependence, facts: dict[str, Any], theme: Theme) -> bytes:
    """PNG. The colour of a cell is its effect over the largest of its column, as in the paper; bold: differs from zero."""
    n = len(matrix.names)
    largest = np.max(np.abs(np.nan_to_num(matrix.effects)), axis=0)
    relative = np.divide(matrix.effects, largest, out=np.full((n + 1, n), np.nan), where=largest > 0)
    colors = LinearSegmentedColormap.from_list("effects", [theme.runs[1], theme.paper, theme.runs[0]])
    with matplotlib.rc_context({"text.color": theme.ink, "font.size": 10, "text.parse_math": False}):
        figure = Figure((1.6 + 0.95 * n, 1.5 + 0.55 * (n + 1)), dpi=DPI, layout="constrained", facecolor=theme.paper)
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(facecolor=theme.band)
        axes.imshow(np.ma.masked_invalid(relative), cmap=colors, vmin=-1, vmax=1, aspect="auto")
        for j, (_, cells) in enumerate(table(matrix, facts)):
            for i, (effect, _, flagged) in enumerate(cells):
                strong = abs(np.nan_to_num(relative[j, i])) > 0.6
                axes.text(
                    i, j, effect, ha="center", va="center", color=theme.paper if strong else theme.ink,
                    fontweight="bold" if flagged or i == j else "normal",
                )  # fmt: skip
        units = [f"{name} (pp)" if _accuracy(facts, name) else name for name in matrix.names]
        axes.set_xticks(range(n), units, rotation=30, ha="right", color=theme.ink)
        axes.set_yticks(range(n + 1), [*matrix.names, "ALL"], color=theme.ink)
        axes.set_xlabel("effect on", color=theme.soft)
        axes.set_ylabel("of reading", color=theme.soft)
        axes.axhline(n - 0.5, color=theme.paper, linewidth=4)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", facecolor=theme.paper)
    return picture.getvalue()


def _accuracy(facts: dict[str, Any], name: str) -> bool:
    return facts["outcomes"].get(name, {}).get("accuracy", False)


def _scale(facts: dict[str, Any], name: str) -> tuple[float, int]:
    """(factor, digits): accuracies are shown in percentage points."""
    return (100.0, 1) if _accuracy(facts, name) else (1.0, 3)
