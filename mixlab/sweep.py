"""Sweeps: many runs that differ in a few keys and in their seeds, several at a time, and one table of what came out.

A run's folder is named after what sets it apart, so the same command finds what is finished, goes on with what was
interrupted, and a command with more values or seeds only adds to it.
"""

import contextlib
import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mixlab import config as configs
from mixlab.config import FREE_KEYS, with_defaults
from mixlab.errors import EXIT_DIVERGED, EXIT_PREEMPTED, EXIT_USER_ERROR, UserError
from mixlab.schema import differences, plain

ATTEMPTS = 3  # of a run that was killed or has saved and stopped, before one command gives it up
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclass(frozen=True)
class Run:
    """One run of a sweep. setting: what sets it apart besides the seed, as key -> value as written; "config" is the
    file.   arguments: of mixlab.train.   config: as config.json will hold it."""

    setting: dict[str, str]
    seed: int
    folder: Path
    arguments: list[str]
    config: dict

    @property
    def lock(self) -> Path:
        return self.folder.with_suffix(".lock")

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def outcome(self) -> str:
        """What run.json says: "complete", "diverged", "preempted", "running" (or killed); "" before the first start."""
        try:
            return json.loads((self.folder / "run.json").read_text()).get("exit") or ""
        except (OSError, ValueError):
            return ""

    def over(self) -> bool:
        return self.outcome() in ("complete", "diverged")


def values(vary: str) -> tuple[str, list[str]]:
    """ "schedule.peak=1e-3,3e-3" -> the key and its values as written; commas within brackets do not separate.
    UserError for anything else."""
    key, equals, text = vary.removeprefix("--config.").partition("=")
    depths = itertools.accumulate(BRACKETS.get(character, 0) for character in text)
    parts = "".join("\0" if c == "," and not depth else c for c, depth in zip(text, depths, strict=True)).split("\0")
    if not equals or not key or not all(parts):
        raise UserError(
            f"--vary={vary}: write it as --vary=KEY=VALUE,VALUE, for example --vary=schedule.peak=1e-3,3e-3"
        )
    if len(set(parts)) < len(parts):
        raise UserError(f"--vary={vary}: has a value twice; give each once")
    return key, parts


def plan_runs(
    specs: Sequence[str], varied: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], output: Path
) -> list[Run]:
    """The runs of every config file (`file.py[:arg]`) with every combination of the varied values, for every seed.

    UserError, before anything starts: all that is wrong with any of the configurations, and a folder in `output` that holds
    a run of something else."""
    lists = [values(vary) for vary in varied]
    keys = [key for key, _ in lists]
    for kind, names in ("config", list(specs)), ("vary", keys), ("seeds", list(map(str, seeds))):
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"--{kind}: {twice[0]} is given twice; give it once")
    if "seed" in keys:
        raise UserError("--vary=seed: the seeds are given with --seeds=0,1,2")
    runs, problems = [], []
    for spec, *chosen in itertools.product(specs, *(options for _, options in lists)):
        setting = dict(zip(keys, chosen, strict=True))
        folder = output / _slug(",".join([_stem(spec), *(f"{key}={value}" for key, value in setting.items())]))
        changes = [*overrides, *(f"--config.{key}={value}" for key, value in setting.items())]
        for seed in seeds:
            full = [*changes, f"--config.seed={seed}"]
            try:
                config = plain(configs.load(spec, full))
            except UserError as error:
                problems.append(str(error))
                continue
            where = folder / f"seed-{seed}"
            arguments = [f"--config={spec}", *full, f"--workdir={where}"]
            runs.append(Run({"config": spec} | setting, seed, where, arguments, config))
            problems += _strangers(runs[-1])
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return runs


def _strangers(run: Run) -> list[str]:
    """What is wrong with the folder of a run that holds one already."""
    try:
        there = with_defaults(json.loads((run.folder / "config.json").read_text()))
    except (OSError, ValueError):
        return []  # mixlab.train says what is wrong with such a folder
    changed = [key for key in differences(there, run.config) if not key.startswith(FREE_KEYS)]
    listed = ", ".join(changed[:3])
    return [f"{run.folder}: holds a run with another {listed}; name another --output"] if changed else []


def _stem(spec: str) -> str:
    name, _, argument = spec.partition(":")
    return Path(name).stem + (f":{argument}" if argument else "")


def _slug(label: str) -> str:
    """A name for a folder that tells labels apart, also those that differ only in what a folder's name cannot hold."""
    slug = re.sub(r"[^\w.,=+-]", "_", label, flags=re.ASCII)
    return label if slug == label and len(label) <= 120 else f"{slug[:100]}-{sha256(label.encode()).hexdigest()[:8]}"


