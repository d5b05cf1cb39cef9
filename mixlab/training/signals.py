"""SIGTERM and SIGINT: save at the next step boundary and exit, instead of dying in the middle of a step."""

import os
import signal
from collections.abc import Callable

import jax


class StopSignal:
    """Within the context, the first SIGTERM or SIGINT (Ctrl-C) is a request to stop, and a second SIGINT
    raises KeyboardInterrupt at once. Ask `requested(step)` after every step, on every process.

    agree: `Checkpoints.reached_preemption`. With jax.distributed all processes must stop after the same step,
        whichever of them got the signal; JAX's own SIGTERM handler and this function see to that, so SIGTERM
        is left to JAX and Ctrl-C is passed on as a SIGTERM.
    """

    def __init__(self, agree: Callable[[int], bool]):
        self._agree = agree
        self._distributed = jax.distributed.is_initialized()
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self):
        for number in (signal.SIGINT,) if self._distributed else (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to save after `step` completed updates and exit; with jax.distributed, the same answer on
        every process."""
        return self._agree(step) if self._distributed else self._received is not None

    def _handle(self, number, frame):
        again, self._received = self._received is not None, signal.Signals(number)
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not again:
            words = f"\n{self._received.name}: saving after this step, then exit (Ctrl-C again: exit at once)\n"
            os.write(2, words.encode())  # print is not safe inside a signal handler
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)
