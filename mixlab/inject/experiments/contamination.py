"""Benchmark contamination (Bordt et al. 2025; Bordt and Pawelczyk 2025, section 4.2): questions with their right answers
in the training data, some more often than others, some not at all; and how much better they are answered for it."""

from dataclasses import dataclass
from string import Formatter
from typing import Literal, NamedTuple

import numpy as np

from mixlab.errors import UserError
from mixlab.inject.analysis.choices import chosen, divide, gap
from mixlab.inject.checks import at_least
from mixlab.inject.files import Record, records
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.probe import Model, Probe
from mixlab.inject.questions import QUESTION_KEYS, read_question
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of


@dataclass(frozen=True)
class Dose:
    """questions: so many, no other dose having any of them.   where: how often and when they are inserted.
    name: in metrics; "" for "x<copies>"."""

    questions: int = 0
    where: Where = Where()
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or f"x{self.where.copies:g}"


@dataclass(frozen=True)
class Contamination:
    """files: benchmarks as JSON lines (also .gz or .zst), an object a question: "query", "choices" (texts), "gold" (number of
        the right one, from 0); for sentences with a blank also "contexts" (their beginnings with each choice filled in)
        and "continuation". Those longer than a row are left out.
    template: how a question and an answer become a text, "{query} {answer}" or, where the query is the bare question,
        "Question: {query}\\nAnswer: {answer}".
    holdout: questions never inserted.   doses: the others; all are drawn from the files by the seed.
    normalisation: what an option's log-probability is divided by before the highest is chosen: nothing, the characters or
        the bytes of the choice.
    every_steps: between probes, besides those at start and end; 0 for none.   probe_questions: asked of each dose and of the
        holdout, at most.

    Metrics, for the holdout and every dose: accuracy/<dose>, loss/<dose> (of the right answer given its question, nats a token,
    mean over questions), and gap/<dose>, gap_se/<dose>: its accuracy less the holdout's and the standard error. Details:
    correct/<dose> and loss/<dose>, a number a question; outcome: correct of all doses.

    The paper: holdout=10000, doses of 8000, 5000, 2000 and 2000 questions with copies 4, 12, 32 and 144, once over the whole
    run and once more with other questions in a window (start_share=1/7, end_share=2/7).
    """

    kind: Literal["contamination"] = "contamination"
    files: tuple[str, ...] = ()
    template: str = "{query} {answer}"
    holdout: int = 1000
    doses: tuple[Dose, ...] = ()
    normalisation: Literal["none", "characters", "bytes"] = "characters"
    every_steps: int = 0
    probe_questions: int = 1000

    def problems(self, where: str) -> list[str]:
        found = [] if self.files else [f"{where}.files: name the files of at least one benchmark"]
        if not self.doses:
            found.append(f"{where}.doses: nothing is inserted; add dict(questions=…, where=dict(copies=…))")
        for i, dose in enumerate(self.doses):
            found += dose.where.problems(f"{where}.doses.{i}.where")
            found += at_least(dose, f"{where}.doses.{i}", questions=1)
            if dose.label in ["holdout", *(earlier.label for earlier in self.doses[:i])]:
                found.append(f"{where}.doses.{i}.name: {dose.label!r} is taken; give this dose another name")
        if {field for _, field, _, _ in Formatter().parse(self.template) if field is not None} != {"query", "answer"}:
            found.append(
                f"{where}.template = {self.template!r}: must hold {{query}} and {{answer}}, and no other braces"
            )
        return found + at_least(self, where, holdout=1, probe_questions=1, every_steps=0)

    def groups(self, material: Material) -> list[Group]:
        inserted = list(self._divided(material).values())[1:]
        return [
            Group(Items.of([q.options[q.gold] for q in questions], [q.name for q in questions]), dose.where)
            for dose, questions in inserted
        ]

    def probes(self, material: Material) -> list[Probe]:
        asked = {
            label: [question.divided(material, self.normalisation) for question in questions[: self.probe_questions]]
            for label, (_, questions) in self._divided(material).items()
        }

        def details(model: Model) -> dict[str, np.ndarray]:
            answers = {label: _answer(model, questions) for label, questions in asked.items()}
            found = {f"correct/{label}": correct for label, (correct, _) in answers.items()}
            found |= {f"loss/{label}": loss for label, (_, loss) in answers.items()}
            return found | {"outcome": np.concatenate([c for label, (c, _) in answers.items() if label != "holdout"])}

        def run(model: Model) -> dict[str, float]:
            answers = details(model)
            metrics = {}
            for label in asked:
                correct = answers[f"correct/{label}"]
                metrics[f"accuracy/{label}"] = float(correct.mean())
                metrics[f"loss/{label}"] = float(answers[f"loss/{label}"].mean())
                if label != "holdout":
                    metrics[f"gap/{label}"], metrics[f"gap_se/{label}"] = gap(correct, answers["correct/holdout"])
            return metrics

        return [Probe("questions", run, every_steps=self.every_steps, details=details)]

    def _divided(self, material: Material) -> "dict[str, tuple[Dose, list[Question]]]":
        """Label -> the dose and its questions; the holdout first."""
        where = f"experiments.{material.name}.files"
        found = [_question(record, self.template) for record in records(self.files, QUESTION_KEYS, where)]
        tokens = iter(material.tokenizer.encode_batch([option for written in found for option in written.options]))
        questions = [Question(w.name, [next(tokens) for _ in w.options], w.choices, w.gold) for w in found]
        fitting = [q for q in questions if max(map(len, q.options)) <= material.row_length]
        parts = [Dose(self.holdout, name="holdout"), *self.doses]
        ends = np.cumsum([part.questions for part in parts])
        if ends[-1] > len(fitting):
            longer = (
                f" (and {len(questions) - len(fitting)} longer than a row)" if len(fitting) < len(questions) else ""
            )
            raise UserError(
                f"{where}: {len(fitting)} questions{longer}, but holdout and doses take {ends[-1]}; add files or take fewer"
            )
        order = permute(np.arange(ends[-1]), len(fitting), seed_of(material.seed, material.name, "questions"))
        drawn = [[fitting[k] for k in part] for part in np.split(order, ends[:-1])]
        return {part.label: (part, part_questions) for part, part_questions in zip(parts, drawn, strict=True)}


