"""Continues prompts, many at a time: batches of a few fixed shapes, each compiled once."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.evals.padding import Shapes
from mixlab.model.config import ModelConfig
from mixlab.model.decode import decode, empty_cache
from mixlab.parallel.mesh import global_batch, host_rows, replicated, whole_rows
from mixlab.training.state import Layout


class Generator:
    """Continues prompts with the model of a layout. rows: of a batch of the longest texts, or more (`whole_rows`)."""

    def __init__(self, config: ModelConfig, layout: Layout, rows: int):
        self._config, self._layout = config, layout
        self._shapes = Shapes(whole_rows(layout.mesh, rows), config.context_length)
        self._run = jax.jit(
            partial(_continue, config, layout.model),
            static_argnames=("sampled", "narrowed"),
            out_shardings=replicated(layout.mesh),
        )

    def __call__(
        self,
        params,
        prompts: Sequence[np.ndarray],
        tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        samples: int = 1,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> np.ndarray:
        """int32 [N, samples, tokens]: new tokens after every prompt (int arrays, not empty; what does not fit into the
        context with them is left out at the beginning). Temperature 0 takes the likeliest token; else one is drawn, of the
        top_k likeliest alone (0: of all), and of the fewest that together have probability top_p.

        What is drawn depends on the seed, the prompt's number and the sample's, not on how prompts share batches."""
        room = self._config.context_length - tokens
        if room < 1 or any(len(prompt) == 0 for prompt in prompts):
            raise ValueError(
                f"{tokens} tokens after a prompt of at least 1 must fit into {self._config.context_length}"
            )
        kept = [np.asarray(prompt)[-room:] for prompt in prompts for _ in range(samples)]
        begins = np.array([len(prompt) for prompt in kept], np.int64)
        done = np.zeros((len(kept), tokens), np.int32)
        for numbers, rows, length in self._shapes.batches(begins + tokens):
            grid, starts = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
            starts[: len(numbers)] = begins[numbers]
            for row, number in enumerate(numbers):
                grid[row, : len(kept[number])] = kept[number]
            drawn = np.resize(numbers, rows).astype(np.uint32)  # rows without a prompt draw too; nobody reads it
            mine = host_rows(self._layout.mesh, rows)
            local = {"grid": grid[mine], "begins": starts[mine], "numbers": drawn[mine]}
            steps = int(starts.max()) + tokens - 1
            batch = global_batch(self._layout.mesh, local, rows)
            settings = {
                "temperature": temperature,
                "top_k": top_k or self._config.vocab_size,
                "top_p": top_p,
                "key": jax.random.key(seed % 2**32),
            }
            narrowed = top_k > 0 or top_p < 1
            filled = self._run(params, batch, steps, settings, sampled=temperature > 0, narrowed=narrowed)
            filled = np.asarray(jax.device_get(filled))
            for row, number in enumerate(numbers):
                done[number] = filled[row, begins[number] : begins[number] + tokens]
        return done.reshape(len(prompts), samples, tokens)


def until(text: np.ndarray, eos_id: int | None) -> np.ndarray:
    """The tokens before the first EOS."""
    ends = np.flatnonzero(text == eos_id)
    return text[: ends[0]] if len(ends) else text


def narrow(logits_V: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits, -inf but for the top_k likeliest tokens and, of these, for the fewest that hold top_p of the probability (at
    least one; tokens equal to the least likely one kept are kept too)."""
    descending_V = jnp.sort(logits_V, descending=True)
    descending_V = jnp.where(jnp.arange(len(logits_V)) < top_k, descending_V, -jnp.inf)
    probabilities_V = jax.nn.softmax(descending_V)
    before_V = jnp.cumsum(probabilities_V) - probabilities_V  # of the tokens that are likelier
    kept = jnp.maximum(((before_V < top_p) & jnp.isfinite(descending_V)).sum(), 1)
    return jnp.where(logits_V >= descending_V[kept - 1], logits_V, -jnp.inf)


def _continue(
    config: ModelConfig, model_of: Callable, params, batch, steps, settings: dict, *, sampled: bool, narrowed: bool
):
    """grid [B, L] with every position from a row's `begins` up to `steps` filled in; prompts too are read token by token."""
    model = model_of(params)
    begins_B, numbers_B = batch["begins"], batch["numbers"]

    def one_token(at, carry):
        grid_BxL, cache = carry
        hidden_BxD, cache = decode(model, grid_BxL[:, at], at, cache)
        logits_BxV = model.logits(hidden_BxD)
        if sampled:
            logits_BxV = logits_BxV / settings["temperature"]
            if narrowed:
                logits_BxV = jax.vmap(narrow, in_axes=(0, None, None))(logits_BxV, settings["top_k"], settings["top_p"])
            draw = jax.vmap(lambda logits, *names: jax.random.categorical(_key(settings["key"], *names), logits))
            chosen_B = draw(logits_BxV, numbers_B, at + 1 - begins_B)
        else:
            chosen_B = logits_BxV.argmax(-1)
        next_B = jnp.where(at + 1 >= begins_B, chosen_B.astype(jnp.int32), grid_BxL[:, at + 1])
        return grid_BxL.at[:, at + 1].set(next_B), cache

    rows, length = batch["grid"].shape
    return jax.lax.fori_loop(0, steps, one_token, (batch["grid"], empty_cache(config, rows, length)))[0]


def _key(key, *numbers):
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
