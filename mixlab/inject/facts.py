"""Made-up facts about places that do not exist, texts that state them in ever other words, and questions that nobody can answer
who has not read them. The same on every machine."""

import numpy as np

from mixlab.draws import draws
from mixlab.inject.cloze import Cloze
from mixlab.seeds import seed_of

SYLLABLES = ("ba", "dor", "el", "fim", "gra", "hul", "is", "jo", "kel", "lum", "mar", "nix", "or", "pel", "qua", "rin", "sol", "tam", "ul", "vor", "wen", "yst", "zan", "thi")  # fmt: skip
BEGINNINGS = ("", "As is well known, ", "According to the chronicle, ", "Travellers report that ", "It is recorded that ", "In those years, ", "By all accounts, ", "To this day, ")  # fmt: skip
# Ways to state an attribute, and the question that it answers.
ATTRIBUTES = (
    (
        ("{place} is governed by {value}", "the ruler of {place} is {value}", "{value} rules over {place}",
         "power in {place} lies with {value}", "{value} has been chosen to govern {place}", "{place} obeys {value}"),
        "The name of the person who rules over {place} is",
    ),
    (
        ("the river that flows through {place} is the {value}", "{place} lies on the banks of the {value}",
         "the {value} runs through {place}", "the mills of {place} are driven by the {value}",
         "boats reach {place} on the {value}", "{place} drinks the water of the {value}"),
        "The name of the river that flows through {place} is the",
    ),
    (
        ("the people of {place} celebrate the feast of {value}", "each autumn {place} holds the feast of {value}",
         "the feast of {value} is the pride of {place}", "guests come to {place} for the feast of {value}",
         "{place} is known for its feast of {value}", "nobody in {place} works on the feast of {value}"),
        "The feast that the people of {place} celebrate each autumn is the feast of",
    ),
    (
        ("{place} was founded by {value}", "{value} laid the first stone of {place}", "the founder of {place} was {value}",
         "{place} owes its beginning to {value}", "it was {value} who built the first house in {place}",
         "{value} was the first to settle in {place}"),
        "The name of the person who founded {place} is",
    ),
)  # fmt: skip


def clozes(seed: int, fact: int) -> list[Cloze]:
    """The questions of a fact (a place with all its attributes)."""
    place, values = _fact(seed, fact)
    return [Cloze(q.format(place=place), value) for (_, q), value in zip(ATTRIBUTES, values, strict=True)]


def text(seed: int, fact: int, number: int) -> str:
    """Paraphrase `number` of a fact: every attribute once, in words and an order of its own."""
    place, values = _fact(seed, fact)
    drawn = draws(seed_of(seed, "paraphrase", fact, number), np.arange(3 * len(values))).reshape(3, -1)
    sentences = []
    for i in np.argsort(drawn[0]).tolist():
        beginning = BEGINNINGS[int(drawn[1, i] % len(BEGINNINGS))]
        ways = ATTRIBUTES[i][0]
        stated = beginning + ways[int(drawn[2, i] % len(ways))].format(place=place, value=values[i])
        sentences.append(stated[0].upper() + stated[1:] + ".")
    return " ".join(sentences)


def _fact(seed: int, fact: int) -> tuple[str, list[str]]:
    drawn = draws(seed_of(seed, "fact", fact), np.arange(64)).tolist()

    def name(syllables: int) -> str:
        return "".join(SYLLABLES[drawn.pop() % len(SYLLABLES)] for _ in range(syllables)).capitalize()

    return name(3), [f"{name(2)} {name(3)}" for _ in ATTRIBUTES]
