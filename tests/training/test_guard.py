"""Steps that are not finite or spike: skipped, stopped at, or gone past from the last checkpoint, whatever interrupts the run."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab import errors, train
from mixlab.config import TrainingConfig
from mixlab.report.spikes import stability_score
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.control import Control
from mixlab.training.guard import Diverged, Guard, RollBack

ROLL_BACK = "--config.training.on_non_finite=roll_back"


class Crash(BaseException):
    pass


@pytest.fixture
def run(trunk, tmp_path, monkeypatch):
    """Runs the trunk's configuration, 20 steps with checkpoints at 7 and 14, with batches spoiled and crashes on the way."""
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    honest = Control.batches

    def run(name, *flags, spoil, steps=(), crash=()):
        crashes = list(crash)

        def batches(self, first, mesh):
            for step, arrays in honest(self, first, mesh):
                if crashes and step == crashes[0]:
                    crashes.pop(0)
                    raise Crash
                yield step, spoil(dict(arrays)) if step in steps else arrays

        monkeypatch.setattr(Control, "batches", batches)
        command = [f"--config={trunk.parent / 'config.py'}", f"--workdir={tmp_path / name}", *flags]
        for _ in crash:
            with pytest.raises(Crash):
                train.main(command)
        return errors.run(train.main, command), tmp_path / name

    return run


def not_a_number(arrays):
    return arrays | {"loss_weights": arrays["loss_weights"] * np.float32(np.nan)}


def nonsense(arrays):
    return arrays | {"targets": np.full_like(arrays["targets"], 3)}


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def weights(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(20)["arrays"]


def roll_backs(workdir):
    kept = json.loads((workdir / "run.json").read_text())["roll_backs"]
    return [(one["step"], one["checkpoint"], one["first_step"], one["last_step"]) for one in kept]


def test_the_batch_alone_is_gone_past(run, capsys):
    """As if its update had been skipped; and the same when the run crashes after the roll back, before and after a
    checkpoint."""
    code, skipped = run("skipped", spoil=not_a_number, steps={10})
    assert code == 0
    code, back = run("back", ROLL_BACK, spoil=not_a_number, steps={10})
    assert code == 0 and roll_backs(back) == [(10, 7, 10, 10)]
    said = "step 11: the loss or its gradient is not finite; back to step 7, and past the batches of steps 10 to 10"
    assert said in " ".join(capsys.readouterr().out.split())
    assert weights(back) == weights(skipped)
    one, other = records(back), records(skipped)
    assert one[11]["train/skipped"] == other[11]["train/skipped"] == 1 and one[11]["tokens"] == other[11]["tokens"]
    assert one[:11] + one[12:] == other[:11] + other[12:]
    code, crashed = run("crashed", ROLL_BACK, spoil=not_a_number, steps={10}, crash=(12, 16, 18))
    assert code == 0 and weights(crashed) == weights(back) and records(crashed) == records(back)
    assert roll_backs(crashed) == roll_backs(back)


def test_weights_gone_bad(run, capsys):
    """When the batch alone is not to blame, all since the checkpoint are gone past; and not more often than was said."""
    code, back = run("twice", ROLL_BACK, spoil=not_a_number, steps={10, 12})
    assert code == 0 and roll_backs(back) == [(10, 7, 10, 10), (12, 7, 7, 12)]
    assert [line["step"] for line in records(back) if line.get("train/skipped")] == [8, 9, 10, 11, 12, 13]
    code, stopped = run("once", ROLL_BACK, "--config.training.max_roll_backs=1", spoil=not_a_number, steps={10, 12})
    assert code == errors.EXIT_DIVERGED and roll_backs(stopped) == [(10, 7, 10, 10)]
    assert "stopping after 1 roll backs" in capsys.readouterr().out


def test_before_the_first_checkpoint_and_at_a_spike(run, capsys):
    """A run that may roll back saves where it begins. A spike's update is made by the time it is seen, and undone."""
    flags = ("--config.training.spike_deviations=8", "--config.training.spike_window_steps=4")
    flags += ("--config.checkpoint.every_steps=100",)
    code, back = run("spike", *flags, spoil=nonsense, steps={17})
    assert code == 0 and roll_backs(back) == [(17, 0, 17, 17)]
    assert "standard deviations above the 4 before it; back to step 0" in " ".join(capsys.readouterr().out.split())
    code, skipped = run("skipped", spoil=not_a_number, steps={17})
    assert code == 0 and weights(back) == weights(skipped)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 1.1, 5.0, 50.0]), min_size=3, max_size=12), st.sampled_from([2, 3, 5]))
def test_spikes_are_those_of_the_report(losses, window):
    """The first spike of a series is where the report finds it; without one, nothing is said."""
    guard = Guard(TrainingConfig(spike_deviations=2.0, spike_window_steps=window), {})
    found = None
    for step, loss in enumerate(losses):
        try:
            guard.judge(step, {"train/loss": loss, "train/grad_norm": 1.0, "train/skipped": 0.0})
        except RollBack as error:
            found = error.step
            break
        guard = Guard(TrainingConfig(spike_deviations=2.0, spike_window_steps=window), guard.meta())  # as a resume does
    spikes = np.flatnonzero(stability_score(np.array(losses), np.ones(len(losses)), window, 2.0).spikes)
    assert found == (spikes[0] if len(spikes) else None)


def test_too_many_skipped_in_a_row_counts_across_a_resume():
    settings = TrainingConfig(max_skipped_steps=3)
    bad = {"train/loss": float("nan"), "train/grad_norm": 1.0, "train/skipped": 1.0}
    guard = Guard(settings, {})
    assert "(1 in a row)" in guard.judge(0, bad)
    guard = Guard(settings, json.loads(json.dumps(guard.meta())))
    assert "(2 in a row)" in guard.judge(1, bad)
    with pytest.raises(Diverged, match="3 skipped updates in a row"):
        guard.judge(2, bad)
