"""A step that never ends, as when a device, the network or a file system hangs: the process ends itself, and says where it was."""

import faulthandler
import os
import sys
import threading
from pathlib import Path

import jax

from mixlab.errors import EXIT_AGAIN

BETWEEN = 10  # times as long as a step may take what is done between two steps


class Watchdog:
    """Within the context, what `watch` names must be over, and the next be named, within its time; else the stacks of all threads
    go to stderr and to stacks-<process>.txt in `folder`, and the process ends at once with EXIT_AGAIN.

    seconds: for a step; 0: nothing is watched. Time during which the process itself was stopped or the machine asleep
    does not count. What holds Python's interpreter lock for ever is not noticed; devices and files that hang do not.
    """

    def __init__(self, seconds: float, folder: Path):
        self._seconds, self._folder = seconds, folder
        self._tick = min(1.0, seconds / 20)
        self._what, self._left = "", float("inf")
        self._closed = threading.Event()

    def __enter__(self):
        if self._seconds:
            threading.Thread(target=self._look_on, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        self._closed.set()

    def watch(self, what: str, times: float = 1) -> None:
        """From now on, and until the next call, `what` is done; it may take `times` as long as a step."""
        self._what, self._left = what, self._seconds * times

    def _look_on(self) -> None:
        while not self._closed.wait(self._tick):
            self._left -= self._tick  # counted, not read from a clock, which would go on while the process is stopped
            if self._left <= 0:
                self._end()

    def _end(self) -> None:
        said = (
            f"error: {self._what} has not ended in the time of training.hang_seconds = {self._seconds:g} (x {BETWEEN} "
            "between steps); the stacks of all threads follow. Start again to go on from the last checkpoint\n"
        )
        os.write(2, said.encode())
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        writing = threading.Thread(target=self._write, args=(said,), daemon=True)
        writing.start()
        writing.join(10)  # the folder's file system may be what hangs
        os._exit(EXIT_AGAIN)

    def _write(self, said: str) -> None:
        with open(self._folder / f"stacks-{jax.process_index()}.txt", "w") as file:
            file.write(said)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
