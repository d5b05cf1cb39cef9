"""What run.json says of spikes: of the whole run, also of the part before an interruption."""

import json

from mixlab import errors, train
from mixlab.errors import EXIT_DIVERGED
from mixlab.report.runs import read_run
from mixlab.report.spikes import spike_scores
from tests.stores import some_texts, write_config, write_store

UNDEFINED = {"loss": None, "grad_norm": None, "stability_total": None, "stability_recent": None}


def spike_score(place, *flags, code=0):
    flags = (f"--config={place / 'config.py'}", f"--workdir={place / 'run'}", *flags)
    assert errors.run(train.main, [*flags, "--config.evaluation.sample_tokens=0"]) == code
    return json.loads((place / "run" / "run.json").read_text())["spike_score"]


def test_spike_scores_in_run_json(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    write_config(tmp_path / "config.py", write_store(tmp_path / "store", some_texts()), steps=80)
    evaluated_once = ("--config.evaluation.every_steps=0", "--config.checkpoint.every_steps=80")
    assert spike_score(tmp_path, *evaluated_once) == UNDEFINED
    longer = ("--config.stages.0.steps=140", "--allow-change=stages.0.steps")
    score = spike_score(tmp_path, *evaluated_once, *longer)
    assert score["stability_total"] is not None  # 128 steps or more: not of the 60 after the resume alone
    assert score == spike_scores(read_run(tmp_path / "run"))
    assert score["loss"] is None


def test_a_run_that_diverges_has_them_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    write_config(tmp_path / "config.py", write_store(tmp_path / "store", some_texts()))
    endless = ("--config.schedule.peak=1e38", "--config.training.on_non_finite=stop")
    assert spike_score(tmp_path, *endless, code=EXIT_DIVERGED) == UNDEFINED
