"""How far a long reading of files is: a live line on a terminal, a plain line every few seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.live import Live

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts input bytes (of `total_bytes`), text bytes and documents, and shows them with rate and time
    left.

    What `skip` counts was done earlier: it is progress, but does not enter the rate."""

    def __init__(self, title: str, total_bytes: int, show: bool = True):
        self.title, self.total_bytes, self.show = title, total_bytes, show
        self.done_bytes = self.skipped_bytes = self.text_bytes = self.documents = 0
        self.started = self.last_line = time.monotonic()
        console = Console(stderr=True)
        live = show and console.is_terminal
        self.live = Live(console=console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> "Progress":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live:
            self.live.stop()

    def skip(self, input_bytes: int) -> None:
        self.skipped_bytes += input_bytes
        self.add(input_bytes, 0, 0)

    def add(self, input_bytes: int, text_bytes: int, documents: int) -> None:
        self.done_bytes += input_bytes
        self.text_bytes += text_bytes
        self.documents += documents
        if self.live:
            self.live.update(self.line(), refresh=True)
        elif self.show and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-6)
        share = self.done_bytes / max(self.total_bytes, 1)
        fresh = self.done_bytes - self.skipped_bytes
        left = seconds * (self.total_bytes - self.done_bytes) / fresh if fresh else None
        return (
            f"{self.title}: {share:.0%} of {self.total_bytes / 1e6:,.1f} MB, {self.documents:,} documents, "
            f"{self.text_bytes / 1e6 / seconds:,.1f} MB/s, {self.documents / seconds:,.0f} documents/s, "
            f"{'?' if left is None else duration(left)} left"
        )


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {whole % 60} s"
