import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from mixlab.errors import UserError
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.checksums import checksums
from mixlab.training.optimizer import OptimizerConfig, make_optimizer

META = {"tokens": 4096, "stream": "abc", "control_log": {"length": 2, "hash": "def"}}


def make_state(step=0, width=8, dtype=jnp.float32, optimizer="muon"):
    params = {
        "embedding": jnp.sin(jnp.arange(999.0 * width)).reshape(999, width) + step,
        "blocks": {
            "up": {"kernel": jnp.full((3, width, 2), 0.5 + step, dtype)},
            "norm": {"scale": jnp.ones((3, 2))},
        },
    }
    opt_state = make_optimizer(OptimizerConfig(name=optimizer)).init(params)
    return {
        "params": params,
        "opt_state": jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), opt_state),
        "step": jnp.int32(step),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    """A folder with checkpoints of steps 10, 20 and 30."""
    with Checkpoints(tmp_path / "checkpoints", keep_last=5) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(step), META | {"tokens": step})
    return tmp_path / "checkpoints"


def data_files(directory, step, item="params"):
    """All of them: some hold only what a later one repeats."""
    files = sorted((directory / str(step) / item).rglob("d/*"))
    assert files
    return files


# --- checksums ---

DTYPES = ["float32", "int32", "uint8", "bool", "float16", "bfloat16"]


@settings(max_examples=40, deadline=None)
@given(
    arrays_of.arrays("uint8", st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=st.integers(0, 255)),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_one_flipped_bit_is_noticed(raw, dtype, data):
    raw = np.repeat(raw, jnp.dtype(dtype).itemsize, axis=-1)
    if dtype == "bool":
        raw &= 1
    x = raw.view(jnp.dtype(dtype))
    before = checksums({"x": jnp.asarray(x)})["x"]
    at = data.draw(st.integers(0, raw.size - 1))
    flipped = raw.copy()
    flipped.flat[at] ^= 1 << (0 if dtype == "bool" else data.draw(st.integers(0, 7)))
    after = checksums({"x": jnp.asarray(flipped.view(jnp.dtype(dtype)))})["x"]
    assert before[0] != after[0] and before[1] != after[1]


def test_exchanged_elements_and_shapes_are_noticed():
    x = jnp.arange(24.0).reshape(4, 6)
    sums = [tuple(checksums({"x": y})["x"]) for y in (x, x[::-1], x.T, x.at[0].set(x[1]).at[1].set(x[0]))]
    assert len(set(sums)) == 4


def test_checksum_by_hand():
    def odd(index, salt):
        h = (index + salt) % 2**32
        h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
        return (h ^ (h >> 16)) | 1

    x = np.array([[1.5, -2.0], [0.0, 7.25]], np.float32)
    bits = [int(b) for b in x.view(np.uint32).ravel()]
    expected = [sum(b * odd(i, salt) for i, b in enumerate(bits)) % 2**32 for salt in (0x9E3779B9, 0x7F4A7C15)]
    assert checksums({"x": jnp.asarray(x)}) == {"x": expected}


# --- saving and restoring ---


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_round_trip_with_donated_buffers(tmp_path, optimizer):
    state = make_state(7, dtype=jnp.bfloat16, optimizer=optimizer)
    expected = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state))
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state, META)
        state = overwrite(state)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored, meta = checkpoints.restore(abstract(state))
        assert_same(restored, expected)
        assert {key: meta[key] for key in META} == META and meta["step"] == 7
        params, _ = checkpoints.restore_params(abstract(state)["params"])
        assert_same(params, expected["params"])
        assert_same(checkpoints.restore_params(None)[0], expected["params"])  # without knowing the model
        assert checkpoints.meta()["tokens"] == 4096


def test_the_layout_names_no_class_of_optax_or_flax(saved):
    arrays = json.loads((saved / "10" / "meta" / "metadata").read_text())["arrays"]
    assert {name for name in arrays if name.startswith("params/")} == {
        "params/embedding",
        "params/blocks/up/kernel",
        "params/blocks/norm/scale",
    }
    assert "opt_state/1/inner_states/adam/inner_state/mu/embedding" in arrays


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(make_state())) is None
        assert checkpoints.meta() is None and checkpoints.entries() == []
    with pytest.raises(UserError, match="does not exist"):
        Checkpoints(tmp_path / "nowhere", read_only=True)


