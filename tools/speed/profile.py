"""Where the time of a traced run went: the longest operations of a trace that jax.profiler wrote, and how long none ran."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
from jax.profiler import ProfileData

EXECUTION = "ThunkExecutor"  # on CPU: a whole program, or the part of it in a loop's body, and the wait for its end


def trace(folder: Path, step: Callable, steps: int = 5) -> None:
    """Writes a trace of some steps in `folder`, dispatched as training does: what step N returned is read when step N + 1 has been
    dispatched. Python is not traced, which would slow it down."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(folder), profiler_options=options):
        before = step()
        for _ in range(steps - 1):
            metrics = step()
            jax.device_get(before)
            before = metrics
        jax.block_until_ready(before)


def longest(folder: Path, count: int = 12) -> list[tuple[str, float, int]]:
    """(operation, seconds, how often) of the newest trace in `folder`, longest first. Operations of a device's own stream
    where there is one; on CPU those of the threads that compute."""
    devices, hosts = _planes(folder)
    seconds, calls = Counter[str](), Counter[str]()
    for plane in devices or hosts:
        for line in plane.lines:
            if not (line.name == "XLA Ops" or line.name.startswith("Stream") if devices else "XLA" in line.name):
                continue
            for event in line.events:
                name = event.name.split(" = ")[0].lstrip("%")
                if name.startswith(EXECUTION):
                    continue
                seconds[name] += event.duration_ns / 1e9
                calls[name] += 1
    return [(name, time, calls[name]) for name, time in seconds.most_common(count)]


def idle(folder: Path) -> tuple[float, float]:
    """(seconds in which no program ran, seconds from the first one's start to the last one's end) of the newest trace in `folder`,
    whose programs are train steps: the sum of the gaps between them. Where a GPU's trace tells kernels alone, gaps within a step
    count too. Of several devices, the one that was idle longest."""
    devices, hosts = _planes(folder)
    found = [_gaps(_programs(plane)) for plane in devices] or [_gaps([e for p in hosts for e in _executions(p)])]
    return max(found)


def _planes(folder: Path) -> tuple[list, list]:
    """The devices' planes of the newest trace, and the others."""
    newest = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(ProfileData.from_file(str(newest)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    return devices, [plane for plane in planes if plane not in devices]


def _programs(plane) -> list:
    """What ran on a device: whole programs, where the trace has them, else all kernels and copies."""
    lines = list(plane.lines)
    modules = [line for line in lines if line.name == "XLA Modules"]
    return [event for line in modules or lines if modules or line.name.startswith("Stream") for event in line.events]


def _executions(plane) -> list:
    """What ran on CPU: operations in XLA's threads, programs in whichever thread starts them."""
    return [
        event for line in plane.lines for event in line.events if "XLA" in line.name or event.name.startswith(EXECUTION)
    ]


def _gaps(events: list) -> tuple[float, float]:
    """(seconds between the events' first start and last end in which none went on, all seconds between them)."""
    spans = sorted((event.start_ns, event.start_ns + event.duration_ns) for event in events)
    gaps, latest = 0.0, spans[0][0] if spans else 0.0
    for start, end in spans:
        gaps, latest = gaps + max(0.0, start - latest), max(latest, end)
    return gaps / 1e9, (latest - spans[0][0]) / 1e9 if spans else 0.0
