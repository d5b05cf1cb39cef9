"""Runs that begin with another run's checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mixlab import config as configs
from mixlab import errors, train
from mixlab.corpus import tokenizer
from mixlab.data import open_data
from mixlab.parallel.mesh import make_mesh
from mixlab.training import control, loop
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.history import History, first_difference
from mixlab.training.optimizer import make_optimizer
from mixlab.training.start import load_origin
from mixlab.training.state import plan_state
from tests.devices import simulated
from tests.stores import some_texts, write_store
from tests.test_mistakes import files, told

TOKENS = 128  # a step


@pytest.fixture(autouse=True)
def cache(trunk, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    monkeypatch.chdir(tmp_path)


def arguments(trunk, workdir, **keys):
    """Flags of a run with the trunk's config, but for keys such as start__step=7."""
    flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return [f"--config={trunk.parent / 'config.py'}", f"--workdir={workdir}", *flags]


def run(*args, **keys):
    assert errors.run(train.main, arguments(*args, **keys)) == 0


def origin(trunk, workdir="run", **keys):
    """What `load_origin` makes of the trunk's config with these keys."""
    flags = arguments(trunk, workdir, **keys)
    config = configs.load(flags[0].removeprefix("--config="), flags[2:])
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, make_mesh(config.mesh))
    return load_origin(config, open_data(config), layout, optimizer, trunk.parent / workdir)


