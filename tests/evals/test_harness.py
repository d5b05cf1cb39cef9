"""A run in lm-eval, against lm-eval's own backend on the exported run. Skipped without lm-eval, torch and transformers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mixlab import errors
from tests.interop.folders import MODELS, make_run, write_letters
from tools import export_hf

pytest.importorskip("torch", reason="torch is not installed: lm-eval's own backend was not run")
pytest.importorskip("transformers", reason="transformers is not installed: lm-eval's own backend was not run")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: its tasks were not run")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "did", "not", "see", "what", "café", "12", "was"]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICES = """
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
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
    """A folder of three tasks: choices, rolling and generation."""
    folder, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    with (folder / "data.jsonl").open("w") as file:
        for number in range(12):
            query = " ".join(rng.choice(WORDS, 2 if number else 60)) + " " * (number % 2)  # the first does not fit
            choices = [" ".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(3)]
            file.write(json.dumps({"query": query, "choices": choices, "gold": int(rng.integers(3))}) + "\n")
    kinds = {"multiple_choice": CHOICES, "loglikelihood_rolling": ROLLING, "generate_until": GENERATION}
    for kind, rest in kinds.items():
        text = TASK.format(name=f"own_{kind}", data=folder / "data.jsonl", kind=kind) + rest
        (folder / f"own_{kind}.yaml").write_text(text)
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
