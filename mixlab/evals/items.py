"""Results by item and by document, small beside the metrics, so that runs can be compared pair by pair.

items/<step>.npz in a run's folder holds "<name>/id", the names of a benchmark's items or of a set's documents, and
"<name>/<metric>", a number for each: a benchmark's metrics, or the "nats", "tokens" and "bytes" of held-out documents.
"""

import zipfile
from pathlib import Path

import numpy as np

FOLDER = "items"


def write_items(workdir: Path, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Adds to those of the step, in one move."""
    path = workdir / FOLDER / f"{step}.npz"
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + ".partial")
    with part.open("wb") as file:
        np.savez_compressed(file, **(read_items(workdir, step) | arrays))  # type: ignore[arg-type]
    part.replace(path)


def read_items(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Those of the step; empty where there are none that can be read."""
    try:
        with np.load(workdir / FOLDER / f"{step}.npz") as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
