"""Metadata conditioning and cooldown as two stages of one run: continuity, disjoint documents, branches, evaluation."""

import json
import shutil

import numpy as np
import pytest

from mixlab import config as configs
from mixlab import errors, evaluate, train
from mixlab.data import open_data
from mixlab.errors import UserError
from mixlab.evals.benchmarks import open_benchmarks
from mixlab.plan import as_text, make_plan
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.schedules import ScheduleConfig, learning_rate
from tests.stores import some_texts, write_store
from tests.test_mistakes import told
from tools import generate

STEPS, TRUNK = 20, 18
CONFIG = """
from mixlab.model.presets import llama

def get_config(arg="0.1"):
    share = 0.0 if arg == "plain" else float(arg)
    rows = dict(sequence_length=64, tokens_per_step=128)
    plain = dict(kind="complete", bos=True)
    stages = [
        dict(name="conditioned", fraction=round(1 - share, 2), format=dict(metadata=dict(columns=["url"]), **plain), **rows),
        dict(name="cooldown", fraction=share, format=plain, **rows),
    ]
    if arg == "plain":
        stages = [dict(name="conditioned", fraction=1.0, format=plain, **rows)]
    return dict(
        name="meco",
        total_tokens=20 * 128,
        sources={{"text": {{"store": {store!r}}}}},
        model=llama(layers=1, d_model=32, heads=2, vocab_size=259, context_length=64),
        stages=[stage for stage in stages if stage["fraction"]],
        schedule=dict(kind="cosine", peak=3e-3, warmup_steps=2),
        checkpoint=dict(every_steps=1, keep_last=100),
        evaluation=dict(
            every_steps=0, tokens_per_domain=300, rows=4, sample_tokens=2, sample_metadata="a.org",
            metadata=dict(variants=["none", "true", "wrong"]),
        ),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meco")
    texts = [text.replace("\0", "")[: 20 + 7 * (i % 5)] for i, text in enumerate(some_texts(500))]
    urls = [f"https://{'abc'[i % 3]}.org/{i}" for i in range(500)]
    store = write_store(folder / "store", texts, urls=urls)
    (folder / "config.py").write_text(CONFIG.format(store=str(store)))
    patch = pytest.MonkeyPatch()
    patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def run(place, name, arg, *flags):
    assert errors.run(train.main, [f"--config={place / 'config.py'}:{arg}", f"--workdir={place / name}", *flags]) == 0
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def weights(place, name, step=STEPS):
    with Checkpoints(place / name / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(step)["arrays"]


@pytest.fixture(scope="module")
def meco(place):
    return run(place, "meco", "0.1")


@pytest.fixture(scope="module")
def throughout(place):
    return run(place, "throughout", "0")


def test_the_cooldown_goes_on_with_the_schedule_on_documents_never_read(place, meco):
    cosine = [learning_rate(ScheduleConfig(peak=3e-3, warmup_steps=2), step, STEPS) for step in range(STEPS)]
    assert [line["train/learning_rate"] for line in meco] == pytest.approx(cosine, rel=1e-5)
    plan = json.loads((place / "meco" / "plan.json").read_text())
    (pair,) = plan["conditioned_and_plain"]
    assert pair["stages"] == ["conditioned", "cooldown"] and pair["in_both"] == 0 and min(pair["documents"]) > 3
    assert [stage["first_step"] for stage in plan["stages"]] == [0, TRUNK]
    assert plan["stages"][1]["sources"]["text"]["first_document"] >= pair["documents"][0]


@pytest.mark.parametrize("step", [TRUNK, TRUNK + 1])
def test_resumed_around_the_cooldown_it_is_the_same_run(place, meco, step):
    name = f"from-{step}"
    shutil.copytree(place / "meco", place / name)
    for path in (place / name / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    assert run(place, name, "0.1") == meco and weights(place, name) == weights(place, "meco")


def test_a_cooldown_branched_off_a_run_with_metadata_throughout_is_the_run_with_cooldown(place, meco, throughout):
    branch = [f"--config.start.branch_from={place / 'throughout'}", f"--config.start.step={TRUNK}"]
    assert run(place, "branch", "0.1", *branch) == meco[TRUNK:]
    assert weights(place, "branch") == weights(place, "meco")
    assert json.loads((place / "branch" / "run.json").read_text())["origin"]["data_differ_from_step"] is None


def test_longer_cooldowns_branch_off_the_same_trunk(place, throughout):
    share, step = "0.3", 14
    branch = [f"--config.start.branch_from={place / 'throughout'}", f"--config.start.step={step}"]
    lines = run(place, f"cooldown-{share}", share, *branch)
    assert [line["step"] for line in lines] == list(range(step + 1, STEPS + 1))
    record = json.loads((place / f"cooldown-{share}" / "run.json").read_text())["origin"]
    assert record["step"] == step and record["data_differ_from_step"] is None
    plan = json.loads((place / f"cooldown-{share}" / "plan.json").read_text())
    assert plan["conditioned_and_plain"][0]["in_both"] == 0


def test_a_plain_run_branched_with_its_own_stages_goes_on_as_it_was(place):
    template = "--config.evaluation.metadata.template={'columns':['url']}"
    whole = run(place, "plain", "plain", template)
    branch = [f"--config.start.branch_from={place / 'plain'}", f"--config.start.step={TRUNK}"]
    assert run(place, "plain-branch", "plain", template, *branch) == whole[TRUNK:]


def test_the_final_scores_tell_what_metadata_do(place, meco, capsys):
    last = meco[-1]
    for variant in ("none", "true", "wrong"):
        assert last[f"eval_metadata/{variant}/micro/loss"] > 0
    difference = last["eval_metadata/true/micro/loss"] - last["eval_metadata/none/micro/loss"]
    assert last["eval_metadata/true_minus_none/micro/loss"] == pytest.approx(difference, abs=1e-5)
    assert "eval/macro/loss" in last and not any(key.startswith("eval/true") for key in last)
    samples = json.loads((place / "meco" / "samples.json").read_text())["samples"]
    assert samples and all(sample["prompt"].startswith("<|bos|>URL: a.org\n\n") for sample in samples)
    text = "--config.evaluation.metadata.text=x.org"
    variants = "--config.evaluation.metadata.variants=('text','none')"
    assert errors.run(evaluate.main, [f"--workdir={place / 'meco'}", text, variants]) == 0
    shown = capsys.readouterr().out
    assert "loss with metadata" in shown and shown.index("text") < shown.index("none")


def test_prompts_are_continued_after_metadata(place, meco, capsys):
    def continued(prompt, *flags):
        capsys.readouterr()
        assert errors.run(generate.main, [f"--workdir={place / 'meco'}", prompt, "--tokens=4", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["text"]

    assert continued("ab", "--metadata=b.org") == continued("URL: b.org\n\nab")


def configured(place, arg, *flags):
    config = configs.load(f"{place / 'config.py'}:{arg}", list(flags))
    return config, open_data(config)


def test_benchmarks_are_asked_after_metadata(place, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"query": "Is it?", "choices": ["yes", "no"], "gold": 0}) + "\n")
    task = {"files": [str(tmp_path / "a.jsonl")], "metadata": "b.org", "normalisation": "unconditional"}
    tasks = f"--config.evaluation.tasks={dict(t=task)}"
    config, data = configured(place, "0.1", tasks)
    asked = open_benchmarks(config, data).tasks["t"]
    texts = [[data.tokenizer.decode(tokens) for tokens in column] for column in (asked.contexts, asked.bare)]
    before = "<|bos|>URL: b.org\n\n"
    assert texts == [[before + "Is it?"] * 2, [before + "Answer:"] * 2]
    with pytest.raises(UserError, match=r"evaluation.tasks.t.metadata: no stage has metadata to go by"):
        none = ("--config.evaluation.metadata.variants=()", "--config.evaluation.sample_metadata=None")
        configured(place, "plain", tasks, *none)


def test_a_run_that_is_all_cooldown_is_the_plain_run(place):
    template = "--config.evaluation.metadata.template={'columns':['url']}"
    (_, cooldown), (_, plain) = configured(place, "1.0", template), configured(place, "plain", template)
    for step in range(STEPS):
        one, other = cooldown.stream[step], plain.stream[step]
        assert all(np.array_equal(array, getattr(other, name)) for name, array in one.arrays().items())


@pytest.mark.parametrize("kind", ["best_fit", "decompose"])
def test_rows_cut_once_have_parts_of_the_store_of_their_own(place, kind):
    store = place / "store"
    parts = {"trunk": (0.0, 0.8), "rest": (0.8, 1.0)}
    flags = [f"--config.sources={ {n: {'store': str(store), 'part': p} for n, p in parts.items()} }"]
    for number, name in enumerate(parts):
        flags += [f"--config.stages.{number}.mixture={ {name: 1.0} }"]
        flags += [
            f"--config.stages.{number}.format.{key}" for key in (f"kind={kind}", "min_length=16", "variant=exact")
        ]
        flags += [f"--config.stages.{number}.tokens_per_step=64"]
    config, data = configured(place, "0.3", *flags, "--config.total_tokens=6400")
    plan = make_plan(config, data)
    (pair,) = plan["conditioned_and_plain"]
    assert pair["in_both"] == 0 and min(pair["documents"]) > 20
    assert "in both: 0 (no document is read with and without metadata)" in as_text(plan, 200)
    assert plan["stages"][0]["sources"]["trunk"]["metadata"]["values"] == 3
    assert list(data.held_out) == ["a", "b"]  # both parts hold out the same documents


def test_what_cannot_be_done_is_told_before_training(place, capsys, tmp_path):
    config = f"--config={place / 'config.py'}"
    column = "--config.stages.0.format.metadata.columns=('ulr',)"
    assert "no metadata column 'ulr'; did you mean url" in told(capsys, config, column)
    without = write_store(tmp_path / "without", some_texts(60))
    more = f"--config.sources={{'text':{{'store':'{place / 'store'}'}},'other':{{'store':'{without}'}}}}"
    both = "--config.stages.0.mixture={'text':1,'other':1}"
    message = told(capsys, config, more, both)
    assert "sources.other with stages.0.format.metadata.columns" in message and "sources.text" not in message
    long = "--config.stages.0.format.metadata.prefix='" + 70 * "x" + "'"
    message = told(
        capsys, config, long
    )  # no value is long, so neither reduce='domain' (it is) nor min_documents=1 would do
    assert "no room for text behind them; set hashed=True, or min_documents=" in message and "reduce=" not in message
    assert "min_documents=2 " not in message and "else shorten prefix and suffix, or lengthen the rows" in message
    whole = "--config.stages.0.format.metadata.reduce='url'"
    assert "no room for text behind them; set reduce='domain', or hashed=True, or min_d" in told(
        capsys, config, long, whole
    )
    share = "--config.stages.0.format.metadata.share=1.5"
    assert "metadata.share = 1.5: must be above 0 and at most 1" in told(capsys, config, share)
    template = told(capsys, f"{config}:plain")
    assert "evaluation.metadata.variants: no stage has metadata to go by" in template
    part = "--config.sources.text.part=(0.9,0.1)"
    assert "sources.text.part = (0.9, 0.1): give two numbers from 0 to 1" in told(capsys, config, part)
    nobody = "--config.sources.text.part=(0.5,0.5000001)"
    assert "no training documents in part (0.5, 0.5000001)" in told(capsys, config, nobody)
    assert not np.any([path.name == "runs" for path in tmp_path.iterdir()])
