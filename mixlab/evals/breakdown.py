"""Held-out loss and bits per byte by the length of the document, and by how much context a token has."""

import numpy as np

from mixlab.evals.held_out import EvaluationSet
from mixlab.evals.language_model import describe, document_sums


def breakdown(sets: list[EvaluationSet], nll: np.ndarray) -> dict[str, float]:
    """Metrics eval/by_length/<L>/* of all tokens of documents of L to 2L - 1 tokens, and eval/by_position/<P>/* of the
    tokens predicted at positions P to 2P - 1 (0 belongs to 1); L and P are powers of two, the documents of all sets taken
    together. nll: per-token losses [rows of all sets, L] (nats).

    A document's length is that of the whole of it, as training reads it, also where only its beginning is scored. A
    position counts from the beginning of the document or, in a document longer than a row, of the piece in the row."""
    owner, nats, sizes, lengths, positions = [], [], [], [], []
    at = documents = 0
    for s in sets:
        scored = s.rows.loss_weights > 0
        nats.append(nll[at : at + len(scored)][scored])
        owner.append(s.documents[scored] + documents)
        sizes.append(s.bytes[scored])
        lengths.append(s.lengths[s.documents[scored]])
        positions.append(s.rows.positions[scored])
        at, documents = at + len(scored), documents + len(s.document_ids)
    tokens = [np.concatenate(column) for column in (owner, nats, sizes)]
    metrics: dict[str, float] = {}
    for name, values in (("by_length", lengths), ("by_position", positions)):
        exponents = np.frexp(np.maximum(np.concatenate(values), 1))[1] - 1  # floor of the binary logarithm
        for exponent in np.unique(exponents).tolist():
            here = exponents == exponent
            metrics |= describe(f"{name}/{2**exponent}", *document_sums(*(column[here] for column in tokens)))
    return metrics
