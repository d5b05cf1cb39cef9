"""Seeded synthetic mathematics: drills, worked sums, word problems. The same text on every machine.

Randomness is the raw 64-bit output of NumPy's PCG64, whose stream is fixed, and integer arithmetic on it."""

from collections.abc import Callable
from math import gcd

import numpy as np

NAMES = ["Ada", "Ben", "Chloe", "Dan", "Ella", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam"]
NAMES += ["Mona", "Noor", "Omar", "Petra", "Quinn", "Rosa", "Sam", "Tara"]
GOODS = ["apples", "books", "candles", "coins", "eggs", "flowers", "marbles", "oranges", "pencils", "shells"]
GOODS += ["stamps", "stones", "tickets", "tiles"]
PLACES = ["the market", "a shop", "the fair", "school", "the library", "the harbour"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

Draw = Callable[[int, int], int]  # (low, high) -> an integer in low..high, both included


def document(seed: int, number: int) -> tuple[str, str]:
    """(topic, text) of one document: problems of one topic, each with its answer."""
    raw = iter(np.random.PCG64([seed, number]).random_raw(512).tolist())

    def draw(low: int, high: int) -> int:
        return low + next(raw) % (high - low + 1)

    topic = list(TOPICS)[draw(0, len(TOPICS) - 1)]
    digits = draw(1, 4)
    return topic, "\n\n".join(TOPICS[topic](draw, digits) for _ in range(draw(2, 24)))


def _number(draw: Draw, digits: int) -> int:
    return draw(2, 10 ** draw(1, digits))


def _pick(draw: Draw, choices: list[str]) -> str:
    return choices[draw(0, len(choices) - 1)]


def _sums(draw: Draw, digits: int) -> str:
    a, b = _number(draw, digits), _number(draw, digits)
    kind = draw(0, 3)
    if kind == 0:
        return f"{a} + {b} = {a + b}"
    if kind == 1:
        return f"{a} - {b} = {a - b}"
    if kind == 2:
        return f"What is {a} plus {b}? {a + b}."
    return f"What is {max(a, b)} minus {min(a, b)}? {max(a, b) - min(a, b)}."


def _products(draw: Draw, digits: int) -> str:
    a, b = _number(draw, min(digits, 3)), _number(draw, 2)
    kind = draw(0, 2)
    if kind == 0:
        return f"{a} * {b} = {a * b}"
    if kind == 1:
        return f"{a * b} / {b} = {a}"
    return f"{a} divided by {b} is {a // b} with remainder {a % b}."


def _long_sum(draw: Draw, digits: int) -> str:
    numbers = [_number(draw, digits) for _ in range(draw(3, 6))]
    lines, total = [], numbers[0]
    for n in numbers[1:]:
        lines.append(f"{total} + {n} = {total + n}")
        total += n
    return f"Add {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}.\n" + "\n".join(lines) + f"\nThe sum is {total}."


def _fractions(draw: Draw, digits: int) -> str:
    a, b, c, d = draw(1, 9), draw(2, 12), draw(1, 9), draw(2, 12)
    top, bottom = a * d + c * b, b * d
    common = gcd(top, bottom)
    result = f"{top // common}/{bottom // common}" if bottom > common else f"{top // common}"
    steps = [f"{a}/{b} + {c}/{d}", f"{a * d}/{bottom} + {c * b}/{bottom}", f"{top}/{bottom}"]
    return " = ".join(steps + [result] * (common > 1))


def _equations(draw: Draw, digits: int) -> str:
    a, x, b = draw(2, 12), _number(draw, min(digits, 2)), _number(draw, digits)
    return f"Solve {a}x + {b} = {a * x + b}.\n{a}x = {a * x + b} - {b} = {a * x}\nx = {a * x} / {a} = {x}"


def _comparisons(draw: Draw, digits: int) -> str:
    numbers = [_number(draw, digits) for _ in range(draw(3, 7))]
    ordered = sorted(numbers)
    return (
        f"Sort {', '.join(map(str, numbers))}: {', '.join(map(str, ordered))}. "
        f"The smallest is {ordered[0]}, the largest {ordered[-1]}."
    )


def _divisors(draw: Draw, digits: int) -> str:
    n, m = draw(6, 240), draw(6, 240)
    listed = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
    return (
        f"The divisors of {n} are {listed}. The greatest common divisor of {n} and {m} is {gcd(n, m)}, "
        f"their least common multiple {n * m // gcd(n, m)}."
    )


def _shopping(draw: Draw, digits: int) -> str:
    name, good, place = _pick(draw, NAMES), _pick(draw, GOODS), _pick(draw, PLACES)
    count, price, extra = draw(2, 30), draw(2, 20), draw(1, 50)
    paid = count * price + extra
    return (
        f"{name} buys {count} {good} at {place} for {price} cents each and pays with {paid} cents. "
        f"How much change does {name} get?\nThe {good} cost {count} * {price} = {count * price} cents. "
        f"The change is {paid} - {count * price} = {extra} cents."
    )


def _sharing(draw: Draw, digits: int) -> str:
    name, other, good = _pick(draw, NAMES), _pick(draw, NAMES), _pick(draw, GOODS)
    while other == name:
        other = _pick(draw, NAMES)
    children, each, left = draw(2, 12), draw(2, 25), draw(0, 1)
    total = children * each + left
    rest = f", and {left} is left over" if left else ""
    return (
        f"{name} and {other} have {total} {good} and share them among {children} children. "
        f"How many does each child get?\n{total} = {children} * {each} + {left}, so each gets {each}{rest}."
    )


def _journey(draw: Draw, digits: int) -> str:
    name, hours, speed, start, day = _pick(draw, NAMES), draw(2, 9), draw(4, 90), draw(5, 14), draw(0, 6)
    return (
        f"On {DAYS[day]} {name} sets out at {start}:00 and travels {hours} hours at {speed} kilometres "
        f"an hour. How far is it, and when does {name} arrive?\nThe distance is {hours} * {speed} = "
        f"{hours * speed} kilometres. The arrival is at {start + hours}:00."
    )


def _calendar(draw: Draw, digits: int) -> str:
    day, later = draw(0, 6), draw(1, 60)
    weeks, rest = divmod(later, 7)
    return (
        f"Today is {DAYS[day]}. Which day is it in {later} days?\n"
        f"{later} = 7 * {weeks} + {rest}, so it is {DAYS[(day + rest) % 7]}."
    )


TOPICS: dict[str, Callable[[Draw, int], str]] = {
    "sums": _sums,
    "products": _products,
    "long-sums": _long_sum,
    "fractions": _fractions,
    "equations": _equations,
    "comparisons": _comparisons,
    "divisors": _divisors,
    "shopping": _shopping,
    "sharing": _sharing,
    "journeys": _journey,
    "calendar": _calendar,
}
