"""A run of two stages that differ in mixture, row length, batch size and learning rate, stopped around the boundary."""

import json
import shutil

import numpy as np
import pytest

from mixlab import errors, train
from mixlab.training.checkpoint import Checkpoints
from tests.stores import some_texts, write_store

FIRST, STEPS = 6, 10
CONFIG = """
from mixlab.model.presets import llama

def get_config(arg=""):
    return dict(
        name="staged",
        sources={{"web": {{"store": {web!r}}}, "books": {{"store": {books!r}, "where": {{"domain": "a"}}}}}},
        model=llama(layers=1, d_model=32, heads=2, vocab_size=259, context_length=64),
        stages=[
            dict(name="trunk", steps=6, sequence_length=32, tokens_per_step=128, mixture=dict(web=0.75, books=0.25)),
            dict(
                name="anneal", tokens=1024, sequence_length=64, tokens_per_step=256, mixture=dict(web=1, books=dict(weight=3.0)),
                schedule=dict(kind="linear", peak=None, final_fraction=0.0),
            ),
        ],
        schedule=dict(kind="cosine", peak=3e-3, warmup_steps=2, horizon_steps=20),
        checkpoint=dict(every_steps=1, keep_last=100),
        evaluation=dict(every_steps=0, tokens_per_domain=300, rows=4, sample_tokens=0),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    web = write_store(folder / "web", some_texts(40))
    books = write_store(folder / "books", some_texts(60)[20:])
    (folder / "config.py").write_text(CONFIG.format(web=str(web), books=str(books)))
    patch = pytest.MonkeyPatch()
    patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def run(place, name, *flags):
    assert errors.run(train.main, [f"--config={place / 'config.py'}", f"--workdir={place / name}", *flags]) == 0
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def weights(place, name):
    with Checkpoints(place / name / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(STEPS)["arrays"]


@pytest.fixture(scope="module")
def whole(place):
    return run(place, "whole")


def test_the_stages_follow_one_another(place, whole):
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in whole] == [128 * s for s in range(1, 7)] + [768 + 256 * s for s in range(1, 5)]
    rates = [line["train/learning_rate"] for line in whole]
    cosine = [3e-3 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (s - 2) / 18))) for s in range(2, 7)]
    expected = [0, 1.5e-3, *cosine[:4]] + [cosine[4] * (1 - s / 4) for s in range(4)]
    assert rates == pytest.approx(expected, rel=1e-5)
    plan = json.loads((place / "whole" / "plan.json").read_text())
    assert [stage["first_step"] for stage in plan["stages"]] == [0, FIRST]
    told = {name: source["tokens"] for name, source in plan["stages"][0]["sources"].items()}
    assert told == {"books": 192, "web": 576}


@pytest.mark.parametrize("step", [FIRST - 1, FIRST, FIRST + 1])
def test_resumed_around_the_boundary_it_is_the_same_run(place, whole, step):
    name = f"from-{step}"
    shutil.copytree(place / "whole", place / name)
    for path in (place / name / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    assert run(place, name) == whole and weights(place, name) == weights(place, "whole")


def test_a_variant_of_the_second_stage_trains_alike_through_the_first(place, whole):
    changed = run(place, "variant", "--config.stages.1.mixture.books=0.5")
    assert changed[:FIRST] == whole[:FIRST] and changed[FIRST:] != whole[FIRST:]
