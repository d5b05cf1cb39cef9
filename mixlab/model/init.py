"""How parameters start."""

import math

import jax
from flax import nnx

from mixlab.model.config import ModelConfig


def weight_init(config: ModelConfig) -> jax.nn.initializers.Initializer:
    """Normal(0, init_std), truncated at `init_cutoff` standard deviations where one is set. Truncation is not
    compensated: at three sigmas the sample deviation is 0.98658 init_std (OLMo 2, section 2.1)."""
    return _normal(config.init_std, config.init_cutoff)


def residual_init(config: ModelConfig) -> jax.nn.initializers.Initializer:
    """For projections that write into the residual stream: as `weight_init`, divided by sqrt(2 * layers)
    where the configuration asks for GPT-2's rule (two such projections a layer)."""
    scale = 1 / math.sqrt(2 * config.layers) if config.init_scale_residual else 1.0
    return _normal(config.init_std * scale, config.init_cutoff)


def _normal(std: float, cutoff: float | None) -> jax.nn.initializers.Initializer:
    if cutoff is None:
        return nnx.initializers.normal(std)
    return nnx.initializers.truncated_normal(std, lower=-cutoff, upper=cutoff)
