"""Real processes, really killed: what a run reads, computes and writes must not show it."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mixlab import errors, train
from mixlab.errors import EXIT_PREEMPTED
from mixlab.training.checkpoint import Checkpoints
from tests.stores import some_texts, write_config, write_store

STEPS = 40
KILLS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a store of 1,600 tokens (an epoch is 12 steps), a config of it, and compiled programs."""
    folder = tmp_path_factory.mktemp("resume")
    write_config(folder / "config.py", write_store(folder / "store", some_texts()), STEPS)
    return folder


def start(place, workdir, *flags):
    command = [sys.executable, "-m", "mixlab.train", f"--config={place / 'config.py'}", f"--workdir={workdir}", *flags]
    environment = os.environ | {"MIXLAB_CACHE": str(place / "cache"), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def records(workdir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def weights(workdir: Path) -> dict:
    """Checksums of every array of the last checkpoint, parameters and optimiser alike."""
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert max(checkpoints.steps()) == STEPS
        return checkpoints.meta(STEPS)["arrays"]


@pytest.fixture(scope="module")
def uninterrupted(place):
    workdir = place / "uninterrupted"
    finish(start(place, workdir))
    return workdir


def wait_for_step(process, workdir, step):
    while process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") > step:
            return
        time.sleep(0.005)


def test_the_uninterrupted_run_is_whole(uninterrupted):
    lines = records(uninterrupted)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert [line["tokens"] for line in lines] == [128 * step for step in range(STEPS + 1)]
    assert lines[-1]["train/loss"] < 0.9 * lines[1]["train/loss"]
    assert [line["step"] for line in lines if "eval/macro/bits_per_byte" in line] == [0, 10, 20, 30, 40]
    assert {"eval/a/loss", "eval/b/loss", "eval/micro/loss_se"} <= lines[-1].keys()
    for name in ("config.json", "plan.json", "run.json", "samples.json", "baselines.json", "report/index.html"):
        assert (uninterrupted / name).stat().st_size > 0
    assert json.loads((uninterrupted / "run.json").read_text())["exit"] == "complete"


def attempt(cache, arguments):
    os.environ["MIXLAB_CACHE"] = cache
    sys.exit(errors.run(train.main, arguments))


def wait_for_new_record(process, path, before, step):
    """Until this process has written the record of `step` or a later one. before: which file was there when it started."""
    while process.is_alive():
        if path.exists() and path.stat().st_ino != before and path.read_text().count("\n") > step:
            return
        time.sleep(0.002)


def test_killed_at_twenty_random_moments_it_is_the_same_run(place, uninterrupted):
    """While it starts, reads, restores, trains, evaluates and saves; across epoch boundaries (every 12 steps)."""
    workdir, killed = place / "killed", 0
    path = workdir / "metrics.jsonl"
    arguments = [f"--config={place / 'config.py'}", f"--workdir={workdir}"]
    processes = multiprocessing.get_context("forkserver")  # what is imported, is once for all of them
    processes.set_forkserver_preload(["mixlab.training.loop", "mixlab.report.summary", __name__])
    rng = np.random.default_rng(seed := int.from_bytes(os.urandom(4), "little"))
    for step in np.sort(rng.integers(1, STEPS - 1, KILLS)).tolist():
        before = path.stat().st_ino if path.exists() else None
        process = processes.Process(target=attempt, args=(str(place / "cache"), arguments))
        process.start()
        if rng.random() < 0.75:
            wait_for_new_record(process, path, before, step)
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, 3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    process = processes.Process(target=attempt, args=(str(place / "cache"), arguments))
    process.start()
    process.join()
    assert process.exitcode == 0 and killed > KILLS / 2
    assert records(workdir) == records(uninterrupted), seed
    assert weights(workdir) == weights(uninterrupted), seed


def test_asked_to_stop_it_saves_says_so_and_goes_on(place, uninterrupted):
    workdir = place / "stopped"
    process = start(place, workdir)
    wait_for_step(process, workdir, 15)
    process.send_signal(signal.SIGTERM)
    output = finish(process, EXIT_PREEMPTED)
    assert "run the same command again" in output
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert records(workdir)[-1]["step"] == saved < STEPS  # nothing done is lost
    finish(start(place, workdir))
    assert records(workdir) == records(uninterrupted) and weights(workdir) == weights(uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(place, uninterrupted):
    workdir = place / "damaged"
    process = start(place, workdir)
    wait_for_step(process, workdir, 30)
    process.kill()
    process.communicate()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    newest = max((p for p in (workdir / "checkpoints" / str(steps[-1]) / "params").rglob("*") if p.is_file()),
                 key=lambda p: p.stat().st_size)  # fmt: skip
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    output = finish(start(place, workdir))
    assert f"checkpoint of step {steps[-1]}" in output and "falling back" in output
    assert records(workdir) == records(uninterrupted) and weights(workdir) == weights(uninterrupted)


def test_text_that_vanishes(place, uninterrupted):
    """The run that reads it goes on, since it holds the files; the next one names what is missing, and nothing is lost."""
    workdir, shard, aside = place / "vanished", place / "store" / "tokens" / "00000.bin", place / "aside.bin"
    process = start(place, workdir)
    wait_for_step(process, workdir, 10)
    shutil.copy(shard, aside)
    shard.unlink()
    wait_for_step(process, workdir, 20)
    process.kill()
    process.communicate()
    output = finish(start(place, workdir), 2)
    assert "tokens/00000.bin is missing" in output and "Traceback" not in output
    aside.rename(shard)
    finish(start(place, workdir))
    assert records(workdir) == records(uninterrupted) and weights(workdir) == weights(uninterrupted)


def test_a_complete_run_stays_as_it_is(place, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    output = finish(start(place, uninterrupted))
    for told in ("held-out text", "bigram", "What next?", f"mixlab.evaluate --workdir={uninterrupted}"):
        assert told in output
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_config_or_corpus_is_refused_with_the_difference(place, uninterrupted):
    output = finish(start(place, uninterrupted, "--config.seed=1", "--config.optimizer.b2=0.9"), 2)
    assert "seed: was 0, is now 1" in output and "optimizer.b2: was 0.95, is now 0.9" in output
    assert "--allow-change=seed,optimizer.b2" in output and "Traceback" not in output
    assert json.loads((uninterrupted / "config.json").read_text())["seed"] == 0


def test_another_text_is_refused(place, uninterrupted):
    store, aside = place / "store", place / "aside"
    store.rename(aside)
    write_store(store, some_texts(31))
    output = finish(start(place, uninterrupted), 2)
    shutil.rmtree(store)
    aside.rename(store)
    assert "corpus.text: was" in output and "--allow-change=corpus.text" in output


def test_a_change_that_is_meant_goes_on(place, uninterrupted):
    workdir = place / "extended"
    finish(start(place, workdir, "--config.stages.0.steps=20"))
    output = finish(start(place, workdir, "--config.stages.0.steps=22"), 2)
    assert "stages.0.steps: was 20, is now 22" in output
    output = finish(start(place, workdir, "--config.stages.0.steps=22", "--allow-change=stages.0.steps"))
    assert "going on from step 20" in output and "other stages" not in output  # what was read is what would be read
    assert [line["step"] for line in records(workdir)] == list(range(23))
    changes = json.loads((workdir / "run.json").read_text())["changes"]
    assert [(c["step"], c["key"], c["from"], c["to"]) for c in changes] == [(20, "stages.0.steps", 20, 22)]
    assert "stages.0.steps: 20 → 22, from step 20" in (workdir / "report" / "index.html").read_text()
    finish(start(place, workdir, "--config.stages.0.steps=22", "--config.evaluation.every_steps=5"))  # a free key
