"""Continues prompts: a batch of fixed shape, one compiled function for all lengths of prompt."""

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.training.state import Layout


def generate(
    layout: Layout, params, prompts: list[np.ndarray], tokens: int, temperature: float, seed: int, eos_id: int
) -> list[np.ndarray]:
    """Up to `tokens` new tokens for every prompt (int arrays, not empty), int32; a text ends before its EOS.

    temperature 0 takes the likeliest token. Prompt and continuation must fit the model's context."""
    length = max(len(p) for p in prompts) + tokens
    grid = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        grid[row, : len(prompt)] = prompt
    begins = jnp.array([len(p) for p in prompts])

    @jax.jit
    def run(params, grid_BxL, key):
        model = layout.model(params)
        positions_BxL = jnp.broadcast_to(jnp.arange(length), grid_BxL.shape)
        rows = jnp.arange(len(prompts))

        def one_token(i, carry):
            grid_BxL, key = carry
            key, now = jax.random.split(key)
            hidden_BxLxD = model(grid_BxL, None, positions_BxL)
            logits_BxV = model.logits(hidden_BxLxD[rows, begins + i - 1])
            drawn = jax.random.categorical(now, logits_BxV / jnp.maximum(temperature, 1e-6))
            chosen = jnp.where(temperature > 0, drawn, logits_BxV.argmax(-1))
            return grid_BxL.at[rows, begins + i].set(chosen.astype(jnp.int32)), key

        return jax.lax.fori_loop(0, tokens, one_token, (grid_BxL, key))[0]

    done = np.asarray(jax.device_get(run(params, grid, jax.random.key(seed))))
    texts = [row[len(prompt) : len(prompt) + tokens] for row, prompt in zip(done, prompts, strict=True)]
    return [text[: np.argmax(text == eos_id)] if (text == eos_id).any() else text for text in texts]
