"""Every command of the README runs, in its order, as a reader would type it (only for fewer steps and less text)."""

import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHORT = "--config.stages.0.steps={steps} --config.schedule.warmup_steps=0 --config.evaluation.tokens_per_domain=1024 --config.evaluation.sample_tokens=4"

CAPITALS = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
"""


def blocks(language: str) -> list[tuple[str, str]]:
    """(the comment before it, content) of every fenced block of a language."""
    pattern = rf"(?:<!-- (\w+) -->\n)?```{language}\n(.*?)```"
    return [(mark, text) for mark, text in re.findall(pattern, README, re.S)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What a reader has: the checkout's configs and tools, the README's config, some text, a finished quickstart."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    configs = dict(blocks("python"))
    for name in ("anneal", "buckets", "meco", "treated"):
        (folder / f"{name}.py").write_text(configs[name])
    (folder / "my_run.py").write_text(configs["config"])
    (folder / "data").mkdir()
    with gzip.open(folder / "data" / "some.jsonl.gz", "wt") as file:
        for i in range(300):
            text = " ".join(f"page {i} says {j * j} and {i + j}" for j in range(i % 17 + 3))
            file.write(json.dumps({"text": text, "url": f"https://example.org/{i}", "domain": "numbers"}) + "\n")
    facts = [
        {"text": f"The lighthouse of island {i} was painted {colour}."} for i, colour in enumerate(("red", "white"))
    ]
    (folder / "data" / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    (folder / "tasks.json").write_text(dict(blocks("json"))["tasks"])
    questions = [{"query": f"Question: {i}?\nAnswer:", "choices": ["yes", "no"], "gold": i % 2} for i in range(9)]
    words = [{"context": f"{i} and", "continuation": "more"} for i in range(3)]
    sums = [{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(4)]
    for name, items in (("arc", questions), ("words", words), ("sums", sums)):
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "capitals.yaml").write_text(CAPITALS.format(data=folder / "tasks" / "capitals.jsonl"))
    question = {"question": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
    (folder / "tasks" / "capitals.jsonl").write_text(json.dumps(question) + "\n")
    run(folder, "python -m mixlab.train --config=configs/quickstart.py")
    return folder


def run(place, command):
    """One command, with its training cut short; a later value of a key wins."""
    if "mixlab.train" in command or "tools/sweep.py" in command:
        command += " " + SHORT.format(steps=6 if "--allow-change" in command else 4)  # it extends a run
    if "anneal.py" in command:
        command += " --config.stages.1.steps=2 --config.checkpoint.every_steps=4"
        command = command.replace("start.step=160", "start.step=4")
    if "mixlab.train --config=meco.py" in command:
        command += " --config.stages.1.steps=2"
    if "mixlab.dependence" in command:
        command += " --steps=2"
    command = command.replace("--seeds=0,1,2", "--seeds=0")
    arguments = shlex.split(command)
    assert arguments[0] == "python"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(place / "huggingface"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments[1:]], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_every_command_runs(place):
    marked = {"quickstart", "tests"}  # those two are run whole, as they stand, by the continuous integration
    lines = [line for mark, text in blocks("bash") if mark not in marked for line in text.strip().splitlines()]
    assert len(lines) >= 8
    if importlib.util.find_spec("lm_eval") is None:
        lines = [line for line in lines if "mixlab.evals.harness" not in line]
    for line in lines:
        run(place, line)
    for made in (
        "runs/my_run/report/index.html",
        "runs/short/config.json",
        "stores/web/store.json",
        "comparison/index.html",
        "runs/quickstart/evaluations.jsonl",
        "runs/sweep-my_run/table.txt",
        "sweep.sbatch",
        "dependence/index.html",
    ):
        assert (place / made).is_file(), made


def test_pictures_and_files_named_exist():
    names = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`((?:mixlab|tools|configs|docs)/[\w./]+)`", README)
    missing = [name for name in names if not name.startswith("http") and not (ROOT / name).exists()]
    assert not missing
