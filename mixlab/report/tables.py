"""What a report says in words and numbers: facts, evaluations, differences, and what is read, as rows."""

import itertools
import json
import math
import shlex
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from mixlab.report.paired import Difference, Items, Recorded, differences_beside, in_documents, mean, together
from mixlab.report.runs import AVERAGES, Run
from mixlab.report.spikes import spike_scores
from mixlab.report.text import ABSENT, count, decimal, duration, measure, plain, visible


@dataclass(frozen=True)
class Fact:
    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart: `share` of the widest, 0..1; `run` is the run's index, None for a baseline."""

    label: str
    value: str
    share: float
    run: int | None


def headline_set(runs: list[Run]) -> str | None:
    """The evaluation that stands for all: the macro average, else micro, else the first set, else None."""
    candidates = [*AVERAGES, *(name for run in runs for name in run.evaluation_sets())]
    return next((name for name in candidates if any(len(_bits(run, name)) for run in runs)), None)


def facts(run: Run, headline: str | None) -> list[Fact]:
    """The headline of a run."""
    planned = run.plan.get("total_tokens")
    amounts = [f"of {count(planned)} planned"] if planned else []
    speeds = run.series("perf/tokens_per_second").values
    stepping = float(run.training_seconds(np.array([run.last_step]))[0])
    speed = [f"{duration(stepping)} of it in train steps"] if math.isfinite(stepping) else []
    speed += [f"{count(float(np.nanmedian(speeds)))} tokens/s"] if np.isfinite(speeds).any() else []
    shares = run.series("perf/mfu").values
    speed += [f"{np.nanmedian(shares):.1%} of peak"] if np.isfinite(shares).any() else []
    line, window = run.series("train/loss").smoothed()
    loss = float(line[-1]) if len(line) else math.nan
    result = [
        Fact("Parameters", count(run.facts.get("parameters"))),
        Fact("Tokens read", count(run.last_tokens), ", ".join([*amounts, count(run.last_step, "steps")])),
        Fact("Time", duration(run.seconds), ", ".join(speed)),
        Fact("Device", plain(run.facts.get("devices")), plain(run.facts.get("machine"), "")),
        Fact(
            "Training loss",
            decimal(loss, 3),
            f"nats per token, mean of the last {window // 2 + 1} records" if window > 1 else "nats per token",
        ),
    ]
    if headline is not None:
        value, error, _ = run.evaluated(headline, "bits_per_byte")
        details = [f"± {decimal(error, 3)}"] if math.isfinite(error) else []
        for kind in ("bigram", "unigram"):
            reference = run.baseline(kind, headline)
            details += [f"{kind} {decimal(reference, 3)}"] if math.isfinite(reference) else []
        result.append(Fact(f"Bits per byte, {headline}", decimal(value, 3), ", ".join(details)))
    return result + _spikes(run)


def _spikes(run: Run) -> list[Fact]:
    spiked = spike_scores(run)
    of_steps = "of its steps lie 7 standard deviations or more from the 1,000 before"
    if spiked["grad_norm"] is not None:
        of_steps += f"; gradient norm {_per_cent(spiked['grad_norm'], 1)}"
    unstable = "loss or gradient norm more than 6 standard deviations above the 128 before"
    if spiked["stability_recent"] is not None:
        unstable += f"; of the last 10,000 {_per_cent(spiked['stability_recent'], 100)}"
    return [
        Fact(
            "Spike score, loss",
            _per_cent(spiked["loss"], 1),
            "known after 1,000 steps" if spiked["loss"] is None else of_steps,
        ),
        Fact(
            "Unstable steps",
            _per_cent(spiked["stability_total"], 100),
            "known after 128 steps" if spiked["stability_total"] is None else unstable,
        ),
    ]


def started(run: Run) -> str:
    try:
        return f"{datetime.fromisoformat(run.facts['started']):%Y-%m-%d %H:%M %Z}".strip()
    except (KeyError, TypeError, ValueError):
        return ""


def status(run: Run) -> str:
    ended = run.facts.get("exit")
    return str(ended) if ended else "no end recorded: still running, or interrupted"


def bars(runs: list[Run], labels: list[str], headline: str | None) -> list[Bar]:
    """Bits per byte of every run beside what counting alone reaches (the first run's baselines)."""
    if headline is None:
        return []
    rows = [(kind, runs[0].baseline(kind, headline), None) for kind in ("unigram", "bigram")]
    for index, (run, label) in enumerate(zip(runs, labels, strict=True)):
        rows.append((label, run.evaluated(headline, "bits_per_byte")[0], index))
    rows = [row for row in rows if math.isfinite(row[1])]
    widest = max((value for _, value, _ in rows), default=1.0) or 1.0
    return [Bar(label, decimal(value, 3), value / widest, index) for label, value, index in rows]


def evaluations(run: Run) -> list[dict]:
    """One row an evaluation set, the averages last: bits per byte, its baselines, loss, tokens."""
    rows = []
    for name in _sets([run]):
        rows.append(
            {
                "set": name,
                "bits_per_byte": measure(*run.evaluated(name, "bits_per_byte")[:2]),
                "bigram": decimal(run.baseline("bigram", name)),
                "unigram": decimal(run.baseline("unigram", name)),
                "loss": measure(*run.evaluated(name, "loss")[:2]),
                "tokens": count(run.evaluated(name, "tokens")[0]),
            }
        )
    return rows


