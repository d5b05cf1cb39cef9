"""How much reasoning is learnt from few problems? Synthetic word problems with worked solutions, each read once (Bordt and
Pawelczyk 2025, section 4 and appendix E.2)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import numpy as np

from mixlab.errors import UserError
from mixlab.inject import igsm
from mixlab.inject.checks import at_least
from mixlab.inject.cloze import Cloze, completions, split, target_log_probabilities
from mixlab.inject.igsm import MODULUS, Problem
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.probe import Model, Probe
from mixlab.seeds import seed_of

_ANSWER = re.compile(r"Answer: (\d+)")
_SPARE_TOKENS = 8  # of an answer beyond the longest right one


@dataclass(frozen=True)
class Reasoning:
    """count: problems to insert.   max_operations, max_parameters: of these, as igsm.problem has them.
    evaluated_operations: numbers of operations that are evaluated, more than max_operations too.
    evaluated_count: problems of each, with balanced answers; none is solved like one that is inserted.
    ranked_count: of these, how many have all 23 answers scored.
    shots: solved problems before an evaluated one, as far as rows are long enough.
    every_steps: between evaluations; 0 for one at the end.
    """

    kind: Literal["reasoning"] = "reasoning"
    count: int = 10_000
    max_operations: int = 10
    max_parameters: int = 20
    where: Where = Where()
    evaluated_operations: tuple[int, ...] = tuple(range(1, 13))
    evaluated_count: int = 100
    ranked_count: int = 20
    shots: int = 3
    every_steps: int = 0

    def problems(self, where: str) -> list[str]:
        found = self.where.problems(f"{where}.where")
        found += at_least(self, where, count=1, evaluated_count=1, ranked_count=0, shots=0, every_steps=0)
        if not 1 <= self.max_operations <= igsm.MOST_OPERATIONS:
            found.append(
                f"{where}.max_operations = {self.max_operations}: must be between 1 and {igsm.MOST_OPERATIONS}"
            )
        if not self.evaluated_operations or not all(1 <= n <= igsm.MOST_OPERATIONS for n in self.evaluated_operations):
            found.append(f"{where}.evaluated_operations: some numbers between 1 and {igsm.MOST_OPERATIONS}")
        most = max((self.max_operations, *self.evaluated_operations))
        if not most <= self.max_parameters <= igsm.MOST_PARAMETERS:
            found.append(
                f"{where}.max_parameters = {self.max_parameters}: must be at least the most operations, {most}, and at most "
                f"{igsm.MOST_PARAMETERS}"
            )
        return found

    def groups(self, material: Material) -> list[Group]:
        chosen = list(islice(self.training_problems(material), self.count))
        tokens = material.tokenizer.encode_batch([problem.text for _, problem in chosen])
        return [Group(Items.of(tokens, [f"problem-{number}" for number, _ in chosen]), self.where)]

    def training_problems(self, material: Material) -> Iterator[tuple[int, Problem]]:
        """(number, problem) without end, without those that are solved like an evaluated one."""
        held_out = {problem.trace_hash for problem in self.evaluated_problems(material)}
        seed = seed_of(material.seed, "reasoning", material.name, "training")
        for number in count():
            problem = igsm.problem(seed, number, self.max_operations, self.max_parameters)
            if problem.trace_hash not in held_out:
                yield number, problem

    def evaluated_problems(self, material: Material) -> list[Problem]:
        """evaluated_count problems of each number of operations, one number after the other."""
        seed = seed_of(material.seed, "reasoning", material.name, "evaluation")
        return [
            igsm.problem(
                seed_of(seed, operations),
                i,
                max_parameters=self.max_parameters,
                operations=operations,
                answer=i % MODULUS,
            )
            for operations in self.evaluated_operations
            for i in range(self.evaluated_count)
        ]

    def probes(self, material: Material) -> list[Probe]:
        """For every number of operations n: op<n>/accuracy with accuracy_se, of greedy solutions cut after their first
        "Answer:"; op<n>/solution_loss, nats a token of the right solution; op<n>/answer_log_probability, of the right
        result of the last step among the 23 that could stand there, after the right steps before (ignorance: -3.14).
        UserError when rows are too short for the evaluated problems."""
        problems, tokenizer = self.evaluated_problems(material), material.tokenizer
        operations = np.array([problem.operations for problem in problems])
        solved = [len(t) for t in tokenizer.encode_batch([problem.text for problem in problems])]
        bare = [len(t) for t in tokenizer.encode_batch([problem.prompt for problem in problems])]
        answer_tokens = max(a - b for a, b in zip(solved, bare, strict=True)) + _SPARE_TOKENS
        room = material.row_length - answer_tokens - max(bare)
        if room < 0:
            raise UserError(
                f"experiments.{material.name}: evaluated problems take up to {max(bare) + answer_tokens} tokens with their "
                f"solution, and rows have {material.row_length}; lower max_parameters or evaluated_operations"
            )
        before = self._shots(material, room)
        prompts = [before + problem.prompt for problem in problems]
        ranked = [problems[first + i] for first in range(0, len(problems), self.evaluated_count)
                  for i in range(min(self.ranked_count, self.evaluated_count))]  # fmt: skip

        def details(model: Model) -> dict[str, np.ndarray]:
            answers = [answer_of(text) for text in completions(model, tokenizer, prompts, answer_tokens)]
            solutions = [Cloze(prompt, p.solution) for prompt, p in zip(prompts, problems, strict=True)]
            losses = [-np.mean(answer) for answer in model.log_probabilities(*split(tokenizer, solutions))]
            return {
                "operations": operations,
                "outcome": np.array([a == problem.answer for a, problem in zip(answers, problems, strict=True)]),
                "solution_loss": np.array(losses, np.float64),
            }

        def run(model: Model) -> dict[str, float]:
            found, metrics = details(model), {}
            right = answer_log_probabilities(model, tokenizer, ranked)
            for n in self.evaluated_operations:
                of_n = operations == n
                accuracy = float(found["outcome"][of_n].mean())
                metrics[f"op{n}/accuracy"] = accuracy
                metrics[f"op{n}/accuracy_se"] = float(np.sqrt(accuracy * (1 - accuracy) / of_n.sum()))
                metrics[f"op{n}/solution_loss"] = float(found["solution_loss"][of_n].mean())
                if ranked:
                    among = [p.operations == n for p in ranked]
                    metrics[f"op{n}/answer_log_probability"] = float(right[among].mean())
            return metrics

        return [Probe("problems", run, self.every_steps, details=details)]

    def _shots(self, material: Material, room_tokens: int) -> str:
        seed, text = seed_of(material.seed, "reasoning", material.name, "shots"), ""
        for i in range(self.shots):
            longer = text + igsm.problem(seed, i, self.max_operations, self.max_parameters).text + "\n\n"
            if len(material.tokenizer.encode(longer)) > room_tokens:
                break
            text = longer
        return text


def answer_of(text: str) -> int | None:
    """The number after the first "Answer:" that a number follows; None when there is none."""
    found = _ANSWER.search(text)
    return int(found[1]) if found else None


def answer_log_probabilities(model: Model, tokenizer, problems: list[Problem]) -> np.ndarray:
    """float64 [N]: log probability of the right result of the last step, among the numbers 0 … 22, after the right steps
    before it."""
    clozes = []
    for problem in problems:
        known = problem.solution[: problem.solution.rindex(" = ") + 2]
        clozes += [Cloze(f"{problem.prompt} {known}", f"{n}.") for n in range(MODULUS)]
    scores = target_log_probabilities(model, tokenizer, clozes).reshape(len(problems), MODULUS)
    right = scores[np.arange(len(problems)), [problem.answer for problem in problems]]
    return right - np.logaddexp.reduce(scores, axis=1)
