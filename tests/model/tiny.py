"""Small models, parameters and batches shared by the tests of this folder."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from mixlab.model.presets import gpt2, llama, olmo2
from mixlab.model.transformer import Transformer
from mixlab.parallel.mesh import abstract_params
from mixlab.training.loss import cross_entropy

PRESETS = {"gpt2": gpt2, "llama": llama, "olmo2": olmo2}
Z_LOSS = 1e-2  # far larger than in use, so that an error in its gradient shows


class Rows(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray
    loss_weights: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


def tiny(preset, **overrides):
    """Two layers, 4 heads of 8; grouped queries but for GPT-2; 61 tokens in a table of 64 rows."""
    values = dict(layers=2, d_model=32, heads=4, ffn_width=40, vocab_size=61, context_length=24, vocab_multiple=8)
    if preset != "gpt2":
        values["kv_heads"] = 2
    return PRESETS[preset](**(values | overrides))


@functools.cache
def abstract(config):
    """(graph definition, abstract parameters)"""
    return abstract_params(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def random_parameters(config, seed=0, dtype=np.float64):
    """A pure nested dict with nothing left at its special initial value: scales are not 1, biases not 0."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(abstract(config)[1]))


def with_parameters(config, parameters):
    """The model with these parameters, a pure nested dict."""
    return nnx.merge(abstract(config)[0], parameters)


def loss(parameters, config, rows):
    """(weighted sum of token losses, nll [B, L])."""
    model = with_parameters(config, parameters)
    hidden = model(rows.tokens, rows.segment_ids, rows.positions)
    result = cross_entropy(
        hidden.reshape(-1, config.d_model),
        model.head_DxV(),
        rows.targets.reshape(-1),
        rows.loss_weights.reshape(-1),
        vocab_size=config.vocab_size,
        z_loss=Z_LOSS,
        chunk_tokens=20,
    )
    return result.total, result.nll_T.reshape(rows.tokens.shape)


def packed_rows(config, seed=1):
    """Two rows of 17 tokens: documents of 6, 1 and 7 then padding; one document of 17 without weight at
    first."""
    rng = np.random.default_rng(seed)
    lengths = [[6, 1, 7], [17]]
    segments, positions = np.zeros((2, 17), np.int32), np.zeros((2, 17), np.int32)
    for row, documents in enumerate(lengths):
        ids = np.repeat(np.arange(1, len(documents) + 1), documents)
        segments[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.concatenate([np.arange(n) for n in documents])
    weights = rng.uniform(0.5, 2.0, (2, 17)).astype(np.float32) * (segments > 0)
    weights[1, :4] = 0
    tokens, targets = rng.integers(config.vocab_size, size=(2, 2, 17)).astype(np.int32)
    return Rows(tokens, targets, weights, segments, positions)