def records(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def meta(workdir, step):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.meta(step)


def params(workdir, step):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_params(None, step)[0]


def assert_the_trunk_going_on(workdir, trunk, step):
    """Everything recorded and the final arrays, parameters and moments, bit for bit."""
    ours, theirs = records(workdir), [line for line in records(trunk) if line["step"] >= step]
    assert [line["step"] for line in ours] == list(range(step, 21))
    assert ours[1:] == theirs[1:]
    assert meta(workdir, 20)["arrays"] == meta(trunk, 20)["arrays"]
    assert meta(workdir, 20)["read"] == meta(trunk, 20)["read"]


# --- branches ---


def test_a_branch_with_the_same_config_is_the_trunk_going_on(trunk, tmp_path, monkeypatch, capsys):
    before, batches = files(trunk), []

    def global_batch(mesh, local, rows):
        batches.append(local)
        return whole(mesh, local, rows)

    whole = loop.global_batch
    monkeypatch.setattr(loop, "global_batch", global_batch)
    run(trunk, tmp_path / "branch", start__branch_from=trunk, start__step=7)
    output = capsys.readouterr().out
    assert "at step 7" in output and "the optimiser's state goes on" in output and "note:" not in output
    assert_the_trunk_going_on(tmp_path / "branch", trunk, 7)

    first = records(tmp_path / "branch")[0]
    assert first["step"] == 7 and first["tokens"] == 7 * TOKENS
    assert first["eval/macro/bits_per_byte"] < records(trunk)[0]["eval/macro/bits_per_byte"]
    stream = open_data(configs.load_json(trunk / "config.json", [])).stream
    assert len(batches) == 13
    for step, batch in enumerate(batches, 7):
        jax.tree.map(np.testing.assert_array_equal, batch, stream[step].arrays())

    kept = json.loads((tmp_path / "branch" / "run.json").read_text())["origin"]
    assert (kept["kind"], kept["folder"], kept["step"]) == ("branch_from", str(trunk), 7)
    assert kept["checkpoint"] == meta(trunk, 7)["sha256"] and kept["data_differ_from_step"] is None
    assert files(trunk) == before
    assert not (tmp_path / "branch" / "checkpoints" / "7").exists()  # the trunk is not copied


class KilledError(BaseException):
    """Stands for a kill: nothing in the project catches it."""


def run_killed(monkeypatch, step, *args, **keys):
    def batches(*rest):
        for at, local in read(*rest):
            if at == step:
                raise KilledError
            yield at, local

    read = control.loader.batches
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(control, "loader", SimpleNamespace(batches=batches))
        train.main(arguments(*args, **keys))


def test_a_killed_branch_goes_on_exactly_and_needs_its_origin_only_at_first(trunk, tmp_path, monkeypatch, capsys):
    growing, branch = tmp_path / "growing", tmp_path / "branch"
    shutil.copytree(trunk, growing)
    for step in (14, 20):
        shutil.move(growing / "checkpoints" / str(step), tmp_path / str(step))
    run_killed(monkeypatch, 10, trunk, branch, start__branch_from=growing)  # at the newest, which is 7
    for step in (14, 20):
        shutil.move(tmp_path / str(step), growing / "checkpoints" / str(step))
    run_killed(monkeypatch, 16, trunk, branch, start__branch_from=growing)  # begins again at 7, the newest or not
    assert f"branching off {growing} at step 7" in capsys.readouterr().out
    shutil.rmtree(growing)
    run(trunk, branch, start__branch_from=growing)
    assert "going on from step 14" in capsys.readouterr().out
    assert_the_trunk_going_on(branch, trunk, 7)
    assert json.loads((branch / "run.json").read_text())["origin"]["step"] == 7


def test_an_origin_that_was_trained_anew_is_not_taken_for_the_one_before(trunk, tmp_path, monkeypatch, capsys):
    other, branch = tmp_path / "other", tmp_path / "branch"
    shutil.copytree(trunk, other)
    keys = dict(start__branch_from=other, start__step=7, start__reset_optimizer=True)
    run_killed(monkeypatch, 9, trunk, branch, **keys)
    with Checkpoints(trunk / "checkpoints", read_only=True) as checkpoints:
        weights, old = checkpoints.restore_params(None, 7)
    shutil.rmtree(other / "checkpoints")
    with Checkpoints(other / "checkpoints") as checkpoints:
        kept = {key: old[key] for key in ("tokens", "tokenizer", "read")}
        checkpoints.save(7, {"params": weights}, kept | {"note": "another"})
    message = told(capsys, *arguments(trunk, branch, **keys))
    assert "is not the one that" in message and "put that one back" in message


def test_fresh_moments(trunk, tmp_path):
    found = origin(trunk, start__branch_from=trunk, start__step=14, start__reset_optimizer=True)
    assert int(found.state["step"]) == 14 and found.record["reset_optimizer"]
    assert all(not np.any(moment) for moment in jax.tree.leaves(found.state["opt_state"]))
    jax.tree.map(np.testing.assert_array_equal, found.state["params"], params(trunk, 14))
    kept = origin(trunk, start__branch_from=trunk, start__step=14)
    assert any(np.any(moment) for moment in jax.tree.leaves(kept.state["opt_state"]))

    run(trunk, tmp_path / "branch", start__branch_from=trunk, start__step=14, start__reset_optimizer=True)
    ours, theirs = records(tmp_path / "branch"), records(trunk)[14:]
    assert ours[1]["train/loss"] == theirs[1]["train/loss"]  # the same weights and batch …
    assert ours[2]["train/loss"] != theirs[2]["train/loss"]  # … and another update


def test_fresh_moments_of_another_optimiser(trunk):
    keys = dict(start__branch_from=trunk, optimizer__name="muon")
    with pytest.raises(errors.UserError, match=r"optimizer.name = 'adamw'.* set start.reset_optimizer=True"):
        origin(trunk, **keys, start__step=7)
    assert int(origin(trunk, **keys, start__step=7, start__reset_optimizer=True).state["step"]) == 7


def test_branches_with_other_data_say_so_and_keep_what_was_read(trunk, tmp_path, capsys):
    """The trunk's stage up to step 7, then a stage of the branch's own; and a branch of that branch."""
    text = (trunk.parent / "config.py").read_text()
    stage = 'dict(name="main", steps=20, sequence_length=32, tokens_per_step=128)'
    assert stage in text
    later = stage.replace("main", "later").replace("20", "5").replace(")", ", format=dict(eos=False))")
    place = tmp_path / "place"
    place.mkdir()
    (place / "config.py").write_text(text.replace(stage, f"{stage.replace('20', '7')}, {later}"))
    inside = place / "trunk"  # its config is the one with two stages
    run(inside, tmp_path / "branch", start__branch_from=trunk, start__step=7)
    assert "note:" not in capsys.readouterr().out
    read = meta(tmp_path / "branch", 12)["read"]
    assert [(s["stage"], s["first_step"], s["last_step"]) for s in read] == [("main", 0, 6), ("later", 7, 11)]

    second = origin(trunk, start__branch_from=tmp_path / "branch")
    assert second.record["data_differ_from_step"] == 7 and second.read == read
    assert any("the data before the branch point differ: in steps 7 to 11" in note for note in second.notes)
    other_seed = origin(trunk, start__branch_from=trunk, start__step=7, seed=1)
    assert other_seed.record["data_differ_from_step"] == 0
    assert any("differ: in steps 0 to 6" in note for note in other_seed.notes)


def test_a_branch_passes_over_a_damaged_checkpoint(trunk, tmp_path):
    shutil.copytree(trunk, tmp_path / "copy")
    files = (tmp_path / "copy" / "checkpoints" / "20" / "params").rglob("d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    found = origin(trunk, start__branch_from=tmp_path / "copy")
    assert found.record["step"] == 14


def test_a_branch_onto_eight_devices(trunk, tmp_path):
    flags = arguments(trunk, tmp_path / "branch", start__branch_from=trunk, start__step=14)
    flags += ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    environment = os.environ | simulated(8)
    done = subprocess.run(
        [sys.executable, "-m", "mixlab.train", *flags], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "branch" / "run.json").read_text())["devices"].startswith("8 x")
    ours, theirs = records(tmp_path / "branch"), records(trunk)[14:]
    for key in ("train/loss", "train/grad_norm", "eval/macro/loss"):
        pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) if key in a and key in b]
        assert pairs
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-4)


