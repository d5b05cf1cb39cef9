"""Multiple-choice questions as files hold them."""

from typing import NamedTuple

from mixlab.errors import UserError
from mixlab.inject.files import Record

QUESTION_KEYS = ("query", "choices", "gold", "contexts", "continuation")


class Question(NamedTuple):
    """query: "" where there are contexts alone.   gold: number of the right choice, from 0.
    contexts, continuation: of a sentence with a blank, its beginnings with each choice filled in and its one end; else None.
    """

    query: str
    choices: list[str]
    gold: int
    contexts: list[str] | None
    continuation: str | None


def read_question(record: Record) -> Question:
    """The question of an object with "query", "choices" and "gold"; for sentences with a blank also "contexts" and
    "continuation". UserError names the line and what is wrong with it."""
    values = record.values
    choices, gold, contexts = values.get("choices"), values.get("gold"), values.get("contexts")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{record.place}: 'choices' must be a list of two or more texts")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UserError(f"{record.place}: 'gold' = {gold!r} must be the number of a choice, 0 to {len(choices) - 1}")
    if contexts is None:
        return Question(record.text("query"), choices, gold, None, None)
    if not isinstance(contexts, list) or len(contexts) != len(choices):
        raise UserError(f"{record.place}: 'contexts' must be a list with a text for each choice")
    query = values.get("query")
    return Question(query if isinstance(query, str) else "", choices, gold, contexts, record.text("continuation"))
