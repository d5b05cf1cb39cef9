"""The train state, made where it will lie: {"params": nested dict, "opt_state": optax state, "step": int32}.

`step` counts completed updates. Everything is plain arrays in plain containers, so that a checkpoint depends on no library's
classes but optax's.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from mixlab.model.config import ModelConfig
from mixlab.model.transformer import Transformer
from mixlab.parallel.mesh import abstract_params, param_shardings, replicated
from mixlab.seeds import seed_of
from mixlab.training.optimizer import opt_state_shardings

State = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What is known of a model's state before it exists. graph: the nnx graph definition that, merged with "params", is the
    model.   abstract: the state with ShapeDtypeStructs (with shardings) for arrays.   shardings: the state with shardings."""

    graph: nnx.GraphDef
    abstract: State
    shardings: State
    mesh: Mesh

    def model(self, params) -> Transformer:
        """The model of these parameters; for use inside jit."""
        return nnx.merge(self.graph, params)

    def on(self, mesh: Mesh) -> "Layout":
        """For batches on another mesh of the same devices in the same order; the state stays where it is."""
        return replace(self, mesh=mesh)


def plan_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> Layout:
    """Shapes and shardings of the state; allocates nothing. UserError when the mesh does not fit the model."""
    graph, params = abstract_params(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    places = param_shardings(params, mesh)
    shapes = nnx.to_pure_dict(params)
    shardings = {
        "params": places,
        "opt_state": opt_state_shardings(optimizer, shapes, places, mesh),
        "step": replicated(mesh),
    }
    state = {
        "params": shapes,
        "opt_state": jax.eval_shape(optimizer.init, shapes),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return Layout(graph, abstract, shardings, mesh)


def create_state(config: ModelConfig, optimizer: optax.GradientTransformation, layout: Layout, seed: int) -> State:
    """A fresh state; each device makes its own part. The same seed gives the same weights on any mesh (up to rounding)."""

    def create(key):
        with nnx.use_eager_sharding(False):
            model = Transformer(config, rngs=nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(0)}

    key = jax.random.key(seed_of(seed, "init") % 2**32)
    return jax.jit(create, out_shardings=layout.shardings)(key)