# --- weights alone ---


def test_weights_alone_begin_at_step_0(trunk, tmp_path, capsys):
    found = origin(trunk, start__init_from=trunk, start__step=7)
    assert int(found.state["step"]) == 0 and found.read == []
    assert all(not np.any(moment) for moment in jax.tree.leaves(found.state["opt_state"]))
    jax.tree.map(np.testing.assert_array_equal, found.state["params"], params(trunk, 7))

    run(trunk, tmp_path / "run", start__init_from=trunk)
    assert "the weights of" in capsys.readouterr().out
    ours, theirs = records(tmp_path / "run"), records(trunk)
    assert [line["step"] for line in ours] == list(range(21)) and ours[0]["tokens"] == 0
    assert {k: v for k, v in ours[0].items() if k.startswith("eval/")} == {
        k: v for k, v in theirs[20].items() if k.startswith("eval/")
    }
    assert ours[20]["train/loss"] < theirs[20]["train/loss"]


def test_a_model_with_longer_rows_says_so(trunk):
    found = origin(trunk, start__init_from=trunk, model__context_length=64, model__remat="full")
    assert any("model.context_length is 32 there and 64 here" in note for note in found.notes)
    assert not any("remat" in note for note in found.notes)


# --- what was read ---


def stream(*stages):
    """Stages as (name, steps), each of which reads what its name says."""
    placed, first = [], 0
    for name, steps in stages:
        placed.append(SimpleNamespace(name=name, first_step=first, last_step=first + steps - 1))
        first += steps
    return SimpleNamespace(stages=placed, identity=lambda: [[s.name, s.first_step] for s in placed])


def steps(stretches):
    return [(s["stage"], s["first_step"], s["last_step"]) for s in stretches]


