"""GPT-2, Llama and OLMo 2 as settings of one transformer: sizes by name or by keyword, any field overridden.

    olmo2("1B")                                        a published size
    olmo2("190M", vocab_size=8192, context_length=512)
    llama(layers=6, d_model=384, heads=6, vocab_size=8192)

A size is what a paper or model card prints. Without a name give at least `layers`, `d_model` and `heads`:
then kv_heads = heads, head_dim = d_model / heads, and the feed-forward width follows the family's own rule.
"""

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from mixlab.errors import UserError
from mixlab.model.config import ModelConfig, config_problems

# name: (layers, d_model, heads, kv_heads, head_dim, ffn_width)
GPT2_SIZES = {
    "124M": (12, 768, 12, 12, 64, 3072),
    "355M": (24, 1024, 16, 16, 64, 4096),
    "774M": (36, 1280, 20, 20, 64, 5120),
    "1558M": (48, 1600, 25, 25, 64, 6400),
}
LLAMA_SIZES = {
    "7B": (32, 4096, 32, 32, 128, 11008),  # Llama 2
    "13B": (40, 5120, 40, 40, 128, 13824),  # Llama 2
    "8B": (32, 4096, 32, 8, 128, 14336),  # Llama 3; give vocab_size=128_256, rope_base=500_000.0
}
# OLMo 2 paper (arXiv 2501.00656), table 1; the sizes below 1B are OLMo-core's small configurations.
OLMO2_SIZES = {
    "30M": (4, 256, 8, 8, 32, 768),
    "60M": (8, 384, 8, 8, 48, 1536),
    "190M": (12, 768, 12, 12, 64, 3072),
    "370M": (16, 1024, 16, 16, 64, 4096),
    "600M": (16, 1344, 16, 16, 84, 5376),
    "760M": (16, 1536, 16, 16, 96, 6144),
    "1B": (16, 2048, 16, 16, 128, 8192),
    "7B": (32, 4096, 32, 32, 128, 11008),
    "13B": (40, 5120, 40, 40, 128, 13824),
    "32B": (64, 5120, 40, 8, 128, 27648),
}


def gpt2(size: str | None = None, **overrides: Any) -> ModelConfig:
    """GPT-2: LayerNorm before each sublayer, biases everywhere, tanh GELU of width 4 d, learned positions,
    tied head, residual projections initialised at std / sqrt(2 * layers). UserError for an unknown size or
    key."""
    family = dict(
        vocab_size=50257,
        context_length=1024,
        norm="layer",
        norm_placement="pre",
        norm_eps=1e-5,
        qk_norm=False,
        activation="gelu",
        positions="learned",
        rope_base=10_000.0,
        attention_bias=True,
        mlp_bias=True,
        tied_head=True,
        init_std=0.02,
        init_cutoff=None,
        init_scale_residual=True,
        vocab_multiple=128,
    )
    return _build("gpt2", family, GPT2_SIZES, size, overrides, ffn_width=lambda d_model: 4 * d_model)


def llama(size: str | None = None, **overrides: Any) -> ModelConfig:
    """Llama: RMSNorm before each sublayer, no bias, SwiGLU of width 8 d / 3 (up to a multiple of 256), RoPE,
    separate head. UserError for an unknown size or key."""
    family = dict(
        vocab_size=32_000,
        context_length=4096,
        norm="rms",
        norm_placement="pre",
        norm_eps=1e-5,
        qk_norm=False,
        activation="swiglu",
        positions="rope",
        rope_base=10_000.0,
        attention_bias=False,
        mlp_bias=False,
        tied_head=False,
        init_std=0.02,
        init_cutoff=None,
        init_scale_residual=False,
        vocab_multiple=128,
    )
    return _build("llama", family, LLAMA_SIZES, size, overrides, ffn_width=_gated_width)


def olmo2(size: str | None = None, **overrides: Any) -> ModelConfig:
    """OLMo 2 (arXiv 2501.00656, section 2.1): as Llama, with RMSNorm on each sublayer's output instead of its
    input, RMSNorm on queries and keys, RoPE base 500,000 and weights from a normal truncated at three
    standard deviations. The z-loss belongs to the loss. UserError for an unknown size or key."""
    family = dict(
        vocab_size=100_278,
        context_length=4096,
        norm="rms",
        norm_placement="post",
        norm_eps=1e-6,
        qk_norm=True,
        activation="swiglu",
        positions="rope",
        rope_base=500_000.0,
        attention_bias=False,
        mlp_bias=False,
        tied_head=False,
        init_std=0.02,
        init_cutoff=3.0,
        init_scale_residual=False,
        vocab_multiple=128,
    )
    return _build("olmo2", family, OLMO2_SIZES, size, overrides, ffn_width=_gated_width)


def _gated_width(d_model: int) -> int:
    """8 d / 3, so that three matrices cost what GPT-2's two do, rounded up to a multiple of 256."""
    return -(-(8 * d_model // 3) // 256) * 256


def _build(
    preset: str,
    family: dict[str, Any],
    sizes: dict[str, tuple[int, ...]],
    size: str | None,
    overrides: dict[str, Any],
    ffn_width: Callable[[int], int],
) -> ModelConfig:
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean model.{nearest[0]}?" if nearest else f"; the keys are {', '.join(known)}"
            raise UserError(f"model.{key} does not exist{hint}")
    values = dict(family)
    if size is not None:
        if size not in sizes:
            raise UserError(f"model.size = {size!r}: {preset} has the sizes {', '.join(sizes)}")
        keys = ("layers", "d_model", "heads", "kv_heads", "head_dim", "ffn_width")
        values |= dict(zip(keys, sizes[size], strict=True))
    values |= overrides
    missing = [key for key in ("layers", "d_model", "heads") if key not in values]
    if missing:
        raise UserError(
            f"model.{missing[0]} is not set: {preset} needs a size ({', '.join(sizes)}), or layers, d_model and heads"
        )
    for key in ("d_model", "heads"):  # before anything is derived from them
        if not isinstance(values[key], int) or values[key] < 1:
            raise UserError(f"model.{key} = {values[key]!r} must be an int of at least 1")
    d_model, heads = values["d_model"], values["heads"]
    if "head_dim" not in values and d_model % heads:
        raise UserError(f"model.heads = {heads} must divide model.d_model = {d_model}, or model.head_dim must be set")
    derived = {"kv_heads": heads, "head_dim": d_model // heads, "ffn_width": ffn_width(d_model)}
    config = ModelConfig(**(derived | values))
    problems = config_problems(config)
    if problems:
        raise UserError("\n".join(problems))
    return config
