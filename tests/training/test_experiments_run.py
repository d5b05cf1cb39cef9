"""Experiments inside real runs: probes change nothing, decisions survive kills, noise is where it belongs."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest

from mixlab import errors, probe, train
from mixlab.inject.experiments.knowledge import Knowledge
from mixlab.inject.probe import Probe
from mixlab.training import control, loop
from mixlab.training.checkpoint import Checkpoints
from tests.stores import some_texts, write_store
from tools import compare_streams, inspect_stream

STEPS = 12
CONFIG = """
from mixlab.model.presets import llama

def get_config(arg=""):
    return dict(
        name="treated",
        sources=dict(text=dict(store={store!r})),
        model=llama(layers=1, d_model=16, heads=2, vocab_size=259, context_length=384),
        stages=[dict(name="main", steps={steps}, sequence_length=384, tokens_per_step=1536)],
        schedule=dict(kind="constant", peak=3e-3),
        checkpoint=dict(every_steps=3, keep_last=9),
        evaluation=dict(every_steps=6, tokens_per_domain=600, rows=4, sample_tokens=0),
        experiments=dict(
            facts=dict(kind="knowledge", every_steps=4, target=0.5, first_texts=2, facts=2, paraphrases=40),
            marks=dict(kind="watermark", steps=[5, 9], sigma=0.5, windows=1, rows_per_window=6, probe_every_steps=5),
        ),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("treated")
    store = write_store(folder / "store", [" ".join(some_texts(6 + i)) for i in range(24)])
    (folder / "config.py").write_text(CONFIG.format(store=str(store), steps=STEPS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
        yield folder


def run(place, name, *more):
    return train.main([f"--config={place / 'config.py'}", f"--workdir={place / name}", *more])


def lines(place, name):
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in found]


def weights(place, name):
    with Checkpoints(place / name / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(STEPS)["arrays"]


@pytest.fixture(scope="module")
def whole(place):
    """The run, and what it did in which order: ("read", step) or ("decide", step)."""
    order = []
    read, decide = control.loader._ProcessBatches.__getitem__, control.Control.decide

    def reading(self, index):
        order.append(("read", self._first + int(index)))
        return read(self, index)

    def deciding(self, step, probes):
        order.extend([("decide", step)] if self.due(step) else [])
        return decide(self, step, probes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control.loader._ProcessBatches, "__getitem__", reading)
        patch.setattr(control.Control, "decide", deciding)
        assert run(place, "whole") == 0
    return order


def test_nothing_is_read_ahead_of_a_decision(whole):
    for step in (0, 4, 8):
        at = whole.index(("decide", step))
        assert {s for what, s in whole[:at] if what == "read"} == set(range(step))
    assert len(whole) == STEPS + 3


def test_probes_are_in_the_record_when_they_are_due(place, whole):
    found = lines(place, "whole")
    assert [line["step"] for line in found] == list(range(STEPS + 1))
    assert [line["step"] for line in found if "probe/facts/probability" in line] == [0, 4, 8, 12]
    assert [line["step"] for line in found if "probe/marks/mean/1" in line] == [0, 5, 10, 12]
    assert [line["step"] for line in found if "train/weight_norm/hidden" in line] == [0, 6, 12]
    assert not any(key.endswith("/failed") for line in found for key in line)
    clocks = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in clocks if "perf/probe_seconds" in line] == [0, 4, 5, 8, 10, 12]
    with np.load(place / "whole" / "probes" / "marks-10.npz") as kept:
        assert kept["outcome"].shape == (6,) and kept["held_out"].shape == (6,)


def test_decisions_insert_into_their_own_interval(place, whole):
    entries = [json.loads(line) for line in (place / "whole" / "control.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 4, 8]
    assert [entry["decision"] for entry in entries] == [
        {"first": 0, "texts": 2}, {"first": 2, "texts": 4}, {"first": 6, "texts": 8},
    ]  # fmt: skip
    ledger = parquet.read_table(place / "whole" / "ledger.parquet").to_pylist()
    intervals = [row["step"] // 4 for row in ledger]
    assert {name: intervals.count(name) for name in set(intervals)} == {0: 2, 1: 4, 2: 8}
    with Checkpoints(place / "whole" / "checkpoints", read_only=True) as checkpoints:
        assert [checkpoints.meta(step)["control_log"]["entries"] for step in (3, 6, 9, 12)] == [1, 2, 3, 3]


class KilledError(BaseException):
    """Stands for a kill: nothing in the project catches it."""


def test_killed_twice_it_is_the_same_run(place, whole, monkeypatch):
    read = control.loader.batches
    for last in (5, 10):  # after a decision that no checkpoint knows; and after a resume, before the next decision

        def batches(*rest, last=last):
            for step, local in read(*rest):
                if step > last:
                    raise KilledError
                yield step, local

        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(control, "loader", SimpleNamespace(batches=batches))
            run(place, "killed")
    path = place / "killed" / "control.jsonl"
    path.write_text(path.read_text() + '{"step": 9')  # torn
    assert run(place, "killed") == 0
    assert lines(place, "killed") == lines(place, "whole")
    assert path.read_text() == (place / "whole" / "control.jsonl").read_text()
    assert weights(place, "killed") == weights(place, "whole")
    assert run(place, "killed") == 0 and path.read_text() == (place / "whole" / "control.jsonl").read_text()


def test_stopped_within_their_windows_static_insertions_are_the_same(place, monkeypatch):
    texts = [json.dumps({"text": f"note {i} " + "abc " * (9 + i)}) for i in range(3)]
    (place / "notes.jsonl").write_text("\n".join(texts))
    static = f"""dict(
            notes=dict(kind="texts", files=[{str(place / "notes.jsonl")!r}], where=dict(copies=4, start_step=2, end_step=9)),
            curve=dict(kind="forgetting", steps=[6], after=[1, 3]),
        ),"""
    text = (place / "config.py").read_text()
    (place / "static.py").write_text(text[: text.index("dict(\n            facts")] + static + "\n    )\n")
    read, batches = {}, control.loader.batches

    def reading(*rest):
        for step, local in batches(*rest):
            read.setdefault(step, []).append(local)
            yield step, local

    monkeypatch.setattr(control, "loader", SimpleNamespace(batches=reading))
    config = f"--config={place / 'static.py'}"
    assert run(place, "unbroken", config) == 0
    for stop in (4, 7):  # both in the middle of the window; before the replaced batch and after it
        with monkeypatch.context() as patch:
            patch.setattr(loop.StopSignal, "requested", lambda self, done, stop=stop: done == stop)
            assert run(place, "stopped", config) == errors.EXIT_PREEMPTED
    assert run(place, "stopped", config) == 0
    for step in range(STEPS):
        once, again = read[step]
        assert once.keys() == again.keys() and all(np.array_equal(once[key], again[key]) for key in once)
    assert lines(place, "stopped") == lines(place, "unbroken") and weights(place, "stopped") == weights(
        place, "unbroken"
    )
    ledgers = [parquet.read_table(place / name / "ledger.parquet") for name in ("unbroken", "stopped")]
    assert ledgers[0].equals(ledgers[1])
    steps = {row["step"] for row in ledgers[0].to_pylist() if row["experiment"] == "notes"}
    assert min(steps) < 4 and max(steps) >= 7  # some on each side of the stops


def test_without_probes_that_decide_nothing_training_is_bitwise_the_same(place, whole, monkeypatch):
    monkeypatch.setattr(loop.ProbeRunner, "due", lambda *_, **__: {})
    assert run(place, "unwatched") == 0
    assert not any(key.startswith("probe/marks") for line in lines(place, "unwatched") for key in line)
    for one, other in zip(lines(place, "unwatched"), lines(place, "whole"), strict=True):
        assert one.items() <= other.items()
    assert weights(place, "unwatched") == weights(place, "whole")


def test_probes_and_controllers_that_fail_do_not_stop_the_run(place, whole, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("cannot say")

    probes = Knowledge.probes
    monkeypatch.setattr(Knowledge, "probes", lambda self, m: [*probes(self, m), Probe("broken", fail, every_steps=6)])
    monkeypatch.setattr(Knowledge, "decide", fail)
    assert run(place, "failing") == 0
    assert [line["step"] for line in lines(place, "failing") if "probe/facts/failed" in line] == [0, 6, 12]
    assert [line["step"] for line in lines(place, "failing") if "probe/facts/accuracy" in line] == [0, 4, 8, 12]
    output = capsys.readouterr().out
    assert "probe broken of experiment facts failed: RuntimeError: cannot say" in output
    assert "experiment facts could not decide (RuntimeError: cannot say)" in output
    failures = json.loads((place / "failing" / "run.json").read_text())["probe_failures"]
    assert [failure["step"] for failure in failures] == [0, 6, 12]
    assert not (place / "failing" / "ledger.parquet").exists()


def test_the_control_run_is_probed_and_reads_no_noise(place, whole):
    assert run(place, "control", "--config.experiments_enabled=()") == 0
    treated, untreated = lines(place, "whole"), lines(place, "control")
    assert not (place / "control" / "control.jsonl").exists()
    probes = [
        [sorted(key for key in line if key.startswith("probe/")) for line in found] for found in (treated, untreated)
    ]
    assert probes[0] == probes[1]
    differ = [a["step"] for a, b in zip(treated, untreated, strict=True) if a.get("train/loss") != b.get("train/loss")]
    first = min(row["step"] for row in parquet.read_table(place / "whole" / "ledger.parquet").to_pylist())
    assert differ[0] == first + 1


def test_probes_of_checkpoints_are_those_of_the_run(place, whole, capsys):
    command = [f"--workdir={place / 'whole'}", "--json"]
    assert probe.main([*command, "--steps=all", "--experiment=facts"]) == 0
    later = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in later] == [3, 6, 9, 12]
    in_run = lines(place, "whole")[12]
    names = {key for key in in_run if key.startswith("probe/facts/")}
    assert names == {key for key in later[-1] if key.startswith("probe/")}
    assert all(later[-1][name] == in_run[name] for name in names)
    before = sorted(path.name for path in (place / "whole").rglob("*"))
    assert probe.main(command[:1]) == 0
    output = capsys.readouterr().out
    assert output.startswith("step 12\n") and "probe/marks/mean/held_out" in output and "probe/facts/accuracy" in output
    assert sorted(path.name for path in (place / "whole").rglob("*")) == before


def test_tools_show_what_was_decided_during_the_run(place, whole, capsys, tmp_path):
    folder = f"--workdir={place / 'whole'}"
    ledger = parquet.read_table(place / "whole" / "ledger.parquet").to_pylist()
    inspect_stream.main([folder, "--experiment=facts", "--json"])
    assert json.loads(capsys.readouterr().out)["insertions"] == ledger
    inspect_stream.main([folder, f"--step={ledger[-1]['step']}", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    spans = [span for span in rows[ledger[-1]["row"]]["spans"] if span["kind"] == "inserted"]
    assert ledger[-1]["item"] in {span["item"] for span in spans}
    assert compare_streams.main([folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [{key: entry[key] for key in ledger[0]} for entry in found["insertions"]] == ledger
    assert [noise["step"] for noise in found["noised"]] == [5, 9] and found["unexplained"] == []
    assert compare_streams.main([folder, f"--against={place / 'whole'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differing"] == 0
    assert compare_streams.main([folder, f"--against={place / 'config.py'}", "--json"]) == 0  # before any decision
    found = json.loads(capsys.readouterr().out)
    assert len(found["insertions"]) == len(ledger) and found["noised"] == []
    (tmp_path / "control.jsonl").write_text("torn")
    (tmp_path / "config.json").write_text((place / "whole" / "config.json").read_text())
    assert errors.run(compare_streams.main, [f"--workdir={tmp_path}"]) == 2
    assert "is no record of decisions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--experiment=fact", "did you mean 'facts'?"),
        ("--steps=some", "--steps=3,12"),
        ("--steps=4", "it has [3, 6, 9, 12]"),
        ("--config.seed=3", "may differ from the run's"),
    ],
)
def test_mistakes_of_the_command_are_told(place, whole, capsys, more, told):
    assert errors.run(probe.main, [f"--workdir={place / 'whole'}", more]) == 2
    assert told in capsys.readouterr().err
