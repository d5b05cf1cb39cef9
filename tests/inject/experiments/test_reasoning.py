"""Reasoning problems in a run: what is inserted, what is held out, and what is measured."""

import numpy as np
import pytest

from mixlab.errors import UserError
from mixlab.inject.experiments.reasoning import Reasoning, answer_of
from tests.inject.fakes import Uniform, material

SMALL = Reasoning(count=30, max_operations=2, max_parameters=3, evaluated_operations=(1, 2, 3), evaluated_count=23,
                  ranked_count=5)  # fmt: skip
LONG = material(row_length=3000)


class Knowing(Uniform):
    """Solves the problems it is asked; gives the right result of a step 0.5 and the others what is left."""

    def __init__(self, problems, solves):
        super().__init__()
        self.problems, self.solves = problems, solves

    def greedy(self, prompts, tokens):
        said = np.full((len(prompts), tokens), 32, np.int32)
        for i, (problem, right) in enumerate(zip(self.problems, self.solves, strict=True)):
            answer = problem.answer if right else (problem.answer + 1) % 23
            text = f" {problem.solution}\nAnswer: {answer}\n\nQuestion: more? Answer: 5".encode()[:tokens]
            said[i, : len(text)] = list(text)
        return said


def test_training_problems_are_read_once_and_share_no_solution_with_the_evaluated_ones():
    evaluated = {problem.trace_hash for problem in SMALL.evaluated_problems(LONG)}
    (group,) = SMALL.groups(LONG)
    texts = [LONG.tokenizer.decode(group.items[i]) for i in range(len(group.items))]
    assert len(set(texts)) == 30 and len(set(group.items.ids)) == 30
    numbered = dict(zip(range(30), SMALL.training_problems(LONG), strict=False)).values()
    assert [problem.text for _, problem in numbered] == texts
    assert not evaluated & {problem.trace_hash for _, problem in numbered}


def test_a_problem_that_is_evaluated_is_left_out(monkeypatch):
    first = next(SMALL.training_problems(LONG))
    monkeypatch.setattr(Reasoning, "evaluated_problems", lambda self, material: [first[1]])
    assert next(SMALL.training_problems(LONG))[0] > first[0]


def test_evaluated_problems_are_balanced():
    problems = SMALL.evaluated_problems(LONG)
    assert [p.operations for p in problems] == [1] * 23 + [2] * 23 + [3] * 23
    assert sorted(p.answer for p in problems[:23]) == list(range(23))


def test_probe():
    problems = SMALL.evaluated_problems(LONG)
    solves = [p.operations == 1 or (p.operations == 2 and p.answer < 10) for p in problems]
    (probe,) = SMALL.probes(LONG)
    found = probe.run(Knowing(problems, solves))
    assert found["op1/accuracy"] == 1 and found["op1/accuracy_se"] == 0
    assert found["op2/accuracy"] == pytest.approx(10 / 23) and found["op3/accuracy"] == 0
    assert found["op2/accuracy_se"] == pytest.approx(np.sqrt(10 / 23 * 13 / 23 / 23))
    assert found["op3/solution_loss"] == pytest.approx(np.log(256), rel=1e-5)
    short, long = (
        [f"{n}." for n in range(10)],
        [f"{n}." for n in range(10, 23)],
    )  # of two and of three bytes, and a space
    weights = {n: 256.0 ** -(1 + len(text)) for n, text in enumerate(short + long)}
    expected = np.mean([np.log(weights[p.answer] / sum(weights.values())) for p in problems[:5]])
    assert found["op1/answer_log_probability"] == pytest.approx(expected, rel=1e-4)
    assert probe.details(Knowing(problems, solves))["outcome"].tolist() == solves


def test_prompts_have_solved_problems_before_them_as_far_as_they_fit():
    class Seen(Uniform):
        def greedy(self, prompts, tokens):
            self.prompts = [bytes(prompt.tolist()).decode() for prompt in prompts]
            assert max(map(len, prompts)) + tokens <= self.row_length
            return super().greedy(prompts, tokens)

    for length, shots in ((3000, 3), (1100, range(1, 3))):
        place, model = material(row_length=length), Seen()
        model.row_length = length
        SMALL.probes(place)[0].run(model)
        seen = {prompt.count("Answer:") for prompt in model.prompts}
        assert len(seen) == 1 and seen <= set(shots if isinstance(shots, range) else [shots])
        assert all(prompt.endswith("modulo 23?\nSolution:") for prompt in model.prompts)
    with pytest.raises(UserError, match="rows have 200"):
        SMALL.probes(material(row_length=200))


def test_answer_of():
    assert answer_of("so a = 3.\nAnswer: 3\nQuestion: … Answer: 4") == 3
    assert answer_of("Answer: 22") == 22 and answer_of("Answer: many") is None and answer_of("") is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [(Reasoning(count=0), "r.count"), (Reasoning(max_operations=99, max_parameters=60), "r.max_operations"),
     (Reasoning(max_parameters=5), "r.max_parameters"), (Reasoning(evaluated_operations=()), "r.evaluated_operations")],
)  # fmt: skip
def test_problems_name_their_keys(settings, key):
    assert settings.problems("r")[0].startswith(key)
    assert Reasoning().problems("r") == [] == SMALL.problems("r")
