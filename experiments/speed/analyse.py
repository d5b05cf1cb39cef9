"""The speed experiment's figures: loss against tokens and seconds, at equal time, in bfloat16; results/*.json, a picture.

python experiments/speed/analyse.py runs/speed
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import results  # noqa: E402
from experiments.intervals import interval  # noqa: E402
from experiments.results import is_complete  # noqa: E402
from experiments.speed.config import ARMS, RATES  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import UserError  # noqa: E402

LABELS = {"adamw": "AdamW", "muon": "Muon", "muon_bf16": "Muon, bfloat16"}
COLOURS = {"adamw": "#777777", "muon": "#4878a8", "muon_bf16": "#c8553d"}
HEADLINE = "eval/macro/bits_per_byte"  # mean of the domains
FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the time of the arm that is the first to end
PAIRS = {"muon": "adamw", "muon_bf16": "muon"}  # what an arm is compared with

Lines = list[dict[str, float]]  # the records of a run that have held-out scores


def rates(workdir: Path) -> dict[str, dict[float, float]]:
    """optimiser -> peak -> held-out bits per byte at the end of the short runs. UserError unless all are complete."""
    found: dict[str, dict[float, float]] = {}
    for optimizer, peaks in RATES.items():
        for peak in peaks:
            folder = workdir / f"rates/{optimizer}-{peak:g}"
            if not is_complete(folder):
                raise UserError(f"{folder}: has not come to its end; run experiments/speed/run.py, it goes on")
            found.setdefault(optimizer, {})[peak] = _scored(folder)[-1][HEADLINE]
    return found


def read(workdir: Path) -> tuple[dict, dict[str, dict[int, Lines]], dict]:
    """(cost.json, arm -> seed -> records with scores, facts) of the folder that run.py leaves; complete runs only."""
    tried = rates(workdir)
    runs: dict[str, dict[int, Lines]] = {}
    folders = []
    for arm in ARMS:
        found = {
            int(path.name.rpartition("-")[2]): path for path in workdir.glob(f"{arm}-[0-9]*/") if is_complete(path)
        }
        if not found:
            raise UserError(f"{workdir}: no run of {arm} has come to its end; run the experiment again, it goes on")
        folders += found.values()
        runs[arm] = {seed: _scored(path) for seed, path in sorted(found.items())}
    plan = json.loads((folders[0] / "plan.json").read_text())
    peaks = {arm: _peak(workdir / f"{arm}-{min(found)}") for arm, found in runs.items()}
    return (
        json.loads((workdir / "cost.json").read_text()),
        runs,
        results.facts(folders, plan)
        | {
            "rates": {name: {f"{peak:g}": score for peak, score in scores.items()} for name, scores in tried.items()},
            "peaks": peaks,
        },
    )


def _scored(folder: Path) -> Lines:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if HEADLINE in line]


def _peak(folder: Path) -> float:
    return json.loads((folder / "config.json").read_text())["schedule"]["peak"]


def costs(cost: dict, clock: str) -> dict[str, dict]:
    """Of every arm: the median step in seconds of both clocks, quartiles and tokens a second by `clock`; and how much
    quicker its step is than that of the arm it is compared with (the median of the turns' ratios)."""
    told: dict[str, dict] = {}
    for arm, seconds in cost["seconds"].items():
        step = statistics.median(seconds[clock])
        told[arm] = {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
        told[arm]["quartiles"] = np.percentile(seconds[clock], (25, 75)).tolist()
        told[arm]["tokens_per_second"] = cost["tokens_per_step"] / step
        if arm in PAIRS:
            ratios = np.array(cost["seconds"][PAIRS[arm]][clock]) / np.array(seconds[clock])
            told[arm]["speedup"] = {"over": PAIRS[arm], "median": float(np.median(ratios))}
    return told


def reached(lines: Lines, target: float) -> float | None:
    """Steps after which the score first came down to `target`, on straight lines between records; None: never."""
    for before, after in itertools.pairwise(lines):
        if after[HEADLINE] <= target:
            part = (before[HEADLINE] - target) / (before[HEADLINE] - after[HEADLINE])
            return before["step"] + part * (after["step"] - before["step"])
    return None


def summarise(cost: dict, runs: dict[str, dict[int, Lines]], clock: str = "cpu") -> dict:
    """Seconds are steps times the arm's median step by `clock`; differences are paired by the seeds that all arms have.

    {"seeds", "clock", "tokens_per_step", "rounds", "cost": `costs`,
     "arms": arm -> {"final": {set: told}, "curve": [{"step", "tokens", "seconds"} | told]},
     "differences": arm -> [{"step", "tokens"} | told]: from the arm of PAIRS, at equal tokens,
     "equal_time": [{"fraction", "seconds", arm: told, "ARM - OTHER": told}]: on straight lines between scores,
     "to_adamw": arm -> {"tokens", "seconds"}: told of the share of AdamW's that brings the arm to AdamW's last score;
        None where a seed never came there},
    where told is {"members", "mean"} and, of more seeds than one, sd and half."""
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    if not seeds:
        raise UserError("no seed has come to its end in every arm; run the experiment again, it goes on")
    chosen = {arm: [found[seed] for seed in seeds] for arm, found in runs.items()}
    measured = costs(cost, clock)
    step_seconds = {arm: told[f"{clock}_seconds"] for arm, told in measured.items()}
    curves = {arm: np.array([[line[HEADLINE] for line in lines] for lines in found]) for arm, found in chosen.items()}
    steps = [int(line["step"]) for line in chosen["adamw"][0]]
    tokens = [int(line["tokens"]) for line in chosen["adamw"][0]]
    last = min(step_seconds.values()) * steps[-1]

    def at(arm: str, seconds: float) -> list[float]:
        return [float(np.interp(seconds / step_seconds[arm], steps, curve)) for curve in curves[arm]]

    def minus(one: list[float], other: list[float]) -> dict:
        return _told((np.array(one) - np.array(other)).tolist())

    arms, equal_time, to_adamw = {}, [], {}
    for arm, found in chosen.items():
        sets = [key.split("/")[1] for key in found[0][-1] if key.startswith("eval/") and key.endswith("/bits_per_byte")]
        arms[arm] = {
            "final": {name: _told([lines[-1][f"eval/{name}/bits_per_byte"] for lines in found]) for name in sets},
            "curve": [
                {"step": step, "tokens": read, "seconds": step * step_seconds[arm]} | _told(scores.tolist())
                for step, read, scores in zip(steps, tokens, curves[arm].T, strict=True)
            ],
        }
        needed = [
            reached(lines, reference[-1][HEADLINE]) for lines, reference in zip(found, chosen["adamw"], strict=True)
        ]
        shares = [step / steps[-1] for step in needed if step is not None]
        dearer = step_seconds[arm] / step_seconds["adamw"]
        to_adamw[arm] = None
        if len(shares) == len(seeds):
            to_adamw[arm] = {"tokens": _told(shares), "seconds": _told([share * dearer for share in shares])}
    for fraction in FRACTIONS:
        scores = {arm: at(arm, fraction * last) for arm in chosen}
        told = {arm: _told(values) for arm, values in scores.items()}
        told |= {f"{arm} - {other}": minus(scores[arm], scores[other]) for arm, other in PAIRS.items()}
        equal_time.append({"fraction": fraction, "seconds": fraction * last} | told)
    differences = {
        arm: [
            {"step": step, "tokens": read} | _told(gaps.tolist())
            for step, read, gaps in zip(steps, tokens, (curves[arm] - curves[other]).T, strict=True)
        ]
        for arm, other in PAIRS.items()
    }
    return {
        "seeds": seeds,
        "clock": clock,
        "tokens_per_step": cost["tokens_per_step"],
        "rounds": len(cost["seconds"]["adamw"][clock]),
        "cost": measured,
        "arms": arms,
        "differences": differences,
        "equal_time": equal_time,
        "to_adamw": to_adamw,
    }


def _told(values: list[float]) -> dict:
    return {"members": values} | (interval(values) if len(values) > 1 else {"mean": values[0]})


def tables(summary: dict) -> str:
    """Markdown: an arm's cost and result; bits per byte and differences at equal time; differences at equal tokens."""
    lines = [
        "| arm | seconds a step | tokens a second | bits per byte | to AdamW's last: tokens | time |",
        "|---|" + "---:|" * 5,
    ]
    for arm, told in summary["arms"].items():
        cost, needed = summary["cost"][arm], summary["to_adamw"][arm]
        cells = [
            LABELS[arm],
            f"{cost[summary['clock'] + '_seconds']:.3f}",
            f"{cost['tokens_per_second']:,.0f}",
            _plus_minus(told["final"]["macro"], "{:.3f}"),
            *(_plus_minus(needed[what], "{:.2f}") if needed else "not reached" for what in ("tokens", "seconds")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    names = [*summary["arms"], *(f"{arm} - {other}" for arm, other in PAIRS.items())]
    lines += ["", f"| at equal time | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for point in summary["equal_time"]:
        cells = [_plus_minus(point[name], "{:+.3f}" if " - " in name else "{:.3f}") for name in names]
        lines.append(f"| {point['fraction']:.0%}, {point['seconds']:.0f} s | {' | '.join(cells)} |")
    lines += ["", f"| tokens | {' | '.join(names[-2:])} |", "|---|---:|---:|"]
    for points in zip(*(summary["differences"][arm] for arm in PAIRS), strict=True):
        lines.append(f"| {points[0]['tokens']:,} | {' | '.join(_plus_minus(p, '{:+.4f}') for p in points)} |")
    return "\n".join(lines)


def _plus_minus(value: dict, form: str) -> str:
    return form.format(value["mean"]) + (f" ± {form.format(value['half']).lstrip('+')}" if "half" in value else "")


def draw(summary: dict, path: Path) -> None:
    """Bits per byte against tokens and against seconds; and what bfloat16 changes at equal tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_tokens, by_time, by_type) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for arm, told in summary["arms"].items():
        curve = told["curve"][1:]  # not the untrained
        means, halves = ([point.get(key, 0.0) for point in curve] for key in ("mean", "half"))
        dashed = "--" if arm == "muon_bf16" else "-"  # it lies on float32's
        style = {"color": COLOURS[arm], "marker": "o", "ms": 3, "lw": 1.5, "ls": dashed, "label": LABELS[arm]}
        for axes, x, scale in ((by_tokens, "tokens", 1e6), (by_time, "seconds", 1)):
            axes.errorbar([point[x] / scale for point in curve], means, yerr=halves, capsize=2, **style)
    by_time.axhline(summary["arms"]["adamw"]["curve"][-1]["mean"], color=COLOURS["adamw"], lw=0.8, ls=":")
    by_tokens.set(xlabel="million tokens", ylabel="held-out bits per byte")
    by_time.set(xlabel=f"{'CPU-' if summary['clock'] == 'cpu' else ''}seconds of training steps")
    by_tokens.legend(frameon=False, fontsize=8)
    gaps = summary["differences"]["muon_bf16"][1:]
    by_type.axhline(0, color=COLOURS["muon"], lw=1.5)
    by_type.errorbar(
        [point["tokens"] / 1e6 for point in gaps],
        [point["mean"] for point in gaps],
        yerr=[point.get("half", 0.0) for point in gaps],
        fmt="o-",
        ms=3,
        lw=1.5,
        capsize=2,
        color=COLOURS["muon_bf16"],
    )
    by_type.set(xlabel="million tokens", ylabel="bits per byte, bfloat16 - float32")
    for axes in figure.axes:
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    flags = results.parse(__doc__, HERE / "results", arguments)
    cost, runs, facts = read(flags.workdir)
    # CPU-seconds tell what a step cost whatever else ran; beside an accelerator they tell nothing.
    clock = "cpu" if "cpu" in str(facts["devices"]).lower() else "wall"
    summary = summarise(cost, runs, clock)
    stem = results.write({"experiment": "speed", "command": flags.command} | facts | summary, flags.output)
    draw(summary, stem.with_suffix(".png"))
    print(tables(summary))
    print(f"{stem}.json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
