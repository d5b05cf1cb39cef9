"""The record of decisions: append only, whole on disk, and the same however often a run is interrupted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.inject.control_log import ControlLog, decide, read_log


class Doubling:
    """Decides on one more than before, twice as much when the probe is low; fails when told to."""

    def decide(self, state, probe, step, steps):
        if probe["v"] == "fail":
            raise RuntimeError("told to")
        n = state.get("n", 1) * (2 if probe["v"] < 0.5 else 1)
        return {"n": n, "history": (*state.get("history", ()), step)}, {"n": n}


def played(values, log=ControlLog()):
    """The log after a run whose probe gives `values`, from where `log` has come."""
    for step in range(len(log), len(values)):
        probe = None if values[step] is None else {"v": values[step]}
        log = decide(log, "facts", Doubling(), probe, 10 * step, 100)
    return log


probes = st.lists(st.one_of(st.none(), st.just("fail"), st.floats(0, 1)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(probes, st.data())
def test_a_resume_and_a_resume_of_a_resume_decide_the_same(tmp_path_factory, values, data):
    path = tmp_path_factory.mktemp("log") / "control.jsonl"
    whole = played(values)
    for _ in range(2):
        whole.save(path)
        kept = data.draw(st.integers(0, len(values)))
        meta = ControlLog(whole.lines[:kept]).meta()
        torn = data.draw(st.integers(0, 5))
        path.write_text(path.read_text() + '{"step": 999'[: 3 * torn])  # what a crash may leave at the end
        resumed = read_log(path, meta)
        assert resumed.meta() == meta
        assert played(values, resumed) == whole
    assert [entry["step"] for entry in whole.entries] == [10 * i for i in range(len(values))]


def test_a_controller_that_fails_leaves_its_last_decision():
    log = played([0.1, "fail", 0.1, None, 0.9])
    assert [entry["decision"] for entry in log.entries] == [{"n": 2}, {"n": 2}, {"n": 4}, {"n": 4}, {"n": 4}]
    assert [entry.get("failed") for entry in log.entries] == [
        None, "RuntimeError: told to", None, "its probe failed", None,
    ]  # fmt: skip
    assert log.entries[-1]["state"] == {"n": 4, "history": [0, 20, 40]}  # as JSON has it, before a resume too
    assert played(["fail"]).entries[0]["decision"] is None


def test_what_cannot_be_written_counts_as_failed():
    class Careless:
        def decide(self, state, probe, step, steps):
            return {"bad": object()}, {}

    (entry,) = decide(ControlLog(), "facts", Careless(), {"v": 1.0}, 0, 10).entries
    assert entry["state"] == {} and "TypeError" in entry["failed"]
    (entry,) = decide(ControlLog(), "facts", Doubling(), {"v": float("nan")}, 0, 10).entries
    assert entry["probe"] == {"v": None}


def test_another_record_is_refused(tmp_path):
    path = tmp_path / "control.jsonl"
    log = played([0.1, 0.9, 0.1])
    meta = log.meta()
    for text in ("", "\n".join(reversed(log.lines)) + "\n", "\n".join(log.lines[:2]) + "\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="is not the record"):
            read_log(path, meta)
    assert read_log(tmp_path / "absent", ControlLog().meta()) == ControlLog()
