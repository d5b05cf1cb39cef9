"""What a run says by length, as rows of tables: of the rows it trained on, and of held-out documents and contexts."""

import numpy as np

from mixlab.report.runs import BREAKDOWNS, Run
from mixlab.report.text import ABSENT, count, decimal, measure

RECENT = 0.1  # of a bucket's steps, over which its loss is averaged


def buckets(run: Run) -> list[dict]:
    """One row a length of training rows, the shortest first: steps, tokens, share of the tokens, loss (mean of the last
    tenth of its steps), median step time. [] for a run whose rows have one length."""
    lengths = [key.split("/")[1].removeprefix("bucket_") for key in run.metrics if key.startswith("train/bucket_")]
    speed, rows = run.series("perf/tokens_per_second"), {}
    for length in sorted(map(int, lengths)):
        losses, seconds = run.series(f"train/bucket_{length}/loss"), run.series(f"perf/bucket_{length}/step_seconds")
        recent = losses.values[-max(1, round(RECENT * len(losses))) :]
        rows[length] = {
            "steps": count(len(losses)),
            "tokens": sum(
                speed.at(int(step)) * value for step, value in zip(seconds.steps, seconds.values, strict=True)
            ),
            "loss": decimal(float(np.mean(recent)), 3),
            "seconds": f"{np.median(seconds.values):.3g} s" if len(seconds) else ABSENT,
        }
    total = sum(row["tokens"] for row in rows.values())
    return [
        row | {"length": f"{length:,}", "tokens": count(row["tokens"]), "share": f"{row['tokens'] / total:.1%}"}
        for length, row in rows.items()
    ]


def breakdowns(run: Run) -> list[dict]:
    """One table a kind of BREAKDOWNS that the run recorded: {"title", "rows": [{"range", "bits_per_byte", "loss",
    "tokens", "documents"}]}, the smallest first."""
    tables = []
    for kind, title in BREAKDOWNS.items():
        starts = {int(key.split("/")[2]) for key in run.metrics if key.startswith(f"eval/{kind}/")}
        rows = [
            {
                "range": bin_label(kind, start),
                "bits_per_byte": measure(*run.evaluated(f"{kind}/{start}", "bits_per_byte")[:2]),
                "loss": measure(*run.evaluated(f"{kind}/{start}", "loss")[:2]),
                "tokens": count(run.evaluated(f"{kind}/{start}", "tokens")[0]),
                "documents": count(run.evaluated(f"{kind}/{start}", "documents")[0]),
            }
            for start in sorted(starts)
        ]
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def bin_label(kind: str, start: int) -> str:
    """The range of tokens of a bin of lengths or positions."""
    first = 0 if kind == "by_position" and start == 1 else start
    return str(first) if first == 2 * start - 1 else f"{first:,} to {2 * start - 1:,}"
