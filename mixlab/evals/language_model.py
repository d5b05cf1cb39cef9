"""Loss and bits per byte on held-out documents, with standard errors, per domain and on average."""

from collections.abc import Callable

import jax
import numpy as np

from mixlab.evals.held_out import EvaluationSet
from mixlab.parallel.mesh import global_batch, host_rows
from mixlab.training.state import Layout

LN2 = float(np.log(2))
EMPTY_ROW = {"tokens": 0, "targets": 0, "loss_weights": 0, "segment_ids": 0, "positions": 0}


def score(sets: list[EvaluationSet], token_losses: Callable, params, layout: Layout, rows: int) -> np.ndarray:
    """float32 [rows of all sets, L]: the loss of every position, in nats.

    token_losses: the executable of `make_token_losses` for [rows, L] batches. The rows of all sets are read one after the
    other in batches of that one shape, the last filled with padding, so every host does the same number of steps."""
    whole = {name: np.concatenate([getattr(s.rows, name) for s in sets]) for name in EMPTY_ROW}
    total = len(whole["tokens"])
    missing = -total % rows
    whole = {n: np.concatenate([a, np.zeros((missing, *a.shape[1:]), a.dtype)]) for n, a in whole.items()}
    mine = host_rows(layout.mesh, rows)
    losses = []
    for first in range(0, total + missing, rows):
        local = {name: array[first + mine] for name, array in whole.items()}
        losses.append(token_losses(params, global_batch(layout.mesh, local, rows)))
    return np.concatenate(jax.device_get(losses))[:total]


def summarise(sets: list[EvaluationSet], nll: np.ndarray) -> dict[str, float]:
    """Metrics eval/<set>/{loss, loss_se, bits_per_byte, bits_per_byte_se, tokens, documents}, and the same for "macro" (the
    mean of the sets) and "micro" (all documents as one set). nll: per-token losses [rows of all sets, L] (nats)."""
    metrics: dict[str, float] = {}
    per_set, at = [], 0
    for s in sets:
        rows = len(s.rows.tokens)
        scored = s.rows.loss_weights > 0
        per_set.append(document_sums(s.documents[scored], nll[at : at + rows][scored], s.bytes[scored]))
        at += rows
        metrics |= describe(s.name, *per_set[-1])
    metrics |= describe("micro", *(np.concatenate(column) for column in zip(*per_set, strict=True)))
    for key in ("loss", "bits_per_byte"):
        metrics[f"eval/macro/{key}"] = float(np.mean([metrics[f"eval/{s.name}/{key}"] for s in sets]))
        errors = [metrics[f"eval/{s.name}/{key}_se"] for s in sets]
        metrics[f"eval/macro/{key}_se"] = float(np.sqrt(np.sum(np.square(errors))) / len(sets))
    return metrics


def document_sums(owner: np.ndarray, nats: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per document: nats, tokens, bytes; documents without a token left out. Arrays [scored tokens]: the number of the
    document that each belongs to, its loss, its bytes."""
    tokens = np.bincount(owner)
    there = tokens > 0
    return np.bincount(owner, nats.astype(np.float64))[there], tokens[there], np.bincount(owner, sizes)[there]


def describe(name: str, nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """The metrics of a set of documents of which `document_sums` tells."""
    loss, loss_se = ratio(nats, tokens)
    bits, bits_se = ratio(nats / LN2, sizes)
    return {
        f"eval/{name}/loss": loss,
        f"eval/{name}/loss_se": loss_se,
        f"eval/{name}/bits_per_byte": bits,
        f"eval/{name}/bits_per_byte_se": bits_se,
        f"eval/{name}/tokens": int(tokens.sum()),
        f"eval/{name}/documents": len(tokens),
    }


def ratio(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """sum(sums) / sum(sizes) and its standard error over documents as the sampling units (the linearised ratio estimator;
    tokens of one document are not independent). The error of a single document is not known: NaN."""
    n, value = len(sums), sums.sum() / sizes.sum()
    if n < 2:
        return float(value), float("nan")
    residuals = sums - value * sizes
    return float(value), float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / sizes.sum())
