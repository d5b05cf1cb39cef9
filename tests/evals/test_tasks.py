"""Benchmarks' items, and the prompts made of them."""

import json

import pytest

from mixlab.evals.tasks import TaskConfig, open_tasks, task_problems

CHOICES = {"id": "q1", "query": "Question: What do bees make?\nAnswer:", "choices": ["wax", "honey"], "gold": 1}
BLANK = {
    "query": "Ann saw Bo, so _ left.",
    "contexts": ["Ann saw Bo, so Ann", "Ann saw Bo, so Bo"],
    "continuation": "left.",
    "choices": ["Ann", "Bo"],
    "gold": 0,
}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def items(config):
    tasks, problems = open_tasks({"t": config}, [])
    assert not problems
    return tasks[0].items


def questions(count, **more):
    return [
        CHOICES
        | {"id": f"q{i}", "query": f"Question: {i}?\nAnswer:", "gold": i % 2}
        | {k: v[i] for k, v in more.items()}
        for i in range(count)
    ]


def test_cloze_form_scores_choices_after_the_query(tmp_path):
    file = write(tmp_path / "a.jsonl", CHOICES, BLANK)
    (bees, blank) = items(TaskConfig((file,)))
    assert bees.name == "q1" and blank.name == "a:2"
    assert bees.contexts == [CHOICES["query"]] * 2 and bees.targets == [" wax", " honey"] and bees.gold == 1
    assert blank.contexts == BLANK["contexts"] and blank.targets == [" left."] * 2 and blank.gold == 0


def test_letters_form_lists_the_choices_before_the_answer(tmp_path):
    bare = CHOICES | {"query": "What do bees make?"}
    file = write(tmp_path / "a.jsonl", CHOICES, bare)
    one, other = items(TaskConfig((file,), format="letters", template="{query}"))
    assert one.contexts == ["Question: What do bees make?\n A. wax\n B. honey\nAnswer:"] * 2
    assert one.targets == [" A", " B"] and one.gold == 1
    (_, other) = items(TaskConfig((file,), format="letters", template="Question: {query}"))
    assert other == one._replace(name="q1")


def test_continuations_and_written_answers(tmp_path):
    told = write(tmp_path / "a.jsonl", {"context": "The cat sat on the", "continuation": "mat "})
    (item,) = items(TaskConfig((told,), format="continuation"))
    assert (item.contexts, item.targets, item.answer) == (["The cat sat on the"], [" mat"], None)
    sums = {"question": "1 + 1?", "answer": "2"}
    file = write(tmp_path / "b.jsonl", sums | {"solution": "One and one are two."}, sums)
    config = TaskConfig((file,), format="generation", template="Question: {query}\nAnswer:", shots=1)
    (item,) = items(config)
    shot = "Question: 1 + 1?\nAnswer: One and one are two. So the answer is 2.\n\n"
    assert item.contexts == [shot + "Question: 1 + 1?\nAnswer:"] and item.answer == "2" and item.targets == [" 2"]
    assert config.stops == ("\n\n", "Question:")


def test_shots_are_the_first_of_their_file_or_group(tmp_path):
    file = write(tmp_path / "a.jsonl", *questions(5))
    first, *_ = found = items(TaskConfig((file,), shots=2))
    assert [item.name for item in found] == ["q2", "q3", "q4"]
    assert first.contexts[0] == "Question: 0?\nAnswer: wax\n\nQuestion: 1?\nAnswer: honey\n\nQuestion: 2?\nAnswer:"
    subjects = ["a", "b", "a", "b", "a"]
    pool = write(tmp_path / "pool.jsonl", *questions(5, subject=subjects))
    asked = write(tmp_path / "asked.jsonl", *questions(2, subject=["b", "a"]))
    b, a = items(TaskConfig((asked,), shots=1, shot_files=(pool,), shots_by="subject"))
    assert b.contexts[0].startswith("Question: 1?\nAnswer: honey\n\nQuestion: 0?")
    assert a.contexts[0].startswith("Question: 0?\nAnswer: wax\n\nQuestion: 1?")


def test_at_most_so_many_items_the_same_in_every_run(tmp_path):
    file = write(tmp_path / "a.jsonl", *questions(50))
    some = items(TaskConfig((file,), items=7))
    assert len({item.name for item in some}) == 7 and some == items(TaskConfig((file,), items=7))
    assert len(items(TaskConfig((file,), items=70))) == 50


def test_all_problems_of_all_files_are_told_at_once(tmp_path):
    good = write(tmp_path / "good.jsonl", CHOICES)
    bad = write(
        tmp_path / "bad.jsonl", CHOICES | {"gold": 2}, CHOICES, {"query": "a"}, CHOICES | {"choices": ["", "b"]}
    )
    (tmp_path / "torn.jsonl").write_text(json.dumps(CHOICES) + '\n{"query": ')
    configs = {
        "fine": TaskConfig((good,)),
        "bad": TaskConfig((bad,)),
        "torn": TaskConfig((str(tmp_path / "torn.jsonl"),)),
        "gone": TaskConfig((str(tmp_path / "gone.jsonl"),)),
        "domain": TaskConfig((good,)),
        "few": TaskConfig((good,), shots=1),
    }
    tasks, problems = open_tasks(configs, ["domain"])
    assert [task.name for task in tasks] == ["fine"]
    told = dict(zip(["bad", "torn", "gone", "domain", "few"], problems, strict=True))
    assert "bad.jsonl, line 1: 'gold' = 2" in told["bad"] and "line 3: 'choices'" in told["bad"]
    assert "line 4: an answer is empty" in told["bad"]
    assert "torn.jsonl, line 2: not JSON" in told["torn"] and "no file matches" in told["gone"]
    assert "eval/domain is the name of other numbers" in told["domain"] and "too few items" in told["few"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), "evaluation.tasks.t.files: name the files"),
        (dict(files=("a",), template="{question}"), "must hold {query}"),
        (dict(files=("a",), template="{query"), "must hold {query}"),
        (dict(files=("a",), shots=-1), "shots = -1: must be at least 0"),
        (dict(files=("a",), items=0), "items = 0: must be at least 1"),
        (dict(files=("a",), shot_files=("b",)), "shots = 0: shot_files and shots_by are of no use"),
        (dict(files=("a",), shots=1, shots_by="subject"), "shots_by: needs shot_files"),
        (dict(files=("a",), format="generation", new_tokens=80), "must be less than model.context_length = 80"),
    ],
)
def test_settings_that_cannot_be(settings, expected):
    assert expected in "\n".join(task_problems({"t": TaskConfig(**settings)}, 80))
    assert "a name has letters" in task_problems({"a/b": TaskConfig(("a",))}, 80)[0]


def test_a_generation_error_names_the_file(tmp_path):
    file = write(tmp_path / "a.jsonl", {"question": "1?"})
    _, (problem,) = open_tasks({"t": TaskConfig((file,), format="generation")}, [])
    assert "no text at 'answer'" in problem
