"""Sweeps of real runs, really killed: nothing finished is done again, nothing interrupted is lost."""

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab import errors
from mixlab.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from mixlab.report.sweeps import as_text, sweep_table
from mixlab.sweep import Run, _cores, _slug, plan_runs, slurm_script, values
from tests.stores import some_texts, write_config, write_store

ROOT = Path(__file__).resolve().parent.parent
STEPS = 600  # so many that no run ends before it is killed


@pytest.mark.parametrize(
    ("vary", "expected"),
    [
        ("schedule.peak=1e-3,3e-3", ("schedule.peak", ["1e-3", "3e-3"])),
        ("--config.mix=[1,2],(3,4),x", ("mix", ["[1,2]", "(3,4)", "x"])),
        ("name=a=b", ("name", ["a=b"])),
    ],
)
def test_values(vary, expected):
    assert values(vary) == expected


@pytest.mark.parametrize("vary", ["peak", "=1,2", "peak=1,", "peak=", "peak=1,1"])
def test_values_that_cannot_be(vary):
    with pytest.raises(UserError, match=r"--vary="):
        values(vary)


@given(st.lists(st.text(min_size=1), min_size=2, max_size=2, unique=True))
def test_folders_tell_settings_apart(labels):
    slugs = [_slug(label) for label in labels]
    assert slugs[0] != slugs[1] and all("/" not in slug and len(slug.encode()) <= 120 for slug in slugs)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")
@pytest.mark.parametrize("at_once", [2, 3, 5])
def test_every_slot_has_its_share_of_the_cores(monkeypatch, at_once):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 10)))
    shares = [_cores(slot, at_once) for slot in range(at_once)]
    assert set.union(*shares) == set(range(2, 10)) and sum(map(len, shares)) == 8
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def finished(folder: Path, setting: dict, seed: int, value: float, outcome="complete") -> Run:
    run = Run(setting, seed, folder / f"{setting['x']}-{seed}", [], {})
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps({"exit": outcome}))
    (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "eval/macro/loss": value}) + "\n")
    return run


def test_table_over_seeds(tmp_path):
    runs = [finished(tmp_path, {"config": "c", "x": "1"}, seed, v) for seed, v in enumerate([1.0, 2.0, 4.5])]
    runs += [
        finished(tmp_path, {"config": "c", "x": "2"}, 0, 3.0),
        finished(tmp_path, {"config": "c", "x": "2"}, 2, 6.0),
    ]
    runs += [finished(tmp_path, {"config": "c", "x": "2"}, 1, 9.0, "diverged")]
    first, second = sweep_table(runs, ["eval/macro/loss"])
    told = first["metrics"]["eval/macro/loss"]
    assert told["mean"] == 2.5
    assert np.isclose(told["interval95"], 4.302653 * np.std([1, 2, 4.5], ddof=1) / 3**0.5)  # Student's t, 2 degrees
    assert second["metrics"]["eval/macro/loss"]["values"] == {"0": 3.0, "2": 6.0}
    apart = second["metrics"]["eval/macro/loss"]["from_first"]  # by seeds that both have
    assert apart["values"] == {"0": 2.0, "2": 1.5} and apart["mean"] == 1.75
    assert np.isclose(apart["interval95"], 12.7062 * 0.25)  # Student's t, 1 degree; the standard error is a quarter
    assert told["from_first"]["mean"] == 0 and second["seeds"] == {"0": "complete", "2": "complete", "1": "diverged"}
    lines = as_text([first, second]).splitlines()
    assert lines[0].split() == ["x", "seeds", "eval/macro/loss", *["from", "the", "first"]]  # one and the same config
    assert lines[1].endswith("2.5000 ± 4.4783") and "2 of 3, 1 diverged" in lines[2]
    assert lines[2].endswith("+1.7500 ± 3.1766")
    with pytest.raises(UserError, match="did you mean eval/macro/loss"):
        sweep_table(runs, ["eval/macro/los"])


@pytest.mark.parametrize(("code", "queued"), [(0, False), (EXIT_PREEMPTED, True), (EXIT_USER_ERROR, False)])
def test_job_array(tmp_path, code, queued):
    """The script runs as SLURM would run it; srun and scontrol stand in for SLURM's."""
    runs = [finished(tmp_path / "a folder", {"x": "1"}, seed, 1.0) for seed in range(3)]
    script = slurm_script(["sweep", "--vary=x=[1, 2]"], runs, 2, tmp_path / "a folder")
    assert "#SBATCH --array=0-2%2\n" in script
    (tmp_path / "srun").write_text(
        f'#!/bin/sh\n: > {tmp_path}/begun\nsleep 0.3\necho "$@" > {tmp_path}/ran\nexit {code}\n'
    )
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/queued\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77"}
    with subprocess.Popen(["bash", "-c", script], env=environment) as process:
        until((tmp_path / "begun").exists, process)
        process.send_signal(signal.SIGTERM)  # the script goes on until the run has answered
    assert process.returncode == code
    assert (tmp_path / "ran").read_text() == "sweep --vary=x=[1, 2] --task=1\n"
    assert (tmp_path / "queued").exists() == queued
    assert not queued or (tmp_path / "queued").read_text() == "requeue 77_1\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_config(folder / "small.py", write_store(folder / "store", some_texts()), STEPS)
    return folder


