"""The scores of a microanneal experiment: means over seeds, 95 % intervals, soups; results/*.json and a figure.

python experiments/dolmino/analyse.py runs/dolmino
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import results  # noqa: E402
from experiments.dolmino.config import ARMS, CORPORA  # noqa: E402
from experiments.intervals import difference, interval  # noqa: E402
from experiments.results import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import UserError  # noqa: E402

LABELS = {"web": "web", "mix": "half web, half added", "math10": "90 % web, 10 % maths"}
LINEAR_UP_TO = 0.1
TICKS = (-2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1)
COLOURS = {"web": "#4878a8", "mix": "#c8553d", "math10": "#5a9367"}


Scores = dict[str, float]  # the metrics eval/SET/bits_per_byte, eval/SET/bits_per_byte_se, … of one model


def summarise(
    before: Scores,
    members: dict[str, list[Scores]],
    soups: dict[str, Scores],
    long: dict[str, Scores],
    groups: dict[str, list[str]],
) -> dict:
    """before: of the trunk.   members: arm -> one a seed.   soups: arm -> its soup.   long: arm -> its anneal on as many
    tokens as the soup's members together.   groups: further rows, each the mean of some sets.

    Returns {"rows": {SET or group: {"before", "before_se", ARM: {"members", "mean", "sd", "half", "change", "soup",
    "long"}, "ARM - web": {"mean", "half"}}}, "soups": {ARM: in how many sets the soup is better}}."""
    sets = sorted({key.split("/")[1] for key in before if key.endswith("/bits_per_byte")} - {"macro", "micro"})
    parts = {name: [name] for name in sets} | groups

    def bits(scores: dict, row: str) -> float:
        return float(np.mean([scores[f"eval/{name}/bits_per_byte"] for name in parts[row]]))

    def error(scores: dict, row: str) -> float:
        errors = [scores[f"eval/{name}/bits_per_byte_se"] for name in parts[row]]
        return float(np.sqrt(np.sum(np.square(errors))) / len(errors))

    rows: dict[str, dict] = {}
    for row in parts:
        told = {"before": bits(before, row), "before_se": error(before, row)}
        values = {arm: [bits(scores, row) for scores in found] for arm, found in members.items()}
        for arm, found in values.items():
            told[arm] = {"members": found, **interval(found), "soup": bits(soups[arm], row)}
            told[arm]["change"] = told[arm]["mean"] - told["before"]
            told[arm] |= {"long": bits(long[arm], row)} if arm in long else {}
            if arm != "web" and "web" in values:
                told[f"{arm} - web"] = difference(found, values["web"])
        rows[row] = told
    counts = {
        arm: {
            "sets": len(sets),
            "below_mean_of_members": sum(rows[s][arm]["soup"] < rows[s][arm]["mean"] for s in sets),
            "below_best_member": sum(rows[s][arm]["soup"] < min(rows[s][arm]["members"]) for s in sets),
        }
        for arm in members
    }
    return {"rows": rows, "soups": counts}


def read(workdir: Path) -> dict:
    """What `summarise` takes and the facts around it, from the folder of runs that run.py leaves."""
    trunk = workdir / "trunk"
    if not (trunk / "metrics.jsonl").is_file():
        raise UserError(f"{workdir}: has no trunk/metrics.jsonl; run experiments/dolmino/run.py first")
    soups = {arm: json.loads((workdir / f"soup-{arm}.json").read_text()) for arm in ARMS if _has(workdir, arm)}
    folders = {arm: sorted(workdir.glob(f"{arm}-[0-9]*/")) for arm in soups}
    long = {arm: workdir / f"{arm}-long" for arm in soups if is_complete(workdir / f"{arm}-long")}
    everything = [trunk, *(folder for found in folders.values() for folder in found), *long.values()]
    config, plan = (json.loads((folders["web"][0] / name).read_text()) for name in ("config.json", "plan.json"))
    stages = {stage["name"]: stage for stage in plan["stages"]}
    return {
        "before": _scores(trunk),
        "members": {arm: [_scores(folder) for folder in found] for arm, found in folders.items()},
        "soups": soups,
        "long": {arm: _scores(folder) for arm, folder in long.items()},
        "facts": results.facts(everything, plan)
        | {
            "seeds": [int(folder.name.rpartition("-")[2]) for folder in folders["web"]],
            "tokens": {name: stage["tokens"] for name, stage in stages.items()},
            "steps": {name: stage["steps"] for name, stage in stages.items()},
            "learning_rate": {
                "peak": config["schedule"]["peak"],
                "anneal_first": stages["anneal"]["learning_rate_first"],
                "anneal_after": stages["anneal"]["learning_rate_after"],
            },
            "mixtures": {arm: _mixture(found[0]) for arm, found in folders.items()},
            "evaluation_tokens": {
                key.split("/")[1]: int(value) for key, value in _scores(trunk).items() if key.endswith("/tokens")
            },
        },
    }


def _has(workdir: Path, arm: str) -> bool:
    return (workdir / f"soup-{arm}.json").is_file()


def _mixture(folder: Path) -> dict[str, float]:
    return json.loads((folder / "config.json").read_text())["stages"][-1]["mixture"]


def _scores(folder: Path) -> Scores:
    """The held-out scores of a run's last step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    scored = [line for line in map(json.loads, lines) if "eval/macro/bits_per_byte" in line]
    if not scored:
        raise UserError(f"{folder}: has no held-out scores yet; run it to its end")
    return {key: value for key, value in scored[-1].items() if key.startswith("eval/")}


