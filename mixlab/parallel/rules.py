"""The one table from the model's logical axis names to the axes of the mesh."""

from collections.abc import Mapping

from jax.sharding import PartitionSpec

# Every logical name that a parameter or an activation may bear, also those that stay whole on each device.
RULES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "vocab": "tensor",
    "positions": None,
    "embed": "fsdp",
    "heads": "tensor",  # heads x head_dim, folded
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "layers": None,
}


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
