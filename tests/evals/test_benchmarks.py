"""Scores of benchmarks, against the model's definition and on a run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import errors, evaluate, soup, train
from mixlab.config import Config, EvaluationConfig
from mixlab.corpus import tokenizer
from mixlab.evals.benchmarks import Asked, Benchmarks, is_right
from mixlab.evals.items import read_items
from mixlab.evals.probing import Probing
from mixlab.evals.tasks import Task, TaskConfig, open_tasks
from mixlab.model.presets import llama
from mixlab.parallel.mesh import MeshConfig, make_mesh
from mixlab.report.page import write_report
from mixlab.report.runs import read_run
from mixlab.report.summary import summary
from mixlab.training.optimizer import make_optimizer
from mixlab.training.state import create_state, plan_state

BYTES = tokenizer.load("bytes")
CONTEXT = 48
WORDS = ["see", "the", "café", "a", "dog", "sits"]


@pytest.fixture(scope="module")
def model():
    """A small model far from uniform predictions, as probes see it, and its log-probabilities of whole texts."""
    config = Config(
        model=llama(layers=1, d_model=16, heads=2, vocab_size=BYTES.vocab_size, context_length=CONTEXT),
        evaluation=EvaluationConfig(rows=3),
    )
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, make_mesh(MeshConfig()))
    params = create_state(config.model, optimizer, layout, 0)["params"]
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)

    @jax.jit
    def logits(row):
        model = layout.model(params)
        return jax.nn.log_softmax(model.logits(model(row[None], None, jnp.arange(CONTEXT)[None]))[0])

    def answer(tokens):  # float64 [n - 1, V]; what follows a row's end does not count
        return np.asarray(logits(np.pad(tokens[:-1], (0, CONTEXT - len(tokens) + 1)).astype(np.int32)), np.float64)

    return Probing(config, layout, None).at(params, 0), answer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Questions with two to four choices, and texts with their last words; some too long for the context."""
    place, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)

    def words(count):
        return " ".join(rng.choice(WORDS, count))

    with (place / "choices.jsonl").open("w") as file:
        for i in range(11):
            choices = [words(rng.integers(1, 4)) for _ in range(2 + i % 3)]
            query = words(20 if i == 5 else 3) + "\n" * (i == 7)
            file.write(json.dumps({"query": query, "choices": choices, "gold": int(rng.integers(len(choices)))}) + "\n")
    with (place / "last.jsonl").open("w") as file:
        for _ in range(7):
            file.write(json.dumps({"context": words(4), "continuation": words(1)}) + "\n")
        file.write(json.dumps({"context": "see", "continuation": words(30)}) + "\n")
    return place


def scored(model, config, prefix=(), longest=CONTEXT):
    ((task,), problems) = open_tasks({"t": config}, [])
    assert not problems
    asked = Asked.of(task, BYTES, np.array(prefix, np.int32), longest)
    return task, asked, Benchmarks({"t": asked}, BYTES).scores(model, ["t"])


def log_probability(answer, context, target, prefix):
    """(sum over the target's tokens, whether each is the likeliest), by the model's definition."""
    bare = context.rstrip()  # white space at its end is scored with the target
    before, after = BYTES.encode(bare), BYTES.encode(context[len(bare) :] + target)
    tokens = np.concatenate([np.array(prefix, np.int32), before, after])[-CONTEXT - 1 :]
    table = answer(tokens)[len(tokens) - 1 - len(after) : len(tokens) - 1]
    return table[np.arange(len(after)), after].sum(), bool((table.argmax(-1) == after).all())


