"""What a person sees while the run goes on: one updating line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
    """Shows step, loss, tokens a second, MFU (where known) and time left; from process 0 only.

    On a terminal a single line is redrawn; elsewhere a line is printed at most every `every_seconds`, and
    always for the last step. `first_step` is the step the run started from, for the time left.
    """

    def __init__(
        self,
        total_steps: int,
        first_step: int = 0,
        *,
        every_seconds: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._first, self._every, self._clock = total_steps, first_step, every_seconds, clock
        self._console = console or Console(quiet=jax.process_index() != 0)
        self._started = clock()
        self._printed = -float("inf")
        self._live: Live | None = None

    def __enter__(self):
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
            self._live.start()
        return self

    def __exit__(self, kind, error, trace):
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, loss: float, tokens_per_second: float | None = None, mfu: float | None = None) -> None:
        """After `step` completed updates."""
        now = self._clock()
        line = self._line(step, loss, tokens_per_second, mfu, now)
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif step == self._total or now - self._printed >= self._every:
            self._printed = now
            self.note(line)

    def note(self, text: str) -> None:
        """A line of its own (an evaluation, a checkpoint), above the updating one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, step, loss, tokens_per_second, mfu, now) -> str:
        parts = [f"step {step:,}/{self._total:,}", f"loss {loss:.4f}"]
        if tokens_per_second is not None:
            parts.append(f"{_short(tokens_per_second)} tokens/s")
        if mfu is not None:
            parts.append(f"MFU {mfu:.1%}")
        if step >= self._total:
            parts.append(f"took {_duration(now - self._started)}")
        elif step > self._first:
            left = (now - self._started) * (self._total - step) / (step - self._first)
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)


def _short(x: float) -> str:
    """1234567 -> "1.23M"."""
    for unit in ("", "k", "M", "G"):
        if abs(x) < 999.5 or unit == "G":
            return f"{x:.3g}{unit}" if abs(x) < 999.5 else f"{x:,.0f}{unit}"
        x /= 1000


def _duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
