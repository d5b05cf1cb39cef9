"""Checkpoints in a folder, one folder a step: orbax writes and reads them."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from mixlab.errors import UserError
from mixlab.training.disk import probe, writing_checkpoints
from mixlab.training.trees import nested

log = logging.getLogger(__name__)


class LocalStorage:
    """What `Checkpoints` needs of a place, in the file system. Every process calls every method, in the same order."""

    def __init__(
        self,
        directory: Path,
        items: Collection[str],
        keep_last: int,
        keep_every_steps: int | None,
        keep_steps: Collection[int],
        read_only: bool,
    ):
        self._directory = directory
        self._last: int | None = None  # the step last given to orbax
        if read_only and not directory.is_dir():
            raise UserError(f"{directory} does not exist; name the folder of a run's checkpoints")
        keep = [policies.LatestN(keep_last), policies.CustomSteps(tuple(keep_steps))]
        if keep_every_steps:
            keep.append(policies.EveryNSteps(keep_every_steps))
        with _quiet(read_only):
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            )
        handlers = {item: ocp.StandardCheckpointHandler() for item in items} | {"meta": ocp.JsonCheckpointHandler()}
        with writing_checkpoints(directory, "open the folder"), _quiet(read_only):
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Returns when the values have left the device; writes on in the background."""
        self._last = step
        with writing_checkpoints(self._directory, f"save step {step}"):
            probe(self._directory)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{item: ocp.args.StandardSave(tree) for item, tree in arrays.items()},
                    meta=ocp.args.JsonSave(record),
                ),
                force=True,
            )

    def wait(self) -> None:
        with writing_checkpoints(self._directory, f"finish step {self._last}"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        with writing_checkpoints(self._directory, f"finish step {self._last}"):
            self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        return self._manager.reached_preemption(step)

    def read_meta(self, step: int) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def read(self, step: int, item: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """The arrays of an item; wanted: a ShapeDtypeStruct with sharding for each."""
        return self._manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(wanted)}))[item]

    def read_param(self, step: int, name: str) -> np.ndarray:
        wanted = nested({name: ocp.RestoreArgs(restore_type=np.ndarray)})
        arguments = ocp.args.PyTreeRestore(
            item=jax.tree.map(lambda _: 0, wanted), restore_args=wanted, partial_restore=True
        )
        (array,) = jax.tree.leaves(
            ocp.PyTreeCheckpointHandler().restore(self._directory / str(step) / "params", args=arguments)
        )
        return array

    def set_aside(self, steps: Collection[int]) -> None:
        """Damaged ones are renamed, not deleted."""
        with writing_checkpoints(self._directory, f"move damaged step {min(steps)} aside"):
            if jax.process_index() == 0:
                for step in steps:
                    source, target = self._directory / str(step), self._directory / f"damaged-{step}"
                    number = 1
                    while target.exists():
                        number += 1
                        target = self._directory / f"damaged-{step}-{number}"
                    source.rename(target)
                    log.warning("moved the damaged checkpoint %s to %s; it can be deleted", source, target.name)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("mixlab: damaged checkpoints moved aside")
            self._manager.reload()


@contextmanager
def _quiet(read_only: bool) -> Iterator[None]:
    """Without orbax's warnings that it only reads, where that was asked for."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR if read_only else level)
    try:
        yield
    finally:
        absl.setLevel(level)
