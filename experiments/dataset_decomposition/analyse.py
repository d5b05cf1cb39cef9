"""The length-bucket experiment's figures: cost, learning, length bias; means over seeds; results/*.json and a picture.

python experiments/dataset_decomposition/analyse.py runs/dataset_decomposition
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import results  # noqa: E402
from experiments.dataset_decomposition.config import ARMS, BUCKETS, CONTROL, LENGTHS  # noqa: E402
from experiments.intervals import difference, interval  # noqa: E402
from experiments.results import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import UserError  # noqa: E402
from mixlab.sequences.statistics import expected_step_time, fit_step_time  # noqa: E402

LABELS = {
    "concat": "concat and chunk",
    "concat_masked": "the same, documents masked",
    "best_fit": "best-fit packing, masked",
    "dd_uniform": "decomposed, uniform",
    "dd_grow_p2": "decomposed, Grow-P2",
    CONTROL: "concat in the lengths of uniform",
}
COLOURS = dict(zip((*ARMS, CONTROL), ("#777777", "#8c6bb1", "#4878a8", "#5a9367", "#c8553d", "#222222"), strict=True))
HEADLINE = "eval/macro/bits_per_byte"  # mean of the domains

Record = dict[str, float]  # a line of metrics.jsonl


def step_seconds(records: list[Record]) -> np.ndarray:
    """float64 [steps]: how long every step of a run took. The first step, which waits for the first batch, and those
    beside an evaluation count as the median of the others of their length."""
    return _seconds_and_lengths(records)[0]


def typical_seconds(measured: dict[str, list], lengths: np.ndarray) -> np.ndarray:
    """float64 [steps]: of steps with rows of `lengths`, each the median of the arm's steps of its length in cost.py."""
    seconds, of = np.array(measured["seconds"]), np.array(measured["lengths"])
    medians = {length: float(np.median(seconds[of == length])) for length in np.unique(of).tolist()}
    return np.array([medians[length] for length in lengths.tolist()])


