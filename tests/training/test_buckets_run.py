"""A small run over length buckets: what it records, what it compiles, and that it is resumed anywhere in a cycle."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab import errors, evaluate, train
from mixlab.batch import render
from mixlab.config import load
from mixlab.data import open_data
from mixlab.evals.benchmarks import Scored
from mixlab.plan import as_text, make_plan
from mixlab.report import by_length
from mixlab.report.runs import read_run
from mixlab.report.summary import summary
from mixlab.training import loop
from mixlab.training.checkpoint import Checkpoints
from tests.devices import simulated
from tests.stores import some_texts, write_store

CYCLE, STEPS = 6, 12
SHAPES = {8: 16, 16: 8, 32: 4}
CONFIG = """
from mixlab.model.presets import llama

def get_config(arg=""):
    return dict(
        name="buckets",
        sources={{"web": {{"store": {web!r}}}, "books": {{"store": {books!r}}}}},
        model=llama(layers=1, d_model=32, heads=2, vocab_size=259, context_length=32),
        stages=[
            dict(
                name="main", steps=12, sequence_length=32, tokens_per_step=128, mixture=dict(web=0.75, books=0.25),
                format=dict(kind="decompose", min_length=8),
                curriculum=dict(mixture="equal", cycles=2, odds="grow_p2"),
            ),
        ],
        schedule=dict(kind="cosine", peak=3e-3, warmup_steps=2),
        checkpoint=dict(every_steps=1, keep_last=100),
        evaluation=dict(every_steps=0, tokens_per_domain=300, rows=4, sample_tokens=0),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("buckets")
    web = write_store(folder / "web", some_texts(60))
    books = write_store(folder / "books", some_texts(90)[60:])
    (folder / "config.py").write_text(CONFIG.format(web=str(web), books=str(books)))
    patch = pytest.MonkeyPatch()
    patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def run(place, name, *flags):
    assert errors.run(train.main, [f"--config={place / 'config.py'}", f"--workdir={place / name}", *flags]) == 0
    return [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def weights(place, name):
    with Checkpoints(place / name / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(STEPS)["arrays"]


@pytest.fixture(scope="module")
def whole(place):
    """The run's metrics, and what it compiled: {"steps": executables by shape, "before", "later": names of the programs
    before and after the first step}."""
    compiled: dict = {"before": [], "later": []}
    compile_step, add = loop.compile_train_step, loop.Recorder.add

    def compile_and_tell(function, layout, rows, length, *more):
        assert "counting" not in compiled
        executable = compile_step(function, layout, rows, length, *more)
        compiled.setdefault("steps", {})[rows, length] = executable
        return executable

    def add_and_count(self, *arguments):
        compiled["counting"] = True
        add(self, *arguments)

    def on_compile(event, duration, **more):
        if "backend_compile" in event and "done" not in compiled:
            compiled["later" if "counting" in compiled else "before"].append(more["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(on_compile)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", compile_and_tell)
        patch.setattr(loop.Recorder, "add", add_and_count)
        lines = run(place, "whole")
    compiled["done"] = True
    return lines, compiled


def test_metrics_tell_the_buckets_apart(place, whole):
    lines, _ = whole
    assert [line["tokens"] for line in lines] == [128 * s for s in range(1, STEPS + 1)]
    lengths = [int(line["train/sequence_length"]) for line in lines]
    for line, length in zip(lines, lengths, strict=True):
        assert line[f"train/bucket_{length}/loss"] == line["train/loss"]
        assert line[f"perf/bucket_{length}/step_seconds"] == line["perf/step_seconds"] > 0
        assert sum("/bucket_" in key for key in line) == 2
        assert line["train/loss_tokens"] == 128  # in the released cut every token has a target
    plan = json.loads((place / "whole" / "plan.json").read_text())["stages"][0]
    assert Counter(lengths[:CYCLE]) == Counter(lengths[CYCLE:]) == {length: 2 for length in SHAPES}
    for length, rows in SHAPES.items():
        bucket = plan["buckets"][str(length)]
        assert (bucket["rows_per_step"], bucket["steps"], bucket["tokens"]) == (rows, 4, 512)
        assert sum(bucket["sources"].values()) == 512
    assert plan["average_sequence_length"] == pytest.approx(3 / (1 / 8 + 1 / 16 + 1 / 32))
    assert plan["average_context_length"] == pytest.approx((7 + 15 + 31) / 6)
    assert {name: source["tokens"] for name, source in plan["sources"].items()} == {"web": 1152, "books": 384}
    for source in plan["sources"].values():
        kept = sum(source["dropped"].values()) + source["padded_tokens_per_epoch"]
        assert 0 < kept < source["tokens_per_epoch"] and "predicted but not read" in source["dropped"]


def test_evaluation_is_no_part_of_a_step_s_time(place, whole):
    clock = SimpleNamespace(now=0.0)

    def read_clock():
        clock.now += 1.0
        return clock.now

    def scores(self, params, step, held_out, tasks):
        clock.now += 1000.0
        return Scored({"eval/macro/bits_per_byte": 1.0, "eval/macro/bits_per_byte_se": 0.0}, {})

    clock.perf_counter = clock.monotonic = read_clock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", clock)
        patch.setattr(loop.Evaluation, "scores", scores)
        lines = run(place, "clocked", "--config.evaluation.every_steps=4", "--config.checkpoint.every_steps=100")
    assert clock.now > 4000 and sum("eval/macro/bits_per_byte" in line for line in lines) == 4
    assert all(0 < line["perf/step_seconds"] < 10 for line in lines if line["step"])


def test_the_report_tells_the_buckets_apart(place, whole):
    rows = by_length.buckets(read_run(place / "whole"))
    assert [row["length"] for row in rows] == ["8", "16", "32"]
    for row in rows:
        assert (row["steps"], row["tokens"], row["share"]) == ("4", "512", "33.3%") and row["seconds"].endswith(" s")
        last = [line["train/loss"] for line in whole[0] if line["train/sequence_length"] == int(row["length"])][-1]
        assert row["loss"] == f"{last:.3f}"
    page = (place / "whole" / "report" / "index.html").read_text()
    assert "Length buckets" in page and "position in the context" not in page


def test_a_checkpoint_is_scored_by_length_and_position(place, whole, capsys):
    arguments = [f"--workdir={place / 'whole'}", "--config.evaluation.breakdown=true"]
    capsys.readouterr()
    assert errors.run(evaluate.main, arguments) == 0
    sets, lengths, positions = capsys.readouterr().out.split("\n\n")
    named = [line.split()[0] for line in sets.splitlines()]
    recorded = read_run(place / "whole").evaluation_sets()
    assert named == ["step", "set", *recorded, "micro", "macro"] and len(recorded) == 4
    total = int(sets.splitlines()[-2].split()[-1])  # micro's tokens
    for table, title in ((lengths, "length of the document"), (positions, "position in the context")):
        head, *rows = table.splitlines()
        assert head.startswith(title) and sum(int(row.split()[-1]) for row in rows) == total
    assert positions.splitlines()[1].startswith("0 to 1 ") and positions.splitlines()[-1].startswith("16 to 31 ")


def test_every_shape_is_compiled_before_the_first_step_and_no_other(whole):
    _, compiled = whole
    assert {length: rows for rows, length in compiled["steps"]} == SHAPES
    for when, many in (("before", len(SHAPES)), ("later", 0)):
        assert sum("train_step" in name for name in compiled[when]) == many
    state, batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), compiled["steps"][4, 32].in_avals[0])
    assert set(batch) == {"tokens", "targets", "loss_weights", "positions"}  # one document a row: nothing to mask
    for length, rows in SHAPES.items():
        fitting = {name: jnp.zeros((rows, length), array.dtype) for name, array in batch.items()}
        given = jax.tree.leaves(state)
        state, _ = compiled["steps"][rows, length](state, fitting)
        assert all(array.is_deleted() for array in given)  # each of the executables takes the state's memory over
    unplanned = {name: jnp.zeros((2, 64), array.dtype) for name, array in batch.items()}
    for executable in compiled["steps"].values():
        with pytest.raises(TypeError, match="compiled"):
            executable(state, unplanned)


@pytest.mark.parametrize("step", [2, CYCLE - 1, CYCLE, CYCLE + 1])
def test_resumed_anywhere_in_a_cycle_it_is_the_same_run(place, whole, step):
    name = f"from-{step}"
    shutil.copytree(place / "whole", place / name)
    for path in (place / name / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    assert timeless(run(place, name)) == timeless(whole[0]) and weights(place, name) == weights(place, "whole")


def test_it_goes_on_with_no_other_curriculum(place, whole, capsys):
    flags = [f"--config={place / 'config.py'}", f"--workdir={place / 'whole'}"]
    code = errors.run(train.main, [*flags, "--config.stages.0.curriculum.odds=uniform"])
    assert code == errors.EXIT_USER_ERROR
    assert "stages.0.curriculum.odds: was 'grow_p2', is now 'uniform'" in capsys.readouterr().err


def test_longer_with_as_many_more_cycles_it_reads_the_same_so_far(place, whole):
    told = summary(place / "whole", f"--config={place / 'config.py'}").splitlines()
    (flags,) = (line.split("mixlab.train ")[1].split() for line in told if line.startswith("  go on"))
    assert flags[2:4] == ["--config.stages.0.steps=24", "--config.stages.0.curriculum.cycles=4"]
    assert flags[4:] == ["--allow-change=stages.0.steps,stages.0.curriculum"]
    config = str(place / "config.py")
    stream, longer = (open_data(load(config, more)).stream for more in ([], flags[2:4]))
    for step in range(STEPS):
        for name, array in stream[step].arrays().items():
            assert np.array_equal(array, longer[step].arrays()[name])


def test_it_is_told_that_what_was_read_is_not_what_the_stages_now_say(place, whole):
    with Checkpoints(place / "whole" / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.meta(STEPS)
    folder = SimpleNamespace(facts=lambda: {})
    as_read, longer = (open_data(load(str(place / "config.py"), more)) for more in ([], ["--config.stages.0.steps=14"]))
    assert loop._resumed(STEPS, meta, as_read, folder) == ["going on from step 12"]
    (_, note) = loop._resumed(STEPS, meta, longer, folder)  # 7 steps a cycle, not 6
    assert note.startswith("note: steps 0 to 11 were read by other stages than the configuration now has")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["training.accumulation_steps=3"], "training.accumulation_steps = 3 does not divide the 4 rows of stages.0; use 2"),
        (["stages.0.sequence_length=64", "stages.0.tokens_per_step=256"], "longer than model.context_length = 32"),
        (["stages.0.format.variant=binary"], "stages.0.format.variant = 'binary': use one of 'exact', 'released', 'overlap'"),
        (["stages.0.format.kind=packed"], "use one of 'concat_chunk', 'complete', 'best_fit', 'decompose'"),
        (["stages.0.curriculum.od=uniform"], "unknown key 'stages.0.curriculum.od'; did you mean 'stages.0.curriculum.odds'?"),
        (["mesh.data=1", "stages.0.tokens_per_step=32768"], "stages.0: the bucket of length 8 has"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_training(place, capsys, flags, told):
    arguments = [f"--config={place / 'config.py'}", f"--workdir={place / 'none'}"]
    assert errors.run(train.main, [*arguments, *(f"--config.{flag}" for flag in flags)]) == errors.EXIT_USER_ERROR
    assert told in capsys.readouterr().err and not (place / "none").exists()


def planned(place, *flags):
    config = load(str(place / "config.py"), [f"--config.{flag}" for flag in flags])
    data = open_data(config)
    plan = make_plan(config, data)
    return data, plan["stages"][0], as_text(plan)


def test_the_plan_tells_lengths_steps_and_what_is_lost(place, whole):
    data, stage, text = planned(place)
    for length, bucket in stage["buckets"].items():
        rows = sum(len(reading.rows.index) for reading in data.stream.lanes[0][int(length)].values())
        assert bucket["rows_per_epoch"] == rows and bucket["epochs"] == bucket["rows"] / rows
    for name, source in stage["sources"].items():
        read = sum(int(length) * len(lane[name].rows.index) for length, lane in data.stream.lanes[0].items())
        assert read + source["dropped_tokens_per_epoch"] == source["tokens_per_epoch"]
    assert f"up to about {stage['steps_without_repeats']:,} steps read no row twice" in text  # of two sources
    assert "2 cycles; a sequence has 13.7 tokens on average, a prediction 8.8 tokens of context" in text


def test_of_a_stage_that_reads_on_it_is_not_told_how_long_it_would_be_without_repeats(place):
    config = load(str(place / "config.py"), [])
    (stage,) = config.stages
    config = replace(config, stages=(stage, replace(stage, name="more")))
    first, second = make_plan(config, open_data(config))["stages"]
    assert "steps_without_repeats" in first and "steps_without_repeats" not in second


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_the_plan_tells_what_packing_pads_and_truncates(place, whole, long_documents):
    format = f"stages.0.format={dict(kind='best_fit', long_documents=long_documents)}"
    data, stage, _ = planned(place, "stages.0.curriculum=None", format)
    for name, source in stage["sources"].items():
        rows = data.stream.readings[0][name].rows
        batch = render(
            rows.pieces(np.arange(len(rows.index))), rows.documents, data.stream.stages[0].format, len(rows.index), 32
        )
        padded = int((batch.segment_ids == 0).sum())
        assert source["padded_tokens_per_epoch"] == padded and source["rows_per_epoch"] == len(rows.index)
        lost = source["tokens_per_epoch"] - (batch.segment_ids.size - padded)
        assert source["truncated_tokens_per_epoch"] == lost and (lost > 0) == (long_documents == "truncate")


def test_longest_rows_on_a_mesh_of_their_own(place, whole):
    """On eight devices, which are too many for the four longest rows: a mesh that cuts those in two reads and learns the same
    as one device."""
    flags = ["mesh.data=1", "mesh.fsdp=-1", "mesh.by_length=true", "model.sequence_attention=ring"]
    flags += ["evaluation.rows=8", "checkpoint.every_steps=100"]
    environment = simulated(8)
    environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # compiles sooner, computes the same
    command = [sys.executable, "-m", "mixlab.train", f"--config={place / 'config.py'}", f"--workdir={place / 'eight'}"]
    done = subprocess.run(
        [*command, *(f"--config.{flag}" for flag in flags)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (place / "eight" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [line["step"] for line in whole[0]]
    for key in ("train/loss", "train/grad_norm", "eval/macro/bits_per_byte"):
        ours, alone = ([line[key] for line in kind if key in line] for kind in (lines, whole[0]))
        np.testing.assert_allclose(ours, alone, rtol=1e-5)
