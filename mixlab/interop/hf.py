"""The architectures of Hugging Face's transformers that are models of ours under other names: Llama, OLMo 2 and GPT-2.

An architecture fixes some fields of a model, has keys in config.json for the others, and a tensor, or one a layer, for every
parameter. Both directions, `export.py` and `importing.py`, are read off this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlab.errors import UserError
from mixlab.model.config import ModelConfig
from mixlab.model.presets import gpt2, llama, olmo2


@dataclass(frozen=True)
class Architecture:
    """name, model_type: as in config.json.   preset: our family.   fixed: fields of the model that it has in one way only.
    keys: field -> its key in config.json.   implied: what a key that is left out stands for.   only: what other keys must be
    where they are given.   modules: our module -> theirs, "{}" being the layer's number.   transposed: whether its
    linear maps are kept as [out, in].   fused: our modules that are parts of one tensor of theirs, along the last axis."""

    name: str
    model_type: str
    preset: Callable[..., ModelConfig]
    fixed: dict[str, Any]
    keys: dict[str, str]
    implied: dict[str, Any]
    only: dict[str, tuple]
    modules: dict[str, str]
    transposed: bool = True
    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.   tensor: its name there, "{}" being the layer's number if it has one.   transposed: whether
    it is the other way round there.   part: (number, count) where it is one of several equal parts of the last axis."""

    tensor: str
    transposed: bool
    part: tuple[int, int] = (0, 1)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """One layer's array of ours, as theirs."""
        return array.T if self.transposed else array

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One layer's array of theirs, as ours."""
        number, count = self.part
        whole = array.T if self.transposed else array
        width = whole.shape[-1] // count
        return whole[..., number * width : (number + 1) * width]


