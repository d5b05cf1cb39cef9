"""Which mesh serves rows of which length, and what is wrong where none does.

Rows of a step grow fewer as they grow longer. With `mesh.by_length`, those that are too few for the run's mesh are cut along
their length: sequence takes from fsdp what they need. Both divide the parameters, and the devices keep their order, so
parameters and moments stay where they are from step to step.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from mixlab.model.config import ModelConfig
from mixlab.parallel.mesh import AXES, MeshConfig, row_shards
from mixlab.schedule.stages import Stage
from mixlab.stream import BatchShape


def mesh_for(mesh: Mesh, config: MeshConfig, rows: int, length: int, parts: int) -> Mesh:
    """The mesh of batches [rows, length] that are computed in `parts`: `mesh`, or its devices in the same order on a mesh with
    a larger sequence."""
    sizes = sizes_for(resolved(config, mesh), rows, length, parts)
    if sizes is None or sizes.sizes == mesh.devices.shape:
        return mesh
    return Mesh(mesh.devices.reshape(sizes.sizes), AXES, axis_types=mesh.axis_types)


def meshes_for(mesh: Mesh, config: MeshConfig, shapes: Iterable[BatchShape], parts: int) -> dict[BatchShape, Mesh]:
    """The mesh of every shape of batch."""
    return {shape: mesh_for(mesh, config, shape.rows, shape.length, parts) for shape in shapes}


def resolved(config: MeshConfig, mesh: Mesh) -> MeshConfig:
    """The config with the sizes that the mesh has."""
    return dataclasses.replace(config, **mesh.shape)


def sizes_for(mesh: MeshConfig, rows: int, length: int, parts: int) -> MeshConfig | None:
    """The least sequence, from the mesh's own on, with which such rows can be divided; None if there is none. mesh: without
    a -1."""
    factors = [f for f in range(1, mesh.fsdp + 1) if mesh.fsdp % f == 0] if mesh.by_length else [1]
    for factor in factors:
        found = dataclasses.replace(mesh, fsdp=mesh.fsdp // factor, sequence=mesh.sequence * factor)
        if rows % (parts * row_shards(vars(found))) == 0 and length % least_length(found) == 0:
            return found
    return None


def least_length(mesh: MeshConfig) -> int:
    """What the length of rows must be a multiple of."""
    return 1 if mesh.sequence == 1 else 2 * mesh.sequence


def problems(mesh: MeshConfig, model: ModelConfig, stages: Sequence[Stage], parts: int) -> list[str]:
    """Why the rows of the stages, computed in `parts`, cannot be divided over a mesh of these sizes, with what can."""
    found = []
    for number, stage in enumerate(stages):
        # The longest first: shorter rows come in multiples of their number.
        for rows, length in reversed(stage.shapes()):
            there = sizes_for(mesh, rows, length, parts)
            if there is None:
                found.append(f"stages.{number}: {_undivided(mesh, rows, length, parts)}")
            elif wrong := _heads(there, model, length):
                found.append(wrong)
            else:
                continue
            break
    return list(dict.fromkeys(found))


def _undivided(mesh: MeshConfig, rows: int, length: int, parts: int) -> str:
    least, shards = least_length(mesh), row_shards(vars(mesh))
    if length % least:
        lengths = " or ".join(str(n) for n in (length // least * least, -(-length // least) * least) if n)
        return (
            f"rows of {length} tokens cannot be cut over mesh.sequence = {mesh.sequence} devices, two pieces each; use a "
            f"sequence_length of {lengths}, or a smaller mesh.sequence"
        )
    split = "data x expert x fsdp" if mesh.expert > 1 else "data x fsdp"
    longer = None if mesh.by_length else sizes_for(dataclasses.replace(mesh, by_length=True), rows, length, parts)
    below, unit = rows // (parts * shards), parts * shards * length
    return (
        f"{rows} rows of {length} tokens a step cannot be split over {split} = {shards} devices in {parts} "
        f"accumulation steps; use {f'tokens_per_step={below * unit} or ' if below else ''}tokens_per_step={(below + 1) * unit}, "
        + (f"mesh.fsdp={longer.fsdp} with mesh.sequence={longer.sequence}, " if longer else "")
        + "fewer devices, or a larger mesh.tensor"
    )


def _heads(mesh: MeshConfig, model: ModelConfig, length: int) -> str | None:
    if model.sequence_attention != "all_to_all" or mesh.sequence == 1:
        return None
    both = model.heads % mesh.tensor == 0 and model.kv_heads % mesh.tensor == 0
    heads = model.heads // mesh.tensor if both else model.heads
    if heads % mesh.sequence == 0:
        return None
    return (
        f'model.sequence_attention = "all_to_all" divides the {heads} heads that a device has over mesh.sequence = '
        f'{mesh.sequence} (rows of {length} tokens); use a divisor of {heads}, or "gather" or "ring"'
    )
