"""Real processes that train one run together, over gloo on this machine."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from mixlab.errors import EXIT_AGAIN, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from mixlab.parallel import distributed
from tests.devices import free_port
from tests.stores import some_texts, write_config, write_store

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40  # so many that no run ends before it is killed


def flags(coordinator=None, processes=None, process=None):
    return Namespace(coordinator=coordinator, processes=processes, process=process)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (flags("here:1"), "belong together"),
        (flags("here:1", 2), "belong together"),
        (flags("here:1", 2, 2), "--process=2: with --processes=2 give 0 to 1"),
        (flags("here", 2, 1), "write it as HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(given, expected):
    with pytest.raises(UserError, match=expected):
        distributed.start(given)


@pytest.mark.parametrize(
    ("environment", "together"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # the job's own shell
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launchers(monkeypatch, environment, together):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    begun: list[tuple] = []
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *given: begun.append(given))
    distributed.start(flags())
    assert begun == ([()] if together else [])


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_config(folder / "config.py", write_store(folder / "store", some_texts()), STEPS)
    lines = [{"context": "ab", "continuation": "c" * n} for n in (3, 1, 2, 5, 4)]  # not as many for each process
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def start(place, workdir, *arguments, devices=1, largest_file=None):
    command = [sys.executable, "-m", "mixlab.train", "--config=config.py", f"--workdir={workdir}"]
    environment = os.environ | {
        "MIXLAB_CACHE": str(place / "cache"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    task = "--config.evaluation.tasks={'quiz': {'files': ['items.jsonl'], 'format': 'continuation'}}"
    odd = "--config.evaluation.rows=3"  # filled up to what two devices divide
    process = subprocess.Popen(
        [*command, "--config.mesh.fsdp=2", odd, task, *arguments], cwd=place, env=environment, **streams
    )
    if largest_file is not None:  # as good as a full disk
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, largest_file))
    STARTED.append(process)
    return process


def start_two(place, workdir, *arguments, limits=(None, None)):
    port = free_port()
    together = (f"--coordinator=localhost:{port}", "--processes=2")
    return [start(place, workdir, *together, f"--process={i}", *arguments, largest_file=limits[i]) for i in range(2)]


def finish(processes, code=0):
    """What each has printed, without gloo's own words, and what it has told on stderr."""
    said = [process.communicate(timeout=900) for process in processes]
    for process, (out, err) in zip(processes, said, strict=True):
        assert process.returncode == code, out + err
    printed = ["".join(line for line in out.splitlines() if not line.startswith("[Gloo]")) for out, _ in said]
    return printed, [err for _, err in said]


def records(workdir) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(processes, workdir, step):
    end = time.monotonic() + 900
    while len(records(workdir)) <= step:
        assert time.monotonic() < end and all(process.poll() is None for process in processes)
        time.sleep(0.01)


def test_two_processes_are_one_run(place):
    """The losses of one process with two devices; stopped by a signal to one of them, and gone on with by one alone."""
    alone, together = place / "alone", place / "together"
    finish([start(place, alone, devices=2)])

    processes = start_two(place, together, "--config.training.hang_seconds=300")
    wait_for_step(processes, together, 3)
    processes[1].send_signal(signal.SIGSTOP)  # slow for a while: no reason to give up
    time.sleep(3)
    processes[1].send_signal(signal.SIGCONT)
    wait_for_step(processes, together, 5)
    processes[1].send_signal(signal.SIGTERM)
    printed, _ = finish(processes, EXIT_PREEMPTED)
    assert "stopped at step" in printed[0] and printed[1] == ""  # one of them speaks
    facts = json.loads((together / "run.json").read_text())
    assert facts["exit"] == "preempted" and facts["devices"].startswith("2 x")
    assert json.loads((together / "plan.json").read_text()) == json.loads((alone / "plan.json").read_text())
    read = records(together)[-1]["step"]
    assert 6 <= read < STEPS

    finish([start(place, together, devices=2)])
    assert (together / "report" / "index.html").is_file()
    one, two = records(alone), records(together)
    assert [record["step"] for record in two] == [record["step"] for record in one] == list(range(STEPS + 1))
    for key in ("train/loss", "train/grad_norm", "eval/macro/bits_per_byte", "eval/quiz/bits_per_byte"):
        ours, theirs = ([record[key] for record in kind if key in record] for kind in (two, one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_two_processes_finish_and_refuse_together(place):
    """To the end, report and samples included; then the same folder with another configuration is refused by both."""
    workdir = place / "whole"
    short = "--config.stages.0.steps=4"
    printed, _ = finish(start_two(place, workdir, short))
    assert "report: " in printed[0] and printed[1] == ""
    assert json.loads((workdir / "run.json").read_text())["exit"] == "complete"
    assert len(json.loads((workdir / "samples.json").read_text())["samples"]) > 0
    before = (workdir / "run.json").read_bytes()
    _, told = finish(start_two(place, workdir, short, "--config.seed=3"), EXIT_USER_ERROR)
    assert all("holds a run of something else" in text for text in told)
    assert (workdir / "run.json").read_bytes() == before


def test_a_process_that_is_killed_or_fails_ends_the_other(place):
    """Killed: the other ends to be started again, and the run goes on. Its disk full: the other ends for that reason too."""
    alone, workdir = place / "alone", place / "lost"
    processes = start_two(place, workdir)
    wait_for_step(processes, workdir, 5)
    processes[1].kill()
    _, told = processes[0].communicate(timeout=120)
    assert processes[0].returncode == EXIT_AGAIN, told
    assert told.splitlines()[-1].startswith("error: another process of the run is gone") and "Traceback" not in told
    processes[1].communicate()

    processes = start_two(place, workdir, limits=(None, 100_000))
    _, told = finish(processes, EXIT_USER_ERROR)
    assert "error: process 1 has failed: checkpoint: cannot" in told[0] and "File too large" in told[1]
    assert (workdir / "failed-1.json").exists()  # which does not concern the next two
    finish(start_two(place, workdir))
    one, two = records(alone), records(workdir)
    np.testing.assert_allclose([r["train/loss"] for r in two[1:]], [r["train/loss"] for r in one[1:]], rtol=1e-5)