def train_all(runs: Sequence[Run], at_once: int, tell: Callable[[str], None]) -> int:
    """Trains what is not over yet, `at_once` runs at a time, each on its share of the processor's cores; `tell` is given
    a line for everything that happens. What a run prints goes to the file beside its folder.

    Returns 0 when all runs are over (complete or diverged), EXIT_PREEMPTED when asked to stop (what was running goes on
    from where it saved), EXIT_USER_ERROR when a run cannot be trained as it is configured (no others are started then),
    1 when a run failed otherwise. A run that someone killed, or asked to stop, is started again, a few times."""
    waiting = [run for run in runs if not run.over()]
    if over := len(runs) - len(waiting):
        tell(f"{over} of {len(runs)} runs are finished already")
    running: dict[int, tuple[Run, subprocess.Popen]] = {}  # by slot
    attempts = {run.folder: 0 for run in waiting}
    elsewhere: set[Path] = set()
    codes = {0}
    with _StopRequest() as stop:
        while running or (waiting and not stop.requested and EXIT_USER_ERROR not in codes):
            for slot, (run, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                code = process.returncode
                if code in (0, EXIT_DIVERGED):
                    tell(f"{run.folder}: {run.outcome()}")
                elif stop.requested:
                    tell(f"{run.folder}: stopped")
                elif (code < 0 or code == EXIT_PREEMPTED) and attempts[run.folder] < ATTEMPTS:
                    how = "saved and stopped" if code == EXIT_PREEMPTED else f"killed by signal {-code}"
                    tell(f"{run.folder}: {how}; starting it again")
                    waiting.append(run)
                else:
                    tell(f"{run.folder}: failed with exit code {code}\n{_last_words(run)}")
                    codes.add(EXIT_USER_ERROR if code == EXIT_USER_ERROR else 1)
            for run in list(waiting):
                free = [slot for slot in range(at_once) if slot not in running]
                if not free or stop.requested or EXIT_USER_ERROR in codes:
                    break
                with _claimed(run) as lock:
                    if lock is None:  # left over from a sweep that was killed: it ends by itself
                        if run.folder not in elsewhere:
                            tell(f"{run.folder}: is being trained by another process; waiting for it")
                            elsewhere.add(run.folder)
                        continue
                    waiting.remove(run)
                    if run.over():  # by that other process
                        tell(f"{run.folder}: {run.outcome()}")
                        continue
                    running[free[0]] = run, _start(run, lock, _cores(free[0], at_once))
                attempts[run.folder] += 1
                tell(f"{run.folder}: started")
            stop.pass_on(process for _, process in running.values())
            time.sleep(0.1)
    return EXIT_PREEMPTED if stop.requested else max(codes)


def train_one(run: Run) -> int:
    """Trains one run, as a task of a job array; returns its exit code, or 0 when it is over (complete or diverged)."""
    with _claimed(run) as lock:
        if lock is None:
            raise UserError(f"{run.folder}: is being trained by another process; wait for that one")
        if run.over():
            print(f"{run.folder}: {run.outcome()} already")
            return 0
        process = _start(run, lock, None)
    with _StopRequest() as stop:
        while process.poll() is None:
            stop.pass_on([process])
            time.sleep(0.1)
    if process.returncode not in (0, EXIT_DIVERGED, EXIT_PREEMPTED):
        print(_last_words(run), file=sys.stderr)
    return 0 if process.returncode == EXIT_DIVERGED else abs(process.returncode)


@contextlib.contextmanager
def _claimed(run: Run) -> Iterator[int | None]:
    """A file descriptor that says the run is being trained; None where another process has it. Whoever inherits it
    holds on to the run, also when the sweep itself is killed."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.lock, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock.fileno()


def _start(run: Run, lock: int, cores: set[int] | None) -> subprocess.Popen:
    ours = os.sched_getaffinity(0) if cores else None
    with open(run.log, "a") as log:
        try:
            if cores:
                os.sched_setaffinity(0, cores)  # the child inherits it, and so do all its threads
            command = [sys.executable, "-m", "mixlab.train", *run.arguments]
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,)
            )
        finally:
            if ours:
                os.sched_setaffinity(0, ours)


def _cores(slot: int, at_once: int) -> set[int] | None:
    """The share of this process's cores that belongs to a slot; None where the system cannot pin."""
    if at_once == 1 or not hasattr(os, "sched_setaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    if at_once >= len(cores):
        return {cores[slot % len(cores)]}
    return set(cores[slot * len(cores) // at_once : (slot + 1) * len(cores) // at_once])


def _last_words(run: Run, lines: int = 12) -> str:
    return "\n".join("    " + line for line in run.log.read_text(errors="replace").splitlines()[-lines:])


class _StopRequest:
    """Within, SIGTERM and Ctrl-C ask to stop instead of ending the process."""

    def __init__(self):
        self.requested = False
        self._asked: set[int] = set()
        self._previous: dict = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.requested = True

    def pass_on(self, processes) -> None:
        """Asks each process once, when this one was asked."""
        if self.requested:
            for process in processes:
                if process.pid not in self._asked:
                    self._asked.add(process.pid)
                    process.terminate()


def slurm_script(command: Sequence[str], runs: Sequence[Run], at_once: int, output: Path) -> str:
    """A SLURM job array with a task a run; `command`: of the sweep, without what writes the script."""
    line = shlex.join(command)
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={output.name}
#SBATCH --array=0-{len(runs) - 1}%{at_once}
#SBATCH --output={output}/slurm-%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# Five minutes before its time is up a run is asked to save; it is then queued again. Set what the cluster asks for:
#SBATCH --cpus-per-task=4 --mem=16G --time=04:00:00
# ##SBATCH --gpus-per-task=1 --partition=...

# When all tasks are done: {line} --table
trap : TERM  # the run's to answer; this script says what becomes of it then
srun {line} --task="$SLURM_ARRAY_TASK_ID" &
while wait $!; code=$?; kill -0 $! 2>/dev/null; do :; done  # the signal cuts a wait short
if [ $code = {EXIT_PREEMPTED} ]; then scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; fi
exit $code
"""
