"""experiments/dataset_decomposition: its arms differ in what they should and in nothing else, and its arithmetic is right."""

import json
from collections import Counter
from pathlib import Path

import pytest

from experiments.dataset_decomposition import analyse
from experiments.dataset_decomposition.config import (
    ARMS,
    BUCKETS,
    CONTROL,
    CORPORA,
    CYCLES,
    LENGTHS,
    TOKENS_PER_STEP,
    get_config,
)
from mixlab import config as configs
from mixlab import schema
from mixlab.errors import UserError
from mixlab.schedule.stages import place_stages

FILE = str(Path(__file__).parents[1] / "experiments/dataset_decomposition/config.py")
WORDS = {"text": "", "embedded": "embedded,"}


def load(corpus, arm):
    return configs.load(f"{FILE}:{WORDS[corpus]}{arm}", [])


def placed(corpus, arm):
    run = load(corpus, arm)
    plenty = dict.fromkeys(LENGTHS, 10_000_000)
    (stage,) = place_stages(run.stages, lambda *_: 50_000_000, run.seed, run.total_tokens, lambda *_: plenty)
    return stage


@pytest.mark.parametrize("corpus", CORPORA)
def test_arms_read_as_many_tokens_a_step_and_differ_in_how_rows_are_made_alone(corpus):
    first = schema.plain(load(corpus, ARMS[0]))
    for arm in ARMS:
        stage = placed(corpus, arm)
        assert stage.tokens == placed(corpus, ARMS[0]).tokens and stage.tokens_per_step == TOKENS_PER_STEP
        told = set(schema.differences(first, schema.plain(load(corpus, arm))))
        assert all(key == "name" or key.startswith(("stages.0.format", "stages.0.curriculum")) for key in told), told
    masks = {arm: load(corpus, arm).stages[0].format.mask_documents for arm in ARMS}
    assert [arm for arm, masked in masks.items() if not masked] == ["concat"]


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("arm", ["dd_uniform", "dd_grow_p2"])
def test_decomposed_arms_read_every_length_alike_in_every_cycle(corpus, arm):
    stage = placed(corpus, arm)
    lengths = [stage.shape(step)[1] for step in range(stage.steps)]
    cycle = stage.steps // CYCLES
    cycles = [Counter(lengths[at : at + cycle]) for at in range(0, stage.steps, cycle)]
    assert len(cycles) == CYCLES and all(found == cycles[0] for found in cycles)
    assert max(cycles[0].values()) - min(cycles[0].values()) <= 1 and set(cycles[0]) == set(LENGTHS)
    assert all(rows * length == TOKENS_PER_STEP for rows, length in stage.shapes())


