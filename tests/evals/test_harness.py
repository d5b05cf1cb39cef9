"""A run in lm-eval, against lm-eval's own backend on the exported run. Skipped without lm-eval, torch and transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mixlab import config as configs
from mixlab import errors
from mixlab.evals.benchmarks import Asked, Benchmarks
from mixlab.evals.probing import Probing
from mixlab.evals.tasks import open_tasks
from mixlab.parallel.mesh import make_mesh
from mixlab.trained import open_trained
from mixlab.training.optimizer import make_optimizer
from mixlab.training.state import plan_state
from tests.interop.folders import MODELS, make_run, write_letters
from tools import export_hf

pytest.importorskip("torch", reason="torch is not installed: lm-eval's own backend was not run")
pytest.importorskip("transformers", reason="transformers is not installed: lm-eval's own backend was not run")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: its tasks were not run")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "did", "not", "see", "what", "café", "12", "was"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, shots: {shots}}}}}
test_split: test
output_type: {kind}
"""
CHOICES = """
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""
SHOTS = (
    CHOICES
    + """
fewshot_split: shots
num_fewshot: 2
fewshot_config: {sampler: first_n}
"""
)
LAST_WORDS = """
doc_to_text: "{{query}}"
doc_to_target: "{{choices[gold]}}"
metric_list: [{metric: acc}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list: [{metric: bits_per_byte}]
"""
GENERATION = """
doc_to_text: "{{query}}"
doc_to_target: "{{query}}"
generation_kwargs: {until: [" the", "."], max_gen_toks: 7}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks: choices, also after examples, last words, rolling and generation."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as file:
        for number in range(12):
            query = " ".join(rng.choice(WORDS, 2 if number else 60)) + " " * (number % 2)  # the first does not fit
            choices = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(3)]
            file.write(json.dumps({"query": query, "choices": choices, "gold": int(rng.integers(3))}) + "\n")
    lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
    (folder / "shots.jsonl").write_text("".join(lines[4:7]))
    kinds = {"multiple_choice": CHOICES, "loglikelihood_rolling": ROLLING, "generate_until": GENERATION}
    kinds |= {"loglikelihood": LAST_WORDS}
    named = [(f"own_{kind}", kind, rest) for kind, rest in kinds.items()]
    for name, kind, rest in [*named, ("own_shots", "multiple_choice", SHOTS)]:
        data = {"data": folder / "data.jsonl", "shots": folder / "shots.jsonl"}
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, **data) + rest)
    return folder


@pytest.fixture(scope="module", params=[("llama", True), ("gpt2", False)], ids=["llama with BOS", "gpt2"])
def run(request, tmp_path_factory):
    name, bos = request.param
    place = tmp_path_factory.mktemp("run")
    run = make_run(place / "run", MODELS[name], write_letters(place / "tokenizer.json"), bos=bos)
    assert errors.run(export_hf.main, [f"--workdir={run}", f"--output={place / 'exported'}"]) == 0
    return run


def evaluate(tasks, **arguments):
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    import mixlab.evals.harness  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tasks / "cache")
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        names = sorted(path.stem for path in tasks.glob("*.yaml"))
        return lm_eval.simple_evaluate(
            tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **arguments
        )


