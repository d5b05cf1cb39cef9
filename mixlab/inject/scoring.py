"""Losses of whole texts."""

from collections.abc import Sequence

import numpy as np

from mixlab.inject.analysis.memorisation import distinct, mean_loss
from mixlab.inject.probe import Model


def losses(model: Model, texts: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [N]: of each text (of two tokens at least) the mean loss over its tokens from the second on, nats."""
    scored = model.log_probabilities([text[:1] for text in texts], [text[1:] for text in texts])
    return np.array([mean_loss([values]) for values in scored])


def inserted_loss(model: Model, texts: Sequence[np.ndarray], eos_id: int | None) -> float:
    """Mean loss over all tokens of the texts but the first of each, without EOS at their ends, each text once: nats a token
    (Bordt and Pawelczyk 2025, section 5)."""
    kept = distinct(texts, eos_id)
    return mean_loss(model.log_probabilities([text[:1] for text in kept], [text[1:] for text in kept]))
