"""Benchmarks: items with right answers, read from files, and how they are put to a model (OLMES; Gu et al. 2025).

Scoring follows the Language Model Evaluation Harness: a continuation is scored after its context, with one space between.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter, ascii_uppercase
from typing import Literal, NamedTuple

import numpy as np

from mixlab.errors import UserError
from mixlab.inject.checks import at_least
from mixlab.inject.files import Record, records
from mixlab.inject.questions import QUESTION_KEYS, Question, read_question
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

KEYS = (*QUESTION_KEYS, "id", "context", "question", "solution", "answer")
RESERVED = ("macro", "micro", "by_length", "by_position", "tasks")


@dataclass(frozen=True)
class TaskConfig:
    """files: items as JSON lines (also .gz or .zst) or Parquet; what an item holds depends on the format.
    format: what is asked.
        "cloze": "query", "choices" (texts), "gold" (number of the right one, from 0): every choice is scored after the query,
            OLMES's cloze form. For sentences with a blank also "contexts" (their beginnings with each choice filled in) and
            "continuation" (their one end, which is scored).
        "letters": the same items; the choices are listed after A, B, C … and the letter is scored, OLMES's multiple-choice form.
        "continuation": "context", "continuation": whether greedy decoding would give it, word for word (LAMBADA).
        "generation": "question", "answer", perhaps "solution": an answer is written; where the right one is a number, the last
            number of what was written must be it, else all of it (GSM8K).
    template: how the query, context or question stands in the prompt, such as "Question: {query}\\nAnswer:".
    shots: so many items with their answers stand before each, a blank line between: the first ones of shot_files or, where there
        are none, of the files themselves, which then ask the others.   shots_by: a key, such as "subject"; an item's shots are
        the first that have its value.
    items: at most so many are asked, the same ones in every run; None: all.
    normalisation: what a choice's log-probability is divided by before the highest is chosen, for the task's score: nothing, the
        characters or the bytes of the choice; "unconditional": less that of the choice after "Answer:" alone.
    metadata: a value written in front of every prompt, as evaluation.sample_metadata is.
    new_tokens: that "generation" writes; what follows a blank line or the beginning of another question is left out.
    every_steps: at its multiples and at the end; None: whenever held-out documents are scored; 0: only at the end.
    """

    files: tuple[str, ...] = ()
    format: Literal["cloze", "letters", "continuation", "generation"] = "cloze"
    template: str = "{query}"
    shots: int = 0
    shot_files: tuple[str, ...] = ()
    shots_by: str | None = None
    items: int | None = None
    normalisation: Literal["none", "characters", "bytes", "unconditional"] = "characters"
    metadata: str | None = None
    new_tokens: int = 256
    every_steps: int | None = None

    def problems(self, where: str) -> list[str]:
        found = [] if self.files else [f"{where}.files: name the files of the benchmark"]
        try:
            fields = [field for _, field, _, _ in Formatter().parse(self.template) if field is not None]
        except ValueError:
            fields = []
        if fields != ["query"]:
            found.append(f"{where}.template = {self.template!r}: must hold {{query}}, once, and no other braces")
        if not self.shots and (self.shot_files or self.shots_by):
            found.append(f"{where}.shots = 0: shot_files and shots_by are of no use; give a number or leave them out")
        if self.shots_by and not self.shot_files:
            found.append(f"{where}.shots_by: needs shot_files, the examples of each {self.shots_by}")
        given = {name: 1 for name in ("items",) if self.items is not None}
        given |= {name: 0 for name in ("every_steps",) if self.every_steps is not None}
        return found + at_least(self, where, shots=0, new_tokens=1, **given)

    @property
    def score(self) -> str:
        """The metric that stands for the task."""
        by = {"none": "acc", "characters": "acc_per_char", "bytes": "acc_per_byte", "unconditional": "acc_uncond"}
        return {"cloze": by[self.normalisation], "generation": "exact_match"}.get(self.format, "acc")

    @property
    def stops(self) -> tuple[str, ...]:
        """Where a written answer ends."""
        return tuple(filter(None, ("\n\n", self.template.partition("{query}")[0].strip())))


class Item(NamedTuple):
    """contexts, targets: one for each choice, or one; a target begins with a space.   gold: number of the right target.
    answer: what must be written, of "generation", else None."""

    name: str
    contexts: list[str]
    targets: list[str]
    gold: int
    answer: str | None = None

    @property
    def shown(self) -> str:
        """With its answer, as an example."""
        return self.contexts[self.gold] + self.targets[self.gold]


@dataclass(frozen=True)
class Task:
    name: str
    config: TaskConfig
    items: list[Item]


def task_problems(tasks: Mapping[str, TaskConfig], context_length: int) -> list[str]:
    """What is wrong with the settings, files aside."""
    found = []
    for name, task in tasks.items():
        where = f"evaluation.tasks.{name}"
        if not re.fullmatch(r"[\w.-]+", name):
            found.append(f"{where}: a name has letters, digits, '.', '_' and '-' only; rename it")
        found += task.problems(where)
        if task.format == "generation" and task.new_tokens >= context_length:
            found.append(
                f"{where}.new_tokens = {task.new_tokens}: must be less than model.context_length = {context_length}"
            )
    return found


def open_tasks(configs: Mapping[str, TaskConfig], sets: Collection[str]) -> tuple[list[Task], list[str]]:
    """(the tasks with their items; what is wrong with the others).   sets: names of the sets of held-out documents, which
    tasks must not have."""
    tasks, problems = [], []
    for name, config in configs.items():
        if name in sets or name in RESERVED:
            problems.append(f"evaluation.tasks.{name}: eval/{name} is the name of other numbers; give it another name")
            continue
        try:
            tasks.append(Task(name, config, _read(name, config)))
        except UserError as error:
            problems.append(str(error))
    return tasks, problems


def _read(name: str, config: TaskConfig) -> list[Item]:
    where = f"evaluation.tasks.{name}"
    asked = _items(config, config.files, f"{where}.files")
    pool = _items(config, config.shot_files, f"{where}.shot_files") if config.shot_files else asked
    shots: dict[object, list[str]] = {}
    for group, item in pool:
        if len(shots.setdefault(group, [])) < config.shots:
            shots[group].append(item.shown + "\n\n")
    if not config.shot_files:
        asked = asked[config.shots :]
    few = [group for group in dict.fromkeys(g for g, _ in asked) if len(shots.get(group, [])) < config.shots]
    if few or not asked:
        what = f" of {config.shots_by} = {few[0]!r}" if few and config.shots_by else ""
        raise UserError(
            f"{where}: there are too few items{what} for {config.shots} shots and something to ask; take fewer shots or add files"
        )
    if config.items is not None and config.items < len(asked):
        order = permute(np.arange(config.items), len(asked), seed_of("task", name))
        asked = [asked[number] for number in sorted(order.tolist())]
    prefixes = {group: "".join(texts) for group, texts in shots.items()}
    return [
        item._replace(contexts=[prefixes.get(group, "") + context for context in item.contexts])
        for group, item in asked
    ]


def _items(config: TaskConfig, files: Sequence[str], where: str) -> list[tuple[object, Item]]:
    """(value of shots_by, item) of every line. UserError names up to three lines that are wrong."""
    keys = KEYS if config.shots_by is None else (*KEYS, config.shots_by)
    found, problems = [], []
    lines = records(files, keys, where)
    while True:
        try:
            record = next(lines)
            found.append((record.values.get(config.shots_by), _item(config, record)))
        except StopIteration:
            break
        except UserError as error:
            problems.append(str(error).removeprefix(f"{where}: "))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{where}: " + "; ".join(problems[:3]) + more)
    return found


def _item(config: TaskConfig, record: Record) -> Item:
    own = record.values.get("id")
    name = own if isinstance(own, str) else record.name
    if config.format == "continuation":
        context, target = record.text("context"), record.text("continuation").strip()
        return Item(name, [config.template.format(query=context)], _targets([target], record), 0)
    if config.format == "generation":
        question, answer, solution = (
            record.text("question"),
            record.text("answer").strip(),
            record.values.get("solution"),
        )
        written = f"{solution.strip()} So the answer is {answer}." if isinstance(solution, str) else answer
        return Item(name, [config.template.format(query=question)], _targets([written], record), 0, answer)
    question = read_question(record)
    if config.format == "letters":
        context, targets = _with_letters(config, question, record), ascii_uppercase[: len(question.choices)]
        return Item(name, [context] * len(targets), _targets(targets, record), question.gold)
    if question.contexts is not None:
        contexts, targets = question.contexts, [question.continuation or ""] * len(question.contexts)
    else:
        contexts, targets = [question.query] * len(question.choices), question.choices
    contexts = [config.template.format(query=context) for context in contexts]
    return Item(name, contexts, _targets(targets, record), question.gold)


def _targets(texts: Sequence[str], record: Record) -> list[str]:
    if not all(texts):
        raise UserError(f"{record.place}: an answer is empty")
    return [" " + text for text in texts]


def _with_letters(config: TaskConfig, question: Question, record: Record) -> str:
    """OLMES's multiple-choice form: a line " A. …" for each choice, then "Answer:"."""
    if not question.query or len(question.choices) > len(ascii_uppercase):
        raise UserError(f"{record.place}: format='letters' needs a text at 'query', and no more choices than letters")
    stem = config.template.format(query=question.query).removesuffix("Answer:").rstrip()
    lines = [f" {letter}. {choice}" for letter, choice in zip(ascii_uppercase, question.choices, strict=False)]
    return "\n".join([stem, *lines, "Answer:"])
