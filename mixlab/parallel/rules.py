"""The one table from the model's logical axis names to the axes of the mesh."""

import math
from collections.abc import Mapping

from jax.sharding import PartitionSpec

# Every logical name that a parameter or an activation may bear, also those that stay whole on each device.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "expert", "fsdp"),
    "length": "sequence",
    "tokens": ("data", "expert", "fsdp", "sequence"),  # of rows one after the other
    "vocab": "tensor",
    "positions": None,
    "embed": ("fsdp", "sequence"),  # jointly: a mesh that trades the one for the other leaves parameters in place
    "experts": "expert",
    "heads": "tensor",  # heads x head_dim, folded
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "layers": None,
}


def mesh_axes(name: str, size: int, sizes: Mapping[str, int]) -> str | tuple[str, ...] | None:
    """The axes of a mesh of these sizes over which a logical axis of this size is divided; None where the rule keeps it
    whole, or it cannot be divided evenly. A row is divided only where each device gets two pieces of it (see
    `model.sequence`)."""
    axes = RULES[name]
    extent = math.prod(sizes[axis] for axis in split_axes(axes))
    return None if size % (2 * extent if name == "length" and extent > 1 else extent) else axes


def split_axes(split: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if split is None else (split,) if isinstance(split, str) else split


def spec(logical_axes, rules: Mapping[str, str | tuple[str, ...] | None] = RULES) -> PartitionSpec:
    """The PartitionSpec of an array with the given logical axes; None in place of a name leaves that axis
    whole."""
    return PartitionSpec(*(None if name is None else rules[name] for name in logical_axes))


def check_names(axes_by_parameter: Mapping[str, tuple[str | None, ...]], rules=RULES) -> None:
    """Raises ValueError unless every logical name is in the table. Flax itself would take an unknown name for
    a mesh axis and fail much later, at the first compilation.

    axes_by_parameter: {"blocks/mlp/up/kernel": ("layers", "embed", "mlp"), ...}
    """
    unknown = {
        name: parameter
        for parameter, axes in reversed(axes_by_parameter.items())
        for name in axes
        if name is not None and name not in rules
    }
    if unknown:
        listed = ", ".join(f"{name!r} (of {parameter})" for name, parameter in sorted(unknown.items()))
        raise ValueError(
            f"logical axis without a rule: {listed}. Add a line for it to RULES in mixlab/parallel/rules.py "
            f"(None keeps the axis whole on every device); known names: {', '.join(sorted(rules))}"
        )