def test_keep_rules(tmp_path):
    with Checkpoints(tmp_path / "c", keep_last=2, keep_every_steps=20, keep_steps=(5, 30)) as checkpoints:
        for step in range(5, 60, 5):
            checkpoints.save(step, {"params": {"w": jnp.float32(step)}, "opt_state": {"m": jnp.float32(0)}}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [5, 20, 30, 40, 50, 55]
    assert sorted(int(name) for name in os.listdir(tmp_path / "c")) == [5, 20, 30, 40, 50, 55]


def test_saving_a_complete_step_again_leaves_it_alone(saved):
    before = [path.stat().st_mtime_ns for path in data_files(saved, 30)]
    with Checkpoints(saved, keep_last=5) as checkpoints:
        checkpoints.restore(abstract(make_state()))
        checkpoints.save(30, make_state(30), META)
    assert [path.stat().st_mtime_ns for path in data_files(saved, 30)] == before
    with (
        Checkpoints(saved, keep_last=5) as checkpoints,
        pytest.raises(ValueError, match="restore the newest"),
    ):
        checkpoints.save(25, make_state(25), META)  # without having restored: nothing is overwritten


# --- damage ---


def truncate(directory):
    for path in data_files(directory, 30):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_data(directory):
    for path in data_files(directory, 30, "opt_state"):
        path.unlink()


def flip_a_bit(directory, item="params"):
    for path in data_files(directory, 30, item):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)


def flip_a_bit_of_the_moments(directory):
    flip_a_bit(directory, "opt_state")


def exchange_the_values(directory):
    """Files that orbax finds in order, with values that are not those saved: only the checksums tell."""
    shutil.rmtree(directory / "30" / "opt_state")
    shutil.copytree(directory / "10" / "opt_state", directory / "30" / "opt_state")


def change_the_meta(directory):
    path = directory / "30" / "meta" / "metadata"
    text = path.read_text()
    assert '"tokens": 30' in text
    path.write_text(text.replace('"tokens": 30', '"tokens": 31'))


def delete_the_manifest(directory):
    for path in (directory / "30" / "params").rglob("manifest.ocdbt"):
        path.unlink()


def empty_the_step(directory):
    shutil.rmtree(directory / "30")
    (directory / "30").mkdir()


DAMAGES = [
    truncate,
    delete_data,
    flip_a_bit,
    flip_a_bit_of_the_moments,
    exchange_the_values,
    change_the_meta,
    delete_the_manifest,
    empty_the_step,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_falls_back_past_damage_and_replaces_it(saved, damage, caplog):
    damage(saved)
    with caplog.at_level(logging.WARNING, "mixlab"), Checkpoints(saved, keep_last=5) as checkpoints:
        restored, meta = checkpoints.restore(abstract(make_state()))
        assert meta["tokens"] == 20
        assert_same(restored, make_state(20))
        (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("mixlab")]
        if damage is exchange_the_values:
            assert "opt_state/1/inner_states/adam/inner_state/count: its checksum does not match" in message
        assert "step 30" in message and "falling back to step 20" in message and "\n" not in message
        sound = [(entry.step, entry.problem is None) for entry in checkpoints.entries()]
        assert sound == [(10, True), (20, True), (30, False)]
        checkpoints.save(25, make_state(25), META)  # the damaged step 30 is not in the way,
        checkpoints.save(30, make_state(30), META)  # and is replaced when it is reached again
    assert (saved / "damaged-30").is_dir()
    with Checkpoints(saved, keep_last=5) as checkpoints:
        assert [(e.step, e.problem) for e in checkpoints.entries()] == [(s, None) for s in (10, 20, 25, 30)]
        assert_same(checkpoints.restore(abstract(make_state()))[0], make_state(30))


def test_reading_moves_nothing(saved):
    flip_a_bit(saved)
    before = sorted(saved.rglob("*"))
    with Checkpoints(saved, read_only=True) as checkpoints:
        _, meta = checkpoints.restore_params(None)
        assert meta["tokens"] == 20
    assert sorted(saved.rglob("*")) == before


def test_when_none_verifies_the_run_does_not_start_afresh(saved):
    for step in (10, 20, 30):
        shutil.rmtree(saved / str(step) / "params")
    with Checkpoints(saved) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(abstract(make_state()))
    assert str(saved) in str(caught.value) and "another folder" in str(caught.value)
    assert sorted(os.listdir(saved)) == ["10", "20", "30"]


@pytest.mark.parametrize(
    "other, words",
    [
        ({"width": 4}, "params/blocks/up/kernel has shape"),
        ({"dtype": jnp.bfloat16}, "params/blocks/up/kernel has dtype float32 there and bfloat16 here"),
        ({"optimizer": "adamw"}, "opt_state/1/"),
    ],
)
def test_another_config_is_refused_not_passed_over(saved, other, words):
    with Checkpoints(saved) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(abstract(make_state(**other)))
    assert words in str(caught.value) and "another model or optimiser" in str(caught.value)


def test_asking_for_a_step(saved):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), step=10)[1]["tokens"] == 10
        with pytest.raises(UserError, match=r"no checkpoint of step 11; it has \[10, 20, 30\]"):
            checkpoints.restore(abstract(make_state()), step=11)


