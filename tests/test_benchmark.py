"""The benchmark's measurements, on small settings: that they measure what they say, not how fast this machine is."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.model.presets import gpt2

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import benchmark  # noqa: E402
from speed import clock, data, kernels, profile, trains  # noqa: E402
from speed.steps import Setting, Step, measure  # noqa: E402

TINY = gpt2(layers=1, d_model=32, heads=2, ffn_width=64, vocab_size=64, context_length=64)


def test_a_step_is_timed_and_traced(tmp_path):
    found = measure(Setting(TINY, 2, 64), 3, tmp_path)
    share = next(value for key, value in found.items() if key.startswith("share of the peak"))
    assert 0 < share < 1 and found["tokens a step"] == 128
    assert found["tokens a second of cpu time"] == pytest.approx(128 / found["seconds a step by cpu time"])
    rows = profile.longest(tmp_path)
    assert rows and rows == sorted(rows, key=lambda row: -row[1])
    assert all(seconds > 0 and calls >= 1 for _, seconds, calls in rows)
    gaps, whole = profile.idle(tmp_path)
    assert 0 < gaps < whole < 60


def test_idle_is_what_no_program_covers():
    class Event(NamedTuple):
        start_ns: int
        duration_ns: int

    seconds = 10**9
    events = [Event(s * seconds, d * seconds) for s, d in ((7, 2), (0, 4), (1, 1), (3, 2), (9, 1))]  # idle from 5 to 7
    assert profile._gaps(events) == (2, 10) and profile._gaps([]) == (0, 0)


def test_packed_rows_hold_documents():
    batch = Step(Setting(TINY, 4, 64, document_tokens=16))._batch
    first = batch["positions"] == 0
    assert np.array_equal(np.cumsum(first, axis=1), batch["segment_ids"]) and batch["segment_ids"].max() > 1
    steps = np.diff(batch["positions"], axis=1)
    assert ((steps == 1) | first[:, 1:]).all()


def test_documents_are_numbered_from_1():
    """0 would be padding, which comes last: kernels would find that it may be seen from everywhere."""
    ids = np.asarray(kernels.packed(np.random.default_rng(0), 4, 256, 16))
    assert ids.min() == 1 and ids.max() > 8 and set(np.unique(np.diff(ids, axis=1))) == {0, 1}


def test_kernels_beside_their_plain_forms():
    told = kernels.attention([(2, 64, 2, 8, None), (2, 64, 2, 8, 16)], "float32", 1)
    assert len(told) == 8 and all(value > 0 for value in told.values())
    told = kernels.loss(128, 16, 64, "float32", 1)
    assert told["ours: temporary memory, MiB"] > 0 and told["all logits: seconds of cpu time"] > 0


def test_data(tmp_path):
    told = data.reading(600_000) | data.index(20_000)
    assert told["index: bytes a document"] < 17
    assert sum("first batch at step 1,000,000" in key for key in told) == 4
    assert sum("metadata: more CPU time than without" in key for key in told) == 2
    assert sum("allocated memory, growth" in key for key in told) == 12
    assert all(np.isfinite(value) for value in told.values())


def test_times_are_medians_of_what_counts():
    calls = []
    times = clock.timed(lambda: calls.append(1) or jnp.ones(1), 5, warm_up=2)
    assert len(calls) == 7 and len(times.cpu) == len(times.wall) == 5
    assert clock.Times([1, 5, 3], [2, 2, 9]).of("cpu") == 3


def test_figures_kept_stand_beside_new_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "HISTORY", tmp_path / "history.jsonl")
    values = iter([2.0, 3.0, 3.0])
    monkeypatch.setattr(trains, "loss", lambda dtype: {"seconds": next(values), "dtype": dtype})
    benchmark.main(["loss", "--keep"])
    benchmark.main(["loss"])
    assert "1.50 of" in capsys.readouterr().out
    benchmark.main(["loss", "--dtype=bfloat16"])  # another command
    assert " of " not in capsys.readouterr().out
    (kept,) = map(json.loads, (tmp_path / "history.jsonl").read_text().splitlines())
    assert kept["command"] == "python tools/benchmark.py loss" and kept["seconds"] == 2.0


def test_no_accelerator_here():
    with pytest.raises(UserError, match="has none"):
        trains.accelerator(None)


def test_kernels_agree_with_whole_score_matrices():
    assert kernels.here() == ["blockwise"]
    found = kernels.agreement("blockwise")
    assert len(found) == 2 and all(0 < worst < 0.02 for worst in found.values())


def test_a_part_that_fails_or_comes_too_late_leaves_the_others_alone(monkeypatch):
    """The accelerator's parts, with stand-ins for the models and a clock that runs out after the fifth."""
    now = iter(range(100))
    monkeypatch.setattr(trains, "ACCELERATOR_SECONDS", 5)
    monkeypatch.setattr(trains.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(trains.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(kernels, "agreement", lambda kernel: {kernel: 1 / (kernel != "triton")})
    monkeypatch.setattr(trains, "measure", lambda setting, repeats, trace: {"rows": setting.rows})
    found = trains.accelerator(None)
    assert found.pop("agreement, triton") == "failed: ZeroDivisionError: division by zero"
    assert found.pop("blockwise") == found.pop("cudnn") == 1
    assert found.pop("GPT-2 124M, 1024: rows") == 32 and found.pop("GPT-2 1.5B, 2048: rows") == 4
    assert found.pop("formula") and set(found.values()) == {"left out: 5 seconds were over"}
    assert {"buckets", "loss", "Llama 190M, 8192, packed"} < found.keys()


def test_a_step_is_one_devices(monkeypatch):
    """Whose peak its speed is a share of."""
    another = SimpleNamespace(platform="gpu", process_index=0)
    monkeypatch.setattr(jax, "devices", lambda real=jax.devices: [*real(), another])
    assert measure(Setting(TINY, 2, 64), 1)["tokens a step"] == 128


def test_on_a_machine_with_an_accelerator_step_and_peer_still_meet_on_one_core(monkeypatch):
    told = iter([3.0, 2.0, 6.0] * 2)
    places = []

    def run(command, env, **_):
        places.append(env["JAX_PLATFORMS"])
        key = "seconds a step by cpu time" if "step" in command else "median_cpu_seconds_per_step"
        return SimpleNamespace(returncode=0, stdout=json.dumps({key: next(told), "machine": "a core"}))

    monkeypatch.setattr(trains.subprocess, "run", run)
    monkeypatch.setattr(trains.importlib.util, "find_spec", lambda name: True)
    found = trains.beside_peer(2)
    assert found["machine"] == "a core" and places == ["cpu"] * 6
    assert found["mixlab / pytorch float32, tokens per CPU-second"] == 2
    assert found["mixlab bfloat16 / pytorch float32, tokens per CPU-second"] == 3


def test_figures_are_kept_whatever_becomes_of_the_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "HISTORY", tmp_path / "history.jsonl")
    monkeypatch.setattr(trains, "accelerator", lambda trace: {"seconds": 1.0})
    with pytest.raises(ValueError):  # there is none
        benchmark.main(["accelerator", "--keep", f"--profile={tmp_path}"])
    assert json.loads((tmp_path / "history.jsonl").read_text())["seconds"] == 1.0


def test_json_is_one_object_with_a_trace_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trains, "accelerator", lambda trace: {"seconds": 1.0})
    monkeypatch.setattr(profile, "longest", lambda folder: [("product", 0.5, 2)])
    monkeypatch.setattr(profile, "idle", lambda folder: (0.0, 1.0))
    benchmark.main(["accelerator", "--json", f"--profile={tmp_path}"])
    told = capsys.readouterr()
    assert json.loads(told.out)["seconds"] == 1.0 and "product" in told.err and "idle" in told.err


def test_the_peers_step_is_of_the_same_size():
    torch_peer = pytest.importorskip("benchmark_torch_peer", exc_type=ImportError)
    peer = torch_peer.measure(layers=1, d_model=32, heads=2, ffn_width=64, vocab_size=128, length=64, rows=2, steps=1)
    ours = dataclasses.replace(TINY, vocab_size=128)
    assert peer["parameters"] == measure(Setting(ours, 2, 64), 1)["parameters"]