_SIZES = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_width": "intermediate_size",
    "context_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "attention_bias": "attention_bias",
    "tied_head": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_IMPLIED = {
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
}
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_MODULES = {
    "embedding": "model.embed_tokens",
    "blocks/attention/query": "model.layers.{}.self_attn.q_proj",
    "blocks/attention/key": "model.layers.{}.self_attn.k_proj",
    "blocks/attention/value": "model.layers.{}.self_attn.v_proj",
    "blocks/attention/output": "model.layers.{}.self_attn.o_proj",
    "blocks/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "blocks/mlp/up": "model.layers.{}.mlp.up_proj",
    "blocks/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    preset=llama,
    fixed={"norm": "rms", "norm_placement": "pre", "qk_norm": False, "activation": "swiglu", "positions": "rope"},
    keys=_SIZES | {"mlp_bias": "mlp_bias"},
    implied=_IMPLIED,
    only=_ONLY,
    modules=_MODULES
    | {
        "blocks/attention_norm": "model.layers.{}.input_layernorm",
        "blocks/mlp_norm": "model.layers.{}.post_attention_layernorm",
    },
)
OLMO2 = Architecture(
    name="Olmo2ForCausalLM",
    model_type="olmo2",
    preset=olmo2,
    fixed={"norm": "rms", "norm_placement": "post", "qk_norm": True, "activation": "swiglu", "positions": "rope"}
    | {"mlp_bias": False},
    keys=_SIZES,
    implied=_IMPLIED,
    only=_ONLY,
    modules=_MODULES
    | {
        "blocks/attention/query_norm": "model.layers.{}.self_attn.q_norm",
        "blocks/attention/key_norm": "model.layers.{}.self_attn.k_norm",
        "blocks/attention_norm": "model.layers.{}.post_attention_layernorm",
        "blocks/mlp_norm": "model.layers.{}.post_feedforward_layernorm",
    },
)
GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    preset=gpt2,
    fixed={"norm": "layer", "norm_placement": "pre", "qk_norm": False, "activation": "gelu", "positions": "learned"}
    | {"attention_bias": True, "mlp_bias": True},
    keys={
        "vocab_size": "vocab_size",
        "layers": "n_layer",
        "d_model": "n_embd",
        "heads": "n_head",
        "ffn_width": "n_inner",
        "context_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied_head": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    implied={
        "n_inner": None,  # 4 n_embd
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "activation_function": "gelu_new",
    },
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    modules={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "blocks/attention/query": "transformer.h.{}.attn.c_attn",
        "blocks/attention/key": "transformer.h.{}.attn.c_attn",
        "blocks/attention/value": "transformer.h.{}.attn.c_attn",
        "blocks/attention/output": "transformer.h.{}.attn.c_proj",
        "blocks/mlp/up": "transformer.h.{}.mlp.c_fc",
        "blocks/mlp/down": "transformer.h.{}.mlp.c_proj",
        "blocks/attention_norm": "transformer.h.{}.ln_1",
        "blocks/mlp_norm": "transformer.h.{}.ln_2",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    transposed=False,
    fused=("blocks/attention/query", "blocks/attention/key", "blocks/attention/value"),
)
ARCHITECTURES = (LLAMA, OLMO2, GPT2)


def place(architecture: Architecture, parameter: str) -> Place:
    """Where a parameter ("blocks/mlp/up/kernel") stands in a model of the architecture."""
    module, _, kind = parameter.rpartition("/")
    if kind not in ("kernel", "bias", "scale"):
        return Place(f"{architecture.modules[parameter]}.weight", transposed=parameter == "head")
    fused = architecture.fused
    return Place(
        f"{architecture.modules[module]}.{'bias' if kind == 'bias' else 'weight'}",
        transposed=kind == "kernel" and architecture.transposed,
        part=(fused.index(module), len(fused)) if module in fused else (0, 1),
    )


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that computes the same function. UserError where there is none, with what stands in the way of the
    nearest."""
    obstacles = {architecture.name: _obstacles(architecture, config) for architecture in ARCHITECTURES}
    nearest = min(ARCHITECTURES, key=lambda architecture: len(obstacles[architecture.name]))
    if found := obstacles[nearest.name]:
        raise UserError(
            f"no architecture of transformers computes this model; {nearest.name} is the nearest, but\n"
            + "\n".join(f"  - {problem}" for problem in found)
            + "\nTrain a model of one of the presets to export it"
        )
    return nearest


def _obstacles(architecture: Architecture, config: ModelConfig) -> list[str]:
    found = [
        f"model.{name} = {getattr(config, name)!r}, where it has {value!r}"
        for name, value in architecture.fixed.items()
        if getattr(config, name) != value
    ]
    if config.d_model % config.heads:
        found.append(f"model.heads = {config.heads} does not divide model.d_model = {config.d_model}")
    if "kv_heads" not in architecture.keys and config.kv_heads != config.heads:
        found.append(f"model.kv_heads = {config.kv_heads}, where it has as many as heads, {config.heads}")
    if "head_dim" not in architecture.keys and config.head_dim * config.heads != config.d_model:
        found.append(f"model.head_dim = {config.head_dim}, where it has model.d_model / model.heads")
    return found


def config_json(config: ModelConfig, specials: dict[str, int | None]) -> dict[str, Any]:
    """config.json of a model. specials: "bos_token_id", "eos_token_id" and "pad_token_id"."""
    architecture = architecture_of(config)
    values = {key: getattr(config, name) for name, key in architecture.keys.items()}
    if "rope_theta" in values:  # read by transformers before version 5; what later ones read is rope_parameters
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_base}
    activations = {name: allowed[0] for name, allowed in architecture.only.items() if name in architecture.implied}
    no_dropout = {"attention_dropout": 0.0}
    if architecture is GPT2:
        no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    head = {"architectures": [architecture.name], "model_type": architecture.model_type, "torch_dtype": "float32"}
    return head | values | activations | no_dropout | specials


def model_of(values: dict[str, Any], vocab_size: int) -> tuple[Architecture, ModelConfig]:
    """The architecture and the model of a config.json, whose vocabulary is the first `vocab_size` rows. UserError, with
    everything at once that cannot be taken over."""
    names = values.get("architectures") or [a.name for a in ARCHITECTURES if a.model_type == values.get("model_type")]
    architecture = next((a for a in ARCHITECTURES if [a.name] == names), None)
    if architecture is None:
        known = ", ".join(a.name for a in ARCHITECTURES)
        what = ", ".join(map(str, names)) or f"model_type = {values.get('model_type')!r}"
        raise UserError(f"architectures: {what} cannot be imported; {known} can")
    given = architecture.implied | _with_rope(values)
    problems = [f"{key} is not given" for key in architecture.keys.values() if key not in given]
    problems += [
        f"{key} = {given[key]!r}: only {' or '.join(map(repr, allowed))} can be taken over"
        for key, allowed in architecture.only.items()
        if key in given and given[key] not in allowed
    ]
    if "sliding_attention" in (values.get("layer_types") or ()):
        problems.append("layer_types: sliding_attention cannot be taken over")
    if not problems and given["vocab_size"] < vocab_size:
        problems.append(f"vocab_size = {given['vocab_size']}, but its tokenizer has {vocab_size} tokens")
    if problems:
        raise UserError("\n".join(f"  - {problem}" for problem in problems))
    settings = {name: given[key] for name, key in architecture.keys.items() if given[key] is not None}
    if architecture is GPT2:
        settings.setdefault("ffn_width", 4 * settings["d_model"])
    return architecture, architecture.preset(**settings | {"vocab_size": vocab_size})


def _with_rope(values: dict[str, Any]) -> dict[str, Any]:
    """config.json with its rope_parameters (since transformers 5) as the keys of earlier versions."""
    rope = dict(values.get("rope_parameters") or {})
    kind = rope.pop("rope_type", "default")
    if kind != "default":
        return values | {"rope_scaling": kind}
    return values | {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
