"""The transformer and its loss once more, in plain NumPy and float64: one document at a time, one head at a
time.

Written from the papers, to be read rather than run fast. It takes the parameters as the pure nested dict that
a checkpoint holds."""

import numpy as np


def hidden_states(params, config, tokens_BxL, segments_BxL, positions_BxL):
    """[B, L, d_model] after the final norm. Documents never meet: each one is run by itself."""
    hidden = np.zeros((*tokens_BxL.shape, config.d_model))
    for row in range(len(tokens_BxL)):
        for segment in np.unique(segments_BxL[row]):
            where = np.flatnonzero(segments_BxL[row] == segment)
            hidden[row, where] = _document(params, config, tokens_BxL[row, where], positions_BxL[row, where])
    return hidden


def loss(params, config, batch, z_loss=0.0):
    """Sum of weight * (nll + z_loss * log(Z)**2) over the tokens, and nll [B, L]."""
    hidden = hidden_states(params, config, batch.tokens, batch.segment_ids, batch.positions)
    head = params["embedding"].T if config.tied_head else params["head"]
    return token_losses(hidden @ head[:, : config.vocab_size], batch.targets, batch.loss_weights, z_loss)


def token_losses(logits, targets, weights, z_loss):
    top = logits.max(axis=-1)
    log_z = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
    nll = log_z - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return np.sum(weights * (nll + z_loss * log_z**2)), nll


def _document(params, config, tokens, positions):
    x = params["embedding"][tokens]
    if config.positions == "learned":
        x = x + params["position_embedding"][positions]
    for i in range(config.layers):
        x = _block(_layer(params["blocks"], i), config, x, positions)
    return _norm(params["final_norm"], config, x)


def _layer(tree, i):
    return {key: _layer(value, i) if isinstance(value, dict) else value[i] for key, value in tree.items()}


def _block(p, config, x, positions):
    if config.norm_placement == "pre":
        x = x + _attention(p["attention"], config, _norm(p["attention_norm"], config, x), positions)
        return x + _mlp(p["mlp"], config, _norm(p["mlp_norm"], config, x))
    x = x + _norm(p["attention_norm"], config, _attention(p["attention"], config, x, positions))
    return x + _norm(p["mlp_norm"], config, _mlp(p["mlp"], config, x))


def _attention(p, config, x, positions):
    q, k, v = (_linear(p[name], x) for name in ("query", "key", "value"))
    if config.qk_norm:
        q, k = _norm(p["query_norm"], config, q), _norm(p["key_norm"], config, k)
    d, group = config.head_dim, config.heads // config.kv_heads
    outputs = []
    for head in range(config.heads):
        q_h = q[:, head * d : (head + 1) * d]
        k_h, v_h = (y[:, head // group * d : (head // group + 1) * d] for y in (k, v))
        if config.positions == "rope":
            q_h, k_h = (_rotate(y, positions, config.rope_base) for y in (q_h, k_h))
        scores = q_h @ k_h.T / np.sqrt(d)
        rows = []
        for t in range(len(x)):
            weights = np.exp(scores[t, : t + 1] - scores[t, : t + 1].max())
            rows.append(weights / weights.sum() @ v_h[: t + 1])
        outputs.append(np.stack(rows))
    return _linear(p["output"], np.concatenate(outputs, axis=-1))


def _rotate(x, positions, base):
    """Pair i is (x[i], x[i + d/2]), turned by position / base ** (2 i / d): a product of complex numbers."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / base ** (np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _mlp(p, config, x):
    up = _linear(p["up"], x)
    if config.activation == "swiglu":
        gate = _linear(p["gate"], x)
        return _linear(p["down"], gate / (1 + np.exp(-gate)) * up)
    return _linear(p["down"], 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))


def _linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def _norm(p, config, x):
    if config.norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * p["scale"] + p.get("bias", 0.0)