def test_histories():
    trunk = History(stream(("a", 5), ("b", 5)))
    assert trunk.until(0) == []
    assert steps(trunk.until(3)) == [("a", 0, 2)] and steps(trunk.until(7)) == [("a", 0, 4), ("b", 5, 6)]
    longer = History(stream(("a", 5), ("b", 9)), 7, trunk.until(7))  # a branch in the midst of the same stage
    assert steps(longer.until(12)) == [("a", 0, 4), ("b", 5, 11)]
    assert steps(History(stream(("x", 20)), 7, trunk.until(7)).until(9)) == [("a", 0, 4), ("b", 5, 6), ("x", 7, 8)]


@pytest.mark.parametrize(
    ("stages", "end", "first"),
    [
        ((("a", 5), ("b", 5)), 7, None),
        ((("a", 5), ("b", 9)), 7, None),
        ((("a", 5), ("b", 2), ("c", 3)), 7, None),
        ((("a", 7),), 7, 5),
        ((("a", 6), ("b", 5)), 7, 5),
        ((("a", 4), ("b", 5)), 7, 4),
        ((("a", 5), ("c", 5)), 7, 5),
        ((("c", 20),), 7, 0),
        ((("a", 5), ("b", 5)), 5, 5),
    ],
)
def test_where_histories_differ(stages, end, first):
    read = History(stream(("a", 5), ("b", 5))).until(7)
    here = History(stream(*stages)).until(end)
    assert first_difference(read, here) == first == first_difference(here, read)


# --- mistakes ---


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (dict(start__branch_from="TRUNK", start__init_from="TRUNK"), "init_from and branch_from are both given"),
        (dict(start__step=7), "start.step = 7: of which run?"),
        (dict(start__init_from="TRUNK", start__reset_optimizer=True), "start.reset_optimizer: belongs to"),
        (dict(start__branch_from="nowhere"), "start.branch_from = nowhere: there is no such folder"),
        (dict(start__init_from="STORE"), "is not the folder of a run: it has no config.json"),
        (dict(start__init_from="TRUNK", start__step=8), "has no checkpoint of step 8; it has [7, 14, 20]"),
        (dict(start__branch_from="TRUNK", start__step=8), "has no checkpoint of step 8; it has [7, 14, 20]"),
        (dict(start__branch_from="TRUNK"), "is of step 20, and this run ends at step 20; give the stages more steps"),
        (dict(start__branch_from="TRUNK", stages__0__steps=10, start__step=14), "this run ends at step 10"),
        (dict(start__branch_from="TRUNK", model__layers=3), "is another model: model.layers is 2 there and 3 here"),
        (dict(start__init_from="TRUNK", model__norm_eps=1e-3), "model.norm_eps is 1e-05 there and 0.001 here"),
    ],
)
def test_mistakes(trunk, tmp_path, capsys, keys, expected):
    places = {"TRUNK": trunk, "STORE": trunk.parent / "store"}
    keys = {key: places.get(value, value) for key, value in keys.items()}
    assert expected in told(capsys, *arguments(trunk, tmp_path / "run", **keys))
    assert not (tmp_path / "run").exists()


def test_another_tokenizer(trunk, tmp_path, capsys):
    letters = tokenizer.train_bpe(some_texts(), 259)
    assert letters.vocab_size == 259 and letters.hash != tokenizer.load("bytes").hash
    write_store(tmp_path / "store", some_texts(), letters)
    keys = dict(start__init_from=trunk, sources__text__store=tmp_path / "store")
    message = told(capsys, *arguments(trunk, tmp_path / "run", **keys))
    assert "was trained with tokenizer bytes" in message and letters.name in message
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints(trunk, tmp_path, capsys):
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    shutil.copy(trunk / "config.json", tmp_path / "young")
    message = told(capsys, *arguments(trunk, tmp_path / "run", start__branch_from=tmp_path / "young"))
    assert "has no checkpoint yet; train it first" in message
