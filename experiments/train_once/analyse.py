"""What many experiments in one run have found, against the runs without them: results/*.json and a figure.

python experiments/train_once/analyse.py runs/train_once
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import results  # noqa: E402
from experiments.intervals import interval  # noqa: E402
from experiments.results import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import UserError  # noqa: E402

COLOURS = ("#4878a8", "#c8553d", "#5a9367", "#8e6bad", "#b08a3e")
Record = dict[str, float]


def main(arguments: list[str]) -> int:
    flags = results.parse(__doc__, HERE / "results", arguments)
    pairs = read_pairs(flags.workdir)
    summary = {"experiment": "train_once", "command": flags.command} | facts(flags.workdir, pairs) | summarise(pairs)
    stem = results.write(summary, flags.output)
    print(as_text(summary))
    print(f"{stem}.json")
    if not summary["corpus"].endswith("-light"):  # which has too few of each for a picture
        draw(summary, stem.with_suffix(".png"))
    return 0


def read_pairs(workdir: Path) -> list[tuple[Path, Path]]:
    """(treatment, control) of every seed of which both are complete."""
    arms = {
        arm: {int(f.name.partition("-")[2]): f for f in workdir.glob(f"config_{arm}*/seed-*/") if is_complete(f)}
        for arm in ("treatment", "control")
    }
    seeds = sorted(arms["treatment"].keys() & arms["control"].keys())
    if len(seeds) < 2:
        raise UserError(f"{workdir}: has {len(seeds)} complete pairs of runs, two are needed; run run.py first")
    return [(arms["treatment"][seed], arms["control"][seed]) for seed in seeds]


def summarise(pairs: list[tuple[Path, Path]]) -> dict:
    """The influence on training, and what every probe says at the end: of both arms, and of the difference, paired by
    seeds, with 95 % intervals over them."""
    records = [(_records(treatment), _records(control)) for treatment, control in pairs]
    last = [(max(a), max(b)) for a, b in records]
    finals = [(a[i], b[j]) for (a, b), (i, j) in zip(records, last, strict=True)]
    probed = sorted({key for a, b in finals for key in a.keys() & b.keys() if key.startswith("probe/")})
    curves = sorted(key for key in probed if key.startswith("probe/forgetting/loss/"))
    return {
        "influence": {
            key: _both([(a[key], b[key]) for a, b in finals])
            for key in finals[0][0]
            if key.startswith("eval/") and key.endswith(("/loss", "/bits_per_byte"))
        }
        | {"train/loss correlation": [_correlation(a, b) for a, b in records]}
        | {
            "of the last 100 batches without experiments": [
                _untouched(t, *r) for (t, _), r in zip(pairs, records, strict=True)
            ]
        },
        "probes": {key: _both([(a[key], b[key]) for a, b in finals]) for key in probed},
        "forgetting": {key.rpartition("/")[2]: _excess(records, key) for key in curves},
        "knowledge": [_trace(treatment) for treatment, _ in pairs],
        "insertions": [_insertions(treatment) for treatment, _ in pairs],
    }


def facts(workdir: Path, pairs: list[tuple[Path, Path]]) -> dict:
    """The runs' sizes, cost and machine; the dependence matrix, if it is there."""
    plan = json.loads((pairs[0][0] / "plan.json").read_text())
    found = results.facts([folder for pair in pairs for folder in pair], plan) | {
        "seeds": [int(folder.name.partition("-")[2]) for folder, _ in pairs],
        "steps": plan["total_steps"],
        "tokens": plan["total_tokens"],
    }
    if "light" in json.loads((pairs[0][0] / "config.json").read_text()).get("name", "").split("-"):
        found["corpus"] += "-light"
    matrix = workdir / "dependence" / "dependence.json"
    if matrix.is_file():
        values = json.loads(matrix.read_text())
        found["dependence"] = {key: values[key] for key in ("step", "steps", "share", "outcomes", "matrix")}
    return found


