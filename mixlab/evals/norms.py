"""Sizes of a model's weights, to compare runs that should not differ much."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mixlab.parallel.mesh import replicated
from mixlab.training.state import Layout


def weight_norms(params) -> dict[str, jax.Array]:
    """Euclidean norms of all weights of the input layer (embeddings), the hidden layers (blocks and final norm), and the
    output matrix, where it is not the embedding."""
    groups = {"input": ("embedding", "position_embedding"), "hidden": ("blocks", "final_norm"), "output": ("head",)}
    found = {}
    for name, keys in groups.items():
        leaves = jax.tree.leaves([params[key] for key in keys if params.get(key) is not None])
        if leaves:
            squares = [jnp.square(leaf.astype(jnp.float32)).sum() for leaf in leaves]
            found[f"train/weight_norm/{name}"] = jnp.sqrt(jnp.stack(squares).sum())
    return found


def compile_weight_norms(layout: Layout) -> Callable:
    """The executable for parameters of this layout."""
    return jax.jit(weight_norms, out_shardings=replicated(layout.mesh)).lower(layout.abstract["params"]).compile()
