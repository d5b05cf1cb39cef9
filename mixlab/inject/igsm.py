"""Word problems over a graph of quantities, worked out modulo 23: synthetic reasoning after iGSM (Ye et al. 2024), written
anew. The same on every machine.

A problem states instance parameters ("The number of Riverview School's lanterns equals ...") in random order, among them
some that are not needed, and asks for one quantity. An owner's total is never stated: it is the sum of all that is stated
of the owner. The solution defines what is needed, in an order in which it can be worked out. Its operations are the
binary operations in it; a definition without any counts as one.
"""

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from mixlab.draws import draws

MODULUS = 23
PLACES = ("Riverview", "Oakwood", "Hillcrest", "Lakeside", "Maplewood", "Sunnydale", "Westbrook", "Northgate", "Stonebridge", "Fairfield", "Cedarville", "Brookfield", "Elmhurst", "Glenwood", "Harborview", "Kingsley", "Millbrook", "Pinehurst", "Rosedale", "Springdale")  # fmt: skip
KINDS = ("School", "Library", "Farm", "Bakery", "Museum", "Market", "Harbour", "Theatre", "Zoo", "Station", "Garden", "Castle")  # fmt: skip
THINGS = ("lanterns", "baskets", "ladders", "mirrors", "blankets", "barrels", "clocks", "kettles", "ropes", "shelves", "stools", "candles", "bells", "brushes", "crates", "drums", "flags", "globes", "hammers", "jars", "kites", "maps", "needles", "paddles", "quilts", "ribbons", "saddles", "trays", "umbrellas", "vases")  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_OPERATIONS = len(LETTERS)  # each has a letter
MOST_PARAMETERS = 60
_OWNERS, _THINGS = 8, 12  # that share the parameters outside totals
_TRIES = 200  # draws of the constants, for a wanted answer, before another graph is tried


@dataclass(frozen=True)
class Problem:
    """question: what is stated and asked.   solution: one definition a sentence.   answer: 0 … 22.
    operations: of the solution.   parameters: how many the question states."""

    question: str
    solution: str
    answer: int
    operations: int
    parameters: int

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nSolution:"

    @property
    def text(self) -> str:
        """The problem as a document."""
        return f"{self.prompt} {self.solution}\nAnswer: {self.answer}"

    @property
    def trace_hash(self) -> bytes:
        """Of the solution, whatever its letters: two problems of one hash are solved by the same words and numbers."""
        numbers: dict[str, str] = {}
        trace = re.sub(r"\b[a-zA-Z]\b", lambda m: numbers.setdefault(m[0], f"#{len(numbers)}"), self.solution)
        return hashlib.blake2b(trace.encode(), digest_size=16).digest()


def problem(
    seed: int,
    number: int,
    max_operations: int = 10,
    max_parameters: int = 20,
    operations: int | None = None,
    answer: int | None = None,
) -> Problem:
    """Problem `number` of `seed`, a function of the arguments alone. Its operations are drawn uniformly from 1 to
    max_operations, or are exactly `operations`; no more than max_parameters (at least as many) are stated. answer: of
    exactly this answer; drawing it uniformly balances a set."""
    draw = _Draw(int(draws(seed, np.array([number]))[0]))
    wanted = operations if operations is not None else draw(1, max_operations)
    while True:
        nodes = _needed(draw, wanted)
        asked = len(nodes) - 1
        names = _names(draw, nodes, max_parameters)
        totals = sum(thing is None for _, thing in names)
        for _ in range(draw(0, max_parameters - len(nodes) + totals)):
            arity = draw(0, min(3, len(nodes)))
            nodes.append(_Node(_sample(draw, range(len(nodes)), arity), _pick(draw, _EXTRAS) if arity else ""))
        for _ in range(_TRIES):
            values: list[int] = []
            for node, (_, thing) in zip(nodes, names, strict=False):
                _fill(draw, node, total=thing is None)
                values.append(node.value(values))
            if answer in (None, values[asked]):
                return _write(draw, nodes, names, asked, values, wanted)


_EXTRAS = ("", "more", "times")


@dataclass
class _Node:
    """A quantity. operands: numbers of earlier nodes, of which it is the sum or (of two) the difference; without any it is a
    constant. extra: so many "more" than that, or so many "times" that."""

    operands: list[int]
    extra: str
    difference: bool = False
    constant: int = 0

    @property
    def operations(self) -> int:
        return max(1, len(self.operands) - 1 + bool(self.extra))

    def inner(self, values: list[int]) -> int:
        numbers = [values[i] for i in self.operands]
        return (numbers[0] - numbers[1] if self.difference else sum(numbers)) % MODULUS

    def value(self, values: list[int]) -> int:
        if not self.operands:
            return self.constant
        inner = self.inner(values)
        return {"": inner, "more": inner + self.constant, "times": inner * self.constant}[self.extra] % MODULUS


