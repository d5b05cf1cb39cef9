"""Errors a user can cause, and the exit codes a launcher can act on."""

import errno
import os
import select
import sys
from collections.abc import Callable
from typing import IO

EXIT_USER_ERROR = 2  # something for a person to put right, told in one message: not to be started again before
EXIT_DIVERGED = 3  # the loss is not finite or spikes, and the policy says stop: not to be started again as it is
EXIT_PREEMPTED = 75  # asked to stop (SIGTERM or Ctrl-C) and saved: started again, it goes on where it stopped
EXIT_AGAIN = 76  # another process, a bucket or a device was lost, or a step hung: started again, it goes on from its last checkpoint
EXIT_ABORTED = 134  # JAX's own way (SIGABRT) to end a process whose others are gone: to be treated as 76
EXIT_NO_READER = 141  # whoever read the output has stopped, as `| head` does; what shells show of others then (SIGPIPE)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the user can put right. The message names the key or file, what is wrong, and the remedy."""


class LostError(Exception):
    """Something outside failed which nobody has to put right here: a process of the run ended, a bucket does not answer. The
    message says what; started again, the run goes on from its last checkpoint."""


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Calls `main(arguments)` and returns the exit code: what `main` returned (None is 0), 2 for a UserError
    or 76 for a LostError, whose message goes to stderr without a traceback; a full disk, wherever it shows, is told likewise. Ends quietly when nobody reads the output any more."""
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        except LostError as error:
            print(f"error: {error}; start again to go on from the last checkpoint", file=sys.stderr)
            return EXIT_AGAIN
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            where = f" for {error.filename}" if error.filename else ""
            print(f"error: {error.strerror}{where}; free some and run the same command again", file=sys.stderr)
            return EXIT_USER_ERROR
        finally:
            sys.stdout.flush()  # here, where its failure can be answered
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]
        if not unread:  # another pipe, to a worker perhaps: no reason to be quiet
            raise
        for stream in unread:  # flushed once more when the interpreter ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return EXIT_NO_READER


def _has_no_reader(stream: IO) -> bool:
    poll = select.poll()
    poll.register(stream, 0)  # errors are reported unasked
    return bool(poll.poll(0))
