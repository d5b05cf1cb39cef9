"""Several processes that train one run together: how they find each other, and what one of them does for all.

Under SLURM (srun), Open MPI and on TPU pods (GKE and Google's virtual machines) they are found by themselves; elsewhere by
--coordinator=HOST:PORT --processes=N --process=I.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixlab import errors
from mixlab.errors import LostError, UserError

# How the loss of another process shows, in the words of gloo, NCCL, and JAX's coordination service.
LOST = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|socket closed|coordination service|heartbeat|barrier|"
    r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
TOLD_SECONDS = 3.0  # in which a process that fails has told the others why

Notes = dict[Path, int]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 of several runs; the port is free there"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def start(flags: argparse.Namespace) -> None:
    """Joins the other processes, if this one was started with others. Call it before anything touches a device: from then on
    `jax.devices()` are those of all. UserError when the flags are incomplete or contradict each other."""
    given = (flags.coordinator, flags.processes, flags.process)
    if given == (None, None, None):
        if _launched_together():
            _join()
        return
    if None in given:
        raise UserError("--coordinator, --processes and --process belong together; give all three, or none")
    if not 0 <= flags.process < flags.processes:
        raise UserError(
            f"--process={flags.process}: with --processes={flags.processes} give 0 to {flags.processes - 1}"
        )
    if not flags.coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"--coordinator={flags.coordinator}: write it as HOST:PORT")
    _join(*given)


def _join(*given) -> None:
    # On CPU the collectives of two programs in flight at once may wait for each other; accelerators have them in order.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(*given)


def _launched_together() -> bool:
    """Whether a launcher that JAX knows has started this process as one of several. A SLURM job's own shell is none of its
    tasks, so SLURM_NTASKS does not count."""
    if any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return (
        chips
        and importlib.util.find_spec("libtpu") is not None
        and os.environ.get("JAX_PLATFORMS") in (None, "", "tpu")
    )


def is_first() -> bool:
    """Whether this process writes what there is one of: files, the console."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"mixlab: {what}")


def first_alone(action: Callable[[], None]) -> None:
    """Runs `action` on process 0 while the others wait. When it raises a UserError there, all processes do."""
    problem = None
    if is_first():
        try:
            action()
        except UserError as error:
            problem = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(problem is not None)):
        raise problem or UserError("process 0 cannot go on; it says why")
    if problem:
        raise problem


@contextlib.contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Within, only process 0 prints."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def leaving_together(folder: Path) -> Iterator[None]:
    """Within, what ends one of several processes ends all of them soon, and with an exit code for the same reason. A process
    that fails leaves at once, where JAX would have it wait for the others, and says why in failed-<process>.json of the run's
    `folder`; those that lose it end with its code, or with EXIT_AGAIN if it could not say (it was killed, its machine died)."""
    if not jax.distributed.is_initialized():
        yield
        return
    over, earlier = threading.Event(), _notes(folder)
    threading.Thread(target=_follow, args=(folder, earlier, over), name="others", daemon=True).start()
    try:
        yield
    except BaseException as error:
        over.set()
        code = _leave(error, folder, earlier)
        if (
            is_first()
        ):  # it holds the service without which JAX aborts the others, who may be leaving for the same reason
            time.sleep(TOLD_SECONDS)
        _exit(code)
    finally:
        over.set()


def _follow(folder: Path, earlier: Notes, over: threading.Event) -> None:
    """Ends this process when another has said that it failed: this one may be waiting for it."""
    while not over.wait(TOLD_SECONDS / 2):
        if told := _told(folder, earlier):
            _exit(_repeat(told))


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _repeat(told: dict) -> int:
    print(f"error: process {told['process']} has failed: {told['said']}", file=sys.stderr)
    return told["code"]


def _leave(error: BaseException, folder: Path, earlier: Notes) -> int:
    """Says what has happened, and returns the exit code for it."""
    lost = not isinstance(error, UserError | LostError) and LOST.search(str(error))
    if lost:
        time.sleep(TOLD_SECONDS)
        if told := _told(folder, earlier):
            return _repeat(told)
        reason = str(error).strip().splitlines()[0][:200]
        error = LostError(f"another process of the run is gone ({reason})")

    def again(_):
        raise error

    try:
        code = errors.run(again, [])
    except BaseException:
        traceback.print_exc()
        code = 1
    if not lost and _began(folder):
        said = {"process": jax.process_index(), "code": code, "said": str(error)}
        with contextlib.suppress(OSError):
            (folder / f"failed-{jax.process_index()}.json").write_text(json.dumps(said))
    return code


def _notes(folder: Path) -> Notes:
    """What processes that failed have left there, an earlier attempt's too: path -> time of writing."""
    found = {}
    for path in folder.glob("failed-*.json"):
        with contextlib.suppress(OSError):  # just being cleared away
            found[path] = path.stat().st_mtime_ns
    return found


def _told(folder: Path, earlier: Notes) -> dict | None:
    """What another process that has failed since `earlier` says of it."""
    for path, written in _notes(folder).items():
        if earlier.get(path) != written:
            with contextlib.suppress(OSError, ValueError):  # not written whole yet
                return json.loads(path.read_text())
    return None


def _began(folder: Path) -> bool:
    """Whether the folder is that of a run which these processes have begun or gone on with."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "run.json").read_text()).get("exit") == "running"
    return False
