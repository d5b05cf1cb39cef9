"""experiments/speed: its arms differ in what they should and in nothing else, and its arithmetic is right."""

import json
from pathlib import Path

import pytest

from experiments.speed import analyse
from experiments.speed.config import ARMS, CORPORA, PEAKS, RATES, TOKENS_PER_STEP, get_config
from mixlab import config as configs
from mixlab import schema
from mixlab.errors import UserError

FILE = str(Path(__file__).parents[1] / "experiments/speed/config.py")
WORDS = {"text": "", "embedded": "embedded,"}


def load(corpus, words):
    return configs.load(f"{FILE}:{WORDS[corpus]}{words}", [])


@pytest.mark.parametrize("corpus", CORPORA)
def test_arms_differ_in_the_optimiser_its_rate_and_the_arithmetic_alone(corpus):
    told = {arm: schema.plain(load(corpus, arm)) for arm in ARMS}
    assert set(schema.differences(told["adamw"], told["muon"])) - {"schedule.peak"} == {"name", "optimizer.name"}
    assert set(schema.differences(told["muon"], told["muon_bf16"])) == {"name", "model.compute_dtype"}
    seeds = (schema.plain(load(corpus, f"muon,{seed}")) for seed in (1, 3))
    assert set(schema.differences(*seeds)) == {"name", "seed"}
    assert all(min(RATES[name]) <= PEAKS[name] <= max(RATES[name]) for name in RATES)


def test_steps_can_be_told():
    run = load("text", "muon,2,steps=40")
    assert (run.seed, run.stages[0].steps, run.evaluation.every_steps) == (2, 40, 4)


@pytest.mark.parametrize("arg", ["sgd", "adamw,muon", "muon,1,2", "2", "muon,steps=x"])
def test_an_argument_that_names_no_arm_is_told(arg):
    with pytest.raises(UserError, match="give one of adamw, muon, muon_bf16"):
        get_config(arg)


SECONDS = {"adamw": 1.0, "muon": 1.25, "muon_bf16": 1.0}
STEPS = 100


def cost():
    """Three turns: the second was slow for all arms alike."""
    seconds = {arm: {"cpu": [s, 7 * s, s], "wall": [2 * s] * 3} for arm, s in SECONDS.items()}
    return {"tokens_per_step": TOKENS_PER_STEP, "seconds": seconds}


def records(arm, seed):
    """AdamW comes down from 4 to 2 on a straight line, Muon twice as steeply for half of the steps and then stays;
    bfloat16 is above it by a hundredth. Seeds lie apart by as much in all arms."""
    fall = {"adamw": 2.0, "muon": 4.0, "muon_bf16": 4.0}[arm]
    found = []
    for step in range(0, STEPS + 1, 10):
        bits = max(4 - fall * step / STEPS, 2.0) + 0.01 * (arm == "muon_bf16") + seed / 10
        scores = {f"eval/{name}/bits_per_byte": bits for name in ("docs", "macro")}
        found.append({"step": step, "tokens": TOKENS_PER_STEP * step} | scores)
    return found


def test_time_tokens_and_differences_of_curves_known_by_hand():
    told = analyse.summarise(cost(), {arm: {seed: records(arm, seed) for seed in (1, 2, 3)} for arm in ARMS})
    assert told["cost"]["muon"]["tokens_per_second"] == pytest.approx(TOKENS_PER_STEP / 1.25)
    assert told["cost"]["muon_bf16"]["speedup"] == {"over": "muon", "median": pytest.approx(1.25)}
    needed = told["to_adamw"]
    assert needed["adamw"]["tokens"]["mean"] == needed["adamw"]["seconds"]["mean"] == pytest.approx(1)
    assert needed["muon"]["tokens"]["mean"] == pytest.approx(0.5)
    assert needed["muon"]["seconds"]["mean"] == pytest.approx(0.625)
    assert needed["muon_bf16"] is None
    quarter, half, *_, whole = told["equal_time"]
    assert [quarter["seconds"], half["seconds"], whole["seconds"]] == pytest.approx([25, 50, 100])
    # After 25 seconds AdamW has made 25 steps and Muon 20; after 50, 50 and 40.
    assert quarter["muon - adamw"]["members"] == pytest.approx([3.2 - 3.5] * 3)
    assert half["muon - adamw"]["mean"] == pytest.approx(2.4 - 3.0)
    assert half["muon - adamw"]["half"] == pytest.approx(0, abs=1e-9)  # seeds cancel: it is paired
    assert half["muon"]["half"] > 0.2
    assert half["muon_bf16 - muon"]["mean"] == pytest.approx(2.01 - 2.4)  # it is quicker
    assert [point["mean"] for point in told["differences"]["muon_bf16"]] == pytest.approx([0.01] * 11)


def test_a_score_that_is_met_between_two_records():
    lines = [{"step": step, analyse.HEADLINE: bits} for step, bits in ((0, 4.0), (10, 3.0), (20, 3.5), (30, 2.5))]
    assert analyse.reached(lines, 3.25) == 7.5
    assert analyse.reached(lines, 2.75) == pytest.approx(27.5)
    assert analyse.reached(lines, 2.0) is None


def write_run(folder, words, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 7}]))
    (folder / "config.json").write_text(configs.to_json(load("embedded", words)))
    fact = {"finished": "2026-01-02T03:04:05", "machine": "m", "devices": "1 x cpu", "versions": {}, "seconds": 1.0}
    (folder / "run.json").write_text(json.dumps(fact | {"exit": "complete"}))
    (folder / "plan.json").write_text(json.dumps({"parameters": 5, "tokenizer": {"name": "t"}}))


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_from_a_folder_of_runs_to_results(tmp_path, capsys, seeds):
    """What run.py leaves, written by hand: the record, the tables and the figure come of it."""
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match=r"rates/adamw-0\.001: has not come to its end"):
        analyse.read(runs)
    for optimizer, peaks in RATES.items():
        for seed, peak in enumerate(peaks):
            write_run(runs / f"rates/{optimizer}-{peak:g}", optimizer, records(optimizer, seed))
    with pytest.raises(UserError, match="no run of adamw has come to its end"):
        analyse.read(runs)
    for arm in ARMS:
        for seed in (*seeds, *[9] * (arm == "muon")):  # a seed that the others lack
            write_run(runs / f"{arm}-{seed}", f"{arm},{seed}", records(arm, seed))
    (runs / "cost.json").write_text(json.dumps(cost()))
    assert analyse.main([str(runs), f"--output={tmp_path / 'results'}"]) == 0
    record = json.loads((tmp_path / "results/embedded.json").read_text())
    assert record["seeds"] == list(seeds) and record["clock"] == "cpu" and record["peaks"]["muon"] == PEAKS["muon"]
    assert record["rates"]["muon"] == {"0.004": 2.0, "0.008": 2.1, "0.016": 2.2}
    assert record["arms"]["muon"]["final"]["docs"]["members"] == pytest.approx([2 + seed / 10 for seed in seeds])
    assert record["arms"]["muon"]["curve"][-1]["seconds"] == 125
    out = capsys.readouterr().out
    assert "| 50%, 50 s |" in out and "| not reached |" in out
    assert (tmp_path / "results/embedded.png").read_bytes()[:4] == b"\x89PNG"
