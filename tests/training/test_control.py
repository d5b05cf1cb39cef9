"""Decisions during a run, without a run: the controller of Train Once, Answer All (algorithm 1) on its golden trace."""

import json
from types import SimpleNamespace

import pytest

from mixlab.inject.control_log import ControlLog, read_log
from mixlab.inject.experiments.knowledge import Knowledge
from mixlab.inject.grid import Grid
from mixlab.training import control
from mixlab.training.control import Control

GOLDEN = [  # step, probability -> texts, first of them
    (0, 1e-9, 64, 0), (1000, 2e-4, 128, 64), (2000, 3e-4, 256, 192), (3000, 5e-4, 512, 448), (4000, 0.01, 256, 960),
    (5000, 0.0041, 256, 1216), (6000, 0.0048, 256, 1472), (7000, 0.02, 128, 1728), (8000, 0.0, 256, 1856),
    (9000, 0.0, 512, 2112),
]  # fmt: skip


@pytest.fixture
def controlled(monkeypatch, tmp_path):
    """Makes the control of a run of 100,000 steps whose stream is not looked at; its insertions are the decisions."""

    def follow(config, stream, experiments, tokenizer, entries):
        return SimpleNamespace(insertions=None, grid=stream.grid, decided=[*stream.decided, *entries])

    monkeypatch.setattr(control, "follow", follow)
    facts = Knowledge(target=0.08, first_texts=64, caps=((0, 256),))
    config = SimpleNamespace(total_steps=100_000, enabled_experiments=("facts",))
    stream = SimpleNamespace(insertions=None, grid=Grid.uniform(100_000, 1, 8), decided=[])
    data = SimpleNamespace(stream=stream, experiments={"facts": (facts, None)}, tokenizer=None)
    return lambda log=ControlLog(): Control(config, data, log, tmp_path)


def test_the_golden_trace_whatever_interrupts_it(controlled, tmp_path):
    whole = None
    for interruptions in ((), (3,), (2, 5, 6), range(10)):
        running = controlled()
        for number, (step, value, texts, first) in enumerate(GOLDEN):
            if number in interruptions:  # a crash after more decisions than the checkpoint knows of
                meta = running.log.meta()
                running.decide(step, {"facts": {"probability": 0.5}})
                running = controlled(read_log(tmp_path / "control.jsonl", meta))
            assert running.due(step) == ["facts"] and not running.due(step + 1)
            (entry,) = running.decide(step, {"facts": {"probability": value}})
            assert not running.due(step)
            assert entry["decision"] == {"texts": texts, "first": first}
        assert entry["state"]["emitted"] == 2624
        assert [e["step"] for e in running.stream.decided] == [step for step, *_ in GOLDEN]
        written = [json.loads(line) for line in (tmp_path / "control.jsonl").read_text().splitlines()]
        assert written == list(running.log.entries)
        whole = whole or running.log
        assert running.log == whole
    assert not running.due(100_000)  # nothing is left to insert into


def test_what_has_no_place_is_not_inserted_and_training_goes_on(controlled, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no place")

    running = controlled()
    running.decide(0, {"facts": {"probability": 0.0}})
    stream = running.stream
    with monkeypatch.context() as patch:
        patch.setattr(control, "follow", refuse)
        (entry,) = running.decide(1000, {"facts": {"probability": 0.0}})
    assert entry["decision"] is None and entry["failed"] == "RuntimeError: no place"
    assert running.stream is stream
    (entry,) = running.decide(2000, {"facts": {"probability": 0.0}})  # as if the failed interval had not been
    assert entry["decision"] == {"texts": 128, "first": 64}