def start(place, *flags):
    command = [
        *(sys.executable, str(ROOT / "tools" / "sweep.py"), "--config=small.py", "--output=out", "--json"),
        *(
            "--config.checkpoint.every_steps=20",
            "--config.evaluation.every_steps=0",
            "--config.evaluation.sample_tokens=0",
        ),
        *("--config.training.on_non_finite=stop", *flags),
    ]
    environment = os.environ | {"MIXLAB_CACHE": str(place / "cache"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=place, **streams)


def records(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.02)
    return found


def children(pid: int) -> dict[str, int]:
    """Workdir -> process id, of the runs that a process has started."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        found |= {w.removeprefix("--workdir="): int(child) for w in words if w.startswith("--workdir=")}
    return found


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
def test_killed_and_started_again(place):
    flags = ("--vary=schedule.peak=1e-3,3e-3,1e30", "--at-once=2")
    folders = [place / "out" / f"small,schedule.peak={peak}" / "seed-0" for peak in ("1e-3", "3e-3", "1e30")]

    # The sweep is killed, and one of its runs; the other goes on by itself.
    sweep = start(place, *flags)
    pids = until(lambda: len(found := children(sweep.pid)) == 2 and found, sweep)
    cores = [os.sched_getaffinity(pid) for pid in pids.values()]
    assert cores[0] | cores[1] == os.sched_getaffinity(0)
    until(lambda: all(len(records(folder)) > 25 for folder in folders[:2]), sweep)
    sweep.kill()
    os.kill(pids[str(folders[1].relative_to(place))], signal.SIGKILL)
    sweep.wait()

    # Asked to stop, it asks its runs to save.
    sweep = start(place, *flags)
    until(lambda: len(records(folders[1])) > 40 and children(sweep.pid), sweep)  # its own run: it now listens
    sweep.send_signal(signal.SIGTERM)
    told = sweep.communicate()[1]
    assert sweep.returncode == EXIT_PREEMPTED, told
    assert f"out/{folders[1].parent.name}/seed-0: st" in told

    # Someone else kills a run: it is started again. One that diverges is a result.
    sweep = start(place, *flags)
    output, told = sweep.communicate()
    assert sweep.returncode == 0, told
    table = json.loads(output)
    assert [row["seeds"]["0"] for row in table] == ["complete", "complete", "diverged"]
    for folder, row in zip(folders[:2], table, strict=False):
        assert [record["step"] for record in records(folder)] == list(range(1, STEPS + 1))
        value = row["metrics"]["eval/macro/bits_per_byte"]["values"]["0"]
        assert value == records(folder)[-1]["eval/macro/bits_per_byte"]
    assert "going on from step" in folders[1].with_suffix(".log").read_text()

    # Nothing is left to do; a table of something else is at once there.
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("seed-*/*")}
    output, told = start(place, *flags, "--metrics=train/loss").communicate()
    assert "3 of 3 runs are finished already" in told and "started" not in told
    assert json.loads(output)[0]["metrics"]["train/loss"]["mean"] == records(folders[0])[-1]["train/loss"]
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("seed-*/*")} == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--vary=schedule.peek=1,2"], "did you mean 'schedule.peak'"),
        (["--vary=seed=1,2"], "given with --seeds"),
        (["--seeds=a"], "--seeds=a"),
        (["--seeds=1,1"], "1 is given twice"),
        (["--at-once=0"], "--at-once=0"),
    ],
)
def test_mistakes_are_told_before_anything_starts(place, capsys, flags, expected):
    main = runpy.run_path(str(ROOT / "tools" / "sweep.py"))["main"]
    code = errors.run(main, [f"--config={place / 'small.py'}", f"--output={place / 'none'}", *flags])
    assert code == EXIT_USER_ERROR and expected in capsys.readouterr().err and not (place / "none").exists()


def test_a_folder_with_other_runs_is_left_alone(place):
    plan = functools.partial(plan_runs, [str(place / "small.py")], [], [0], output=place / "other")
    (run,) = plan(overrides=["--config.stages.0.steps=5"])
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(run.config))
    assert plan(overrides=["--config.stages.0.steps=5", "--config.mesh.data=1"])[0].folder == run.folder
    with pytest.raises(UserError, match=r"another stages.0.steps; name another --output"):
        plan(overrides=[])
