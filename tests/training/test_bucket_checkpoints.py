"""Checkpoints in buckets, over the clouds' own protocols, from servers on this machine."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab import errors, evaluate, train
from mixlab.corpus.bucket import Bucket
from mixlab.errors import UserError
from mixlab.training.bucket_storage import OBJECT_BYTES, chunk_shape, superseded
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.control import Control
from tests.buckets import buckets, troubled
from tests.devices import free_port
from tests.training.test_checkpoint import META, abstract, assert_same, make_state

URLS = ["s3://texts/kept", "gs://texts/some/kept"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def servers():
    with buckets():
        yield


@pytest.fixture(scope="module", params=URLS)
def saved(request):
    """A place with checkpoints of steps 10, 20 and 30, of which a fourth was cut off."""
    with Checkpoints(request.param, keep_last=3) as checkpoints:
        for step in (5, 10, 20, 30):
            checkpoints.save(step, make_state(step), META | {"tokens": step})
    Bucket(request.param).write("40/params/embedding/zarr.json", b"{}")
    return request.param


def test_as_on_a_disk(saved):
    names = Bucket(saved).names()
    assert not any(name.startswith("5/") for name in names)  # of four, three were to be kept
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [10, 20, 30]
        restored, meta = checkpoints.restore(abstract(make_state()))
        assert_same(restored, make_state(30))
        assert meta["tokens"] == 30
        params, _ = checkpoints.restore_params(None, 10)  # without knowing the model
        np.testing.assert_array_equal(params["embedding"], make_state(10)["params"]["embedding"])
        whole = checkpoints.read_param(meta, "embedding")
        np.testing.assert_array_equal(whole, restored["params"]["embedding"])
    assert Bucket(saved).names() == names  # reading changes nothing


def lose_an_object(bucket):
    bucket.delete("30/params/embedding/c/")


def change_an_object(bucket):
    (name,) = bucket.names("30/params/blocks/norm/scale/c/")
    content = bytearray(bucket.read(name))
    content[3] ^= 1
    bucket.write(name, bytes(content))


def lose_an_array(bucket):
    bucket.delete("30/opt_state/1/")


def change_the_meta(bucket):
    bucket.write("30/meta.json", bucket.read("30/meta.json").replace(b'"tokens": 30', b'"tokens": 31'))


DAMAGES = [lose_an_object, change_an_object, lose_an_array, change_the_meta]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_falls_back_past_damage_and_replaces_it(saved, damage):
    damage(Bucket(saved))
    with Checkpoints(saved, keep_last=3) as checkpoints:
        assert not Bucket(saved).names("40/")  # what was cut off is cleared away
        restored, meta = checkpoints.restore(abstract(make_state()))
        assert meta["tokens"] == 20
        assert_same(restored, make_state(20))
        checkpoints.save(30, make_state(30), META | {"tokens": 30})
    with Checkpoints(saved, read_only=True) as checkpoints:
        assert [(e.step, e.problem) for e in checkpoints.entries()] == [(s, None) for s in (10, 20, 30)]


def test_places_that_cannot_be_written(monkeypatch):
    with pytest.raises(UserError, match="there is no such bucket"):
        Checkpoints("s3://none/kept")
    with troubled(os.environ["AWS_ENDPOINT_URL"]) as (front, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", front)
        with pytest.raises(UserError, match="s3://texts/private: access is refused; log in"):
            Checkpoints("s3://texts/private")


def test_a_run_keeps_its_checkpoints_in_a_bucket(trunk, tmp_path, monkeypatch, capsys):
    """It goes on from there after a crash, is evaluated from there, and another run does not take them for its own."""
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    flags = ["--config.checkpoint.directory=s3://texts/runs", "--config.checkpoint.keep_last=9"]
    command = [f"--config={trunk.parent / 'config.py'}", f"--workdir={tmp_path / 'one'}", *flags]
    honest = Control.batches

    def breaks(self, first, mesh):
        for step, arrays in honest(self, first, mesh):
            if step == 11:
                raise KeyboardInterrupt
            yield step, arrays

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Control, "batches", breaks)
        train.main(command)
    assert errors.run(train.main, command) == 0
    assert "going on from step 7" in capsys.readouterr().out and not (tmp_path / "one" / "checkpoints").exists()
    with (
        Checkpoints("s3://texts/runs/one", read_only=True) as there,
        Checkpoints(trunk / "checkpoints", read_only=True) as here,
    ):
        assert there.steps() == here.steps()
        assert there.meta(20)["arrays"] == here.meta(20)["arrays"]
    assert errors.run(evaluate.main, [f"--workdir={tmp_path / 'one'}", "--step=14"]) == 0
    other = [*command[:1], f"--workdir={tmp_path / 'other' / 'one'}", *flags]
    assert errors.run(train.main, other) == errors.EXIT_USER_ERROR
    assert "holds checkpoints of another run" in capsys.readouterr().err
    assert errors.run(train.main, [*command[:2], "--allow-change=checkpoint.directory"]) == errors.EXIT_USER_ERROR
    assert "the run's checkpoints are in s3://texts/runs/one; copy them to" in capsys.readouterr().err


PROCESS = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from mixlab.parallel.mesh import MeshConfig, make_mesh
from mixlab.training.checkpoint import Checkpoints

mesh = make_mesh(MeshConfig(data=2, fsdp=2))
split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
create = jax.jit(lambda: {"w": jnp.arange(8.0), "v": jnp.float32(3)}, out_shardings={"w": split, "v": whole})
with Checkpoints("s3://texts/together") as checkpoints:
    for step in (1, 2):
        values = jax.tree.map(lambda x: x * step, create())
        checkpoints.save(step, {"params": values, "opt_state": {"m": values["w"]}}, {"tokens": step})
    checkpoints.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values)
    params, meta = checkpoints.restore_params(like)
    assert meta["step"] == 2 and params["w"].sharding.is_equivalent_to(split, 1)
"""


def test_two_processes_write_their_parts_and_one_reads_all():
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(i), port], cwd=ROOT, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    with Checkpoints("s3://texts/together", read_only=True) as checkpoints:
        params, meta = checkpoints.restore_params(None)
    assert meta["tokens"] == 2 and params["v"] == 6
    np.testing.assert_array_equal(params["w"], 2 * np.arange(8.0))


@given(st.lists(st.integers(1, 5000), max_size=4).map(tuple), st.sampled_from([1, 2, 4]))
def test_parts_divide_a_shard(shard, item_bytes):
    chunk = chunk_shape(shard, item_bytes)
    assert all(size % part == 0 for size, part in zip(shard, chunk, strict=True))
    assert np.prod(chunk, dtype=np.int64) * item_bytes <= OBJECT_BYTES


@given(st.sets(st.integers(1, 60)), st.integers(1, 4), st.sampled_from([None, 7]), st.sets(st.integers(1, 60)))
def test_what_is_kept(steps, last, every, named):
    kept = set(steps) - set(superseded(steps, last, every, named))
    assert kept == set(sorted(steps)[-last:]) | (steps & named) | {s for s in steps if every and s % every == 0}
