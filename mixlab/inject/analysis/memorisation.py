"""What a model remembers of a text: extraction, exposure, counterfactual memorisation, loss (Carlini et al. 2019 and 2023,
Zhang et al. 2023). Log-probabilities are natural logarithms, a float array a text."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def extracted(completions: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """bool [N]: whether the greedy completion of a prompt is the target, token by token. Both int [N, tokens]."""
    return (np.asarray(completions) == np.asarray(targets)).all(axis=1)


def exposure(losses: np.ndarray, references: np.ndarray) -> np.ndarray:
    """float64 [N]: log2 R − log2 rank, in bits, for the loss of each inserted secret among R references that were never
    inserted (Carlini et al. 2019).

    The rank is 1 + the number of references of lower loss, at most R, so that exposure lies between 0 and log2 R.
    """
    references = np.sort(np.asarray(references, np.float64))
    ranks = np.minimum(1 + np.searchsorted(references, losses, side="left"), len(references))
    return np.log2(len(references)) - np.log2(ranks)


def extrapolated_exposure(losses: np.ndarray, references: np.ndarray) -> np.ndarray:
    """float64 [N]: −log2 F(loss), with F a skew-normal distribution fitted to the references: not bounded by their number."""
    fitted = stats.skewnorm(*stats.skewnorm.fit(np.asarray(references, np.float64)))
    return -fitted.logcdf(np.asarray(losses, np.float64)) / np.log(2)


def counterfactual_memorisation(treated: Sequence[np.ndarray], control: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean, standard error) over texts of M(treated) − M(control), M being the share of a text's tokens that the model
    predicts; each argument has a bool array a text.

    A plug-in for the definition of Zhang et al. (2023), which averages over many models of either side, by one of each.
    """
    gains = np.array([np.mean(t) - np.mean(c) for t, c in zip(treated, control, strict=True)])
    return float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("nan")


def distinct(sequences: Sequence[np.ndarray], eos_id: int | None) -> list[np.ndarray]:
    """The sequences without EOS at either end, each once, in order; none with fewer than two tokens, which have no loss."""
    found: dict[bytes, np.ndarray] = {}
    for sequence in sequences:
        tokens = np.asarray(sequence, np.int32)
        text = np.flatnonzero(tokens != eos_id) if eos_id is not None else np.arange(len(tokens))
        tokens = tokens[text[0] : text[-1] + 1] if len(text) else tokens[:0]
        if len(tokens) > 1:
            found.setdefault(tokens.tobytes(), tokens)
    return list(found.values())


def mean_loss(log_probabilities: Sequence[np.ndarray]) -> float:
    """Mean loss (nats a token) over the tokens of all texts; NaN for none."""
    values = np.concatenate([np.asarray(values, np.float64) for values in log_probabilities] or [np.zeros(0)])
    return float(-values.mean()) if len(values) else float("nan")
