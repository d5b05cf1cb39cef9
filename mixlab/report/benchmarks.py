"""What a report says of benchmarks."""

from mixlab.report.paired import Difference, Items, differences_beside, in_items, mean
from mixlab.report.runs import TASK_AVERAGE, Run
from mixlab.report.text import Measure, count, measure

COLUMNS = {
    "acc": "accuracy",
    "acc_per_char": "by characters",
    "acc_per_byte": "by bytes",
    "acc_uncond": "less unconditional",
    "exact_match": "exact match",
    "bits_per_byte": "bits per byte of the right answer",
}


def columns(run: Run) -> dict[str, str]:
    """Metric -> its heading, of those that any benchmark of the run has."""
    return {metric: title for metric, title in COLUMNS.items() if any(_has(run, n, metric) for n in run.tasks())}


def rows(run: Run) -> list[dict]:
    """One row a benchmark, the average last: how it is asked, its score, all metrics, items."""
    found = []
    for name in _names([run]):
        found.append(
            {
                "name": name,
                "average": name == TASK_AVERAGE,
                "form": _form(run, name),
                "score": measure(*run.evaluated(name, "score")[:2]),
                "values": [
                    measure(*run.evaluated(name, metric)[:2]) if _has(run, name, metric) else Measure("")
                    for metric in columns(run)
                ],
                "items": count(run.evaluated(name, "items")[0]) if _has(run, name, "items") else "",
            }
        )
    return found


def comparison(runs: list[Run]) -> list[dict]:
    """One row a benchmark and metric (its score, and bits per byte of the right answer), their mean last: every run's last value,
    and its difference from the first run's; item by item where both recorded the same items, else as if independent."""
    items = [Items(run) for run in runs]
    found = []
    known: list[list[Difference | None]] = [[] for _ in runs[1:]]
    for name in _names(runs):
        for metric, title in (("score", ""), ("bits_per_byte", COLUMNS["bits_per_byte"])):
            if not any(_has(run, name, metric) for run in runs):
                continue
            values = [run.evaluated(name, metric) for run in runs]
            asked = [one.of(name, step) for one, (_, _, step) in zip(items, values, strict=True)]
            if name == TASK_AVERAGE:
                paired = [mean(differences) for differences in known]
            else:
                paired = [in_items(name, asked[0], other, metric) for other in asked[1:]]
                for differences, difference in zip(known, paired, strict=True):
                    differences += [difference] if metric == "score" else []
            found.append(
                {
                    "name": name,
                    "average": name == TASK_AVERAGE,
                    "metric": title,
                    "up": metric == "score",
                    "values": [measure(*value[:2]) for value in values],
                    "differences": differences_beside(values, paired),
                }
            )
    return found


def _names(runs: list[Run]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.tasks()))
    return [*names, *([TASK_AVERAGE] if any(_has(run, TASK_AVERAGE, "score") for run in runs) else [])]


def _has(run: Run, name: str, metric: str) -> bool:
    return bool(len(run.series(f"eval/{name}/{metric}")))


def _form(run: Run, name: str) -> str:
    """ "cloze, 5 shots", as far as the configuration tells."""
    tasks = (run.config.get("evaluation") or {}).get("tasks") or {}
    settings = tasks.get(name) or {}
    shots = settings.get("shots") or 0
    return ", ".join(filter(None, (settings.get("format", ""), f"{shots} shots" if shots else "")))
