"""Errors a user can cause, and the exit codes a launcher can act on."""

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3  # the loss became non-finite and the policy is to stop
EXIT_PREEMPTED = 75  # asked to stop (SIGTERM), saved, and ready to be started again


class UserError(Exception):
    """Something the user can put right. The message names the key or file, what is wrong, and the remedy."""


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Calls `main(arguments)` and returns the exit code: what `main` returned (None is 0), or 2 for a UserError,
    whose message goes to stderr without a traceback."""
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
