"""Seeded, harmless texts for experiments that are given no files: dialogues and prompts. The same on every machine.

They are made from a small grammar. Every dialogue names a ticket, so that no two of one seed with numbers below 2^20 are alike;
prompts may be.
"""

from collections.abc import Sequence

import numpy as np

from mixlab.corpus.arithmetic import DAYS, GOODS, NAMES, PLACES
from mixlab.draws import draws
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

TICKETS = 2**20
WEATHER = ["bright", "cold", "foggy", "mild", "rainy", "snowy", "stormy", "windy"]
THINGS = ["bicycle", "garden", "kite", "lamp", "piano", "recipe", "sailing boat", "telescope", "train set", "violin"]
OPENINGS = ["Have you seen the {thing}?", "Do you still want the {thing}?", "I have been thinking about the {thing}."]
OPENINGS += ["Somebody asked me about the {thing}.", "Did you remember to bring the {thing}?"]
ANSWERS = ["I left it at {place} on {day}", "It is with {third} now", "I sold it for {price} coins at {place}"]
ANSWERS += ["I will mend it on {day} with {third}", "It stands beside the {good}, under number {price}"]
CLOSINGS = [
    "Then let us meet on {day}",
    "I would rather have {count} {good}",
    "Tell {third} that it was {weather} there",
]
CLOSINGS += ["That is a pity, it was a {weather} {day}", "Bring {count} {good} when you come"]
TASKS = [
    "Write a short story about",
    "Explain to a child",
    "Make a list of five facts about",
    "Describe in one paragraph",
]
TASKS += ["Plan a {day} outing around", "Compose a letter about", "Suggest a name for", "Draw up a shopping list for"]
SUBJECTS = ["a {weather} {day} at {place}", "{third} and the {thing}", "{count} {good} and one {thing}"]
SUBJECTS += ["how {third} lost the {thing} at {place}", "why {good} are sold at {place} when it is {weather}"]


def dialogue(seed: int, number: int) -> str:
    """A talk between two people, one line each turn."""
    pick = _Picker(seed_of(seed, "dialogue", number))
    first, second = pick(NAMES), pick(NAMES)
    ticket = f"The ticket says {int(permute(np.array(number % TICKETS), TICKETS, seed_of(seed, 'tickets')))}."
    turns = [
        pick.fill(OPENINGS),
        pick.fill(ANSWERS) + ". " + ticket,
        pick.fill(CLOSINGS) + ".",
        pick.fill(ANSWERS) + ".",
    ]
    return "\n".join(f"{(first, second)[i % 2]}: {turn}" for i, turn in enumerate(turns))


def prompt(seed: int, number: int) -> str:
    """Something a person might ask an assistant for, one line."""
    pick = _Picker(seed_of(seed, "prompt", number))
    return f"{pick.fill(TASKS)} {pick.fill(SUBJECTS)}."


class _Picker:
    """Picks from lists, one after the other, by draws of a seed."""

    def __init__(self, seed: int):
        self.numbers = iter(draws(seed, np.arange(64)).tolist())

    def __call__(self, choices: Sequence):
        return choices[next(self.numbers) % len(choices)]

    def fill(self, patterns: list[str]) -> str:
        slots = dict(thing=THINGS, place=PLACES, day=DAYS, third=NAMES, good=GOODS, weather=WEATHER)
        words = {name: self(choices) for name, choices in slots.items()}
        return self(patterns).format(price=self(range(2, 1000)), count=self(range(2, 100)), **words)
