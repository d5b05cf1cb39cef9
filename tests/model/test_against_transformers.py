"""The three presets against GPT2LMHeadModel, LlamaForCausalLM and Olmo2ForCausalLM: loss and every gradient.

Random settings and weights, ours copied over. Skipped without torch and transformers (`pip install -e
.[interop]`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PRESETS, random_parameters, tiny, with_parameters

from mixlab.training.loss import cross_entropy

torch = pytest.importorskip("torch", reason="torch is not installed: the reference implementations were not run")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: the reference implementations were not run"
)


def make_reference(preset, config):
    common = dict(vocab_size=config.vocab_size, use_cache=False, attn_implementation="eager")
    common |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if preset == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_positions=config.context_length,
                n_embd=config.d_model,
                n_layer=config.layers,
                n_head=config.heads,
                n_inner=config.ffn_width,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    common |= dict(
        hidden_size=config.d_model,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base,  # transformers 4
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},  # transformers 5
        tie_word_embeddings=config.tied_head,
    )
    if preset == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**common))


def renamed(preset, config, tree):
    """Our parameters (or gradients) under the reference's names, in its layout."""
    vocab = config.vocab_size
    answer, blocks = {}, tree["blocks"]

    def put(name, kernel=None, scale=None, bias=None, transpose=True):
        if kernel is not None:
            answer[f"{name}.weight"] = kernel.T if transpose else kernel
        if scale is not None:
            answer[f"{name}.weight"] = scale
        if bias is not None:
            answer[f"{name}.bias"] = bias

    for i in range(config.layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        a, m = p["attention"], p["mlp"]
        if preset == "gpt2":  # its Conv1D keeps kernels as [in, out], as we do
            at = f"transformer.h.{i}"
            qkv = [a["query"], a["key"], a["value"]]
            put(
                f"{at}.attn.c_attn",
                kernel=np.concatenate([y["kernel"] for y in qkv], axis=1),
                bias=np.concatenate([y["bias"] for y in qkv]),
                transpose=False,
            )
            put(f"{at}.attn.c_proj", **a["output"], transpose=False)
            put(f"{at}.mlp.c_fc", **m["up"], transpose=False)
            put(f"{at}.mlp.c_proj", **m["down"], transpose=False)
            put(f"{at}.ln_1", **p["attention_norm"])
            put(f"{at}.ln_2", **p["mlp_norm"])
            continue
        at = f"model.layers.{i}"
        for theirs, ours in (
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("o_proj", "output"),
        ):
            put(f"{at}.self_attn.{theirs}", **a[ours])
        for name in ("gate", "up", "down"):
            put(f"{at}.mlp.{name}_proj", **m[name])
        if preset == "llama":
            put(f"{at}.input_layernorm", **p["attention_norm"])
            put(f"{at}.post_attention_layernorm", **p["mlp_norm"])
        else:
            put(f"{at}.self_attn.q_norm", **a["query_norm"])
            put(f"{at}.self_attn.k_norm", **a["key_norm"])
            put(f"{at}.post_attention_layernorm", **p["attention_norm"])
            put(f"{at}.post_feedforward_layernorm", **p["mlp_norm"])
    if preset == "gpt2":
        answer["transformer.wte.weight"] = tree["embedding"][:vocab]
        answer["transformer.wpe.weight"] = tree["position_embedding"]
        put("transformer.ln_f", **tree["final_norm"])
    else:
        answer["model.embed_tokens.weight"] = tree["embedding"][:vocab]
        answer["lm_head.weight"] = tree["head"][:, :vocab].T
        put("model.norm", **tree["final_norm"])
    return answer


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_gradient_of_every_parameter(preset):
    config = tiny(preset, ffn_width=48)
    parameters = random_parameters(config, dtype=np.float32)
    reference = make_reference(preset, config)
    ours = {name: torch.tensor(np.array(value)) for name, value in renamed(preset, config, parameters).items()}
    theirs = dict(reference.named_parameters())
    assert set(ours) == set(theirs)
    reference.load_state_dict(ours, strict=False)  # the tied head and buffers have no entry of their own

    # One row of two documents for us, with positions that restart; two rows for the reference.
    tokens = np.random.default_rng(3).integers(config.vocab_size, size=(2, 13)).astype(np.int32)
    packed = tokens[:, :-1].reshape(1, 24)
    segments = np.repeat([[1, 2]], 12, axis=1).astype(np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32), 2)[None]

    def loss(parameters):
        model = with_parameters(config, parameters)
        hidden = model(packed, segments, positions).reshape(24, -1)
        targets, weights = tokens[:, 1:].reshape(-1), jnp.ones(24)
        result = cross_entropy(hidden, model.head_DxV(), targets, weights, vocab_size=config.vocab_size)
        return result.total / 24

    value, gradient = jax.jit(jax.value_and_grad(loss))(parameters)
    rows = torch.tensor(tokens).long()
    expected = reference(input_ids=rows, labels=rows).loss
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    gradient = renamed(preset, config, jax.tree.map(np.asarray, gradient))
    largest = max(parameter.grad.norm().item() for parameter in theirs.values())
    for name, parameter in theirs.items():
        error = np.linalg.norm(gradient[name] - parameter.grad.numpy())
        assert error < 1e-5 * max(parameter.grad.norm().item(), 0.01 * largest), name
