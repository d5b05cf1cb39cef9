"""What a model is: one frozen record in which every choice is written out, and the check of that record."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args, get_origin


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. The presets in `presets.py` fill these fields in; nothing is implied by a
    name.

    The first block of fields is the architecture and decides the parameters. The second block decides only
    how the same function is computed, so it may change between two runs of one checkpoint."""

    vocab_size: int
    layers: int
    d_model: int
    heads: int
    kv_heads: int  # < heads: grouped-query attention
    head_dim: int
    ffn_width: int
    context_length: int  # the longest row the model accepts; rows of the table when positions are learned
    norm: Literal["rms", "layer"]  # "layer" has a bias, "rms" has none
    norm_placement: Literal["pre", "post"]  # post: on the sublayer's output, before the residual sum (OLMo 2)
    norm_eps: float
    qk_norm: bool  # on whole projected queries and keys, before heads are split and before RoPE (OLMo 2)
    activation: Literal["swiglu", "gelu"]  # gelu is the tanh form of GPT-2
    positions: Literal["rope", "learned"]
    rope_base: float
    attention_bias: bool  # on query, key, value and output projections
    mlp_bias: bool
    tied_head: bool
    init_std: float
    init_cutoff: float | None  # truncate the normal at this many standard deviations
    init_scale_residual: bool  # GPT-2: projections into the residual stream start at std / sqrt(2 * layers)
    vocab_multiple: int  # embedding rows are padded up to a multiple; the padding never gets probability

    compute_dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # float64: checks, under enable_x64
    remat: Literal["none", "dots", "full"] = "none"  # recompute in backward: nothing, what is cheap, all
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    attention: Literal["auto", "dense", "blockwise", "splash", "triton", "cudnn"] = "auto"
    sequence_attention: Literal["gather", "ring", "all_to_all"] = "gather"  # how, where mesh.sequence divides rows

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def config_problems(config: ModelConfig) -> list[str]:
    """Everything that is wrong with `config`, one message a problem, each naming its key; [] when it is
    sound."""
    problems = _type_problems(config)
    if problems:
        return problems  # the checks below compare values and need the right types

    def require(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    for name in ("vocab_size", "layers", "d_model", "heads", "kv_heads", "head_dim", "ffn_width"):
        value = getattr(config, name)
        require(value >= 1, f"model.{name} = {value} must be at least 1")
    for name in ("context_length", "vocab_multiple"):
        value = getattr(config, name)
        require(value >= 1, f"model.{name} = {value} must be at least 1")
    for name in ("norm_eps", "rope_base", "init_std"):
        value = getattr(config, name)
        require(value > 0, f"model.{name} = {value} must be positive")
    if config.kv_heads >= 1:
        require(
            config.heads % config.kv_heads == 0,
            f"model.kv_heads = {config.kv_heads} must divide model.heads = {config.heads}",
        )
    if config.positions == "rope":
        require(config.head_dim % 2 == 0, f"model.head_dim = {config.head_dim} must be even for rotary positions")
    if config.init_cutoff is not None:
        require(config.init_cutoff > 0, f"model.init_cutoff = {config.init_cutoff} must be positive, or None")
    return problems


def _type_problems(config: ModelConfig) -> list[str]:
    problems = []
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), field.type
        if get_origin(kind) is Literal:
            options = get_args(kind)
            if value not in options:
                problems.append(f"model.{field.name} = {value!r} must be one of {', '.join(map(repr, options))}")
        elif not _fits(value, kind):
            expected = getattr(kind, "__name__", str(kind))
            problems.append(f"model.{field.name} = {value!r} must be of type {expected}")
    return problems


def _fits(value: object, kind: object) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False  # bool is an int to Python, not to us
    if kind is int:
        return isinstance(value, int)
    if kind is float:
        return isinstance(value, int | float)
    return value is None or isinstance(value, int | float)  # float | None
