"""Small models with random weights, as folders of runs."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mixlab.config import Config, to_json
from mixlab.corpus import tokenizer as tokenizers
from mixlab.model.presets import gpt2, llama, olmo2
from mixlab.model.transformer import Transformer
from mixlab.parallel.mesh import abstract_params
from mixlab.schedule.stages import StageConfig
from mixlab.sequences.format import FormatConfig
from mixlab.trained import open_trained
from mixlab.training.checkpoint import Checkpoints

TEXTS = ["the cat sat on the mat, the dog did not; naïve café 1234, the end of the story"] * 3
TOKENS = 276
SIZE = dict(layers=2, d_model=32, heads=4, ffn_width=40, context_length=24, vocab_size=TOKENS)  # in 384 rows
MODELS = {
    "llama": llama(**SIZE, kv_heads=2),
    "llama, tied, with biases": llama(**SIZE, tied_head=True, attention_bias=True, mlp_bias=True),
    "llama, wide heads": llama(**SIZE, head_dim=16, rope_base=500.0, norm_eps=1e-3),
    "olmo2": olmo2(**SIZE, kv_heads=2, head_dim=6),
    "olmo2, tied, with biases": olmo2(**SIZE, tied_head=True, attention_bias=True),
    "gpt2": gpt2(**SIZE, norm_eps=1e-3),
    "gpt2, own head": gpt2(**SIZE, tied_head=False),
}


def write_letters(path: Path) -> Path:
    """A tokenizer.json of TOKENS tokens."""
    tokenizers.train_bpe(TEXTS, TOKENS).save(path)
    return path


def make_run(folder: Path, model, letters: Path, bos: bool = False) -> Path:
    """A folder as of a run of this model; biases are not 0, scales not 1."""
    rng = np.random.default_rng(0)
    abstract = nnx.to_pure_dict(abstract_params(lambda: Transformer(model, rngs=nnx.Rngs(0)))[1])
    params = jax.tree.map(lambda x: jax.numpy.asarray(rng.normal(0.0, 0.3, x.shape), np.float32), abstract)
    tokenizer = tokenizers.load(letters)
    stage = StageConfig(steps=1, sequence_length=24, tokens_per_step=24, format=FormatConfig(bos=bos))
    folder.mkdir()
    (folder / "config.json").write_text(to_json(Config(model=model, tokenizer=str(letters), stages=(stage,))))
    with Checkpoints(folder / "checkpoints") as checkpoints:
        meta = {"tokens": 24, "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash}}
        checkpoints.save(1, {"params": params}, meta)
    return folder


def logits(run: Path, tokens_BxL: np.ndarray) -> np.ndarray:
    """[B, L, vocabulary] of the run's newest checkpoint."""
    with open_trained(run) as trained:
        params = trained.checkpoints.restore_params(None)[0]
        graph = abstract_params(lambda: Transformer(trained.config.model, rngs=nnx.Rngs(0)))[0]

    @jax.jit
    def compute(params, tokens_BxL):
        model = nnx.merge(graph, params)
        positions_BxL = jax.numpy.broadcast_to(jax.numpy.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
        return model.logits(model(tokens_BxL, None, positions_BxL))

    return np.asarray(compute(params, tokens_BxL))
