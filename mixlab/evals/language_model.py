"""Loss and bits per byte on held-out documents, with standard errors, per domain and on average."""

from collections.abc import Callable

import jax
import numpy as np

from mixlab.evals.held_out import EvaluationSet
from mixlab.parallel.mesh import global_batch, host_rows
from mixlab.training.state import Layout

LN2 = float(np.log(2))
EMPTY_ROW = {"tokens": 0, "targets": 0, "loss_weights": 0, "segment_ids": 0, "positions": 0}


def evaluate(sets: list[EvaluationSet], token_losses: Callable, params, layout: Layout, rows: int) -> dict[str, float]:
    """Metrics eval/<set>/{loss, loss_se, bits_per_byte, bits_per_byte_se, tokens, documents}, and the same for "macro" (the
    mean of the sets) and "micro" (all documents as one set).

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
    nll = np.concatenate(jax.device_get(losses))[:total]
    return summarise(sets, nll)


def summarise(sets: list[EvaluationSet], nll: np.ndarray) -> dict[str, float]:
    """The metrics of per-token losses [rows of all sets, L] (nats)."""
    metrics: dict[str, float] = {}
    per_set, at = [], 0
    for s in sets:
        rows = len(s.rows.tokens)
        per_set.append(_document_sums(s, nll[at : at + rows]))
        at += rows
        metrics |= _describe(s.name, *per_set[-1])
    metrics |= _describe("micro", *(np.concatenate(column) for column in zip(*per_set, strict=True)))
    for key in ("loss", "bits_per_byte"):
        metrics[f"eval/macro/{key}"] = float(np.mean([metrics[f"eval/{s.name}/{key}"] for s in sets]))
        errors = [metrics[f"eval/{s.name}/{key}_se"] for s in sets]
        metrics[f"eval/macro/{key}_se"] = float(np.sqrt(np.sum(np.square(errors))) / len(sets))
    return metrics


def _document_sums(s: EvaluationSet, nll: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per document: nats, scored tokens, scored bytes; documents without a scored token left out."""
    scored = s.rows.loss_weights > 0
    owner, count = s.documents[scored], len(s.document_ids)
    nats = np.bincount(owner, nll[scored].astype(np.float64), count)
    tokens = np.bincount(owner, minlength=count)
    sizes = np.bincount(owner, s.bytes[scored], count)
    return nats[tokens > 0], tokens[tokens > 0], sizes[tokens > 0]


def _describe(name: str, nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
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