def _seconds_and_lengths(records: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    steps = [record for record in records if record["step"]]
    seconds = np.array([record["perf/step_seconds"] for record in steps])
    lengths = np.array([int(record.get("train/sequence_length", LENGTHS[-1])) for record in steps])
    alone = np.array([HEADLINE not in record and record["step"] > 1 for record in steps])
    for length in np.unique(lengths):
        here = lengths == length
        seconds[here & ~alone] = np.median(seconds[here & alone])
    return seconds, lengths


def costs(cost: dict, runs: dict[str, list[list[Record]]]) -> dict:
    """What cost.py measured, the line through it, and the time of an arm's steps as predicted and as it was.

    runs: arm -> records of each seed. Savings are of the time of `concat`; a seed's arms ran one after the other, so
    its saving is that of a pair. A masked arm is predicted by the time of masked rows of the longest length."""
    medians = {
        kind: {int(length): statistics.median(times) for length, times in by_length.items()}
        for kind, by_length in cost["seconds"].items()
    }
    plain = medians["plain"]
    fixed, per_token = fit_step_time(list(plain), list(plain.values()))
    residuals = [abs(fixed + per_token * length - seconds) / seconds for length, seconds in plain.items()]
    longest = LENGTHS[-1]
    predicted = {
        "concat": expected_step_time(fixed, per_token, {longest: 1.0}),
        **dict.fromkeys(("concat_masked", "best_fit"), medians["masked"][longest]),
        **dict.fromkeys(
            ("dd_uniform", "dd_grow_p2"), expected_step_time(fixed, per_token, dict.fromkeys(LENGTHS, 1.0))
        ),
    }
    totals = {arm: [float(step_seconds(records).sum()) for records in found] for arm, found in runs.items()}
    typical = {
        arm: float(typical_seconds(cost["arms"][arm], _seconds_and_lengths(found[0])[1]).mean())
        for arm, found in runs.items()
    }
    told = {}
    for arm, found in totals.items():
        savings = [1 - seconds / reference for seconds, reference in zip(found, totals["concat"], strict=True)]
        told[arm] = {
            "train_seconds": found,
            "step_seconds": [s / len(step_seconds(r)) for s, r in zip(found, runs[arm], strict=True)],
            "predicted_step_seconds": predicted[arm],
            "predicted_saving": 1 - predicted[arm] / predicted["concat"],
            "typical_step_seconds": typical[arm],
            "typical_saving": 1 - typical[arm] / typical["concat"],
            "savings": savings,
            "saving": interval(savings) if len(savings) > 1 else {"mean": savings[0]},
        }
    return {
        "tokens_per_step": cost["tokens_per_step"],
        "rounds": cost["rounds"],
        "step_seconds": {kind: {str(k): v for k, v in by_length.items()} for kind, by_length in medians.items()},
        "fixed_seconds": fixed,
        "seconds_per_token_of_length": per_token,
        "largest_residual": max(residuals),
        "arms": told,
    }


def learned(runs: list[list[Record]], measured: dict[str, list] | None = None) -> dict:
    """Of an arm's seeds: the last held-out bits per byte of every set and bin, and those on the way.

    {"final": {"SET" or "by_length/L" or "by_position/P": {"members", "mean", "sd", "half"}},
     "curve": [{"step", "tokens", "seconds", "mean", "half"}]}, where the arm's typical steps
    are `measured`. A single seed has neither sd nor half."""
    names = [key.removeprefix("eval/").rpartition("/")[0] for key in runs[0][-1] if key.endswith("/bits_per_byte")]
    final = {name: _told([records[-1][f"eval/{name}/bits_per_byte"] for records in runs]) for name in names}
    curve = []
    scored = [[record for record in records if HEADLINE in record] for records in runs]
    for at in zip(*scored, strict=True):
        step = int(at[0]["step"])
        value = _told([record[HEADLINE] for record in at])
        curve.append({"step": step, "tokens": int(at[0]["tokens"]), **value})
        if measured:
            spent = [typical_seconds(measured, _seconds_and_lengths(records)[1])[:step].sum() for records in runs]
            curve[-1]["seconds"] = float(np.mean(spent))
    return {"final": final, "curve": curve}


def _told(values: list[float]) -> dict:
    return {"members": values} | (interval(values) if len(values) > 1 else {"mean": values[0]})


def read(workdir: Path) -> tuple[dict, dict[str, dict[int, list[Record]]], dict]:
    """(cost.json, arm or bucket -> seed -> records, facts) of the folder that run.py leaves; complete runs only."""
    if not (workdir / "cost.json").is_file():
        raise UserError(f"{workdir}: has no cost.json; run experiments/dataset_decomposition/run.py first")
    cost = json.loads((workdir / "cost.json").read_text())
    runs: dict[str, dict[int, list[Record]]] = {}
    folders = []
    for arm in (*ARMS, CONTROL, *BUCKETS):
        found = {int(path.name.rpartition("-")[2]): path for path in workdir.glob(f"{arm}-*/") if is_complete(path)}
        folders += found.values()
        if found:
            runs[arm] = {seed: _records(path) for seed, path in sorted(found.items())}
    if missing := [arm for arm in (*ARMS, CONTROL) if arm not in runs]:
        raise UserError(
            f"{workdir}: {', '.join(missing)} have not come to their end; run the experiment again, it goes on"
        )
    plan = json.loads((folders[0] / "plan.json").read_text())
    last = next(iter(runs[ARMS[0]].values()))[-1]
    return (
        cost,
        runs,
        results.facts(folders, plan)
        | {
            "tokens": {arm: int(next(iter(found.values()))[-1]["tokens"]) for arm, found in runs.items()},
            "seeds": {arm: list(found) for arm, found in runs.items()},
            "evaluation_tokens": _counts(last, "tokens"),
            "evaluation_documents": _counts(last, "documents"),
        },
    )


def _counts(record: Record, what: str) -> dict[str, int]:
    return {k.removeprefix("eval/").rpartition("/")[0]: int(v) for k, v in record.items() if k.endswith(f"/{what}")}


def _records(folder: Path) -> list[Record]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summarise(cost: dict, runs: dict[str, dict[int, list[Record]]]) -> dict:
    """{"seeds": those that every arm has, "cost", "arms": arm -> `learned` and its difference from concat, "control": the same
    of the concatenated text in the lengths of dd_uniform, and dd_uniform's difference from that, "buckets": `learned` of
    single buckets}."""
    seeds = sorted(set.intersection(*(set(runs[arm]) for arm in (*ARMS, CONTROL))))
    if not seeds:
        raise UserError("no seed has come to its end in every arm; run the experiment again, it goes on")
    chosen = {arm: [runs[arm][seed] for seed in seeds] for arm in ARMS}
    arms = {arm: learned(found, cost["arms"][arm]) for arm, found in chosen.items()}
    for told in arms.values():
        if len(seeds) > 1:
            told["difference_from_concat"] = _differences(told, arms["concat"])
    control = learned([runs[CONTROL][seed] for seed in seeds])
    if len(seeds) > 1:
        control["difference_from_concat"] = _differences(control, arms["concat"])
        control["dd_uniform_difference"] = _differences(arms["dd_uniform"], control)
    buckets = {name: learned(list(runs[name].values())) for name in BUCKETS if name in runs}
    return {"seeds": seeds, "cost": costs(cost, chosen), "arms": arms, "control": control, "buckets": buckets}


def _differences(told: dict, reference: dict) -> dict:
    """Of every set and bin."""
    return {
        name: difference(value["members"], reference["final"][name]["members"]) for name, value in told["final"].items()
    }


def tables(summary: dict) -> str:
    """Markdown: cost and result of every arm; then bits per byte by length of document and position, also of buckets."""
    cost = summary["cost"]
    lines = [
        "| arm | ms/step predicted | typical | mean | saving predicted | typical | mean | bits per byte | - concat |",
        "|---|" + "---:|" * 8,
    ]
    for arm, told in summary["arms"].items():
        c = cost["arms"][arm]
        cells = [
            LABELS[arm],
            f"{1000 * c['predicted_step_seconds']:.0f}",
            f"{1000 * c['typical_step_seconds']:.0f}",
            f"{1000 * statistics.mean(c['step_seconds']):.0f}",
            f"{c['predicted_saving']:.1%}",
            f"{c['typical_saving']:.1%}",
            _plus_minus(c["saving"], "{:.1%}"),
            _plus_minus(told["final"]["macro"], "{:.3f}"),
            _plus_minus(told["difference_from_concat"]["macro"], "{:+.3f}") if "difference_from_concat" in told else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    columns = {LABELS[arm]: told["final"] for arm, told in summary["arms"].items()}
    columns[LABELS[CONTROL]] = summary["control"]["final"]
    columns |= {name.removeprefix("bucket_") + " alone": told["final"] for name, told in summary["buckets"].items()}
    lines += ["", f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | {' | '.join(_plus_minus(final[row], '{:.3f}') for final in columns.values())} |")
    return "\n".join(lines)


def _plus_minus(value: dict, form: str) -> str:
    return form.format(value["mean"]) + (f" ± {form.format(value['half']).lstrip('+')}" if "half" in value else "")


def draw(summary: dict, path: Path) -> None:
    """Four panels: bits per byte against tokens and against seconds, by position, and time of a step by length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((by_tokens, by_time), (by_position, by_length)) = plt.subplots(
        2, 2, figsize=(9.6, 7.2), layout="constrained"
    )
    for number, (arm, told) in enumerate((summary["arms"] | {CONTROL: summary["control"]}).items()):
        curve, style = (
            told["curve"][1:],
            {"color": COLOURS[arm], "marker": "o", "ms": 3, "lw": 1.5},
        )  # not the untrained
        means, halves = ([point.get(key, 0.0) for point in curve] for key in ("mean", "half"))
        for axes, x in ((by_tokens, "tokens"), (by_time, "seconds")):
            if x not in curve[0]:  # of the control no time was measured
                continue
            scale = 1e6 if x == "tokens" else 1.0
            label = LABELS[arm] if axes is by_tokens else None
            xs = [point[x] / scale for point in curve]
            axes.errorbar(xs, means, yerr=halves, capsize=2, label=label, **style)
        bins = _bins(told["final"], "by_position")
        reference = _bins(summary["arms"]["concat"]["final"], "by_position")
        gains = [value["mean"] - reference[start]["mean"] for start, value in bins.items()]
        errors = [told.get("difference_from_concat", {}).get(f"by_position/{s}", {}).get("half", 0.0) for s in bins]
        if arm != "concat":
            shift = 1.06 ** (number - 3)  # so that intervals do not hide one another
            by_position.errorbar([s * shift for s in bins], gains, yerr=errors, capsize=2, **style)
    by_position.axhline(0, color=COLOURS["concat"], lw=1.5)
    by_position.set_xscale("log", base=2)
    by_position.set(xlabel="position in the context, from", ylabel="bits per byte, difference from concat")
    by_tokens.set(xlabel="million tokens", ylabel="held-out bits per byte")
    by_time.set(xlabel="seconds of training", ylabel="held-out bits per byte")
    cost = summary["cost"]
    for kind, marker in (("plain", "o"), ("masked", "x")):
        times = cost["step_seconds"][kind]
        label = "one document a row" if kind == "plain" else "documents masked"
        by_length.plot([int(k) for k in times], list(times.values()), marker, color="0.3", label=label)
    ends = np.array([0, LENGTHS[-1]])
    line = cost["fixed_seconds"] + cost["seconds_per_token_of_length"] * ends
    by_length.plot(ends, line, color="0.6", lw=1, label="line through the former")
    by_length.set(xlabel="tokens a row", ylabel=f"seconds a step of {cost['tokens_per_step']:,} tokens", ylim=(0, None))
    by_length.legend(frameon=False, fontsize=8)
    for axes in figure.axes:
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *by_tokens.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bins(final: dict, kind: str) -> dict[int, dict]:
    return {int(name.split("/")[1]): value for name, value in final.items() if name.startswith(f"{kind}/")}


def main(arguments: list[str]) -> int:
    flags = results.parse(__doc__, HERE / "results", arguments)
    cost, runs, facts = read(flags.workdir)
    summary = summarise(cost, runs)
    stem = results.write(
        {"experiment": "dataset_decomposition", "command": flags.command} | facts | summary, flags.output
    )
    draw(summary, stem.with_suffix(".png"))
    print(tables(summary))
    print(f"{stem}.json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
