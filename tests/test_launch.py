"""The launch files: what they start, and what they make of a run's exit code. Stand-ins take the place of the programs."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from mixlab.errors import EXIT_ABORTED, EXIT_AGAIN, EXIT_DIVERGED, EXIT_PREEMPTED

LAUNCH = Path(__file__).resolve().parent.parent / "launch"


def stand_in(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("code", [0, EXIT_DIVERGED, EXIT_PREEMPTED, EXIT_AGAIN])
def test_slurm(tmp_path, code):
    """A run that has saved, or lost a process, is queued again; others end as they ended."""
    stand_in(tmp_path, "srun", f'trap "" TERM; echo "$@" > {tmp_path}/ran; sleep 0.3; exit {code}')
    stand_in(tmp_path, "scontrol", f'echo "$@" > {tmp_path}/queued')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "py"}
    with subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--config=a b.py"], env=environment) as process:
        while not (tmp_path / "ran").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == code
    assert (tmp_path / "ran").read_text() == "--kill-on-bad-exit=1 py -m mixlab.train --config=a b.py\n"
    assert (tmp_path / "queued").exists() == (code in (EXIT_PREEMPTED, EXIT_AGAIN))


def test_local(tmp_path):
    """Every process gets its number and the same coordinator; the first code that is not 0 is the answer."""
    body = f'for last; do :; done; echo "$@" > {tmp_path}/${{last#--process=}}; [ "$last" != --process=1 ] || exit 3'
    environment = os.environ | {"PYTHON": stand_in(tmp_path, "py", body), "PORT": "4567"}
    done = subprocess.run(["bash", LAUNCH / "local.sh", "3", "--config=c.py"], env=environment)
    assert done.returncode == EXIT_DIVERGED
    for process in range(3):
        flags = f"--coordinator=localhost:4567 --processes=3 --process={process}"
        assert (tmp_path / str(process)).read_text() == f"-m mixlab.train --config=c.py {flags}\n"


@pytest.mark.parametrize(
    ("code", "restarts", "times"), [(EXIT_AGAIN, 2, 3), (EXIT_ABORTED, 0, 1), (EXIT_DIVERGED, 2, 1)]
)
def test_local_starts_again(tmp_path, code, restarts, times):
    """All processes, when one is lost, and not more often than was said."""
    body = f'for last; do :; done; echo >> {tmp_path}/${{last#--process=}}; [ "$last" != --process=1 ] || exit {code}'
    environment = os.environ | {"PYTHON": stand_in(tmp_path, "py", body), "PORT": "4567", "RESTARTS": str(restarts)}
    done = subprocess.run(["bash", LAUNCH / "local.sh", "2", "--config=c.py"], env=environment)
    assert done.returncode == code
    assert [(tmp_path / process).read_text() for process in "01"] == ["\n" * times] * 2


def test_local_passes_the_signal_on(tmp_path):
    body = f'trap "exit {EXIT_PREEMPTED}" TERM; touch {tmp_path}/up-$BASHPID; for i in {{1..600}}; do sleep 0.05; done'
    environment = os.environ | {"PYTHON": stand_in(tmp_path, "py", body), "PORT": "4567"}
    with subprocess.Popen(["bash", LAUNCH / "local.sh", "2", "--config=c.py"], env=environment) as process:
        while len(list(tmp_path.glob("up-*"))) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
    assert process.returncode == EXIT_PREEMPTED


def test_jobset():
    """What is written there is a JobSet whose machines, chips and topology agree."""
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert spec["parallelism"] == spec["completions"] == rows * columns // chips
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["command"][:3] == ["python", "-m", "mixlab.train"]