def comparison(runs: list[Run]) -> list[dict]:
    """One row an evaluation set: every run's last bits per byte, and its difference from the first run's; document by document
    where both recorded the same ones, else with the root of the sum of the two squared standard errors."""
    items = [Items(run) for run in runs]
    rows = []
    read: dict[str, list[Recorded]] = {}  # set -> by run
    paired: dict[str, list[Difference | None]] = {}  # set -> by run but the first
    for name in _sets(runs):
        values = [run.evaluated(name, "bits_per_byte") for run in runs]
        if name == "macro":
            paired[name] = [mean(column) for column in zip(*paired.values(), strict=True)]
        else:
            given = [one.of(name, step) for one, (_, _, step) in zip(items, values, strict=True)]
            read[name] = [together(parts) for parts in zip(*read.values(), strict=True)] if name == "micro" else given
            paired[name] = [in_documents(name, read[name][0], other) for other in read[name][1:]]
        beside = differences_beside(values, paired[name])
        rows.append({"set": name, "values": [measure(*value[:2]) for value in values], "differences": beside})
    return rows


def config_differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """(dotted key, its value in every run) for the keys of the configs that are not the same in all runs."""
    flat = [_flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, ABSENT) for config in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def reading(run: Run) -> list[dict]:
    """What the plan says is read: one entry a stage, with a row a source."""
    names = list(dict.fromkeys(name for stage in run.stages for name in stage.get("sources") or {}))
    result = []
    for stage in run.stages:
        sources = stage.get("sources") or {}
        total = sum(source.get("tokens") or 0 for source in sources.values()) or 1
        rows = []
        for name, source in sources.items():
            rows.append(
                {
                    "source": name,
                    "index": names.index(name),
                    "share": (source.get("tokens") or 0) / total,
                    "tokens": count(source.get("tokens")),
                    "epochs": f"{source['epochs']:.3g}" if source.get("epochs") is not None else ABSENT,
                    "documents": count(source.get("documents_per_epoch")),
                    **{
                        kind: count(source.get(f"{kind}_tokens_per_epoch"))
                        for kind in ("dropped", "padded", "truncated")
                    },
                }
            )
        details = [
            count(stage.get("steps"), "steps"),
            count(stage.get("tokens"), "tokens"),
            _lengths(stage),
            f"{count(stage.get('tokens_per_step'))} tokens a step" if stage.get("tokens_per_step") else "",
            _rates(stage),
            _metadata(sources),
        ]
        result.append({"name": stage.get("name", ""), "details": [d for d in details if d], "rows": rows})
    return result


def continuations(run: Run) -> list[tuple[str, str]]:
    """(prompt, continuation) of the run's samples, control characters shown by their Unicode pictures."""
    result = []
    for sample in run.samples.get("samples") or []:
        prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
        result.append((visible(prompt), visible(text.removeprefix(prompt))))
    return result


def evaluated_at(run: Run, headline: str | None) -> str:
    """When the numbers of the tables were taken."""
    series = run.series(f"eval/{headline}/bits_per_byte")
    return f"step {int(series.steps[-1]):,}, after {count(float(series.tokens[-1]))} tokens" if len(series) else ""


def held_out_row_tokens(run: Run) -> int | None:
    """The length of the rows in which held-out text was scored: how much context its tokens had."""
    stages = run.config.get("stages") or [{}]
    return (run.config.get("evaluation") or {}).get("sequence_length") or stages[-1].get("sequence_length")


def fingerprints(run: Run) -> list[tuple[str, str]]:
    """(source, what the plan says identifies it)."""
    return [(name, plain(value)) for name, value in (run.plan.get("sources") or {}).items()]


def command(run: Run) -> str | None:
    """The command that started the run, if recorded (run.json "command": a string or a list of arguments)."""
    value = run.facts.get("command")
    return shlex.join(map(str, value)) if isinstance(value, list) else value


def changes(run: Run) -> list[str]:
    """What was allowed to change when the run went on (run.json "changes")."""
    told = [change for change in run.facts.get("changes") or [] if isinstance(change, dict)]
    return [
        f"{change.get('key')}: {change.get('from')} → {change.get('to')}"
        + (f", from step {count(change['step'])}" if change.get("step") is not None else "")
        for change in told
    ]


def versions(run: Run) -> str:
    return plain(run.facts.get("versions"), "")


def _per_cent(value: float | None, scale: float) -> str:
    return ABSENT if value is None else f"{value * scale:.3g}%"


def _lengths(stage: dict) -> str:
    lengths = sorted(map(int, stage.get("buckets") or {})) or [stage.get("sequence_length")]
    return f"sequences of {' to '.join(dict.fromkeys(map(count, (lengths[0], lengths[-1]))))}" if all(lengths) else ""


def _metadata(sources: dict) -> str:
    names = [name for name, source in sources.items() if source.get("metadata")]
    return f"metadata before documents of {', '.join(names)}" if names else ""


def _rates(stage: dict) -> str:
    known = [stage.get(f"learning_rate_{which}") for which in ("first", "highest", "last")]
    joints = [rate for rate, _ in itertools.groupby(f"{rate:.3g}" for rate in known if rate is not None)]
    return "learning rate " + " → ".join(joints) if joints else ""


def _bits(run: Run, name: str) -> np.ndarray:
    return run.series(f"eval/{name}/bits_per_byte").values


def _sets(runs: list[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.evaluation_sets())
    averages = [a for a in AVERAGES if any(key.startswith(f"eval/{a}/") for run in runs for key in run.metrics)]
    return [*names, *averages]


def _flatten(value: object, prefix: str = "") -> dict[str, str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or (prefix and not value):
        return {prefix: json.dumps(value, ensure_ascii=False)}
    return {k: v for key, item in items for k, v in _flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()}
