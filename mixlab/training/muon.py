"""Muon (Jordan et al. 2024): momentum whose matrices are brought near orthogonal ones."""

import math

import jax
import optax
import optax.contrib

from mixlab.parallel.rules import RULES

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published iteration
# Axes of the mesh over which layers are divided here, first those that divide parameters; and over which matrices are.
SHARDS, LONG_SIDE = RULES["embed"], RULES["mlp"]
STACK = (*SHARDS, *(axis for axis in RULES["tokens"] if axis not in SHARDS))
FREE = jax.P.UNCONSTRAINED


def scale_by_muon(momentum: float, iterations: int, rms: float, eps: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised by so many iterations, every matrix at the root mean square `rms` (Liu et al.
    2025, "Muon is scalable for LLM training", section 2.2).

    All axes but the last two (layers, experts) are batch axes; the heads of an attention weight stay folded, so that
    its matrix is orthogonalised as a whole.
    """

    def last_two_axes(updates):
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)

    def orthogonal(update_xMxN, _):
        return orthogonalise(update_xMxN, iterations) * (rms * max(update_xMxN.shape[-2:]) ** 0.5)

    # Without iterations of its own, optax's gives the momentum with every matrix at a Frobenius norm of 1.
    unit_momentum = optax.contrib.scale_by_muon(
        beta=momentum, ns_steps=0, eps=eps, weight_dimension_numbers=last_two_axes
    )
    return optax.chain(unit_momentum, optax.stateless_with_tree_map(orthogonal))


def orthogonalise(x_xMxN: jax.Array, iterations: int) -> jax.Array:
    """Newton-Schulz: singular values of at most 1 come near 1. The smaller side is the one that is squared.

    On several devices each has whole matrices of its part of the layers meanwhile: a matrix moves once before all iterations
    where parameters are divided (fsdp), not where all have them (data), and once after. A stack of fewer layers than devices
    leaves some idle. Over `tensor` the longer side is divided, and only the squares are summed up.
    """
    wide = x_xMxN.shape[-2] <= x_xMxN.shape[-1]
    x_xMxN = _place(x_xMxN, None, FREE, FREE)  # the momentum that it comes of stays where it is kept
    x = _place(x_xMxN if wide else x_xMxN.mT, STACK, None, LONG_SIDE)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + (c * square) @ square) @ x
    # Replicas give each other theirs before a layer is divided again: in one, the compiler would bring whole stacks together.
    x = _place(_place(x, STACK, None, LONG_SIDE), SHARDS, None, LONG_SIDE)
    return _place(x if wide else x.mT, None, FREE, FREE)


def _place(x: jax.Array, layers, rows, columns) -> jax.Array:
    """A stack of matrices divided over these axes of the mesh, if it has several devices there."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.ndim < 3 or mesh.empty or mesh.are_all_axes_manual or math.prod(mesh.shape[axis] for axis in STACK) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(layers, *[FREE] * (x.ndim - 3), rows, columns))