def test_what_a_kill_during_saving_leaves_is_not_a_checkpoint(saved):
    shutil.copytree(saved / "30", saved / "40.orbax-checkpoint-tmp")
    with Checkpoints(saved, keep_last=5) as checkpoints:
        assert checkpoints.restore(abstract(make_state()))[1]["tokens"] == 30
        checkpoints.save(40, make_state(40), META)
    assert sorted(os.listdir(saved)) == ["10", "20", "30", "40"]


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", where], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def noise(step, count):
    values = np.random.default_rng(step).standard_normal(count).astype(np.float32)
    return {"params": {"w": jnp.asarray(values)}, "opt_state": {"m": jnp.zeros(3)}}


def test_a_full_disk_is_told_and_older_checkpoints_live(small_disk):
    directory = small_disk / "checkpoints"
    count = 200_000  # 0.8 MB
    with pytest.raises(UserError) as caught, Checkpoints(directory, keep_last=9) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, noise(step, count), META)
    text = str(caught.value)
    assert "No space left on device" in text and str(directory) in text and "Free space" in text
    with Checkpoints(directory, read_only=True) as checkpoints:
        entries = checkpoints.entries()
        assert len(entries) >= 2 and all(entry.problem is None for entry in entries)
        assert f"on disk: {[entry.step for entry in entries]}" in text
    shutil.rmtree(directory / "1")  # the user frees space and runs again
    with Checkpoints(directory, keep_last=1) as checkpoints:
        _, meta = checkpoints.restore(abstract(noise(0, count)))
        checkpoints.save(meta["step"] + 1, noise(meta["step"] + 1, count), META)
    with Checkpoints(directory) as checkpoints:
        assert [(e.step, e.problem) for e in checkpoints.entries()] == [(meta["step"] + 1, None)]


def test_a_folder_that_cannot_be_written(small_disk):
    with Checkpoints(small_disk / "checkpoints") as checkpoints:
        checkpoints.save(1, noise(1, 10), META)
        checkpoints.wait()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(UserError, match="Read-only file system"):
            checkpoints.save(2, noise(2, 10), META)
            checkpoints.wait()
    with pytest.raises(UserError, match="cannot open the folder"):
        Checkpoints(small_disk / "elsewhere")


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


# --- other meshes, other processes ---


def test_restores_on_other_meshes_bit_for_bit(tmp_path):
    body = """
    import sys
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from mixlab.parallel.mesh import MeshConfig, make_mesh
    from mixlab.training.checkpoint import Checkpoints

    values = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    sums = []
    for data, fsdp, tensor in (1, 4, 2), (1, 2, 4), (2, 2, 2), (1, 1, 1):
        mesh = make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])
        split = NamedSharding(mesh, P("fsdp", None if tensor == 4 else "tensor"))
        whole = NamedSharding(mesh, P())
        with Checkpoints(sys.argv[1], keep_last=9) as checkpoints:
            if not checkpoints.steps():
                state = {
                    "params": {"w": jax.device_put(values, split)},
                    "opt_state": {"m": jax.device_put(values[0], whole)},
                }
            else:
                like = {
                    "params": {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=split)},
                    "opt_state": {"m": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=whole)},
                    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
                }
                state, meta = checkpoints.restore(like)
                assert state["params"]["w"].sharding.is_equivalent_to(split, 2)
                assert int(state["step"]) == len(sums) and state["step"].sharding.is_equivalent_to(whole, 0)
            np.testing.assert_array_equal(state["params"]["w"], values)
            checkpoints.save(len(sums) + 1, state, {})
            checkpoints.wait()
            sums.append(checkpoints.meta()["arrays"])
    assert sums[0] == sums[1] == sums[2] == sums[3]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(body), str(tmp_path / "checkpoints")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
