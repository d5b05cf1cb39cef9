"""Checkpoints: complete or absent, verified on reading, independent of mesh and process count.

They are in a folder, where orbax writes them, or in a bucket. Each has three items: `params` and `opt_state` as nested dicts of arrays (no
class of optax or flax shows in the layout; weights saved for themselves have no `opt_state`), and `meta`, a JSON
object with what the caller wants to know again (tokens, stream fingerprint, control log, config hash) and, for
every array, its type, shape and checksums. Orbax does not notice a flipped byte and casts a wrong dtype in
silence; the checksums do notice. A checkpoint that does not verify is passed over for the next older one.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mixlab.corpus.cache import is_url
from mixlab.errors import LostError, UserError
from mixlab.training.bucket_storage import BucketStorage
from mixlab.training.checksums import checksums, host_checksum
from mixlab.training.local_storage import LocalStorage
from mixlab.training.trees import fill, flat, nested, pure

log = logging.getLogger(__name__)

FORMAT = 1
ITEMS = ("params", "opt_state")
OUR_META = ("format", "step", "arrays", "sha256")


class DamagedError(Exception):
    """This checkpoint cannot be trusted; an older one may."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A checkpoint in the folder. `problem` is None, or why it cannot be used; `meta` is what was saved with
    it."""

    step: int
    meta: dict[str, Any] | None
    problem: str | None


class Checkpoints:
    """The checkpoints of one run; `directory`: a folder, or gs://… or s3://….

    Every process calls every method, in the same order. With `read_only` nothing is created, moved or
    deleted, so that the folder of a run in progress can be read.

    Kept are the last `keep_last` checkpoints, those at multiples of `keep_every_steps`, and those at
    `keep_steps`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        keep_steps: Collection[int] = (),
        read_only: bool = False,
    ):
        self.directory = str(directory) if is_url(directory) else Path(directory).absolute()
        self._sound: set[int] = set()  # written by this object, or restored and verified
        self._damaged: dict[int, str] = {}
        keep = (keep_last, keep_every_steps, keep_steps)
        self._storage = (
            BucketStorage(self.directory, *keep, read_only)
            if isinstance(self.directory, str)
            else LocalStorage(self.directory, ITEMS, *keep, read_only)
        )

    # --- writing ---

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Saves `state` ({"params", "opt_state", ...}; or {"params"}, the weights alone) as of `step` completed
        updates; returns once the values have left the device, so the buffers may be donated at once, and writes on
        in the background.

        A step already saved or restored by this object is complete and is left alone. A damaged checkpoint
        that `restore` had passed over is moved aside first, and so replaced. UserError when the folder cannot
        be written (full disk, no permission), for this save or, found late, for the one before: earlier
        checkpoints are intact.
        """
        self.wait()
        if step in self._sound:
            return
        self._move_damaged_aside()
        newest = max(self.steps(), default=-1)
        if newest >= step:
            raise ValueError(
                f"{self.directory} holds step {newest}, which is not before step {step}: restore the newest "
                "checkpoint before saving, or save into another folder"
            )
        arrays = {item: pure(state[item]) for item in ITEMS if item in state}
        sums = checksums(arrays)  # dispatched before the caller donates the buffers
        record = make_record(step, meta, describe(arrays, sums))
        self._storage.save(step, arrays, record)
        self._sound.add(step)

    def wait(self) -> None:
        """Blocks until the last save is on disk; UserError if it failed. Nothing more can be saved after
        that."""
        self._storage.wait()

    def close(self) -> None:
        """Waits for the last save, then frees the threads. UserError if that save failed."""
        self._storage.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            return self.close()
        try:  # the first error is the one to tell
            self._storage.close()
        except Exception as later:
            log.error("while closing the checkpoints in %s: %s", self.directory, _first_line(later))

    def reached_preemption(self, step: int) -> bool:
        """Whether the processes have agreed, on a SIGTERM to any of them, to stop after `step`. Always False
        without jax.distributed. Call it at every step on every process."""
        return self._storage.reached_preemption(step)

    # --- reading ---

    def steps(self) -> list[int]:
        """Steps with a folder, ascending; not verified."""
        return sorted(self._storage.steps())

    def entries(self) -> list[Entry]:
        """All checkpoints, ascending, each read in full and verified."""
        return [self._verify(step) for step in self.steps()]

    def meta(self, step: int | None = None) -> dict[str, Any] | None:
        """The meta of `step`, or of the newest checkpoint whose meta can be read; None if the folder has
        none."""
        return self._newest(lambda step: self._read_meta(step), step)

    def restore(self, abstract: dict[str, Any], step: int | None = None) -> tuple[dict[str, Any], dict] | None:
        """(state, meta) of the newest checkpoint that verifies, or None if there is no checkpoint at all.

        abstract: the state with a ShapeDtypeStruct (with sharding) for every array, on any mesh. UserError if
            checkpoints exist and none verifies; if `step` is given and that one does not; if it holds the
            weights alone; or if the arrays are not those of this model and optimiser (another config), which no
            older checkpoint would mend.
        """

        def read(step):
            meta = self._read_meta(step)
            if items(meta) != ITEMS:
                raise UserError(
                    f"{self.directory}: step {step} holds the weights alone, no optimiser's state; "
                    "a run can start from them (start.init_from), not go on from them"
                )
            state = {item: self._read(step, meta, item, abstract[item]) for item in ITEMS}
            if "step" in abstract:
                state["step"] = _on_mesh(np.int32(step), abstract["step"])
            self._sound.add(step)
            return state, meta

        return self._newest(read, step)

    def restore_params(self, abstract_params, step: int | None = None) -> tuple[Any, dict] | None:
        """As `restore`, for the parameters alone: (params, meta). The optimiser's state is not read.

        abstract_params None: the arrays as they were saved, whole, on the default device."""

        def read(step):
            meta = self._read_meta(step)
            return self._read(step, meta, "params", abstract_params), meta

        return self._newest(read, step)

    def read_param(self, meta: dict[str, Any], name: str) -> np.ndarray:
        """One parameter ("blocks/up/kernel") of the checkpoint of this meta as it was saved, whole, in host memory:
        for what must not hold a whole model at once. For one process. DamagedError if it does not verify."""
        array = self._agree(name, lambda: self._storage.read_param(meta["step"], name))
        if describe({name: array}, {name: host_checksum(array)})[name] != meta["arrays"][f"params/{name}"]:
            raise DamagedError(f"params/{name}: its checksum does not match")
        return array

    def _newest(self, read: Callable[[int], Any], only: int | None):
        steps = self.steps() if only is None else [only]
        if only is not None and only not in self.steps():
            raise UserError(f"{self.directory} has no checkpoint of step {only}; it has {self.steps() or 'none'}")
        for step in reversed(steps):
            try:
                answer = read(step)
            except DamagedError as error:
                self._damaged[step] = str(error)
                self._sound.discard(step)
                older = [s for s in steps if s < step]
                go_on = f"falling back to step {older[-1]}" if older else "no older one is left"
                log.warning("checkpoint of step %d in %s is damaged (%s); %s", step, self.directory, error, go_on)
            else:
                return answer
        if not steps:
            return None
        raise UserError(
            f"{self.directory}: no checkpoint can be used ("
            + "; ".join(f"step {step}: {self._damaged[step]}" for step in steps)
            + "). Put back a copy of one, or start a new run in another folder; nothing was deleted"
        )

    def _verify(self, step: int) -> Entry:
        meta = None
        try:
            meta = self._read_meta(step)
            for item in items(meta):
                self._read(step, meta, item, None)
        except DamagedError as error:
            return Entry(step, meta, str(error))
        return Entry(step, meta, None)

    def _read_meta(self, step: int) -> dict[str, Any]:
        meta = self._agree("meta", lambda: self._storage.read_meta(step))
        if not isinstance(meta, dict) or meta.get("sha256") != _digest(meta) or meta.get("step") != step:
            raise DamagedError("meta: its checksum does not match")
        if meta["format"] != FORMAT:
            raise UserError(
                f"{self.directory}: step {step} has checkpoint format {meta['format']}; this mixlab reads {FORMAT}"
            )
        return meta

    def _read(self, step: int, meta: dict, item: str, abstract):
        saved = {name: entry for name, entry in meta["arrays"].items() if name.startswith(item + "/")}
        if abstract is None:
            abstract = nested({name.split("/", 1)[1]: _abstract(entry) for name, entry in saved.items()})
        wanted = {item: pure(abstract)}
        if difference := _difference(saved, describe(wanted)):
            raise UserError(
                f"{self.directory}: step {step} was saved with another model or optimiser: {difference}. Use "
                "the config of that run, or another folder for this one"
            )
        arrays = {item: self._agree(item, lambda: self._storage.read(step, item, wanted[item]))}
        found = describe(arrays, checksums(arrays))
        if wrong := [name for name in saved if saved[name] != found.get(name)]:
            raise DamagedError(f"{wrong[0]}: its checksum does not match" + f" ({len(wrong)} arrays in all)")
        return fill(abstract, arrays[item])

    def _agree(self, what: str, read: Callable[[], Any]):
        """`read()`, or DamagedError on every process if it fails on any."""
        try:
            answer, problem = read(), None
        except (MemoryError, jax.errors.JaxRuntimeError, LostError, UserError):
            raise  # the device is full, or gone, or the bucket: the checkpoint is not to blame
        except Exception as error:  # orbax raises the bare class for a truncated file
            answer, problem = None, f"{what}: {_first_line(error)}"
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.int32(problem is not None))
            if failed.any() and problem is None:
                problem = f"{what}: process {int(np.argmax(failed))} could not read it"
        if problem is not None:
            raise DamagedError(problem)
        return answer

    # --- damage ---

    def _move_damaged_aside(self) -> None:
        """Damaged steps newer than the one in use would stand in the way of saving."""
        newest_sound = max(self._sound, default=-1)
        aside = [step for step in self._damaged if step > newest_sound and step in self.steps()]
        if not aside:
            return
        self._storage.set_aside(aside)
        for step in aside:
            del self._damaged[step]


def items(meta: dict[str, Any]) -> tuple[str, ...]:
    """Which trees a checkpoint of this meta holds: all of ITEMS, or the weights alone."""
    return tuple(item for item in ITEMS if any(name.startswith(item + "/") for name in meta["arrays"]))


def make_record(step: int, meta: dict[str, Any], arrays: dict[str, dict]) -> dict[str, Any]:
    """What the item `meta` of a checkpoint holds: the caller's meta and the arrays as of `describe`, under a digest."""
    if reserved := set(OUR_META) & set(meta):
        raise ValueError(f"meta: {sorted(reserved)} are the checkpoint's own keys")
    record = {"format": FORMAT, "step": step, **meta, "arrays": arrays}
    return record | {"sha256": _digest(record)}


def describe(tree, sums: dict[str, list[int]] | None = None) -> dict[str, dict]:
    """Name of every array -> its type, shape and, where given, checksums."""
    described = {name: {"dtype": str(x.dtype), "shape": list(x.shape)} for name, x in flat(tree).items()}
    for name, pair in (sums or {}).items():
        described[name]["checksums"] = pair
    return described


def _abstract(entry: dict) -> jax.ShapeDtypeStruct:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]), sharding=place)


def _on_mesh(value: np.ndarray, abstract: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback((), abstract.sharding, lambda _: np.asarray(value, abstract.dtype))


def _difference(saved: dict[str, dict], wanted: dict[str, dict]) -> str | None:
    """The first way in which the saved arrays are not those wanted, in words."""
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            return f"{name} was saved and is not wanted"
        if name not in saved:
            return f"{name} is wanted and was not saved"
        for key in ("shape", "dtype"):
            if saved[name][key] != wanted[name][key]:
                return f"{name} has {key} {saved[name][key]} there and {wanted[name][key]} here"
    return None


def _digest(meta: dict) -> str:
    body = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= 200 else text[:200] + " ..."
