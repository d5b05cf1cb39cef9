"""The device mesh, and where the batch and the parameters lie on it.

Axis types are always Auto: the compiler places what is not named here.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixlab.errors import UserError
from mixlab.parallel import rules

AXES = ("data", "expert", "fsdp", "sequence", "tensor")  # outermost first: neighbouring devices share a tensor group


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one is -1, and takes the devices that the others leave.

    data: rows are divided.   fsdp: rows, and all parameters.   tensor: the features of each layer.
    sequence: each row is cut along its length (model.sequence_attention says how its parts see each other), and parameters
        are divided as over fsdp. For rows that are too few for the devices, or too long for one.
    expert: rows, and the experts of a sparse model. As data, where there are none.
    by_length: batches of rows that are too few for these sizes have a mesh of their own, in which sequence takes from fsdp
        what they need (see parallel/lengths.py).
    slices: groups of devices with a slow network between them, over which the outermost axes are divided: data first, then
        fsdp, so that what remains stays within. None: as many as the devices tell (slices of TPUs, hosts of GPUs). Devices
        that do not tell are grouped by process.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    by_length: bool = False
    slices: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all devices of all processes). UserError unless the sizes use every
    device, with the nearest sizes that do."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, n = config.sizes, len(devices)
    fixed = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh: {named(sizes)} cannot be; each size is at least 1, and at most one may be -1 (inferred)"
        )
    if n % fixed if -1 in sizes else n != fixed:
        asked = f"{named(sizes)} needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices"
        raise UserError(f"mesh: {asked}, and there are {n}; nearest that work: {_nearest(sizes, n)}")
    sizes = tuple(n // fixed if size == -1 else size for size in sizes)
    return Mesh(arrange(sizes, config.slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(sizes: Sequence[int], slices: int | None, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in an array of these sizes, in the order of AXES, neighbours near each other. UserError when there are other
    slices, or the sizes cannot be divided over them."""
    told = len({getattr(device, "slice_index", None) for device in devices})
    if told == 1 and slices in (None, 1):
        split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")  # as jax.make_mesh does
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    groups = told if told > 1 else len({device.process_index for device in devices})
    if (slices or told) != groups:
        raise UserError(
            f"mesh.slices = {slices}: the devices come in {groups} {'slices' if told > 1 else 'processes'}; use {groups}, or "
            "leave it at None"
        )
    across, left = [], groups
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise UserError(
            f"mesh: {named(sizes)} cannot be divided over {groups} slices; use a multiple of {groups} for data or fsdp"
        )
    within = [size // outer for size, outer in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, process_is_granule=told == 1)


def named(sizes) -> str:
    """Without the axes that divide nothing."""
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size != 1) or "data=1"


def _nearest(sizes, n: int, count: int = 3) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    used = [divisors if size != 1 or axis in ("data", "fsdp") else [1] for axis, size in zip(AXES, sizes, strict=True)]
    working = [s for s in itertools.product(*used) if math.prod(s) == n]

    def distance(candidate):
        return sum(abs(math.log2(c / s)) for c, s in zip(candidate, sizes, strict=True) if s != -1)

    return "; ".join(named(s) for s in sorted(working, key=distance)[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Of an array [rows, …] of a batch: rows split over data, expert and fsdp; and over sequence their second axis, if it
    can be, which is that of tokens in all arrays where it is long enough."""
    length = rules.mesh_axes("length", shape[1], mesh.shape) if len(shape) > 1 and mesh.shape["sequence"] > 1 else None
    return NamedSharding(mesh, PartitionSpec(rules.RULES["batch"], *(() if length is None else (length,))))


def row_shards(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of these sizes divides the rows of a batch."""
    return math.prod(sizes[axis] for axis in rules.split_axes(rules.RULES["batch"]))


def whole_rows(mesh: Mesh, rows: int) -> int:
    """`rows`, and as many more as it takes for the mesh to divide them: of batches that may be filled up."""
    shards = row_shards(mesh.shape)
    return -(-rows // shards) * shards


def host_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """The global row numbers (int64, ascending) that this process must supply of a batch of `rows` rows. A
    contiguous block, except where the network's topology orders the devices otherwise. UserError if the rows
    cannot be split."""
    shards = row_shards(mesh.shape)
    if rows % shards:
        split = _named_axes(mesh, rules.RULES["batch"])
        raise UserError(
            f"a batch of {rows} rows cannot be split over {split} = {shards} shards; "
            f"use a multiple of {shards} rows a step, or a smaller data or fsdp"
        )
    mine = batch_sharding(mesh, (rows,)).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in mine.values()]))


def global_batch(mesh: Mesh, local, rows: int):
    """This process' rows -> global arrays.

    `local` is a tree of numpy arrays [len(host_rows(mesh, rows)), ...]; the answer has its structure, with
    arrays [rows, ...] split as `batch_sharding` says."""

    def place(x):
        shape = (rows, *x.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, shape), x, shape)

    return jax.tree.map(place, local)


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


def _extent(mesh: Mesh, split) -> int:
    return math.prod(mesh.shape[axis] for axis in rules.split_axes(split))


def _named_axes(mesh: Mesh, split) -> str:
    axes = [axis for axis in rules.split_axes(split) if mesh.shape[axis] > 1]
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