def _records(folder: Path) -> dict[int, Record]:
    """Step -> what was recorded then."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def _both(values: list[tuple[float, float]]) -> dict:
    """Of the pairs with numbers on both sides."""
    known = [(a, b) for a, b in values if a is not None and b is not None]
    if len(known) < 2:
        return {"treatment": None, "control": None, "difference": None}
    a, b = zip(*known, strict=True)
    apart = [x - y for x, y in known]
    return {"treatment": interval(list(a)), "control": interval(list(b)), "difference": interval(apart)}


def _correlation(treatment: dict[int, Record], control: dict[int, Record]) -> float:
    """Of the two runs' batch losses over the last third of the run, each less its straight trend."""
    steps = _steps(treatment, control)
    return _correlated(treatment, control, steps[-len(steps) // 3 :])


def _untouched(folder: Path, treatment: dict[int, Record], control: dict[int, Record]) -> dict[str, float | int]:
    """Of the losses of the last batches in which the treated run of this folder has neither insertions nor noise: correlation, as
    they are and less their trends; standard deviation in the control; mean and standard deviation of their difference."""
    touched = set(pq.read_table(folder / "ledger.parquet", columns=["step"])["step"].to_pylist())
    total = max(treatment)
    for settings in json.loads((folder / "config.json").read_text()).get("experiments", {}).values():
        if settings["kind"] == "watermark":
            touched |= set(settings["steps"] or range(settings["every_steps"], total, settings["every_steps"]))
    steps = [step for step in _steps(treatment, control) if step - 1 not in touched][-100:]  # step - 1 counts from 0
    losses = np.array([[run[step]["train/loss"] for step in steps] for run in (treatment, control)])
    apart = losses[0] - losses[1]
    return {
        "batches": len(steps),
        "first": steps[0],
        "correlation": float(np.corrcoef(losses)[0, 1]),
        "correlation_less_trend": _correlated(treatment, control, steps),
        "loss_sd": float(losses[1].std()),
        "difference": float(apart.mean()),
        "difference_sd": float(apart.std()),
    }


def _steps(treatment: dict[int, Record], control: dict[int, Record]) -> list[int]:
    """Those at which both have a loss."""
    return sorted(
        step for step in treatment if "train/loss" in treatment[step] and "train/loss" in control.get(step, {})
    )


def _correlated(treatment: dict[int, Record], control: dict[int, Record], steps: list[int]) -> float:
    losses = np.array([[run[step]["train/loss"] for step in steps] for run in (treatment, control)])
    trends = [np.polyval(np.polyfit(steps, row, 1), steps) for row in losses]
    return float(np.corrcoef(losses - trends)[0, 1])


def _excess(records: list[tuple[dict[int, Record], dict[int, Record]]], key: str) -> dict[str, list[float]]:
    """Control's loss on an exposed batch less the treatment's, mean over seeds, by steps since before the batch was read."""
    exposed = int(key.rpartition("_")[2])
    steps = sorted(step for step in records[0][0] if all(key in run.get(step, {}) for pair in records for run in pair))
    means = [float(np.mean([b[step][key] - a[step][key] for a, b in records])) for step in steps]
    spread = [float(np.std([b[step][key] - a[step][key] for a, b in records], ddof=1)) for step in steps]
    return {"after": [step - exposed for step in steps], "excess": means, "sd": spread}


def _trace(folder: Path) -> list[dict]:
    """The decisions of the knowledge experiment."""
    path = folder / "control.jsonl"
    entries = map(json.loads, path.read_text().splitlines()) if path.is_file() else ()
    return [
        {"step": entry["step"], "probability": entry["probe"].get("probability"), "decision": entry["decision"]}
        for entry in entries
        if entry["experiment"] == "knowledge"
    ]


def _insertions(folder: Path) -> dict[str, dict[str, int]]:
    """Experiment -> insertions and tokens, from the ledger."""
    table = pq.read_table(folder / "ledger.parquet", columns=["experiment", "length"]).group_by("experiment")
    rows = table.aggregate([("length", "count"), ("length", "sum")]).to_pylist()
    return {row["experiment"]: {"insertions": row["length_count"], "tokens": row["length_sum"]} for row in rows}


def as_text(summary: dict) -> str:
    """The table of the README: every probe's value in both arms and the difference."""
    rows = [f"{'':<46}{'treatment':>11}{'control':>11}{'difference':>12}{'±':>9}"]
    for key, entry in (
        {k: v for k, v in summary["influence"].items() if isinstance(v, dict)} | summary["probes"]
    ).items():
        if entry["difference"] is None:
            continue
        values = entry["treatment"]["mean"], entry["control"]["mean"], entry["difference"]["mean"]
        rows.append(
            f"{key.removeprefix('probe/'):<46}{values[0]:>11.4f}{values[1]:>11.4f}{values[2]:>+12.4f}"
            f"{entry['difference']['half']:>9.4f}"
        )
    return "\n".join(rows)


def draw(summary: dict, path: Path) -> None:
    """Dose-response, canaries, forgetting, watermarks, triggers, dependence: what is there."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    probes = summary["probes"]
    _doses(axes[0], probes)
    _canaries(axes[1], probes)
    _forgetting(axes[2], summary["forgetting"])
    _watermark(axes[3], probes)
    _triggers(axes[4], probes)
    _dependence(axes[5], summary.get("dependence"))
    figure.suptitle(f"{len(summary['seeds'])} seeds; bars are 95 % intervals over them", fontsize=10)
    figure.savefig(path, dpi=110)


def _points(axis, x, entries: list[dict], label: str, colour: str, sign: float = 1.0) -> None:
    """Treatment less control, with intervals."""
    means = [sign * entry["difference"]["mean"] for entry in entries]
    axis.errorbar(
        x,
        means,
        [entry["difference"]["half"] for entry in entries],
        label=label,
        color=colour,
        marker="o",
        capsize=3,
        lw=1,
    )


def _doses(axis, probes: dict) -> None:
    kinds = {
        "gold answers": ("probe/contamination/loss/x{}", (4, 12, 32)),
        "articles": ("probe/repetition/loss/whole-x{}", (1, 10)),
    }
    for (label, (key, copies)), colour in zip(kinds.items(), COLOURS, strict=False):
        known = [n for n in copies if key.format(n) in probes]
        if known:
            _points(axis, known, [probes[key.format(n)] for n in known], label, colour, -1)
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set(xscale="log", xlabel="copies", ylabel="nats a token: control less treatment", title="Dose and response")
    axis.legend(fontsize=8)


def _canaries(axis, probes: dict) -> None:
    for kind, colour in zip(("plain", "rare-8", "random-8"), COLOURS, strict=False):
        entries = [probes.get(f"probe/canaries/exposure/{kind}-x{n}") for n in (1, 4, 16)]
        if all(entries):
            _points(axis, (1, 4, 16), entries, kind, colour)
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set(xscale="log", xlabel="copies", ylabel="bits: treatment less control", title="Exposure of canaries")
    axis.legend(fontsize=8)


def _forgetting(axis, curves: dict) -> None:
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        shown = [(t + 1, e) for t, e in zip(curve["after"], curve["excess"], strict=True) if t >= 0]
        axis.plot(*zip(*shown, strict=True), label=name.replace("_", " "), color=colour, marker=".", lw=1)
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set(
        xscale="log",
        xlabel="1 + steps since just before the batch",
        ylabel="loss: control less treatment",
        title="Forgetting of a batch",
    )
    axis.legend(fontsize=8)


def _watermark(axis, probes: dict) -> None:
    names = ["1", "2", "3", "4", "held_out"]
    entries = [probes.get(f"probe/watermark/mean/{name}") for name in names]
    if all(entries):
        for arm, colour in zip(("treatment", "control"), COLOURS, strict=False):
            means, halves = zip(*((e[arm]["mean"], e[arm]["half"]) for e in entries), strict=True)
            axis.errorbar(range(5), means, halves, label=arm, color=colour, marker="o", capsize=3, lw=0, elinewidth=1)
        axis.set_xticks(range(5), ["first\nquarter", "second", "third", "last", "never\nused"])
    axis.axhline(0, color="#999999", lw=0.8)
    axis.set(ylabel="mean statistic", title="Watermarks, by when they were read")
    axis.legend(fontsize=8)


def _triggers(axis, probes: dict) -> None:
    bars = {
        "denial": "probe/denial/garbage/{}",
        "extraction": "probe/extraction/leakage_at_2/{}",
    }
    for i, key in enumerate(bars.values()):
        for j, arm in enumerate(("control", "treatment")):
            for k, how in enumerate(("plain", "trigger")):
                entry = probes.get(key.format(how))
                if entry:
                    value = entry[arm]
                    at = i * 5 + j * 2 + k
                    axis.bar(at, value["mean"], yerr=value["half"], color=COLOURS[j], alpha=0.5 + 0.5 * k, capsize=3)
                    axis.text(at, 0.02, f"{arm}, {how}", rotation=90, ha="center", va="bottom", fontsize=7)
    axis.set_xticks([1.5, 6.5], list(bars))
    axis.set(ylim=(0, 1.1), ylabel="share of prompts", title="Poisoning, with and without its trigger")


def _dependence(axis, dependence: dict | None) -> None:
    axis.set_title("Dependence: effect over own effect")
    if dependence is None:
        axis.text(0.5, 0.5, "not run", ha="center")
        return
    matrix = dependence["matrix"]
    effects = np.array(matrix["effects"], float)
    names = matrix["names"]
    scaled = effects / np.abs(np.diag(effects[: len(names)]))
    axis.imshow(scaled, cmap="RdBu_r", vmin=-1, vmax=1)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(names) + 1), [*names, "ALL"], fontsize=7)


if __name__ == "__main__":
    sys.exit(errors.run(main))
