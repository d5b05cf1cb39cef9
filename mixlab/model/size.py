"""How large a model is and what a token costs, by arithmetic: nothing is allocated, jax is not needed."""

from mixlab.model.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters as stored, padded vocabulary rows included, a tied head counted once."""
    c = config
    query_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def norm(width: int) -> int:
        return width * (2 if c.norm == "layer" else 1)

    per_layer = _matmul_parameters_per_layer(c) + 2 * norm(c.d_model)
    if c.attention_bias:
        per_layer += query_width + 2 * kv_width + c.d_model
    if c.mlp_bias:
        per_layer += c.ffn_width * (2 if c.activation == "swiglu" else 1) + c.d_model
    if c.qk_norm:
        per_layer += norm(query_width) + norm(kv_width)
    tables = c.padded_vocab_size * (1 if c.tied_head else 2)
    if c.positions == "learned":
        tables += c.context_length
    return c.layers * per_layer + tables * c.d_model + norm(c.d_model)


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of one training step (forward and backward) per token of a row of
    `sequence_length` tokens; a multiply-add is two.

        6 * (matrix parameters of the layers + d_model * vocab_size)
        + 6 * layers * heads * head_dim * sequence_length

    2 forward and 4 backward per matrix parameter; embedding look-ups, norms and biases are free. Attention
    scores and their use cost 4 * heads * head_dim a key, three times with the backward pass, and a causal
    token sees half of the row on average: hence 6, not 12 (papers that count the full square report a higher
    utilisation). Document masks and recomputation are not counted, so this is useful work when a row is one
    document."""
    c = config
    matrices = c.layers * _matmul_parameters_per_layer(c) + c.d_model * c.vocab_size
    attention = c.layers * c.heads * c.head_dim * sequence_length
    return 6.0 * matrices + 6.0 * attention


def _matmul_parameters_per_layer(c: ModelConfig) -> int:
    attention = 2 * c.d_model * (c.heads + c.kv_heads) * c.head_dim  # query and output, key and value
    mlp = c.d_model * c.ffn_width * (3 if c.activation == "swiglu" else 2)
    return attention + mlp