@pytest.mark.parametrize("prefix", [(), (BYTES.bos_id,)], ids=["", "BOS"])
def test_choices_are_scored_as_defined(model, files, prefix):
    asks, answer = model
    config = TaskConfig((str(files / "choices.jsonl"),), normalisation="unconditional", shots=1)
    task, _, (metrics, items) = scored(asks, config, prefix)
    right = {name: [] for name in ("acc", "acc_per_char", "acc_per_byte", "acc_uncond")}
    bits = []
    for item in task.items:
        pairs = [(c, t) for c, t in zip(item.contexts, item.targets, strict=True)]
        sums = np.array([log_probability(answer, c, t, prefix)[0] for c, t in pairs])
        alone = np.array([log_probability(answer, "Answer:", t, prefix)[0] for _, t in pairs])
        texts = [t[1:] for _, t in pairs]
        by = {
            "acc": sums,
            "acc_per_char": sums / [len(t) for t in texts],
            "acc_per_byte": sums / [len(t.encode()) for t in texts],
            "acc_uncond": sums - alone,
        }
        for name, values in by.items():
            right[name].append(float(values.argmax() == item.gold))
        bits.append(-sums[item.gold] / math.log(2) / len(texts[item.gold].encode()))
    assert len(bits) == 10 == metrics["eval/t/items"]
    for name, values in right.items():
        np.testing.assert_array_equal(items[f"t/{name}"], values)
        assert metrics[f"eval/t/{name}"] == pytest.approx(np.mean(values))
        assert metrics[f"eval/t/{name}_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(10))
    np.testing.assert_allclose(items["t/bits_per_byte"], bits, rtol=1e-4)
    assert metrics["eval/t/bits_per_byte"] == pytest.approx(np.mean(bits), rel=1e-4)
    assert metrics["eval/t/score"] == metrics["eval/t/acc_uncond"]
    assert items["t/id"].tolist() == [item.name for item in task.items]


def test_last_words_are_right_where_greedy_decoding_gives_them(model, files):
    asks, answer = model
    task, asked, (_, items) = scored(asks, TaskConfig((str(files / "last.jsonl"),), format="continuation"))
    assert len(task.items) == 8 and len(asked.items) == 7  # the long answer does not fit into the context
    found = [log_probability(answer, item.contexts[0], item.targets[0], ()) for item in asked.items]
    np.testing.assert_array_equal(items["t/acc"], [likeliest for _, likeliest in found])
    sizes = [len(item.targets[0][1:].encode()) for item in asked.items]
    expected = [-s / math.log(2) / n for (s, _), n in zip(found, sizes, strict=True)]
    np.testing.assert_allclose(items["t/bits_per_byte"], expected, rtol=1e-4)
    likeliest = asks.greedy([BYTES.encode(item.contexts[0]) for item in asked.items], 5)
    sure = [item._replace(targets=[BYTES.decode(new)]) for item, new in zip(asked.items, likeliest, strict=True)]
    kept = [item for item in sure if BYTES.encode(item.targets[0]).tolist() == likeliest[sure.index(item)].tolist()]
    assert kept
    right = Asked.of(Task("t", asked.config, kept), BYTES, np.zeros(0, np.int32), CONTEXT)
    assert Benchmarks({"t": right}, BYTES).scores(asks, ["t"]).metrics["eval/t/acc"] == 1


def test_written_answers(model, files, tmp_path):
    asks, _ = model
    (written,) = asks.greedy([BYTES.encode("see")], 4)
    text = BYTES.decode(written).partition("\n\n")[0].strip()
    lines = [{"question": "see", "answer": text or "?"}, {"question": "see", "answer": "something else"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TaskConfig((str(tmp_path / "a.jsonl"),), format="generation", new_tokens=4)
    _, _, (metrics, items) = scored(asks, config)
    assert items["t/exact_match"].tolist() == [bool(text), 0] and metrics["eval/t/score"] == bool(text) / 2


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" 3 + 4 = 7. So the answer is 7.", "7", True),
        (" It costs $1,234.50", "1234.5", True),
        (" 7\n\nQuestion: what is 8?", "7", True),
        (" 7 Question: 8", "7", True),
        (" 17", "7", False),
        (" seven", "7", False),
        (" -7", "7", False),
        (" Paris\n\nmore", "paris", True),
        (" in Paris", "paris", False),
    ],
)
def test_what_a_right_answer_is(text, answer, expected):
    assert is_right(text, answer, ("\n\n", "Question:")) == expected