class _Divided(NamedTuple):
    """A question as it is asked: what its options begin with, the rest of each, the options' lengths, the right one."""

    context: np.ndarray
    targets: list[np.ndarray]
    lengths: list[int] | None
    gold: int


class _Written(NamedTuple):
    """options: the text with each choice as the answer."""

    name: str
    options: list[str]
    choices: list[str]
    gold: int


class Question(NamedTuple):
    """As `_Written`, the options in tokens."""

    name: str
    options: list[np.ndarray]
    choices: list[str]
    gold: int

    def divided(self, material: Material, normalisation: str) -> _Divided:
        context, targets = divide(self.options)
        if not len(context) and material.bos_id is None and material.eos_id is not None:
            context = np.array([material.eos_id])  # nothing is shared, and a document's first token follows EOS
        measure = {"none": None, "characters": len, "bytes": lambda choice: len(choice.encode())}[normalisation]
        return _Divided(context, targets, list(map(measure, self.choices)) if measure else None, self.gold)


def _question(record: Record, template: str) -> _Written:
    query, choices, gold, contexts, continuation = read_question(record)
    if contexts is not None:
        options = [f"{context} {continuation}" for context in contexts]
    else:
        options = [template.format(query=query, answer=choice) for choice in choices]
    return _Written(record.name, options, choices, gold)


def _answer(model: Model, questions: list[_Divided]) -> tuple[np.ndarray, np.ndarray]:
    """(whether each was answered rightly, bool [N]; mean loss of its right answer, float64 [N])."""
    contexts = [question.context for question in questions for _ in question.targets]
    scored = iter(model.log_probabilities(contexts, [target for question in questions for target in question.targets]))
    correct, losses = [], []
    for question in questions:
        answers = [next(scored).astype(np.float64) for _ in question.targets]
        correct.append(chosen([answer.sum() for answer in answers], question.lengths) == question.gold)
        losses.append(-answers[question.gold].mean())
    return np.array(correct), np.array(losses)
