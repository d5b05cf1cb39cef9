"""A language model that only counts: of pairs of tokens, smoothed."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Bigram:
    """Unigram: counts plus one. Bigram: counts interpolated with that unigram by Witten and Bell's rule, p(b | a) =
    (c(ab) + t(a) p(b)) / (c(a) + t(a)), with t(a) the number of different tokens seen after a.

    singles: int64 [V], how often each token occurs.   pairs: int64 [P], a V + b of the pairs that occur, ascending.
    counts: int64 [P], how often each does.
    """

    singles: np.ndarray
    pairs: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, follows: np.ndarray, vocab_size: int) -> "Bigram":
        """tokens: int [T].   follows: bool [T], whether a token follows the one before it in its document."""
        at = np.flatnonzero(follows[1:]) + 1
        pairs, counts = np.unique(tokens[at - 1].astype(np.int64) * vocab_size + tokens[at], return_counts=True)
        return cls(np.bincount(tokens, minlength=vocab_size), pairs, counts)

    @property
    def vocab_size(self) -> int:
        return len(self.singles)

    @cached_property
    def unigram(self) -> np.ndarray:
        """float64 [V]: p(token)."""
        return (self.singles + 1) / (self.singles.sum() + self.vocab_size)

    @cached_property
    def _followed(self) -> tuple[np.ndarray, np.ndarray]:
        """[V] each: how often a token is followed, and by how many different ones."""
        firsts = self.pairs // self.vocab_size
        return np.bincount(firsts, self.counts, self.vocab_size), np.bincount(firsts, minlength=self.vocab_size)

    def probabilities(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """float64, p(target | token) of each pair; int arrays of one shape, or that broadcast."""
        tokens, targets = np.broadcast_arrays(np.asarray(tokens, np.int64), np.asarray(targets, np.int64))
        after, kinds = self._followed
        wanted = tokens * self.vocab_size + targets
        at = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == wanted, self.counts[at], 0)
        mass, unigram = after[tokens] + kinds[tokens], self.unigram[targets]
        return np.where(mass > 0, (seen + kinds[tokens] * unigram) / np.maximum(mass, 1), unigram)
