"""Where a run's checkpoints are: in its folder, on another disk, or in a bucket."""

import json
from pathlib import Path

from mixlab.corpus.cache import is_url
from mixlab.errors import UserError
from mixlab.training.checkpoint import Checkpoints


def checkpoints_of(folder: Path) -> Path | str:
    """Where the checkpoints are of the run, soup or import in `folder`."""
    try:
        directory = json.loads((folder / "config.json").read_text())["checkpoint"]["directory"]
    except (OSError, ValueError, KeyError, TypeError):
        directory = None
    there = (
        folder / "checkpoints"
    ).is_dir()  # a soup has them there, whatever the configuration of its ingredients says
    return checkpoint_place(None if there else directory, folder)


def checkpoint_place(directory: str | None, folder: Path) -> Path | str:
    """Where those of a run in `folder` are, by `checkpoint.directory` of its configuration."""
    if directory is None:
        return folder / "checkpoints"
    place = f"{directory.rstrip('/')}/{folder.absolute().name}"
    return place if is_url(place) else Path(place)


def has_checkpoints(place: Path | str) -> bool:
    if isinstance(place, Path):
        return any(path.name.isdigit() for path in place.glob("*"))
    with Checkpoints(place, read_only=True) as checkpoints:
        return bool(checkpoints.steps())


def check_place(place: Path | str, workdir: Path) -> None:
    """UserError when the checkpoints at `place` are those of another run, or this run's are elsewhere."""
    if not (workdir / "config.json").exists():
        if has_checkpoints(place):
            raise UserError(
                f"checkpoint.directory: {place} holds checkpoints of another run than {workdir}; put the folder of that run "
                "back, or name another --workdir"
            )
    elif str(there := checkpoints_of(workdir)) != str(place) and has_checkpoints(there) and not has_checkpoints(place):
        raise UserError(f"checkpoint.directory: the run's checkpoints are in {there}; copy them to {place} first")
