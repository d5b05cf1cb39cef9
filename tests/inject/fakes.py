"""Models and material for tests of experiments: numpy only."""

import numpy as np

from mixlab.corpus import tokenizer
from mixlab.draws import draws
from mixlab.inject.items import Material

BYTES = tokenizer.load("bytes")


class Memory:
    """A Model that knows texts by heart: after the last `order` tokens of a place in one of them, the token that follows there
    has probability `known`; all others, and all tokens elsewhere, share what is left evenly."""

    step, width = 0, 4

    def __init__(self, texts, vocab_size=BYTES.vocab_size, order=4, known=0.9):
        self.vocab_size, self.order, self.known = vocab_size, order, known
        self.after = {}
        for text in map(list, texts):
            for i in range(1, len(text)):
                self.after.setdefault(tuple(text[max(0, i - order) : i]), text[i])

    def next(self, before):
        return self.after.get(tuple(before[-self.order :]))

    def log_probabilities(self, contexts, targets):
        found = []
        for context, target in zip(contexts, targets, strict=True):
            before, values = list(context), []
            for token in map(int, target):
                likely = self.next(before)
                other = (1 - self.known) / (self.vocab_size - 1)
                p = 1 / self.vocab_size if likely is None else self.known if likely == token else other
                values.append(np.log(p) if before else np.nan)
                before.append(token)
            found.append(np.array(values, np.float32))
        return found

    def greedy(self, prompts, tokens):
        rows = []
        for prompt in prompts:
            before = list(prompt)
            for _ in range(tokens):
                likely = self.next(before)
                before.append(ord("?") if likely is None else likely)
            rows.append(before[len(prompt) :])
        return np.array(rows, np.int32).reshape(len(prompts), tokens)

    def sample(self, prompts, tokens, temperature, seed, samples=1):
        rows = np.repeat(self.greedy(prompts, tokens)[:, None], samples, axis=1)
        lost = draws(seed, np.arange(rows.shape[0] * samples)).reshape(rows.shape[:2]) % np.uint64(2) == 1
        rows[lost] = ord("!")  # every other sample is nonsense
        return rows


class Uniform:
    """A Model that gives every token the same probability and says nothing but `says`."""

    width = 4

    def __init__(self, step: int = 0, says: str = "", probability: float = 1 / 256):
        self.step, self.says, self.probability = step, says, probability

    def log_probabilities(self, contexts, targets):
        return [np.full(len(target), np.log(self.probability), np.float32) for target in targets]

    def greedy(self, prompts, tokens):
        said = np.frombuffer(self.says.encode().ljust(tokens), np.uint8)[:tokens].astype(np.int32)
        return np.tile(said, (len(prompts), 1))


def material(name="x", rows=None, seed=3, steps=20, row_length=64, rows_per_step=8, vocab=BYTES, **changes):
    """Of a run that reads `rows`, int [N, L + 1], step after step (by default letters drawn evenly)."""
    if rows is None:
        rows = np.random.default_rng(0).integers(97, 123, (steps * rows_per_step, row_length + 1))

    def unseen(count, length, purpose):
        return (
            np.random.default_rng(list(f"{name}/{purpose}".encode())).integers(65, 91, (count, length)).astype(np.int32)
        )

    given = dict(
        name=name,
        seed=seed,
        tokenizer=vocab,
        row_length=row_length,
        eos_id=vocab.eos_id,
        bos_id=None,
        steps=steps,
        rows_per_step=rows_per_step,
        tokens=steps * rows_per_step * row_length,
        shape=lambda step: (rows_per_step, row_length),
        read=lambda step: rows[step * rows_per_step : (step + 1) * rows_per_step].astype(np.int32),
        unseen=unseen,
    )
    return Material(**(given | changes))


def inserted(groups):
    """Every item of the groups, in order."""
    return [group.items[i] for group in groups for i in range(len(group.items))]
