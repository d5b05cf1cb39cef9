"""The failures of a file system, told as one message."""

import contextlib
import errno
import os
from pathlib import Path

from mixlab.errors import DISK_FULL, UserError

REASONS = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EIO", "EFBIG")
PROBE_BYTES = 1 << 18


@contextlib.contextmanager
def writing_checkpoints(directory: Path, what: str):
    """Within, a full disk, a missing permission and their like raise UserError("cannot {what} in ..."), in
    whichever form orbax and tensorstore report them. Other exceptions pass."""
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        names = os.listdir(directory) if directory.is_dir() else []
        on_disk = sorted(int(name) for name in names if name.isdigit())
        raise UserError(
            f"checkpoint: cannot {what} in {directory}: {reason}. Checkpoints on disk: {on_disk or 'none'}. "
            "Free space or choose another folder, and run again to go on from the newest"
        ) from error


@contextlib.contextmanager
def writing_run(workdir: Path):
    """Within, a full disk raises the same UserError whichever of a run's files meets it first: the record of a step as a rule,
    while a checkpoint is written in the background. Other exceptions pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"cannot write {error.filename or workdir}: {error.strerror}. Free space, and run again to go on from the "
            "newest checkpoint"
        ) from error


def probe(directory: Path) -> None:
    """Raises OSError unless a small file can be written in the folder. A failure at this point is cheap; one
    in the midst of orbax's preparations leaves threads that wait for minutes."""
    path = directory / f".probe-{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)


def _reason(error: BaseException | None) -> str | None:
    codes = [getattr(errno, name) for name in REASONS]
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return os.strerror(error.errno)
        for code in codes:  # tensorstore passes on the system's words only
            if os.strerror(code).lower() in str(error).lower():
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None
