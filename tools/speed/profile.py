"""Where the time of a traced run went: the longest operations of a trace that jax.profiler wrote."""

from collections import Counter
from pathlib import Path

from jax.profiler import ProfileData


def longest(folder: Path, count: int = 12) -> list[tuple[str, float, int]]:
    """(operation, seconds, how often) of the newest trace in `folder`, longest first. Operations of a device's own stream
    where there is one; on CPU those of the threads that compute."""
    trace = max(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    seconds, calls = Counter[str](), Counter[str]()
    for plane in devices or planes:
        for line in plane.lines:
            if not (line.name == "XLA Ops" or line.name.startswith("Stream") if devices else "XLA" in line.name):
                continue
            for event in line.events:
                name = event.name.split(" = ")[0].lstrip("%")
                if name.startswith("ThunkExecutor"):  # the whole program, of which the others are parts
                    continue
                seconds[name] += event.duration_ns / 1e9
                calls[name] += 1
    return [(name, time, calls[name]) for name, time in seconds.most_common(count)]
