"""experiments/dolmino: its runs differ in what they should and in nothing else, and its statistics are right."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.dolmino import analyse
from experiments.dolmino.config import ARMS, CORPORA, mixture
from experiments.intervals import difference, interval
from mixlab import config as configs
from mixlab import schema
from mixlab.errors import UserError
from mixlab.schedule.stages import place_stages
from mixlab.training.schedules import composed_rate

FILE = str(Path(__file__).parents[1] / "experiments/dolmino/config.py")
WORDS = {"text": "", "embedded": "embedded,"}


def load(corpus, arm):
    return configs.load(f"{FILE}:{WORDS[corpus]}{arm}", [])


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_arm_goes_on_from_the_trunk(corpus):
    trunk = load(corpus, "trunk")
    (stage,) = trunk.stages
    for arm in ARMS:
        run = load(corpus, f"{arm},2")
        assert run.stages[0] == stage and run.sources == trunk.sources and run.start.branch_from.endswith("trunk")
        anneal = run.stages[1]
        assert anneal.seed == 2 and sum(anneal.mixture.values()) == pytest.approx(1)
        for step in (0, 30, stage.steps - 1):
            assert composed_rate(run.learning_rates, step) == composed_rate(trunk.learning_rates, step)
        rates = [composed_rate(run.learning_rates, stage.steps + step) for step in (0, anneal.steps // 2, anneal.steps)]
        reached = composed_rate(trunk.learning_rates, stage.steps)
        assert rates == pytest.approx([reached, reached / 2, 0.0])


@pytest.mark.parametrize("corpus", CORPORA)
def test_seeds_change_the_order_alone(corpus):
    a, b = (schema.plain(load(corpus, f"mix,{seed}")) for seed in (1, 3))
    assert set(schema.differences(a, b)) == {"name", "stages.1.seed"}


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("arm", ARMS)
def test_the_plan_delivers_the_added_share(corpus, arm):
    run = load(corpus, arm)
    stages = place_stages(run.stages, lambda name, format: 10_000_000, run.seed, run.total_tokens)
    added = {name: rows for name, rows in stages[1].rows_of().items() if name in CORPORA[corpus]["added"]}
    rows = stages[1].steps * stages[1].rows_per_step
    assert abs(sum(added.values()) - ARMS[arm] * rows) <= len(added)
    assert set(stages[0].rows_of()) == set(CORPORA[corpus]["web"])
    assert arm != "math10" or all("math" in name for name in added)


def test_mixtures_keep_the_proportions_of_the_trunk():
    web, mixed = mixture("text", "web"), mixture("text", "mix")
    assert web == mixture("text", "trunk") and {n: mixed[n] for n in web} == {n: w / 2 for n, w in web.items()}


@pytest.mark.parametrize("arg", ["web,mix", "mix,1,2", "mixx", "embedded", ""])
def test_a_wrong_argument_is_told(arg):
    from experiments.dolmino.config import get_config

    with pytest.raises(UserError, match="give one of trunk, web, mix, math10"):
        get_config(arg)


def test_intervals_and_differences_are_students_and_welchs():
    a, b = [1.0, 1.5, 1.1], [0.8, 0.82, 0.81]
    one = stats.ttest_1samp(a, 0).confidence_interval()
    found = interval(a)
    assert found["mean"] - found["half"] == pytest.approx(one.low) and found["sd"] == pytest.approx(np.std(a, ddof=1))
    two = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    found = difference(a, b)
    assert (found["mean"] - found["half"], found["mean"] + found["half"]) == pytest.approx((two.low, two.high))
    assert difference([1.0, 1.0], [2.0, 2.0]) == {"mean": -1.0, "half": 0.0}


def scores(**bits):
    found = {"eval/macro/bits_per_byte": 9.0}
    for name, value in bits.items():
        found |= {f"eval/{name}/bits_per_byte": value, f"eval/{name}/bits_per_byte_se": 0.01, f"eval/{name}/tokens": 9}
    return found


def test_summary_of_known_numbers():
    members = {
        "web": [scores(web=2.0 + d, math=3.0) for d in (-0.1, 0.0, 0.1)],
        "mix": [scores(web=2.1, math=1.0 + d) for d in (-0.2, 0.0, 0.2)],
    }
    soups = {"web": scores(web=1.8, math=3.0), "mix": scores(web=2.05, math=0.9)}
    long = {"mix": scores(web=2.0, math=0.7)}
    summary = analyse.summarise(scores(web=2.5, math=3.5), members, soups, long, {"both": ["web", "math"]})
    rows = summary["rows"]
    assert list(rows) == ["math", "web", "both"]
    assert rows["math"]["mix - web"]["mean"] == pytest.approx(-2.0)
    assert rows["web"]["web"]["change"] == pytest.approx(-0.5)
    assert rows["both"]["before"] == 3.0 and rows["both"]["before_se"] == pytest.approx(0.01 / 2**0.5)
    assert rows["both"]["mix"]["long"] == pytest.approx(1.35) and "long" not in rows["both"]["web"]
    assert rows["both"]["mix"]["members"] == pytest.approx([1.45, 1.55, 1.65])
    assert summary["soups"]["web"] == {"sets": 2, "below_mean_of_members": 1, "below_best_member": 1}
    assert summary["soups"]["mix"] == {"sets": 2, "below_mean_of_members": 2, "below_best_member": 1}


def test_from_a_folder_of_runs_to_results(tmp_path, capsys):
    """What run.py leaves, written by hand: the record, the table and the figure come of it."""
    corpus, rng = CORPORA["embedded"], np.random.default_rng(0)
    names = [*corpus["web"], *corpus["added"]]

    def write(folder, config):
        folder.mkdir(parents=True)
        lines = [{"step": 1, "train/loss": 2.0}, {"step": 2} | scores(**{n: float(rng.uniform(1, 3)) for n in names})]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.json").write_text(configs.to_json(config))
        fact = {
            "finished": "2026-01-02T03:04:05",
            "machine": "m",
            "devices": "d",
            "versions": {},
            "seconds": 1.0,
            "exit": "complete",
        }
        (folder / "run.json").write_text(json.dumps(fact))
        stages = [
            {"name": s.name, "tokens": 10, "steps": 1, "learning_rate_first": 1e-3, "learning_rate_after": 0.0}
            for s in config.stages
        ]
        plan = {"parameters": 5, "tokenizer": {"name": "t"}, "stages": stages}
        (folder / "plan.json").write_text(json.dumps(plan))

    write(tmp_path / "runs/trunk", load("embedded", "trunk"))
    write(tmp_path / "runs/mix-long", load("embedded", "mix,1"))
    for arm in ("web", "mix"):
        for seed in (1, 2):
            write(tmp_path / f"runs/{arm}-{seed}", load("embedded", f"{arm},{seed}"))
        soup = scores(**dict.fromkeys(names, 0.5))
        (tmp_path / f"runs/soup-{arm}.json").write_text(json.dumps({"step": 2} | soup))
    assert analyse.main([str(tmp_path / "runs"), f"--output={tmp_path / 'results'}"]) == 0
    record = json.loads((tmp_path / "results/embedded.json").read_text())
    assert record["seeds"] == [1, 2] and record["mixtures"]["mix"] == mixture("embedded", "mix")
    assert record["soups"]["mix"] == {"sets": 5, "below_mean_of_members": 5, "below_best_member": 5}
    out = capsys.readouterr().out
    assert "mix - web" in out and "long mix" in out and "long web" not in out
    assert (tmp_path / "results/embedded.png").read_bytes()[:4] == b"\x89PNG"


def test_analysing_before_running_is_told(tmp_path):
    with pytest.raises(UserError, match=r"run experiments/dolmino/run\.py first"):
        analyse.read(tmp_path)
