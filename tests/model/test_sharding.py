"""The model on a mesh of eight simulated devices, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp

from mixlab.model.sharding import constrain, mesh_axes

HERE = pathlib.Path(__file__).parent


def test_the_model_and_its_kernels_on_eight_devices():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    program = [sys.executable, str(HERE / "sharded_program.py")]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "sharded: ok" in result.stdout


def test_without_a_mesh_names_mean_nothing():
    x = jnp.ones((4, 2))
    assert constrain(x, "batch", None) is x
    assert mesh_axes("batch", 4) is None
    assert jax.sharding.get_abstract_mesh().empty