def answers(result):
    """Task -> what the model answered to every question, in order."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in result["samples"].items()
    }


def test_answers_are_those_of_the_harness_own_backend(run, tasks):
    ours = evaluate(tasks, model="mixlab", model_args={"workdir": str(run)}, batch_size=3)
    hf = {"pretrained": str(run.parent / "exported"), "dtype": "float32"}
    theirs = evaluate(tasks, model="hf", model_args=hf, device="cpu", batch_size=1)
    one, two = answers(ours), answers(theirs)
    assert one["own_generate_until"] == two["own_generate_until"]
    assert any(text for [[text]] in one["own_generate_until"])
    flat = [[float(s) for [(s, _)] in q] for q in one["own_multiple_choice"]]
    np.testing.assert_allclose(flat, [[float(s) for [(s, _)] in q] for q in two["own_multiple_choice"]], atol=1e-3)
    likeliest = [[str(g) for [(_, g)] in q] for q in one["own_multiple_choice"]]
    assert likeliest == [[str(g) for [(_, g)] in q] for q in two["own_multiple_choice"]]
    rolling = [np.array(result["own_loglikelihood_rolling"], float).ravel() for result in (one, two)]
    np.testing.assert_allclose(*rolling, rtol=1e-5, atol=1e-3)
    for task, metrics in theirs["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, abs=1e-3), (task, metric)
    metrics = of_the_loop(run, tasks)
    pairs = {"acc": "acc", "acc_norm": "acc_per_char", "acc_bytes": "acc_per_byte"}
    for task in ("own_multiple_choice", "own_shots", "own_loglikelihood"):
        for theirs_metric, metric in pairs.items():
            for suffix, error in (("", ""), ("_stderr", "_se")):
                value = theirs["results"][task].get(f"{theirs_metric}{suffix},none")
                if isinstance(value, float):
                    assert metrics[f"eval/{task}/{metric}{error}"] == pytest.approx(value, abs=1e-3), (task, metric)
    assert {"eval/own_shots/acc_per_byte_se", "eval/own_loglikelihood/acc_se"} <= set(metrics)


def of_the_loop(run, tasks):
    """What the evaluation of a training run finds on the same items."""
    file, shots = (str(tasks / name) for name in ("data.jsonl", "shots.jsonl"))
    last = tasks / "last.jsonl"
    questions = [json.loads(line) for line in (tasks / "data.jsonl").read_text().splitlines()]
    lines = [{"context": q["query"], "continuation": q["choices"][q["gold"]]} for q in questions]
    last.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = {
        "own_multiple_choice": {"files": [file]},
        "own_shots": {"files": [file], "shots": 2, "shot_files": [shots]},
        "own_loglikelihood": {"files": [str(last)], "format": "continuation"},
    }
    config = configs.load_json(run / "config.json", [f"--config.evaluation.tasks={asked}"])
    opened, problems = open_tasks(config.evaluation.tasks, [])
    assert not problems
    layout = plan_state(config.model, make_optimizer(config.optimizer), make_mesh(config.mesh))
    with open_trained(run) as trained:
        params, _ = trained.checkpoints.restore_params(layout.abstract["params"])
        before = np.array([trained.tokenizer.bos_id] if trained.begins_with_bos else [], np.int32)
        longest = config.model.context_length
        ready = {task.name: Asked.of(task, trained.tokenizer, before, longest) for task in opened}
        model = Probing(config, layout, None).at(params, 1)
        return Benchmarks(ready, trained.tokenizer).scores(model, list(ready)).metrics


ONE_RUN = pytest.mark.parametrize("run", [("llama", True)], ids=["llama"], indirect=True)


@ONE_RUN
def test_answers_do_not_depend_on_how_questions_share_batches(run, tasks):
    one, two = (
        answers(evaluate(tasks, model="mixlab", model_args={"workdir": str(run)}, batch_size=rows))
        for rows in (1, "auto")
    )
    assert one["own_generate_until"] == two["own_generate_until"]
    numbers = [[[float(s) for [(s, _)] in q] for q in r["own_multiple_choice"]] for r in (one, two)]
    np.testing.assert_allclose(*numbers, atol=1e-4)


@ONE_RUN
def test_the_command(run, tasks):
    command = [sys.executable, "-m", "mixlab.evals.harness", "--model_args", f"workdir={run},step=1"]
    command += ["--tasks", "own_multiple_choice", "--include_path", str(tasks), "--limit=2"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tasks / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "own_multiple_choice" in done.stdout and "acc_norm" in done.stdout
    wrong = [word.replace("step=1", "step=5") for word in command]
    done = subprocess.run(wrong, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "has no checkpoint of step 5; it has [1]" in done.stderr
    assert "Traceback" not in done.stderr
