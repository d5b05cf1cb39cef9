"""What counting alone reaches on the held-out text: unigram and bigram models of the training tokens."""

import numpy as np

from mixlab.corpus.store import TokenStore
from mixlab.evals.held_out import EvaluationSet
from mixlab.evals.language_model import summarise
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

COUNTED_TOKENS = 8_000_000  # of the training documents, taken in a seeded order


def baselines(stores: list[TokenStore], sets: list[EvaluationSet], vocab_size: int) -> dict[str, dict[str, float]]:
    """{"unigram": {set: bits per byte, "macro": …, "micro": …}, "bigram": {…}}.

    Unigram: counts plus one. Bigram: counts interpolated with that unigram by Witten and Bell's rule, p(b | a) =
    (c(ab) + t(a) p(b)) / (c(a) + t(a)) with t(a) the number of different tokens seen after a. Pairs never cross documents.
    """
    pairs, singles = _count(stores, vocab_size)
    keys, counts = pairs
    unigram = (singles + 1) / (singles.sum() + vocab_size)
    after = np.bincount(keys // vocab_size, counts, vocab_size)
    kinds = np.bincount(keys // vocab_size, minlength=vocab_size)
    tokens = np.concatenate([s.rows.tokens for s in sets]).astype(np.int64)
    targets = np.concatenate([s.rows.targets for s in sets]).astype(np.int64)
    wanted = tokens * vocab_size + targets
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    seen = np.where(keys[at] == wanted, counts[at], 0)
    mass = after[tokens] + kinds[tokens]
    bigram = np.where(mass > 0, (seen + kinds[tokens] * unigram[targets]) / np.maximum(mass, 1), unigram[targets])
    return {
        name: {
            key.split("/")[1]: value
            for key, value in summarise(sets, -np.log(probability)).items()
            if key.endswith("/bits_per_byte")
        }
        for name, probability in (("unigram", unigram[targets]), ("bigram", bigram))
    }


def _count(stores: list[TokenStore], vocab_size: int):
    """((sorted pair keys a * V + b, their counts), token counts [V]) of the training documents."""
    keys, singles = [], np.zeros(vocab_size, np.int64)
    for store in stores:
        ids = store.documents("train")
        ids = ids[permute(np.arange(len(ids)), len(ids), seed_of("baselines"))]
        lengths = np.asarray(store.offsets[ids + 1]) - np.asarray(store.offsets[ids])
        chosen = np.searchsorted(np.cumsum(lengths), COUNTED_TOKENS // len(stores)) + 1
        ids, lengths = ids[:chosen], lengths[:chosen]
        tokens = np.empty(int(lengths.sum()), np.int32)
        store.read(ids, np.zeros_like(ids), lengths, tokens)
        singles += np.bincount(tokens, minlength=vocab_size)
        inside = np.ones(len(tokens), bool)
        inside[np.cumsum(lengths)[:-1]] = False  # the first token of a document follows nothing
        follows = np.flatnonzero(inside[1:]) + 1
        keys.append(tokens[follows - 1].astype(np.int64) * vocab_size + tokens[follows])
    return np.unique(np.concatenate(keys), return_counts=True), singles
