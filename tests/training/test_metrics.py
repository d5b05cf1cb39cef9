import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.training.metrics import MetricsLog, mfu, peak_flops


def records(workdir):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_one_line_a_step_assembled_from_parts(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.add(0, {"eval/a/loss": 9.0})
        log.add(1, {"tokens": 10, "train/loss": jnp.float32(0.5)})
        assert [r["step"] for r in records(tmp_path)] == [0]  # step 1 is still open
        log.add(1, {"perf/mfu": np.float64(0.25)})
        log.add(4, {"tokens": np.int64(40), "train/loss": 2})
        assert records(tmp_path)[1] == {"step": 1, "tokens": 10, "train/loss": 0.5, "perf/mfu": 0.25}
        log.flush()
        assert records(tmp_path)[2] == {"step": 4, "tokens": 40, "train/loss": 2}
        log.flush()
    assert len(records(tmp_path)) == 3


def test_a_record_is_written_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.add(5, {"train/loss": 1.0})
    with pytest.raises(ValueError, match="twice"):
        log.add(5, {"train/loss": 1.0})
    with pytest.raises(ValueError, match="late"):
        log.add(4, {"train/loss": 1.0})
    log.flush()
    with pytest.raises(ValueError, match="late"):
        log.add(5, {"perf/mfu": 1.0})
    log.close()


def test_what_is_not_finite_becomes_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.add(
            1,
            {
                "train/loss": float("nan"),
                "train/grad_norm": jnp.inf,
                "x": -np.inf,
                "y": None,
                "z": jnp.float32(1),
            },
        )
    assert records(tmp_path) == [
        {"step": 1, "train/loss": None, "train/grad_norm": None, "x": None, "y": None, "z": 1.0}
    ]


@pytest.mark.parametrize("torn", ["", '{"step": 9, "train/lo', '{"step": 9}', "\x00\x00\x00"])
def test_resume_cuts_off_what_will_be_written_again(tmp_path, torn):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 9):
            log.add(step, {"train/loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with MetricsLog(tmp_path, resume_step=5) as log:
        assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5]
        with pytest.raises(ValueError, match="late"):
            log.add(5, {"train/loss": 0})
        log.add(6, {"train/loss": 66})
    assert [r["train/loss"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 66]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]
    with MetricsLog(tmp_path, resume_step=6):  # twice from the same point: nothing changes
        pass
    assert [r["train/loss"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 66]


def test_a_new_run_loses_no_record_of_an_earlier_attempt(tmp_path):
    for loss in (1, 2):
        with MetricsLog(tmp_path) as log:
            log.add(1, {"train/loss": loss})
    assert records(tmp_path) == [{"step": 1, "train/loss": 2}]
    assert json.loads((tmp_path / "metrics.jsonl.previous").read_text())["train/loss"] == 1


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLog(tmp_path / "run", tensorboard=True) as log:
        log.add(1, {"train/loss": 1.0})
    assert not (tmp_path / "run").exists()


def events(directory):
    """{key: [(step, value), ...]} as a viewer sees them, after the purges."""
    from tensorboardX.proto import event_pb2

    seen = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        raw, at = path.read_bytes(), 0
        while at < len(raw):  # TFRecord: length (8), its crc (4), data, crc (4)
            length = int.from_bytes(raw[at : at + 8], "little")
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + length])
            at += length + 16
            if event.HasField("session_log"):
                seen = [item for item in seen if item[1] < event.step]
            seen += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    by_key = {}
    for key, step, value in seen:
        by_key.setdefault(key, []).append((step, value))
    return by_key


def test_tensorboard_has_the_same_numbers_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        for step in range(1, 6):
            log.add(step, {"tokens": step * 10, "train/loss": 1 / step})
    with MetricsLog(tmp_path, tensorboard=True, resume_step=3) as log:
        for step in range(4, 8):
            log.add(step, {"tokens": step * 10, "train/loss": float("nan") if step == 7 else 2 / step})
    shown = events(tmp_path / "tensorboard")
    written = records(tmp_path)
    assert set(shown) == {"tokens", "train/loss"}
    assert [step for step, _ in shown["train/loss"]] == [r["step"] for r in written] == list(range(1, 8))
    assert [value for _, value in shown["tokens"]] == [r["tokens"] for r in written]
    for (_, value), record in zip(shown["train/loss"][:-1], written, strict=False):
        assert value == pytest.approx(record["train/loss"], rel=1e-6)
    assert math.isnan(shown["train/loss"][-1][1]) and written[-1]["train/loss"] is None


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"mixlab\[{name}\]"):
        MetricsLog(tmp_path, **{name: True})


def offline_records(folder):
    """{step: record} as Weights & Biases keeps them for a later upload, in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        raw, at, parts = path.read_bytes(), 7, []
        while at + 7 <= len(raw):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
            parts.append(raw[at + 7 : at + 7 + length])
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record.FromString(b"".join(parts))
                parts = []
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    values = {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}
                    found[record.history.step.num] = values
    return found


def test_tensorboard_and_wandb_show_what_the_record_has(trunk, tmp_path, monkeypatch):
    """All numbers of a run, of which it is told twice what it did after step 10, with the packages themselves."""
    pytest.importorskip("tensorboardX")
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: nothing was logged with it")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    lines = [json.loads(line) for line in (trunk / "metrics.jsonl").read_text().splitlines()]
    lines[-1] |= {"eval/a.task-1/acc": 0.25, "train/loss": float("nan")}
    for resume_step, told in ((None, lines[:14]), (10, lines[11:])):
        with MetricsLog(tmp_path, tensorboard=True, wandb=True, resume_step=resume_step) as log:
            for line in told:
                log.add(line["step"], {key: value for key, value in line.items() if key != "step"})
        wandb.teardown()  # as the end of the process does
    written = {record.pop("step"): record for record in records(tmp_path)}
    assert list(written) == [line["step"] for line in lines]
    uploaded = offline_records(tmp_path / "wandb")
    shown = {step: {} for step in written}
    for key, values in events(tmp_path / "tensorboard").items():
        for step, value in values:
            shown[step][key] = value
    for step, record in written.items():
        assert set(record) == set(uploaded[step]) == set(shown[step])
        for key, value in record.items():
            if value is None:
                assert math.isnan(shown[step][key]) and math.isnan(uploaded[step][key])
            else:
                assert uploaded[step][key] == value and shown[step][key] == pytest.approx(value, rel=1e-6)
    number = (tmp_path / "wandb_id.txt").read_text()
    assert "eval/a.task-1/acc" in shown[20] and number.isalnum()
    # Each part of the run has a folder of its own; two of one second differ in what wandb puts behind the id.
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(f"-{number}" in name for name in folders), folders


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    device = types.SimpleNamespace(device_kind=kind)
    assert peak_flops(device) == peak
    if peak:
        assert mfu(6e9, 1e5, [device, device]) == pytest.approx(6e14 / (2 * peak))
    else:
        assert mfu(6e9, 1e5, [device, device]) is None
