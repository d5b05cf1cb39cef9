"""Logical axis names of activations, resolved by the one table of rules against the mesh in force (if any).

Parameters carry their names as metadata and are placed where the state is made. The few activations that need
help say so by name here. The mesh is the one of `jax.set_mesh`; without it, nothing happens.
"""

import math

import jax

from mixlab.parallel import rules


def mesh_axes(name: str, size: int) -> str | tuple[str, ...] | None:
    """The mesh axes over which a logical axis of this size is divided; None when there is no mesh (or one device's part
    is being computed), the rule keeps it whole, or the size does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else rules.mesh_axes(name, size, mesh.shape)


def dividing_axes(name: str, size: int) -> tuple[str, ...]:
    """Those of `mesh_axes` that have more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in rules.split_axes(mesh_axes(name, size)) if mesh.shape[axis] > 1)


def extent(name: str, size: int) -> int:
    """Into how many parts a logical axis of this size is divided."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in dividing_axes(name, size))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the partitioner to keep `x` divided as its logical axes say (None: not divided)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return x
    axes = (None if name is None else mesh_axes(name, size) for name, size in zip(names, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, jax.P(*axes))


def flatten_tokens(x: jax.Array) -> jax.Array:
    """[B, L, …] -> [B L, …], row after row; where rows are divided, in the order of devices, so that no token moves."""
    (B, L), rest = x.shape[:2], x.shape[2:]
    rows, parts = extent("batch", B), extent("length", L)
    if parts == 1:
        return x.reshape(B * L, *rest)
    split = x.reshape(rows, B // rows, parts, L // parts, *rest).swapaxes(1, 2)
    together = (*rules.split_axes(rules.RULES["batch"]), *rules.split_axes(rules.RULES["length"]))
    return jax.lax.with_sharding_constraint(split.reshape(B * L, *rest), jax.P(together if rows > 1 else together[-1:]))


def unflatten_tokens(x: jax.Array, B: int, L: int) -> jax.Array:
    """The inverse of `flatten_tokens`."""
    rows, parts = extent("batch", B), extent("length", L)
    if parts == 1:
        return x.reshape(B, L, *x.shape[1:])
    split = x.reshape(rows, parts, B // rows, L // parts, *x.shape[1:]).swapaxes(1, 2)
    return constrain(split.reshape(B, L, *x.shape[1:]), "batch", "length", *(None,) * (x.ndim - 1))
