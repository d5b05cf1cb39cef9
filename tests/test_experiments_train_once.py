"""experiments/train_once: treatment and control differ in what is inserted alone, and its statistics are right."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from experiments.train_once import analyse
from mixlab import config as configs
from mixlab import schema
from mixlab.errors import UserError

FILE = str(Path(__file__).parents[1] / "experiments/train_once/config.py")


@pytest.mark.parametrize("words", ["", ",embedded", ",embedded,short", ",light"])
def test_the_control_differs_in_what_is_enabled_alone(words):
    treatment, control = (schema.plain(configs.load(f"{FILE}:{arm}{words}", [])) for arm in ("treatment", "control"))
    changed = {key for key in schema.differences(treatment, control)}
    assert {key.partition(".")[0] for key in changed} == {"name", "experiments_enabled"}
    assert control["experiments_enabled"] == [] and len(treatment["experiments"]) >= 8


@pytest.mark.parametrize("arg", ["", "both", "treatment,control", "treatment,long", "control,embedded,light"])
def test_other_words_are_refused(arg):
    with pytest.raises(UserError, match="give treatment or control"):
        configs.load(f"{FILE}:{arg or ','}", [])


def _folder(path: Path, gain: float, noise: np.ndarray, steps: int = 30) -> None:
    """A finished run whose losses fall, and whose probes have found `gain`."""
    path.mkdir(parents=True)
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "train/loss": 5 - step / 10 + noise[step - 1]}
        if step >= 10:
            record["probe/forgetting/loss/batch_10"] = 4 - (gain / (step - 9) if step > 10 else 0)
        records.append(record)
    records[-1] |= {
        "eval/macro/loss": 3.0 + noise[0] / 10,
        "probe/contamination/loss/x4": 4 - gain,
        "probe/contamination/loss/x12": 4 - 2 * gain,
        "probe/contamination/loss/x32": 4 - 3 * gain,
        "probe/canaries/tpr/plain-x1": None,
    }
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    facts = {"exit": "complete", "seconds": 10.0, "finished": "2026-01-01T00:00", "machine": "m"}
    facts |= {"devices": "1 x cpu", "versions": {}}
    marks = {"mark": {"kind": "watermark", "steps": [5, 25], "every_steps": 0}}
    values = {"run": facts, "plan": {"parameters": 5, "tokenizer": {}, "total_steps": steps, "total_tokens": 100}}
    for name, value in (
        values | {"config": {"sources": {"text": {"store": "embedded"}}, "experiments": marks}}
    ).items():
        (path / f"{name}.json").write_text(json.dumps(value))
    ledger = {"experiment": ["a", "a", "b"], "length": [3, 4, 5], "step": [27, 28, 28]}
    pq.write_table(pa.table(ledger), path / "ledger.parquet")


def test_differences_are_paired_by_seed(tmp_path, capsys):
    rng = np.random.default_rng(0)
    gains = [0.1, 0.2, 0.6]
    for seed, gain in enumerate(gains, 1):
        noise = rng.normal(size=30)
        _folder(tmp_path / f"config_treatment-x/seed-{seed}", gain, noise)
        _folder(tmp_path / f"config_control-y/seed-{seed}", 0.0, noise)
    analyse.main([str(tmp_path), f"--output={tmp_path / 'results'}", "--command=a command"])
    found = json.loads((tmp_path / "results/embedded.json").read_text())
    dose = found["probes"]["probe/contamination/loss/x12"]["difference"]
    assert dose["mean"] == pytest.approx(-0.6)
    assert dose["half"] == pytest.approx(stats.t.ppf(0.975, 2) * np.std([0.2, 0.4, 1.2], ddof=1) / 3**0.5, rel=1e-5)
    assert found["influence"]["train/loss correlation"] == pytest.approx([1, 1, 1])
    assert found["influence"]["eval/macro/loss"]["difference"]["mean"] == 0
    untouched = found["influence"]["of the last 100 batches without experiments"][0]
    assert untouched["batches"] == 30 - 2 - 2 and untouched["first"] == 1
    assert untouched["correlation"] == untouched["correlation_less_trend"] == pytest.approx(1)
    assert untouched["difference"] == pytest.approx(0) and untouched["loss_sd"] > 0.1
    curve = found["forgetting"]["batch_10"]
    assert curve["after"][:3] == [0, 1, 2] and curve["excess"][:2] == pytest.approx([0, np.mean(gains) / 2], rel=1e-5)
    assert found["insertions"][0] == {"a": {"insertions": 2, "tokens": 7}, "b": {"insertions": 1, "tokens": 5}}
    assert found["seeds"] == [1, 2, 3] and found["command"] == "a command"
    assert (tmp_path / "results/embedded.png").stat().st_size > 10_000
    assert "contamination/loss/x12" in capsys.readouterr().out


def test_one_pair_is_too_few(tmp_path):
    _folder(tmp_path / "config_treatment-x/seed-1", 0.1, np.zeros(30))
    _folder(tmp_path / "config_control-y/seed-1", 0.0, np.zeros(30))
    with pytest.raises(UserError, match="1 complete pairs"):
        analyse.main([str(tmp_path)])
