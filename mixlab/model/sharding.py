"""Logical axis names of activations, resolved against the rules and the mesh in force (if any).

Parameters carry their names as metadata and are placed where the state is made. The few activations that need
help say so by name; with no mesh set, nothing happens.
"""

import math

import jax
from flax.core import spmd


def mesh_axes(name: str, size: int) -> str | tuple[str, ...] | None:
    """The mesh axes that `nnx.logical_axis_rules` gives to a logical axis of this size; None when there is no
    mesh, no rule, or the size does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = dict(spmd.get_logical_axis_rules()).get(name)
    if mesh.empty or axes is None:
        return None
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    return axes if size % math.prod(mesh.shape[axis] for axis in names) == 0 else None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the partitioner to keep `x` divided as its logical axes say (None: not divided)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = (name and mesh_axes(name, size) for name, size in zip(names, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, jax.P(*axes))
