"""The train step and the evaluation step: plain functions of pure state, compiled ahead for every shape of batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mixlab.config import Config
from mixlab.model.noise import scaled_noise
from mixlab.model.sharding import dividing_axes, flatten_tokens, unflatten_tokens
from mixlab.parallel.mesh import batch_sharding, replicated
from mixlab.training.loss import CrossEntropy, cross_entropy
from mixlab.training.optimizer import apply_gradients
from mixlab.training.schedules import composed_rate
from mixlab.training.state import Layout, State

Arrays = dict[str, jax.Array]


def make_train_step(config: Config, optimizer: optax.GradientTransformation, layout: Layout) -> Callable:
    """(state, batch) -> (state, metrics).

    batch: the arrays of stream.Batch; without segment_ids, attention is over whole rows; with noise_keys and noise_scales,
    noise is added to the embeddings.   metrics, float32 scalars: loss (mean over the weights of the global batch,
    without z-loss), z_loss (its weighted addition), grad_norm (before clipping), learning_rate, loss_tokens,
    rows_without_loss, skipped.
    An update whose loss or gradient is not finite leaves parameters and moments as they were, bit for bit; the step counts.
    """
    settings, rates = config.training, config.learning_rates

    def loss_sum(params, batch: Arrays):
        loss = _losses(config, layout, params, batch, settings.z_loss)
        return loss.total, settings.z_loss * loss.z_sum

    function = jax.value_and_grad(loss_sum, has_aux=True)

    def sum_over_parts(params, batch: Arrays):
        def one_part(total, part):
            return jax.tree.map(jnp.add, total, function(params, part)), None

        parts = {name: _parts(array, settings.accumulation_steps) for name, array in batch.items()}
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, params, batch))
        return jax.lax.scan(one_part, zero, parts)[0]

    def gradients(params, batch: Arrays):
        if settings.accumulation_steps == 1:
            return function(params, batch)
        replicas = dividing_axes("batch", len(batch["tokens"]))
        whole = all(sharding.is_fully_replicated for sharding in jax.tree.leaves(layout.shardings["params"]))
        if not replicas or not whole:
            return sum_over_parts(params, batch)

        # Devices that have all parameters sum their gradients once, where the compiler would have them do so for every part.
        def on_one_device(params, batch: Arrays):
            return jax.lax.psum(sum_over_parts(params, batch), replicas)

        specs = (jax.P(), jax.P(replicas))
        return jax.shard_map(on_one_device, in_specs=specs, out_specs=jax.P(), check_vma=False)(params, batch)

    def train_step(state: State, batch: Arrays) -> tuple[State, Arrays]:
        # Weights are made shares of the global batch before any gradient, rather than gradients divided when they are rounded.
        shares = batch["loss_weights"] / jnp.maximum(batch["loss_weights"].sum(), 1.0)
        (total, z_loss), gradient = gradients(state["params"], batch | {"loss_weights": shares})
        rate = composed_rate(rates, state["step"])
        params, opt_state, grad_norm = apply_gradients(optimizer, gradient, state["opt_state"], state["params"], rate)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        kept = {"params": state["params"], "opt_state": state["opt_state"]}
        updated = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), {"params": params, "opt_state": opt_state}, kept
        )
        metrics = {
            "loss": total - z_loss,
            "z_loss": z_loss,
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "loss_tokens": (batch["loss_weights"] > 0).sum(),
            "rows_without_loss": (batch["loss_weights"].sum(axis=1) == 0).sum(),
            "skipped": 1.0 - finite,
        }
        return updated | {"step": state["step"] + 1}, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

    return train_step


def make_token_losses(config: Config, layout: Layout) -> Callable:
    """(params, batch) -> float32 [B, L]: -log p(target) at every position, whatever its weight."""

    def token_losses(params, batch: Arrays):
        return unflatten_tokens(_losses(config, layout, params, batch).nll_T, *batch["tokens"].shape)

    return token_losses


def make_input_gradients(config: Config, layout: Layout) -> Callable:
    """(params, batch) -> float32 [B, L, D]: gradient of the weighted sum of token losses with respect to the embeddings of
    the batch's tokens."""

    def input_gradients(params, batch: Arrays):
        def total(added_BxLxD):
            return _losses(config, layout, params, batch, added_BxLxD=added_BxLxD).total

        return jax.grad(total)(jnp.zeros((*batch["tokens"].shape, config.model.d_model), jnp.float32))

    return input_gradients


def compile_train_step(
    train_step: Callable, layout: Layout, rows: int, length: int, masked: bool = True, noised: bool = False
):
    """The executable for batches of a stream.BatchShape; the state's buffers are donated to it."""
    shardings = (layout.shardings, replicated(layout.mesh))
    step = jax.jit(train_step, donate_argnums=0, out_shardings=shardings)
    with jax.set_mesh(layout.mesh):
        return step.lower(layout.abstract, abstract_batch(layout, rows, length, masked, noised)).compile()


def compile_pass_over(layout: Layout) -> Callable:
    """state -> the state after a step whose batch is gone past: all as it was, one step on."""
    on = jax.jit(lambda step: step + 1, out_shardings=layout.shardings["step"])
    return lambda state: state | {"step": on(state["step"])}


def compile_token_losses(token_losses: Callable, layout: Layout, rows: int, length: int):
    """The executable for batches of [rows, length]; its answer is whole on every device."""
    function = jax.jit(token_losses, out_shardings=replicated(layout.mesh))
    return function.lower(layout.abstract["params"], abstract_batch(layout, rows, length)).compile()


def abstract_batch(
    layout: Layout, rows: int, length: int, masked: bool = True, noised: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of a batch's arrays."""
    types = dict.fromkeys(("tokens", "targets", "positions"), jnp.int32) | {"loss_weights": jnp.float32}
    types |= {"segment_ids": jnp.int32} if masked else {}
    arrays = {name: ((rows, length), kind) for name, kind in types.items()}
    if noised:
        arrays |= {"noise_keys": ((rows, 2), jnp.uint32), "noise_scales": ((rows,), jnp.float32)}
    return {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(layout.mesh, shape))
        for name, (shape, kind) in arrays.items()
    }


def _losses(
    config: Config,
    layout: Layout,
    params,
    batch: Arrays,
    z_loss: float = 0.0,
    added_BxLxD: jax.Array | None = None,
) -> CrossEntropy:
    """The losses of a batch's tokens, in the order of `flatten_tokens`; `added` to their embeddings, or the noise that the batch has keys of."""
    model = layout.model(params)
    if "noise_keys" in batch:
        length, width = batch["tokens"].shape[1], config.model.d_model
        added_BxLxD = scaled_noise(batch["noise_keys"], batch["noise_scales"], length, width)
    hidden_BxLxD = model(batch["tokens"], batch.get("segment_ids"), batch["positions"], added_BxLxD)
    return cross_entropy(
        flatten_tokens(hidden_BxLxD),
        model.head_DxV(),
        flatten_tokens(batch["targets"]),
        flatten_tokens(batch["loss_weights"]),
        vocab_size=config.model.vocab_size,
        z_loss=z_loss,
        chunk_tokens=config.training.loss_chunk_tokens,
    )


def _parts(array: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]; part i takes rows i, i + parts, …, so that each device has its share of every part."""
    return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)
