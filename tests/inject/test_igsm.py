"""Generated word problems, checked from their text alone."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.inject.igsm import MODULUS, problem
from mixlab.inject.igsm_check import check_solution, quantities

SEEDS = st.integers(0, 2**64 - 1)


@settings(max_examples=150, deadline=None)
@given(SEEDS, st.integers(0, 10**6), st.integers(1, 14), st.integers(0, 10))
def test_the_text_alone_gives_the_answer_and_the_solution_is_right(seed, number, operations, spare):
    made = problem(seed, number, max_parameters=operations + spare, operations=operations)
    values, asked = quantities(made.question)
    assert values[asked] == made.answer and 0 <= made.answer < MODULUS
    assert check_solution(made.question, made.solution) == made.operations == operations
    assert made.question.count(" equals ") == made.parameters <= operations + spare
    assert made.text.endswith(f"\nAnswer: {made.answer}")


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(0, 100), st.integers(1, 10), st.integers(0, MODULUS - 1))
def test_answers_can_be_asked_for(seed, number, operations, answer):
    made = problem(seed, number, operations=operations, answer=answer)
    assert made.answer == answer and check_solution(made.question, made.solution) == operations


def test_problems_are_a_function_of_seed_and_number():
    assert problem(5, 77) == problem(5, 77)
    assert len({problem(5, n).text for n in range(50)} | {problem(6, n).text for n in range(50)}) == 100
    assert problem(5, 77, 2, 4).text == SAMPLE


def test_difficulties_and_sizes_are_spread_and_all_kinds_of_statements_come_up():
    made = [problem(1, n, max_operations=4, max_parameters=12) for n in range(400)]
    assert set(Counter(p.operations for p in made)) == {1, 2, 3, 4}
    assert min(Counter(p.operations for p in made).values()) > 60
    assert max(p.parameters for p in made) == 12 and min(p.parameters for p in made) <= 2
    text = " ".join(p.question for p in made)
    for words in (" more than ", " times ", "the sum of", "the difference of", "'s total", "What is "):
        assert words in text
    assert len({p.answer for p in made}) == MODULUS


def test_hash_ignores_letters_and_nothing_else():
    made = problem(1, 3, operations=5)
    letters = re.findall(r" as ([a-zA-Z]);", made.solution)
    turned = dict(zip(letters, letters[1:] + letters[:1], strict=True))
    renamed = re.sub(r"\b[a-zA-Z]\b", lambda found: turned.get(found[0], found[0]), made.solution)
    assert renamed != made.solution and check_solution(made.question, renamed) == 5
    assert replace(made, solution=renamed).trace_hash == made.trace_hash
    assert replace(made, solution=made.solution.replace("= ", "= 1", 1)).trace_hash != made.trace_hash


QUESTION = (
    "The number of Oak School's maps equals 5. The number of Elm Zoo's jars equals 20 more than Oak School's maps. "
    "The number of Elm Zoo's kites equals 3 times the difference of Elm Zoo's jars and Oak School's maps. "
    "What is Elm Zoo's total, modulo 23?"
)
RIGHT = (
    "Define Oak School's maps as a; so a = 5. Define Elm Zoo's jars as b; so b = 20 + a = 20 + 5 = 2. "
    "Define Elm Zoo's kites as c; so c = 3 * (b - a) = 3 * (2 - 5) = 3 * 20 = 14. "
    "Define Elm Zoo's total as d; so d = b + c = 2 + 14 = 16."
)


def test_the_checker_on_a_problem_worked_by_hand():
    values, asked = quantities(QUESTION)
    assert (asked, values[asked]) == ("Elm Zoo's total", 16)
    assert check_solution(QUESTION, RIGHT) == 5  # 1 for the constant, 1, 2 and 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("= 16.", "= 15."), ("3 * 20", "3 * 19"), ("as c; so c", "as a; so a"), ("20 + a", "20 + c"), ("a = 5", "a = 6"),
     (" Define Elm Zoo's total as d; so d = b + c = 2 + 14 = 16.", ""), ("Elm Zoo's kites", "Elm Zoo's kits")],
)  # fmt: skip
def test_the_checker_finds_mistakes(right, wrong):
    with pytest.raises(ValueError):
        check_solution(QUESTION, RIGHT.replace(right, wrong))


@pytest.mark.parametrize(
    "unsaid", ["The number of Oak School's maps equals 5. ", "What is Elm Zoo's total, modulo 23?"]
)
def test_the_checker_needs_all_that_is_said(unsaid):
    with pytest.raises(ValueError):
        quantities(QUESTION.replace(unsaid, ""))


SAMPLE = """\
Question: The number of Cedarville Zoo's kettles equals 6. \
The number of Cedarville Zoo's shelves equals Cedarville Zoo's kettles. \
How many shelves does Cedarville Zoo have, modulo 23?
Solution: Define Cedarville Zoo's kettles as D; so D = 6. \
Define Cedarville Zoo's shelves as K; so K = D = 6.
Answer: 6"""
