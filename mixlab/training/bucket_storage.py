"""Checkpoints in a bucket (gs:// or s3://): every process writes its part of the arrays, through tensorstore.

Below the URL, <step>/params/… and <step>/opt_state/… hold a zarr array for every array, in objects of at most 64 MiB of which
no two processes share one; <step>/written/<process> says that a process has written its part; <step>/meta.json, which process 0
writes when all have, makes the checkpoint complete. (Orbax itself, as of 0.12, writes to gs:// only with another cloud library
beside tensorstore, and not to s3://.)
"""

import json
import logging
import re
import threading
import time
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from mixlab.corpus.bucket import Bucket
from mixlab.errors import LostError
from mixlab.training.trees import flat, nested

log = logging.getLogger(__name__)

OBJECT_BYTES = 2**26
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 3600.0  # with another process's part, …
CLOSING_SECONDS = 60.0  # … and when the run has failed
DAMAGE = ("NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT")


class BucketStorage:
    """What `Checkpoints` needs of a place, in a bucket. Every process calls every method, in the same order. UserError when
    there is no such bucket or the right to write in it is missing, at once; LostError when it does not answer."""

    def __init__(
        self,
        url: str,
        keep_last: int,
        keep_every_steps: int | None,
        keep_steps: Collection[int],
        read_only: bool,
    ):
        self._bucket = Bucket(url)
        self._keep = (keep_last, keep_every_steps, frozenset(keep_steps))
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        names = self._bucket.names()
        self._steps = sorted(int(found[1]) for name in names if (found := re.fullmatch(r"(\d+)/meta\.json", name)))
        if not read_only and jax.process_index() == 0:
            self._bucket.write(".probe", b"may this be written?")
            self._bucket.delete(".probe")
            for step in {name.split("/")[0] for name in names} - {str(step) for step in self._steps}:
                if step.isdigit():  # a save that was cut off
                    self._bucket.delete(f"{step}/")

    def steps(self) -> list[int]:
        return list(self._steps)

    def save(self, step: int, arrays: dict[str, Any], record: dict[str, Any]) -> None:
        """Returns when the values have left the device; writes on in the background."""
        parts = {
            name: (array, [(s.index, np.array(s.data)) for s in array.addressable_shards if s.replica_id == 0])
            for name, array in flat(arrays).items()
        }
        self._writing = threading.Thread(target=self._write, args=(step, parts, record), daemon=True)
        self._writing.start()
        self._steps.append(step)

    def wait(self) -> None:
        """Until all processes have written all."""
        self._join(None)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("mixlab: checkpoint written")

    def close(self) -> None:
        """After `wait` there is nothing to do; where the run has failed, another process may never write its part."""
        self._join(None if jax.process_count() == 1 else CLOSING_SECONDS)

    def _join(self, seconds: float | None) -> None:
        if self._writing is not None:
            self._writing.join(seconds)
            self._writing = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def reached_preemption(self, step: int) -> bool:
        return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)

    def read_meta(self, step: int) -> Any:
        text = self._bucket.read(f"{step}/meta.json")
        if text is None:
            raise FileNotFoundError("meta.json is missing")
        return json.loads(text)

    def read(self, step: int, item: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """The arrays of an item; wanted: a ShapeDtypeStruct with sharding for each. A process reads what it will hold."""
        asked = {}
        for name, array in flat(wanted).items():
            store = self._open(f"{step}/{item}/{name}")
            places = array.sharding.addressable_devices_indices_map(array.shape)
            asked[name] = {str(index): store[index].read() for index in places.values()}
        found = {}
        for name, array in flat(wanted).items():
            blocks = {index: self._result(future) for index, future in asked[name].items()}
            found[name] = jax.make_array_from_callback(
                array.shape, array.sharding, lambda index, blocks=blocks: blocks[str(index)]
            )
        return nested(found)

    def read_param(self, step: int, name: str) -> np.ndarray:
        return self._result(self._open(f"{step}/params/{name}").read())

    def set_aside(self, steps: Collection[int]) -> None:
        """Damaged ones are deleted: objects cannot be renamed."""
        if jax.process_index() == 0:
            for step in steps:
                log.warning("deleting the damaged checkpoint of step %d in %s", step, self._bucket.url)
                self._delete(step)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("mixlab: damaged checkpoints deleted")
        self._steps = [step for step in self._steps if step not in steps]

    def _write(self, step: int, parts: dict[str, Any], record: dict[str, Any]) -> None:
        try:
            futures = []
            for name, (array, shards) in parts.items():
                if shards:
                    store = self._create(f"{step}/{name}", array)
                    futures += [store[index].write(data) for index, data in shards]
            for future in futures:
                self._result(future)
            self._bucket.write(f"{step}/written/{jax.process_index()}", b"whole")
            if jax.process_index() == 0:
                self._await_all(step)
                self._bucket.write(f"{step}/meta.json", json.dumps(record).encode())
            old = superseded(self._steps, *self._keep)
            if jax.process_index() == 0:
                for step in old:
                    self._delete(step)
            self._steps = [step for step in self._steps if step not in old]
        except BaseException as error:
            self._error = error

    def _await_all(self, step: int) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while len(self._bucket.names(f"{step}/written/")) < jax.process_count():
            if time.monotonic() > end:
                raise LostError(f"{self._bucket.url}: not all processes have written their part of step {step}")
            time.sleep(POLL_SECONDS)

    def _delete(self, step: int) -> None:
        self._bucket.delete(f"{step}/meta.json")  # first: from here on it is none
        self._bucket.delete(f"{step}/")

    def _create(self, name: str, array: jax.Array) -> tensorstore.TensorStore:
        chunk = chunk_shape(array.sharding.shard_shape(array.shape), array.dtype.itemsize)
        metadata = {
            "shape": list(array.shape),
            "data_type": str(array.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        }
        spec = {"driver": "zarr3", "kvstore": self._bucket.spec(f"{name}/"), "metadata": metadata}
        return self._result(tensorstore.open(spec, create=True, open=True))

    def _open(self, name: str) -> tensorstore.TensorStore:
        spec = {"driver": "zarr3", "kvstore": self._bucket.spec(f"{name}/")}
        return self._result(tensorstore.open(spec, open=True))

    def _result(self, future):
        """What it comes to. UserError or LostError when the bucket is to blame; tensorstore's own when this checkpoint is."""
        try:
            return future.result()
        except Exception as error:
            if any(code in str(error) for code in DAMAGE):
                raise
            raise self._bucket.explained(error) from None


def chunk_shape(shard: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """A part of a shard of at most OBJECT_BYTES, where its axes can be divided so far; it divides the shard evenly."""
    chunk, most = list(shard), OBJECT_BYTES // item_bytes
    for axis, size in enumerate(shard):
        others = int(np.prod(chunk)) // max(size, 1)
        fitting = [n for n in range(1, size + 1) if size % n == 0 and others * n <= most]
        chunk[axis] = max(fitting, default=1) if size else 1
    return tuple(chunk)


def superseded(
    steps: Collection[int], keep_last: int, keep_every_steps: int | None, keep_steps: Collection[int]
) -> list[int]:
    """Which of the steps need not be kept."""
    return [
        step
        for step in sorted(steps)[:-keep_last]
        if step not in keep_steps and not (keep_every_steps and step % keep_every_steps == 0)
    ]
