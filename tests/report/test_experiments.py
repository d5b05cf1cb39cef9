"""What a report says of experiments inside runs, and of a treated run beside its control."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from mixlab.report import experiment_plots, experiments
from mixlab.report.page import write_report
from mixlab.report.runs import read_run

STEPS, DOSES = 200, (1, 4, 16)


def make(path, name, treated):
    """200 steps; a contamination in three doses from step 50 on, memorised if treated; a watermark; failing probes at 100."""
    path.mkdir()
    rng, more = np.random.default_rng(1), np.random.default_rng(2 + treated)
    shared = rng.normal(0, 0.1, STEPS + 1)
    lines = []
    for step in range(STEPS + 1):
        record = {"step": step, "tokens": step * 64}
        if step:
            noise = 0.01 * more.normal()
            record["train/loss"] = 2 + 6 / step + shared[step] + noise + (0.002 if treated else 0)
        if step % 20 == 0:
            record["train/weight_norm/hidden"] = 10 + step / 100 + treated
            known = treated * max(0, step - 50) / 150
            for copies in DOSES:
                record[f"probe/questions/gap/x{copies}"] = 0.02 * copies * known + 0.01 * more.normal()
                record[f"probe/questions/gap_se/x{copies}"] = 0.01
            record["probe/questions/loss/holdout"] = 3.0
            record["probe/marks/mean/1"] = 0.5 * known
        if step == 100:
            record["probe/marks/failed"] = 1
        lines.append(json.dumps(record))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "config.json").write_text(json.dumps({"name": name}))
    planned = {
        "questions": {"kind": "contamination", "enabled": treated} | ({"items": 30, "tokens": 999} if treated else {}),
        "marks": {"kind": "watermark", "enabled": treated},
    }
    if treated:
        planned["marks"]["noised_steps"] = [10, 20]
    plan = {"total_steps": STEPS, "total_tokens": STEPS * 64, "experiments": planned}
    (path / "plan.json").write_text(json.dumps(plan))
    if treated:
        steps = np.sort(rng.integers(50, STEPS, 90))
        table = {"experiment": ["questions"] * 90, "step": steps.astype(np.int32), "length": np.full(90, 7, np.int32)}
        parquet.write_table(pa.table(table), path / "ledger.parquet")
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return make(folder / "control", "control", False), make(folder / "treated", "treated", True)


def test_insertions_are_those_of_the_ledger(pair):
    rows = {row["name"]: row for row in experiments.inserted(read_run(pair[1]))}
    assert rows["questions"]["tokens"] == "630" and rows["questions"]["share"] == "4.92%"
    assert rows["marks"]["failures"] == 1
    assert (rows["marks"]["tokens"], rows["marks"]["steps"]) == ("noise, steps: 2", "10 to 20")
    assert not experiments.inserted(read_run(pair[0]))[0]["enabled"]


def test_metrics_are_grouped_by_condition(pair):
    found = {(f.experiment, f.metric): f for f in experiments.families([read_run(path) for path in pair])}
    assert set(found) == {("questions", "gap"), ("questions", "loss"), ("marks", "mean")}
    assert found["questions", "gap"].doses() == {"": [(1, "x1"), (4, "x4"), (16, "x16")]}
    assert found["questions", "loss"].doses() == {}
    family = experiments.Family("canaries", "tpr", ("rare-8-x4", "rare-8-x1", "plain-x1", "plain-x16"))
    assert family.doses() == {
        "rare-8": [(1, "rare-8-x1"), (4, "rare-8-x4")],
        "plain": [(1, "plain-x1"), (16, "plain-x16")],
    }


def test_paired_losses_find_what_was_put_there(pair):
    whole, end, untouched = experiments.paired_losses([read_run(path) for path in pair])
    assert whole["steps"] == "all steps (200)" and end["steps"] == "last tenth (20)"
    low, high = (float(text.replace("−", "-")) for text in whole["interval"].split(" to "))
    assert low < 0.002 < high < 0.006
    assert float(whole["correlation"]) > 0.97
    touched = len(experiments.exposures(read_run(pair[1]))["questions"].steps)
    assert untouched["steps"] == f"steps without insertions ({200 - touched - 2})"  # nor noise


def test_the_interval_covers_a_dependent_mean():
    covered, naive = 0, 0
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(size=1020)
        series = np.convolve(noise, np.ones(20) / 20, "valid")  # neighbours agree, as steps near in training do
        low, high = experiments.block_bootstrap(series, resamples=400, seed=seed)
        covered += low < 0 < high
        naive += abs(series.mean()) < 1.96 * series.std() / np.sqrt(len(series))
    assert covered > 80 and naive < 60


def test_the_page_shows_experiments_and_the_pair(pair, tmp_path):
    page = write_report(pair, tmp_path / "report").read_text()
    for told in ("How far apart they are", "treated</b> less that of <b>control", "not inserted, only probed",
                 "solid for <b>control</b>, dashed for <b>treated</b>", "questions/gap/x16", "contamination", "steps without insertions"):  # fmt: skip
        assert told in page
    names = {path.name for path in (tmp_path / "report").iterdir()}
    shown = experiment_plots.pictures([read_run(path) for path in pair])
    assert [picture.kind for picture in shown] == ["exposure", "dose", "probe", "probe", "probe"]
    assert {f"{picture.stem}{suffix}.png" for picture in shown for suffix in ("", "-dark")} <= names
    alone = write_report([pair[1]], tmp_path / "alone").read_text()
    assert "How far apart" not in alone and "questions: gap by copies" in alone
