"""Checkpoints of weights that are read while they are written: for models larger than memory.

They are what `Checkpoints` writes of weights alone, and are read by it.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mixlab.training.checkpoint import describe, make_record
from mixlab.training.checksums import host_checksum
from mixlab.training.disk import probe, writing_checkpoints
from mixlab.training.trees import nested

CHUNK_BYTES = 2**26  # that a parameter is compressed and written in


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """An array that is not in memory. load: reads it, the same at every call."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def save_streamed(directory: Path, step: int, params: dict[str, Deferred], meta: dict[str, Any]) -> None:
    """Writes the checkpoint of `step` of these parameters ({"blocks/up/kernel": …}), and returns when it is on disk. `meta`
    as of `Checkpoints.save`. Each parameter is read twice, once for its checksums, and held by itself: memory is a few times
    the largest. For one process. UserError when the folder cannot be written."""
    arrays = {"params": nested(params)}
    sums = {f"params/{name}": host_checksum(parameter.load()) for name, parameter in params.items()}
    record = make_record(step, meta, describe(arrays, sums))
    registry = ocp.type_handlers.create_type_handler_registry((Deferred, _OneByOne()))
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        "meta": ocp.JsonCheckpointHandler(),
    }
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), arrays["params"])
    directory = Path(directory).absolute()
    with writing_checkpoints(directory, f"save step {step}"):
        directory.mkdir(parents=True, exist_ok=True)
        probe(directory)
        with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
            items = {
                "params": ocp.args.PyTreeSave(arrays["params"], save_args=chunks),
                "meta": ocp.args.JsonSave(record),
            }
            manager.save(step, args=ocp.args.Composite(**items))
            manager.wait_until_finished()
            manager.check_for_errors()


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Orbax's own handler of arrays, given one after the other: the next is loaded when the last is written."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _background_serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value.load()], [info], [arg])
