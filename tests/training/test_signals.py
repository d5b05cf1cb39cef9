import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mixlab.training.signals import StopSignal
from tests.devices import free_port


def never(step):
    raise AssertionError("a single process needs no agreement")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request(number, capfd):
    before = signal.getsignal(number)
    with StopSignal(never) as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert signal.Signals(number).name in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_aborts():
    with pytest.raises(KeyboardInterrupt), StopSignal(never) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher may say it twice
        assert stop.requested(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


PROCESS = """
import os, signal, sys
import jax
index, port, directory, how = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from mixlab.parallel.mesh import MeshConfig, global_batch, host_rows, make_mesh
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.signals import StopSignal

mesh = make_mesh(MeshConfig(data=2, fsdp=2))
split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
rows = host_rows(mesh, 8)
assert list(rows) == list(range(4 * index, 4 * index + 4))
batch = global_batch(mesh, np.repeat(rows[:, None], 3, 1).astype(np.float32), 8)
create = jax.jit(lambda: {"w": jnp.arange(8.0)}, out_shardings={"w": split})
state = {"params": create(), "opt_state": {"m": create()["w"]}, "step": jnp.int32(0)}
advance = jax.jit(
    lambda s, b: jax.tree.map(lambda x: x + b.sum().astype(x.dtype), s), donate_argnums=0,
    out_shardings={"params": {"w": split}, "opt_state": {"m": split}, "step": whole},
)
like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
    {"params": {"w": split}, "opt_state": {"m": split}, "step": whole},
)
with Checkpoints(directory, keep_last=9) as checkpoints, StopSignal(checkpoints.reached_preemption) as stop:
    if how == "fall back":
        restored, meta = checkpoints.restore(like)
        assert meta["step"] == 5 and int(restored["step"]) == 5, meta["step"]
        checkpoints.save(meta["step"] + 1, restored, {})
    else:
        for step in range(1, 20_000):
            # Collectives of several steps in flight at once can deadlock on CPU.
            state = jax.block_until_ready(advance(state, batch))
            if step == 5:
                checkpoints.save(step, state, {})
            if step == 8 and index == 1:
                os.kill(os.getpid(), getattr(signal, how))
            if stop.requested(step):
                break
        assert 8 <= step < 19_999, step
        checkpoints.save(step, state, {})
    checkpoints.wait()
    steps = checkpoints.steps()
print("steps", steps)
"""


def two_processes(directory, how):
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), str(port), str(directory), how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        answers = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, err) in zip(running, answers, strict=True):
        assert process.returncode == 0, err[-3000:]
    lines = [[line for line in out.splitlines() if line.startswith("steps")][-1] for out, _ in answers]
    assert lines[0] == lines[1]
    return answers


def test_two_processes_stop_together_save_together_and_fall_back_together(tmp_path):
    """SIGINT to one process; then a fallback past damage in two processes; then one process reads it all."""
    directory = tmp_path / "checkpoints"
    two_processes(directory, "SIGINT")
    first, last = sorted(int(path.name) for path in directory.iterdir())
    assert first == 5 and last >= 8
    one = """
    import sys, numpy as np
    from mixlab.training.checkpoint import Checkpoints
    with Checkpoints(sys.argv[1], read_only=True) as checkpoints:
        params, meta = checkpoints.restore_params(None)
        np.testing.assert_array_equal(params["w"], np.arange(8.0) + 84 * meta["step"])  # 84: the batch's sum
        assert [entry.problem for entry in checkpoints.entries()] == [None, None]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(one), str(directory)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr

    for path in (directory / str(last) / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-20])
    answers = two_processes(directory, "fall back")
    assert "falling back to step 5" in answers[0][1]
    assert sorted(path.name for path in directory.iterdir()) == ["5", "6", f"damaged-{last}"]
