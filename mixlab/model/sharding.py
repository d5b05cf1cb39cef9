"""Logical axis names of activations, resolved by the one table of rules against the mesh in force (if any).

Parameters carry their names as metadata and are placed where the state is made. The few activations that need
help say so by name here. The mesh is the one of `jax.set_mesh`; without it, nothing happens.
"""

import math

import jax

from mixlab.parallel.rules import RULES


def mesh_axes(name: str, size: int) -> str | tuple[str, ...] | None:
    """The mesh axes over which a logical axis of this size is divided; None when there is no mesh, the rule
    keeps it whole, or the size does not divide."""
    mesh, axes = jax.sharding.get_abstract_mesh(), RULES[name]
    if mesh.empty or axes is None:
        return None
    names = (axes,) if isinstance(axes, str) else axes
    return axes if size % math.prod(mesh.shape[axis] for axis in names) == 0 else None


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the partitioner to keep `x` divided as its logical axes say (None: not divided)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = (None if name is None else mesh_axes(name, size) for name, size in zip(names, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, jax.P(*axes))
