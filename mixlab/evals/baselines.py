"""What counting alone reaches on the held-out text: unigram and bigram models of the training tokens."""

import numpy as np

from mixlab.corpus.bigram import Bigram
from mixlab.corpus.store import TokenStore
from mixlab.evals.held_out import EvaluationSet
from mixlab.evals.language_model import summarise
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

COUNTED_TOKENS = 8_000_000  # of the training documents, taken in a seeded order


def baselines(stores: list[TokenStore], sets: list[EvaluationSet], vocab_size: int) -> dict[str, dict[str, float]]:
    """{"unigram": {set: bits per byte, "macro": …, "micro": …}, "bigram": {…}}, of `Bigram`. Pairs never cross documents."""
    model = Bigram.of(*_read(stores), vocab_size)
    tokens = np.concatenate([s.rows.tokens for s in sets])
    targets = np.concatenate([s.rows.targets for s in sets])
    return {
        name: {
            key.split("/")[1]: value
            for key, value in summarise(sets, -np.log(probability)).items()
            if key.endswith("/bits_per_byte")
        }
        for name, probability in (
            ("unigram", model.unigram[targets]),
            ("bigram", model.probabilities(tokens, targets)),
        )
    }


def _read(stores: list[TokenStore]) -> tuple[np.ndarray, np.ndarray]:
    """Training documents one after the other, int32 [T], and whether a token follows the one before it, bool [T]."""
    found, follows = [], []
    for store in stores:
        ids = store.documents("train")
        ids = ids[permute(np.arange(len(ids)), len(ids), seed_of("baselines"))]
        lengths = np.asarray(store.offsets[ids + 1]) - np.asarray(store.offsets[ids])
        chosen = np.searchsorted(np.cumsum(lengths), COUNTED_TOKENS // len(stores)) + 1
        ids, lengths = ids[:chosen], lengths[:chosen]
        tokens = np.empty(int(lengths.sum()), np.int32)
        store.read(ids, np.zeros_like(ids), lengths, tokens)
        inside = np.ones(len(tokens), bool)
        inside[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        found.append(tokens)
        follows.append(inside)
    return np.concatenate(found), np.concatenate(follows)
