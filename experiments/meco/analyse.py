"""The scores of the experiment: means over seeds with 95 % intervals, differences from the standard run; results/*.json, a figure.

python experiments/meco/analyse.py runs/meco
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import results  # noqa: E402
from experiments.intervals import interval  # noqa: E402
from experiments.meco.config import ARMS  # noqa: E402
from experiments.results import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import UserError  # noqa: E402

LABELS = {
    "standard": "standard",
    "meco": "MeCo",
    "no_cooldown": "metadata throughout",
    "hashed": "MeCo, hashed",
    "loss": "MeCo, loss on metadata",
}
COLOURS = {"standard": "0.3", "meco": "#c8553d", "no_cooldown": "#e0a458", "hashed": "#4878a8", "loss": "#5a9367"}
PLAIN = "eval/macro/bits_per_byte"
VARIANTS = ("none", "true", "wrong")

Lines = list[dict]  # the records of a run that have held-out scores


def summarise(runs: dict[str, dict[int, Lines]]) -> dict:
    """runs: arm -> seed -> records, the last at the end of training; "standard" and two seeds at least.

    Returns {"arms": {ARM: {"plain", "none", "true", "wrong": {mean, sd, half, seeds}, "plain - standard", "true - none", …:
    {mean, half}, "tokens_to_standard": tokens by which each seed's plain score was as good as that of the standard run at its
    end, None where it never was, "seen": {decade: {mean, half}}, "curve": {tokens: mean}}}, "sets": {SET: {ARM: mean}}}.
    Bits per byte, the mean of the domains; "seen" in nats a token. Differences are paired by seed."""
    seeds = sorted(runs["standard"])
    ends = {arm: {seed: found[seed][-1] for seed in seeds if seed in found} for arm, found in runs.items()}
    arms: dict[str, dict] = {}
    for arm, last in ends.items():
        if len(last) < 2:
            continue
        keys = {"plain": PLAIN} | {v: f"eval_metadata/{v}/macro/bits_per_byte" for v in VARIANTS}
        values = {name: {seed: line[key] for seed, line in last.items()} for name, key in keys.items()}
        told = {
            name: interval(list(found.values())) | {"seeds": list(found.values())} for name, found in values.items()
        }
        for name, (one, other) in {
            "plain - standard": (values["plain"], {s: line[PLAIN] for s, line in ends["standard"].items()}),
            "true - none": (values["true"], values["none"]),
            "wrong - none": (values["wrong"], values["none"]),
        }.items():
            told[name] = interval([one[seed] - other[seed] for seed in last])
        told["tokens_to_standard"] = [reached(runs[arm][s], ends["standard"][s][PLAIN]) for s in last]
        prefix = "eval_metadata/true_minus_none/seen_"
        decades = sorted(
            int(k.split("_")[-1].split("/")[0]) for k in last[min(last)] if k.startswith(prefix) and k.endswith("/loss")
        )
        told["seen"] = {
            decade: interval([line[f"{prefix}{decade}/loss"] for line in last.values()])
            | {"documents": last[min(last)][f"{prefix}{decade}/documents"]}
            for decade in decades
        }
        steps = [{line["tokens"]: line[PLAIN] for line in runs[arm][seed]} for seed in last]
        told["curve"] = {tokens: float(np.mean([s[tokens] for s in steps])) for tokens in steps[0]}
        arms[arm] = told
    names = [
        key.split("/")[1]
        for key in ends["standard"][seeds[0]]
        if key.startswith("eval/") and key.endswith("/bits_per_byte")
    ]
    sets = {
        name: {arm: float(np.mean([line[f"eval/{name}/bits_per_byte"] for line in ends[arm].values()])) for arm in arms}
        for name in names
        if name not in ("macro", "micro")
    }
    return {"arms": arms, "sets": sets}


def reached(lines: Lines, target: float) -> float | None:
    """Tokens at which the plain score first came down to `target`, on straight lines between records; None: it never did."""
    before = None
    for line in lines:
        score, tokens = line[PLAIN], line["tokens"]
        if score <= target:
            return (
                tokens
                if before is None
                else before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - score)
            )
        before = (tokens, score)
    return None


def read(workdir: Path) -> tuple[dict[str, dict[int, Lines]], dict]:
    """(what `summarise` takes, the facts around it) of the runs that run.py leaves. The arm without cooldown has its trunk's
    records before its own."""
    runs: dict[str, dict[int, Lines]] = {}
    for arm in ARMS:
        for folder in sorted(workdir.glob(f"{arm}-[0-9]*/")):
            if is_complete(folder):
                runs.setdefault(arm, {})[int(folder.name.rpartition("-")[2])] = _records(folder)
    if len(runs.get("standard", {})) < 2:
        raise UserError(
            f"{workdir}: has less than two complete runs of the arm 'standard'; run experiments/meco/run.py first"
        )
    for seed, lines in runs.get("no_cooldown", {}).items():
        earlier = runs.get("meco", {}).get(seed, [])
        runs["no_cooldown"][seed] = [line for line in earlier if line["step"] < lines[0]["step"]] + lines
    folders = [workdir / f"{arm}-{seed}" for arm, found in runs.items() for seed in found]
    plan = json.loads((next(workdir.glob("meco-[0-9]*/plan.json"), folders[0] / "plan.json")).read_text())
    return runs, results.facts(folders, plan) | {
        "seeds": {arm: sorted(found) for arm, found in runs.items()},
        "tokens": {stage["name"]: stage["tokens"] for stage in plan["stages"]},
        "documents": plan["conditioned_and_plain"],
    }


def _records(folder: Path) -> Lines:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if PLAIN in line]


def table(summary: dict) -> str:
    """Bits per byte at the end of training, as Markdown; ± is half of a 95 % interval over seeds."""
    head = ["arm", "without", "from standard", "with its own", "with another's", "own - none", "tokens to standard"]
    lines = [" | ".join(head), " | ".join(["---"] + ["---:"] * (len(head) - 1))]
    for arm, told in summary["arms"].items():
        found = [tokens for tokens in told["tokens_to_standard"] if tokens is not None]
        all_did = len(found) == len(told["tokens_to_standard"])
        cells = [LABELS[arm], *(f"{told[k]['mean']:.3f} ± {told[k]['half']:.3f}" for k in ("plain",))]
        cells.append(f"{told['plain - standard']['mean']:+.3f} ± {told['plain - standard']['half']:.3f}")
        cells += [f"{told[k]['mean']:.3f} ± {told[k]['half']:.3f}" for k in ("true", "wrong")]
        cells.append(f"{told['true - none']['mean']:+.3f} ± {told['true - none']['half']:.3f}")
        cells.append(
            f"{np.mean(found):,.0f}" if all_did else f"{len(found)} of {len(told['tokens_to_standard'])} seeds"
        )
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def draw(summary: dict, path: Path) -> None:
    """Left: bits per byte without metadata, by tokens read. Right: at the end, without, with true and with wrong metadata."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for i, (arm, told) in enumerate(summary["arms"].items()):
        curve = {int(tokens): score for tokens, score in told["curve"].items() if int(tokens)}
        left.plot(
            [t / 1e6 for t in curve], list(curve.values()), "o-", ms=3, lw=1.2, color=COLOURS[arm], label=LABELS[arm]
        )
        for variant, marker in (("none", "o"), ("true", "^"), ("wrong", "x")):
            first = {"label": {"none": "without", "true": "its own", "wrong": "another's"}[variant]} if i == 0 else {}
            x = i + 0.2 * (VARIANTS.index(variant) - 1)
            values = told[variant]
            right.errorbar(x, values["mean"], values["half"], fmt=marker, ms=5, capsize=2, color=COLOURS[arm], **first)
    left.set_xlabel("million tokens read")
    left.set_ylabel("held-out bits per byte without metadata")
    left.legend(frameon=False, fontsize=8)
    right.set_xticks(
        range(len(summary["arms"])), [LABELS[arm].replace(", ", ",\n") for arm in summary["arms"]], fontsize=7
    )
    right.set_ylabel("at the end, with metadata in front")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    flags = results.parse(__doc__, HERE / "results", arguments)
    runs, facts = read(flags.workdir)
    summary = summarise(runs)
    stem = results.write({"experiment": "meco", "command": flags.command} | facts | summary, flags.output)
    draw(summary, stem.with_suffix(".png"))
    print(table(summary))
    print(f"{stem}.json, .png")
    return 0


if __name__ == "__main__":
    sys.exit(errors.run(main))