def _needed(draw: "_Draw", operations: int) -> list[_Node]:
    """A graph of exactly so many operations in which the last node needs all others.

    Nodes that nothing uses yet are loose. A node of c operations takes at most c + 1 loose ones and is loose itself, so
    with r operations left there may be r + 1 loose nodes, and in the end there is one."""
    nodes: list[_Node] = []
    loose: list[int] = []
    left = operations
    while left:
        options = []
        for arity in range(4):
            for extra in _EXTRAS if arity else ("",):
                cost = max(1, arity - 1 + bool(extra))
                options += [
                    (arity, extra, fresh)
                    for fresh in range(min(arity, len(loose)) + 1)
                    if arity - fresh <= len(nodes) - len(loose) and cost + len(loose) - fresh <= left
                ]
        arity, extra, fresh = _pick(draw, options)
        used = [i for i in range(len(nodes)) if i not in loose]
        taken = _sample(draw, loose, fresh)
        loose = [i for i in loose if i not in taken] + [len(nodes)]
        operands = taken + _sample(draw, used, arity - fresh)
        nodes.append(_Node(_sample(draw, operands, arity), extra))
        left -= nodes[-1].operations
    return nodes


def _names(draw: "_Draw", nodes: list[_Node], spare: int) -> list[tuple[str, str | None]]:
    """(owner, thing) of the nodes, and of `spare` more after them. Some sums become the total of an owner of their own
    (thing None), who has their operands and nothing else."""
    owners = [f"{place} {kind}" for place, kind in zip(_sample(draw, PLACES, 20), _sample(draw, KINDS * 2, 20), strict=True)]  # fmt: skip
    things = _sample(draw, THINGS, _THINGS)
    named: dict[int, tuple[str, str | None]] = {}
    for i, node in enumerate(nodes):
        plain = len(node.operands) > 1 and not node.extra and i not in named
        if plain and not named.keys() & set(node.operands) and len(owners) > _OWNERS and draw(0, 1):
            owner = owners.pop()
            named[i] = (owner, None)
            named |= {j: (owner, thing) for j, thing in zip(node.operands, _sample(draw, things, 3), strict=False)}
    pairs = _sample(draw, [(o, t) for o in owners[:_OWNERS] for t in things], len(nodes) - len(named) + spare)
    return [named[i] if i in named else pairs.pop() for i in range(len(nodes) + spare)]


def _fill(draw: "_Draw", node: _Node, total: bool) -> None:
    node.constant = draw(2 if node.extra == "times" else 1 if node.extra else 0, MODULUS - 1)
    node.difference = len(node.operands) == 2 and not total and bool(draw(0, 1))


def _write(draw: "_Draw", nodes, names, asked: int, values: list[int], operations: int) -> Problem:
    def said(i: int) -> str:
        owner, thing = names[i]
        return f"{owner}'s {thing or 'total'}"

    def stated(i: int) -> str:
        node = nodes[i]
        operands = [said(j) for j in node.operands]
        match operands:
            case []:
                what = str(node.constant)
            case [one]:
                what = one
            case [*first, last]:
                what = f"the {'difference' if node.difference else 'sum'} of {', '.join(first)} and {last}"
        return f"The number of {said(i)} equals {f'{node.constant} {_WORDS[node.extra]} ' if node.extra else ''}{what}."

    statements = [stated(i) for i in range(len(nodes)) if names[i][1] is not None]
    owner, thing = names[asked]
    ask = f"How many {thing} does {owner} have" if thing else f"What is {owner}'s total"
    question = " ".join([*_sample(draw, statements, len(statements)), f"{ask}, modulo {MODULUS}?"])
    letters = _sample(draw, LETTERS, asked + 1)
    numbers = [str(value) for value in values]
    solution = " ".join(
        f"Define {said(i)} as {letters[i]}; so {' = '.join([letters[i], *_worked(nodes[i], letters, numbers, values)])}."
        for i in range(asked + 1)
    )
    return Problem(question, solution, values[asked], operations, len(statements))


_WORDS = {"more": "more than", "times": "times"}


def _worked(node: _Node, letters: list[str], numbers: list[str], values: list[int]) -> list[str]:
    """What stands between the signs of equality: in letters, in numbers, worked out."""
    result = str(node.value(values))
    if not node.operands:
        return [result]

    def formula(names: list[str]) -> str:
        inner = (" - " if node.difference else " + ").join(names[i] for i in node.operands)
        if node.extra == "times":
            return f"{node.constant} * {f'({inner})' if len(node.operands) > 1 else inner}"
        return f"{node.constant} + {inner}" if node.extra else inner

    steps = [formula(letters), formula(numbers)]
    if node.extra == "times" and len(node.operands) > 1:
        steps.append(f"{node.constant} * {node.inner(values)}")
    return [*steps, result] if steps[-1] != result else steps


class _Draw:
    """Random integers, one after the other."""

    def __init__(self, seed: int):
        self._seed, self._at = seed, 0
        self._raw: list[int] = []

    def __call__(self, low: int, high: int) -> int:
        """low … high, both included."""
        if not self._raw:
            self._raw = draws(self._seed, np.arange(self._at, self._at + 256)).tolist()
            self._at += 256
        return low + self._raw.pop() % (high - low + 1)


def _pick(draw: _Draw, choices):
    return choices[draw(0, len(choices) - 1)]


def _sample(draw: _Draw, items, count: int) -> list:
    """`count` of the items in random order, none twice."""
    pool = list(items)
    for i in range(count):
        j = draw(i, len(pool) - 1)
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:count]
