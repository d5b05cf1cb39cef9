"""What the run itself reads, counted: which tokens are rare, and which text is unlike the rest of it."""

import numpy as np

from mixlab.corpus.bigram import Bigram
from mixlab.draws import draws
from mixlab.inject.items import Material
from mixlab.seeds import seed_of

COUNTED_TOKENS = 2_000_000


def count(material: Material, tokens: int = COUNTED_TOKENS) -> Bigram:
    """Pairs of tokens in about so many tokens of the run without experiments: whole steps, evenly spaced."""
    steps = min(material.steps, max(1, tokens * material.steps // max(material.tokens, 1)))
    found = [material.read(step)[:, :-1] for step in np.linspace(0, material.steps - 1, steps).astype(int).tolist()]
    starts = [np.arange(rows.shape[1]) == 0 for rows in found]
    follows = [np.broadcast_to(~start, rows.shape).ravel() for start, rows in zip(starts, found, strict=True)]
    return Bigram.of(
        np.concatenate([rows.ravel() for rows in found]), np.concatenate(follows), material.tokenizer.vocab_size
    )


def rarest(counts: Bigram, material: Material) -> np.ndarray:
    """int64: every token that stands for text, the rarest first; those that are equally rare in an order of the seed."""
    text = np.flatnonzero(material.tokenizer.byte_lengths() > 0)
    return text[np.lexsort((draws(seed_of(material.seed, "rarest"), text), counts.singles[text]))]
