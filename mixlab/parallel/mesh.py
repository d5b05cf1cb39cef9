"""The device mesh, and where the batch and the parameters lie on it.

The mesh has the axes data (rows, parameters replicated), fsdp (rows, parameters split) and tensor (the
features of each layer split). Axis types are always Auto: the compiler places what is not named here.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixlab.errors import UserError
from mixlab.parallel import rules

AXES = ("data", "fsdp", "tensor")  # outermost first: neighbouring devices share a tensor group


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1, and takes the devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all devices of all processes). UserError unless the sizes use every
    device, with the nearest sizes that do."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, n = dataclasses.astuple(config), len(devices)
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh: {_named(sizes)} cannot be; each size is at least 1, and at most one may be -1 (inferred)"
        )
    if n % fixed if -1 in sizes else n != fixed:
        asked = f"{_named(sizes)} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices"
        raise UserError(f"mesh: {asked}, and there are {n}; nearest that work: {_nearest(sizes, n)}")
    sizes = tuple(n // fixed if size == -1 else size for size in sizes)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _named(sizes) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def _nearest(sizes, n: int, count: int = 3) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    working = [s for s in itertools.product(divisors, repeat=len(AXES)) if math.prod(s) == n]

    def distance(candidate):
        return sum(abs(math.log2(c / s)) for c, s in zip(candidate, sizes, strict=True) if s != -1)

    return "; ".join(_named(s) for s in sorted(working, key=distance)[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over data and fsdp; each row whole."""
    return NamedSharding(mesh, rules.spec(("batch",)))


def host_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The global row numbers (int64, ascending) that this process must supply of a batch of `rows` rows. A
    contiguous block, except where the network's topology orders the devices otherwise. UserError if the rows
    cannot be split."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        split = _named_axes(mesh, ("data", "fsdp"))
        raise UserError(
            f"a batch of {rows} rows cannot be split over {split} = {shards} shards; "
            f"use a multiple of {shards} rows a step, or a smaller data or fsdp"
        )
    mine = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in mine.values()]))


def global_batch(mesh: Mesh, local, rows: int):
    """This process' rows -> global arrays.

    `local` is a tree of numpy arrays [len(host_rows(mesh, rows)), ...]; the answer has its structure, with
    arrays [rows, ...] split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (rows, *x.shape[1:])), local)


def abstract_params(create: Callable[[], nnx.Module]):
    """(graphdef, abstract nnx.State of the Params) of the module that `create` makes. Allocates nothing, and
    needs no mesh."""
    with nnx.use_eager_sharding(False):
        graphdef, params, _ = nnx.split(nnx.eval_shape(create), nnx.Param, ...)
    return graphdef, params


def param_shardings(params: nnx.State, mesh: Mesh):
    """Shardings for an (abstract) nnx.State of annotated parameters, as a pure nested dict.

    ValueError if a logical name has no rule; UserError if an axis cannot be split evenly, with the sizes."""
    axes, shapes = {}, {}
    for path, variable in nnx.to_flat_state(params):
        name, shape = "/".join(map(str, path)), variable.get_value().shape
        axes[name] = tuple(variable.get_metadata().get("out_sharding") or (None,) * len(shape))
        shapes[name] = shape
    rules.check_names(axes)
    problems = [
        f"{name}: axis {logical!r} of {size} over {_named_axes(mesh, split)}"
        for name in axes
        for logical, size, split in zip(axes[name], shapes[name], rules.spec(axes[name]), strict=True)
        if size % _extent(mesh, split)
    ]
    if problems:
        raise UserError("mesh: the model cannot be split evenly; change the mesh or the size: " + "; ".join(problems))
    shardings = {name: NamedSharding(mesh, rules.spec(axes[name])) for name in axes}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: shardings["/".join(str(entry.key) for entry in path)], nnx.to_pure_dict(params)
    )


def _split_axes(split) -> tuple[str, ...]:
    return () if split is None else (split,) if isinstance(split, str) else split


def _extent(mesh: Mesh, split) -> int:
    return math.prod(mesh.shape[axis] for axis in _split_axes(split))


def _named_axes(mesh: Mesh, split) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in _split_axes(split))