def test_short_rows_come_first_in_grow_p2_alone():
    def early(arm):
        """Mean length of the rows of the first half of every cycle over that of the second."""
        stage = placed("text", arm)
        half = stage.steps // CYCLES // 2
        lengths = [stage.shape(step)[1] for step in range(stage.steps)]
        starts = range(0, stage.steps, stage.steps // CYCLES)
        firsts = [n for at in starts for n in lengths[at : at + half]]
        lasts = [n for at in starts for n in lengths[at + half : at + 2 * half]]
        return sum(firsts) / sum(lasts)

    assert early("dd_grow_p2") < 0.5 < 0.7 < early("dd_uniform")


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("arm", BUCKETS)
def test_single_buckets_read_rows_of_their_length_alone(corpus, arm):
    stage = placed(corpus, arm)
    assert [length for length in stage.mixtures if stage.batches(length)] == [int(arm.removeprefix("bucket_"))]


@pytest.mark.parametrize("corpus", CORPORA)
def test_the_control_reads_concatenated_text_in_the_lengths_of_uniform(corpus):
    run, uniform = load(corpus, f"{CONTROL},2"), placed(corpus, "dd_uniform")
    lengths = [stage.sequence_length for stage in run.stages]
    cycle = len(lengths) // CYCLES
    assert len(lengths) == uniform.steps and {stage.steps for stage in run.stages} == {1}
    expected = Counter(uniform.shape(step)[1] for step in range(cycle))
    assert [Counter(lengths[at : at + cycle]) for at in range(0, len(lengths), cycle)] == [expected] * CYCLES
    assert lengths[:cycle] != lengths[cycle : 2 * cycle]
    assert {stage.format for stage in run.stages} == {load(corpus, "concat").stages[0].format}
    told = schema.differences(schema.plain(load(corpus, "concat,2")), schema.plain(run))
    assert all(key == "name" or key.startswith("stages.") for key in told), told


@pytest.mark.parametrize("corpus", CORPORA)
def test_seeds_change_the_order_and_the_first_weights_alone(corpus):
    a, b = (schema.plain(load(corpus, f"dd_uniform,{seed}")) for seed in (1, 3))
    assert set(schema.differences(a, b)) == {"name", "seed"}


@pytest.mark.parametrize("arg", ["dd_shrink", "concat,dd_uniform", "concat,1,2", "2", "bucket_64"])
def test_an_argument_that_names_no_arm_is_told(arg):
    with pytest.raises(
        UserError,
        match="give one of concat, concat_masked, best_fit, dd_uniform, dd_grow_p2, concat_lengths, bucket_128",
    ):
        get_config(arg)


FIXED, PER_TOKEN, MASK = 0.3, 1e-4, 0.01
MEAN_LENGTH = sum(LENGTHS) / len(LENGTHS)


def cost():
    plain = {str(length): [FIXED + PER_TOKEN * length] * 3 for length in LENGTHS}
    masked = {length: [times[0] + MASK] * 3 for length, times in plain.items()}
    arms = {}
    for arm in ARMS:
        lengths = [*LENGTHS, *LENGTHS] if arm.startswith("dd_") else [LENGTHS[-1]] * 3
        seconds = [FIXED + PER_TOKEN * n + MASK * (arm in ("concat_masked", "best_fit")) for n in lengths]
        arms[arm] = {"lengths": lengths, "seconds": seconds}
    return {"tokens_per_step": 4096, "rounds": 3, "seconds": {"plain": plain, "masked": masked}, "arms": arms}


def records(arm, bits, steps=20):
    """Of a run whose steps cost what `cost` says; the first one, and those before a score, far more."""
    masked, found = arm in ("concat_masked", "best_fit"), [{"step": 0, "tokens": 0} | scores(4.0)]
    for step in range(1, steps + 1):
        length = LENGTHS[step % len(LENGTHS)] if arm.startswith("dd_") else LENGTHS[-1]
        seconds = FIXED + PER_TOKEN * length + MASK * masked
        record = {"step": step, "tokens": 4096 * step, "perf/step_seconds": seconds}
        record |= {"train/sequence_length": length} if arm.startswith("dd_") else {}
        if step == 1 or step % 10 == 0:
            record["perf/step_seconds"] += 50
        found.append(record | (scores(bits + 10 / step) if step % 10 == 0 else {}))
    return found


def scores(bits):
    names = ("docs", "macro", "by_length/256", "by_length/4096", "by_position/1", "by_position/1024")
    return {f"eval/{name}/{key}": v for name in names for key, v in (("bits_per_byte", bits), ("tokens", 90))}


def test_time_as_predicted_is_time_as_measured_where_steps_cost_what_they_should():
    told = analyse.costs(cost(), {arm: [records(arm, 2.0), records(arm, 2.0)] for arm in ARMS})
    assert (told["fixed_seconds"], told["seconds_per_token_of_length"]) == pytest.approx((FIXED, PER_TOKEN))
    assert told["largest_residual"] == pytest.approx(0, abs=1e-9)
    reference = FIXED + PER_TOKEN * LENGTHS[-1]
    for arm, found in told["arms"].items():
        step = FIXED + PER_TOKEN * MEAN_LENGTH if arm.startswith("dd_") else reference + MASK * (arm != "concat")
        assert found["predicted_step_seconds"] == pytest.approx(step)
        assert found["train_seconds"] == pytest.approx([20 * step] * 2)
        assert found["typical_step_seconds"] == pytest.approx(step)
        assert (
            found["saving"]["mean"] == pytest.approx(found["predicted_saving"]) == pytest.approx(1 - step / reference)
        )


def test_from_a_folder_of_runs_to_results(tmp_path, capsys):
    """What run.py leaves, written by hand: the record, the tables and the figure come of it."""
    bits = {"concat": 2.0, "concat_masked": 1.9, "best_fit": 1.9, "dd_uniform": 1.8, CONTROL: 1.85, "dd_grow_p2": 1.7}
    runs = [(arm, seed) for arm in bits for seed in (1, 2, 3)][:-1] + [("bucket_512", 1)]  # one seed is missing
    for arm, seed in runs:
        folder = tmp_path / f"runs/{arm}-{seed}"
        folder.mkdir(parents=True)
        lines = records(arm, bits.get(arm, 2.5) + seed / 100)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.json").write_text(configs.to_json(load("embedded", f"{arm},{seed}")))
        fact = {"finished": "2026-01-02T03:04:05", "machine": "m", "devices": "d", "versions": {}, "seconds": 1.0}
        (folder / "run.json").write_text(json.dumps(fact | {"exit": "complete"}))
        (folder / "plan.json").write_text(json.dumps({"parameters": 5, "tokenizer": {"name": "t"}}))
    (tmp_path / "runs/cost.json").write_text(json.dumps(cost()))
    assert analyse.main([str(tmp_path / "runs"), f"--output={tmp_path / 'results'}"]) == 0
    record = json.loads((tmp_path / "results/embedded.json").read_text())
    assert record["seeds"] == [1, 2] and record["tokens"] == dict.fromkeys((*bits, "bucket_512"), 81920)
    grown = record["arms"]["dd_grow_p2"]
    assert grown["final"]["macro"]["members"] == pytest.approx([2.21, 2.22])
    assert grown["difference_from_concat"]["by_position/1024"]["mean"] == pytest.approx(-0.3)
    assert [point["step"] for point in grown["curve"]] == [0, 10, 20] and grown["curve"][0]["seconds"] == 0
    assert grown["curve"][2]["seconds"] == pytest.approx(20 * (FIXED + PER_TOKEN * MEAN_LENGTH), rel=1e-4)
    assert record["control"]["difference_from_concat"]["docs"]["mean"] == pytest.approx(-0.15)
    assert record["control"]["dd_uniform_difference"]["docs"]["mean"] == pytest.approx(-0.05)
    assert record["buckets"]["bucket_512"]["final"]["docs"] == {"members": [3.01], "mean": 3.01}
    out = capsys.readouterr().out
    assert "decomposed, Grow-P2" in out and "512 alone" in out and "−" not in out
    assert (tmp_path / "results/embedded.png").read_bytes()[:4] == b"\x89PNG"


def test_analysing_too_early_is_told(tmp_path):
    with pytest.raises(UserError, match=r"run experiments/dataset_decomposition/run\.py first"):
        analyse.read(tmp_path)
    (tmp_path / "cost.json").write_text(json.dumps(cost()))
    with pytest.raises(UserError, match=r"concat, .* have not come to their end"):
        analyse.read(tmp_path)
