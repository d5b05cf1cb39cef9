"""The report of one run, or of several side by side: index.html, which holds its pictures and opens offline; the pictures lie
beside it too, to be used elsewhere."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from mixlab.errors import UserError
from mixlab.report import benchmarks, by_length, experiment_plots, experiments, plots, tables
from mixlab.report.charts import charts, set_charts, task_charts
from mixlab.report.runs import Run, labels, read_runs

MARK = b"mixlab report"  # near the start of every file of a report, index.html and pictures alike
_MARK_WITHIN_BYTES = 1024


def write_report(run_dirs: Sequence[str | Path], output_dir: str | Path) -> Path:
    """Writes the report of the run folders into `output_dir` and returns the path of its index.html.

    With several runs the curves are overlaid and every number is set beside the first run's. An earlier
    report in `output_dir` is replaced. Raises UserError when a folder is not a run, or when `output_dir`
    holds anything but an earlier report."""
    output = Path(output_dir)
    runs = read_runs(run_dirs)
    old = _files_of_earlier_report(output)
    names = labels(runs)
    general, sets, tasks = charts(runs), set_charts(runs), task_charts(runs)
    files = {
        f"{chart.stem}{theme.suffix}.png": plots.draw(chart, runs, names, theme)
        for chart in [*general, *sets, *tasks]
        for theme in (plots.LIGHT, plots.DARK)
    }
    told = experiment_plots.pictures(runs)
    files |= {
        f"{picture.stem}{theme.suffix}.png": experiment_plots.draw(picture, runs, theme)
        for picture in told
        for theme in (plots.LIGHT, plots.DARK)
    }
    headline = tables.headline_set(runs)
    views = [_view(index, run, names[index], headline) for index, run in enumerate(runs)]
    for view in views:  # what several runs read alike is shown once
        earlier = [other["label"] for other in views[: view["index"]] if other["reading"] == view["reading"]]
        view["reads_as"] = earlier[0] if earlier else None
    embedded = {name: "data:image/png;base64," + base64.b64encode(picture).decode() for name, picture in files.items()}
    context = {
        "embedded": embedded,
        "mark": MARK.decode(),
        "title": names[0] if len(runs) == 1 else f"{len(runs)} runs compared",
        "runs": views,
        "headline": headline,
        "bars": tables.bars(runs, names, headline),
        "charts": general,
        "inches": plots.INCHES,
        "set_charts": sets,
        "comparison": tables.comparison(runs) if len(runs) > 1 else [],
        "benchmarks": benchmarks.comparison(runs) if len(runs) > 1 else [],
        "task_charts": tasks,
        "probed": experiments.probed(runs),
        "experiment_charts": told,
        "paired": experiments.paired_losses(runs) if len(runs) == 2 else [],
        "weight_norms": experiments.weight_norms(runs) if len(runs) > 1 else [],
        "config_differences": tables.config_differences(runs) if len(runs) > 1 else [],
    }
    files["index.html"] = _template().render(context).encode("utf-8", errors="replace")  # last: it holds the others
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content)
        for path in old:
            if path.name not in files:
                path.unlink()
    except OSError as error:
        raise UserError(
            f"{output}: the report cannot be written there ({error.strerror}); give another --output"
        ) from error
    return output / "index.html"


def _files_of_earlier_report(output: Path) -> list[Path]:
    """The files in `output`, all of them an earlier report's. Raises UserError when there are others."""
    if not output.exists():
        return []
    if not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder as --output")
    files = sorted(output.iterdir())
    for path in files:
        if not _is_of_a_report(path):
            raise UserError(
                f"{output}: holds {path.name!r}, which is not part of a report; nothing was written, "
                "give a new or empty folder as --output"
            )
    return files


def _is_of_a_report(path: Path) -> bool:
    if path.suffix not in (".html", ".png") or not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK in file.read(_MARK_WITHIN_BYTES)


def _view(index: int, run: Run, label: str, headline: str | None) -> dict:
    return {
        "index": index,
        "label": label,
        "path": str(run.path),
        "facts": tables.facts(run, headline),
        "status": tables.status(run),
        "notes": run.notes,
        "started": tables.started(run),
        "evaluations": tables.evaluations(run),
        "benchmarks": benchmarks.rows(run),
        "benchmark_columns": benchmarks.columns(run),
        "breakdowns": by_length.breakdowns(run),
        "inserted": experiments.inserted(run),
        "buckets": by_length.buckets(run),
        "held_out_row_tokens": tables.held_out_row_tokens(run),
        "evaluated_at": tables.evaluated_at(run, headline),
        "reading": tables.reading(run),
        "fingerprints": tables.fingerprints(run),
        "samples": tables.continuations(run),
        "samples_step": run.samples.get("step"),
        "config": json.dumps(run.config, indent=2, ensure_ascii=False) if run.config else "",
        "command": tables.command(run),
        "changes": tables.changes(run),
        "versions": tables.versions(run),
    }


def _template() -> jinja2.Template:
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=here, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")