def table(summary: dict) -> str:
    """The rows as Markdown: bits per byte before and after; ± is the half-width of a 95 % interval over seeds."""
    arms = list(summary["soups"])
    compared = [f"{arm} - web" for arm in arms if arm != "web"]
    long = [arm for arm in arms if all("long" in row[arm] for row in summary["rows"].values())]
    head = ["held-out set", "before (± se)", *arms, *compared]
    head += [f"soup of {arm}" for arm in arms] + [f"long {arm}" for arm in long]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for name, row in summary["rows"].items():
        cells = [name, f"{row['before']:.3f} ± {row['before_se']:.3f}"]
        cells += [f"{row[arm]['mean']:.3f} ± {row[arm]['half']:.3f}" for arm in arms]
        cells += [f"{row[pair]['mean']:+.3f} ± {row[pair]['half']:.3f}" for pair in compared]
        cells += [f"{row[arm]['soup']:.3f}" for arm in arms] + [f"{row[arm]['long']:.3f}" for arm in long]
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def draw(summary: dict, path: Path) -> None:
    """Change of bits per byte from the trunk's end, a row a set: mean of the seeds with its interval, soup, long anneal.

    The scale is linear up to LINEAR_UP_TO and logarithmic beyond: maths gains a hundred times what web does."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, arms = list(summary["rows"]), list(summary["soups"])
    figure, axes = plt.subplots(figsize=(7.2, 0.46 * len(rows) + 1.1), constrained_layout=True)
    for i, name in enumerate(rows):
        row = summary["rows"][name]
        for j, arm in enumerate(arms):
            y = i + (j - (len(arms) - 1) / 2) * 0.25
            told, base = row[arm], row["before"]
            first = {"label": LABELS[arm]} if i == 0 else {}
            axes.errorbar(
                told["mean"] - base, y, xerr=told["half"], fmt="o", ms=4, capsize=2, color=COLOURS[arm], **first
            )
            for key, marker, label in (("soup", "D", "their soup"), ("long", "x", "one anneal of as many tokens")):
                if key in told:
                    axes.plot(told[key] - base, y - 0.07, marker, ms=4, mfc="white", color=COLOURS[arm])
                if i == j == 0 and any(key in summary["rows"][name][a] for a in arms):
                    axes.plot([], [], marker, ms=4, mfc="white", color="0.3", ls="", label=label)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_xscale("symlog", linthresh=LINEAR_UP_TO, linscale=1.2)
    highest = max(row[arm]["change"] + row[arm]["half"] for row in summary["rows"].values() for arm in arms)
    axes.set_xlim(right=max(highest, 0) + 0.01)
    low, high = axes.get_xlim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("change of held-out bits per byte from the trunk's checkpoint (left is better)")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    flags = results.parse(__doc__, HERE / "results", arguments)
    found = read(flags.workdir)
    corpus = CORPORA[found["facts"]["corpus"]]
    maths = [name for name in corpus["added"] if "math" in name]
    groups = {
        "mean of the web side": list(corpus["web"]),
        "mean of the added side": list(corpus["added"]),
        "mean of maths": maths,
    }
    groups = {name: sets for name, sets in groups.items() if len(sets) > 1}
    summary = summarise(found["before"], found["members"], found["soups"], found["long"], groups)
    order = [*corpus["web"], *corpus["added"], *groups]
    summary["rows"] = dict(sorted(summary["rows"].items(), key=lambda row: order.index(row[0])))
    stem = results.write({"experiment": "dolmino", "command": flags.command} | found["facts"] | summary, flags.output)
    draw(summary, stem.with_suffix(".png"))
    print(table(summary))
    print(f"{stem}.json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