@pytest.fixture(scope="module")
def run(trunk, files, tmp_path_factory):
    """A run like the trunk that is asked benchmarks as well."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    quiz = {"files": [str(files / "choices.jsonl")], "items": 5}
    asked = {"quiz": quiz, "often": quiz | {"every_steps": 8, "shots": 1}, "last": quiz | {"every_steps": 0}}
    command = [f"--config={trunk.parent / 'config.py'}", "--config.evaluation.at_steps=(3,)", f"--workdir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
        assert errors.run(train.main, [*command, f"--config.evaluation.tasks={asked}"]) == 0
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_scores_them_when_they_are_due_and_trains_as_without(trunk, run):
    ours, theirs = (lines_of(folder / "metrics.jsonl") for folder in (run, trunk))
    for key in ("train/loss", "train/grad_norm"):
        assert [line.get(key) for line in ours] == [line.get(key) for line in theirs]
    assert ours[-1]["eval/micro/loss"] == theirs[-1]["eval/micro/loss"]

    def steps(key):
        return [line["step"] for line in ours if key in line]

    assert steps("eval/quiz/acc") == steps("eval/micro/loss") == [0, 3, 10, 20]
    assert steps("eval/often/acc") == [0, 3, 8, 16, 20] and steps("eval/last/acc") == [3, 20]
    assert steps("eval/tasks/score") == [3, 20]
    items = read_items(run, 20)
    assert items["quiz/acc"].mean() == ours[-1]["eval/quiz/acc"] and len(items["often/id"]) == 5
    ratio = items["a/nats"].sum() / items["a/tokens"].sum()
    assert ratio == pytest.approx(ours[-1]["eval/a/loss"]) and len(set(items["a/id"])) == len(items["a/id"])
    told = [line.split() for line in summary(run, "").splitlines()]
    assert ["quiz", *(f"{ours[-1][f'eval/quiz/{key}']:.3f}" for key in ("score", "score_se", "bits_per_byte"))] in told
    assert "quiz/acc" not in read_items(run, 8) and read_items(run, 7) == {}


def test_checkpoints_and_soups_are_scored_afterwards_as_in_training(trunk, run, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    before = (run / "metrics.jsonl").read_bytes()
    assert errors.run(evaluate.main, [f"--workdir={run}", "--steps=all"]) == 0
    shown = capsys.readouterr().out
    assert "step 14" in shown and "step 20" in shown and "benchmark" in shown and "quiz" in shown
    middle, last = lines_of(run / "evaluations.jsonl")
    assert (middle["step"], last["step"]) == (14, 20) and last["tokens"] == 20 * 128
    trained = lines_of(run / "metrics.jsonl")[-1]
    for key in (key for key in trained if key.startswith("eval/")):
        assert last[key] == pytest.approx(trained[key], rel=1e-6), key
    assert (run / "metrics.jsonl").read_bytes() == before
    seen = read_run(run)
    assert seen.series("eval/quiz/acc").steps.tolist() == [0, 3, 10, 14, 20]
    assert seen.tasks() == ["quiz", "often", "last"] and seen.evaluation_sets() == ["a", "b"]
    assert len(read_items(run, 14)["last/acc"]) == 5

    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"words": {"files": [str(files / "last.jsonl")], "format": "continuation"}}))
    made = tmp_path / "soup"
    assert errors.run(soup.main, [f"{run}:14", f"{run}:20", f"--output={made}"]) == 0
    capsys.readouterr()
    command = [f"--workdir={made}", f"--tasks={tasks}", "--json"]
    assert errors.run(evaluate.main, [*command, "--no-record"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert not (made / "evaluations.jsonl").exists() and not (made / "items").exists()
    assert errors.run(evaluate.main, command) == 0
    (line,) = lines_of(made / "evaluations.jsonl")
    assert {key: line[key] for key in printed} == printed and read_run(made).tasks() == ["words"]
    assert write_report([run, made], tmp_path / "report").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tasks=gone.json"], "--tasks=gone.json: cannot be read as JSON"),
        (["--tasks=list.json"], "--tasks=list.json: must be an object such as"),
        (["--tasks=typo.json"], "unknown key 'evaluation.tasks.t.file'; did you mean 'evaluation.tasks.t.files'?"),
        (["--steps=3"], "has no checkpoint of step 3"),
        (["--steps=last"], "--steps=last: write all, or numbers"),
    ],
)
def test_mistakes(trunk, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "typo.json").write_text('{"t": {"file": "a.jsonl"}}')
    assert errors.run(evaluate.main, [f"--workdir={trunk}", *arguments]) == errors.EXIT_USER_ERROR
    assert expected in capsys.readouterr().err


def test_files_that_cannot_be_used_are_told_before_anything_is_written(trunk, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "continuation": "b" * 99}) + "\n")
    tasks = {
        "gone": {"files": ["gone.jsonl"]},
        "a": {"files": ["gone.jsonl"]},
        "long": {"files": [str(tmp_path / "long.jsonl")], "format": "continuation"},
    }
    command = [f"--config={trunk.parent / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    assert errors.run(train.main, [*command, f"--config.evaluation.tasks={tasks}"]) == errors.EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "evaluation.tasks.gone.files" in told and "evaluation.tasks.a: eval/a is the name of other" in told
    assert "evaluation.tasks.long: every item has an answer of more than 32 tokens" in told
    assert not (tmp_path / "run").exists()
