"""Reading token by token with kept keys and values is reading the row at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.model.decode import decode, empty_cache
from tests.model.tiny import random_parameters, tiny, with_parameters


@pytest.mark.parametrize("preset", ["gpt2", "llama", "olmo2"])
def test_token_by_token_is_the_whole_row(preset):
    with jax.enable_x64(True):
        config = tiny(preset, compute_dtype="float64")
        model = with_parameters(config, random_parameters(config))
        tokens = np.random.default_rng(3).integers(0, 61, (3, 20)).astype(np.int32)
        whole = model(tokens, None, jnp.broadcast_to(jnp.arange(20), tokens.shape))
        cache = empty_cache(config, 3, 24)  # longer than what is read
        assert cache.keys.shape == (2, 3, 24, config.kv_heads, config.head_dim)
        step = jax.jit(decode)
        for at in range(20):
            hidden, cache = step(model, jnp.asarray(tokens[:, at]), jnp.int32(at), cache)
            np.testing.assert_allclose(hidden, whole[:, at], rtol=1e-9, atol=1e-9)
