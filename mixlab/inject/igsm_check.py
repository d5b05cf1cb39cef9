"""Solves and checks word problems of igsm.py from their text alone, knowing nothing of how they are made."""

import re

from mixlab.inject.igsm import MODULUS

_STATEMENT = re.compile(r"The number of (.+?) equals (?:(\d+) (more than|times) )?(?:the (sum|difference) of )?(.+)")
_QUESTION = re.compile(r"(?:How many (?P<thing>.+) does (?P<owner>.+) have|What is (?P<total>.+'s total)), modulo 23\?")
_DEFINITION = re.compile(r"Define (.+) as ([a-zA-Z]); so (.+)")


def quantities(question: str) -> tuple[dict[str, int], str]:
    """Every quantity that the text states or totals, modulo 23, and the one asked for. ValueError when the text cannot be
    read or does not determine a quantity."""
    *sentences, asking = re.split(r"(?<=\.) ", question)
    found = _QUESTION.fullmatch(asking)
    if not found:
        raise ValueError(f"no question: {asking!r}")
    asked = found["total"] or f"{found['owner']}'s {found['thing']}"
    stated: dict[str, tuple] = {}
    for sentence in sentences:
        match = _STATEMENT.fullmatch(sentence.removesuffix("."))
        if not match or match[1] in stated:
            raise ValueError(f"not a statement, or a second one of the same: {sentence!r}")
        stated[match[1]] = match.groups()[1:]
    values: dict[str, int] = {}

    def value(name: str, above: tuple[str, ...] = ()) -> int:
        if name.isdecimal():
            return int(name)
        if name in above:
            raise ValueError(f"{name} depends on itself")
        if name not in values:
            above = (*above, name)
            if name in stated:
                number, extra, combined, rest = stated[name]
                numbers = [value(part, above) for part in (re.split(", | and ", rest) if combined else [rest])]
                result = numbers[0] - numbers[1] if combined == "difference" else sum(numbers)
                result = result * int(number) if extra == "times" else result + int(number or 0)
            else:
                owned = [other for other in stated if name.endswith("'s total") and other.startswith(name[:-5])]
                if not owned:
                    raise ValueError(f"nothing is said of {name}")
                result = sum(value(other, above) for other in owned)
            values[name] = result % MODULUS
        return values[name]

    for name in (*stated, asked):
        value(name)
    return values, asked


def check_solution(question: str, solution: str) -> int:
    """How many operations a right solution does. ValueError naming the first sentence that is wrong: it uses a letter that
    is not defined yet or defines one again, an equation does not hold modulo 23, or the value is not what the question
    says; or the last sentence is not of what was asked."""
    truth, asked = quantities(question)
    letters: dict[str, int] = {}
    operations, name = 0, ""
    for sentence in re.split(r"(?<=\.) ", solution):
        match = _DEFINITION.fullmatch(sentence.removesuffix("."))
        if not match:
            raise ValueError(f"not a definition: {sentence!r}")
        name, letter, equation = match.groups()
        left, *formulas = equation.split(" = ")
        if left != letter or letter in letters or not formulas or not formulas[-1].isdecimal():
            raise ValueError(f"does not define a new letter as a number: {sentence!r}")
        if name not in truth and name.endswith("'s total"):
            truth[name] = sum(v for other, v in truth.items() if other.startswith(name[:-5])) % MODULUS
        for formula in formulas:
            if _evaluate(formula, letters) != truth.get(name):
                raise ValueError(f"{formula} is not {name} in {sentence!r}")
        letters[letter] = int(formulas[-1])
        operations += max(1, len(re.findall(r" [+*-] ", formulas[0])))
    if name != asked:
        raise ValueError(f"the solution ends with {name!r} and not with {asked!r}")
    return operations


def _evaluate(formula: str, letters: dict[str, int]) -> int:
    """A formula of numbers, letters, + - * and parentheses, modulo 23."""
    tokens = re.findall(r"\d+|[a-zA-Z]|[-+*()]", formula)[::-1]

    def atom() -> int:
        token = tokens.pop()
        if token == "(":
            inside = total()
            tokens.pop()
            return inside
        if token.isalpha():
            if token not in letters:
                raise ValueError(f"the letter {token} is used before it is defined")
            return letters[token]
        return int(token)

    def product() -> int:
        result = atom()
        while tokens and tokens[-1] == "*":
            tokens.pop()
            result *= atom()
        return result

    def total() -> int:
        result = product()
        while tokens and tokens[-1] in "+-":
            sign = 1 if tokens.pop() == "+" else -1
            result += sign * product()
        return result

    return total() % MODULUS
