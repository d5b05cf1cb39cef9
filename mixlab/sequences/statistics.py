"""What rows of given lengths mean for a model: average lengths, average contexts, and the time of a step.

Everything follows from how many tokens are read in pieces of which length (Pouransari et al. 2024, appendix
F): a piece that is attended to on its own and has l tokens makes l predictions, from 0, 1, …, l - 1 earlier
tokens.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mixlab.sequences.index import SequenceIndex


def tokens_by_length(index: SequenceIndex) -> dict[int, int]:
    """Piece length -> tokens in pieces of that length, ascending."""
    lengths, counts = np.unique(np.asarray(index.lengths), return_counts=True)
    return {int(length): int(length) * int(count) for length, count in zip(lengths, counts, strict=True)}


def average_sequence_length(tokens: Mapping[int, float]) -> float:
    """Tokens a piece. tokens: piece length -> tokens (any unit)."""
    return sum(tokens.values()) / sum(t / length for length, t in tokens.items())


def average_context_length(tokens: Mapping[int, float]) -> float:
    """Earlier tokens that a prediction sees, on average. tokens: piece length -> tokens (any unit)."""
    return sum(t * (length - 1) / 2 for length, t in tokens.items()) / sum(tokens.values())


def fit_step_time(lengths: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """(fixed, per_token): seconds = fixed + per_token x sequence length, by least squares.

    seconds: measured for steps that all have the same number of tokens, in rows of `lengths`.
    """
    per_token, fixed = np.polyfit(lengths, seconds, 1)
    return float(fixed), float(per_token)


def expected_step_time(fixed: float, per_token: float, tokens: Mapping[int, float]) -> float:
    """Seconds a step of a mixture, averaged over its steps. tokens: sequence length -> tokens (any unit)."""
    return fixed + per_token * (2 * average_context_length(tokens) + 1)
