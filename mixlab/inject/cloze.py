"""Texts to complete: a prompt, and what belongs after it."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from mixlab.corpus.tokenizer import Tokenizer
from mixlab.inject.probe import Model


class Cloze(NamedTuple):
    """input: without a space at its end.   target: without one at its beginning."""

    input: str
    target: str


def split(tokenizer: Tokenizer, clozes: Sequence[Cloze]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(contexts, targets), int32 token arrays: "input target" is tokenized as `pairs` does."""
    return pairs(tokenizer, [cloze.input for cloze in clozes], [f" {cloze.target}" for cloze in clozes])


def pairs(
    tokenizer: Tokenizer, contexts: Sequence[str], targets: Sequence[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(contexts, targets), int32 token arrays: the two texts are tokenized as one, and as many tokens as the context has by
    itself are it; white space at its end belongs to the target (as in the Language Model Evaluation Harness)."""
    bare = [context.rstrip() for context in contexts]
    whole = tokenizer.encode_batch([context + target for context, target in zip(contexts, targets, strict=True)])
    unique = list(dict.fromkeys(bare))
    own = dict(zip(unique, tokenizer.encode_batch(unique), strict=True))
    return [own[text] for text in bare], [tokens[len(own[text]) :] for text, tokens in zip(bare, whole, strict=True)]


def target_log_probabilities(model: Model, tokenizer: Tokenizer, clozes: Sequence[Cloze]) -> np.ndarray:
    """float64 [N]: log p(target | input), summed over the target's tokens."""
    return np.array([answer.sum(dtype=np.float64) for answer in model.log_probabilities(*split(tokenizer, clozes))])


def completions(model: Model, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int) -> list[str]:
    """The greedy continuation of every prompt, of so many tokens."""
    return [tokenizer.decode(ids) for ids in model.greedy(tokenizer.encode_batch(list(prompts)), tokens)]


def partial_ratio(target: str, text: str) -> float:
    """0 … 100: how alike `target` and the most similar part of its length in `text` are, whatever the case (by difflib's ratio;
    libraries for fuzzy matching give slightly other numbers)."""
    target, text = target.lower(), text.lower()
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(target)
    best = 0.0
    for first in range(max(len(text) - len(target), 0) + 1):
        matcher.set_seq1(text[first : first + len(target)])
        if matcher.quick_ratio() > best:
            best = max(best, matcher.ratio())
    return 100 * best
