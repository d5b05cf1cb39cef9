"""The same loss curve on any mesh and any number of processes, and less memory on more devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.devices import PATIENCE, free_port

ROOT = Path(__file__).resolve().parents[2]
# Compiled in half the time: nothing here is run for long.
QUICK = f"{PATIENCE} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(*arguments):
    command = [sys.executable, str(ROOT / "tests" / "parallel" / "topologies.py"), *map(str, arguments)]
    environment = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes, file):
    try:
        said = [process.communicate(timeout=900) for process in processes]
        for process, (_, err) in zip(processes, said, strict=True):
            assert process.returncode == 0, err[-3000:]
    finally:
        for process in processes:
            process.kill()
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("topologies") / "curves.json"
    return finish([start(file)], file)


def test_one_process_with_any_mesh(one_process):
    curves = {name: np.array(losses) for name, losses in one_process["curves"].items()}
    assert len(curves) == 17
    for name, losses in curves.items():
        alone = curves[f"{name.partition(',')[0]}, 1 device"]
        np.testing.assert_allclose(losses, alone, rtol=1e-5, err_msg=name)
        assert losses[-1] < losses[0] - 0.1, name  # a curve, not noise


@pytest.mark.parametrize(("count", "presets"), [(2, ("gpt2", "llama", "olmo2")), (4, ("llama",))])
def test_several_processes(one_process, tmp_path, count, presets):
    """Whole rows, and rows cut along their length, on devices of different processes."""
    port = free_port()
    file = tmp_path / "curves.json"
    curves = finish([start(file, port, count, process, *presets) for process in range(count)], file)
    assert curves.keys() == set(presets)
    for preset, losses in curves.items():
        np.testing.assert_allclose(losses, one_process["curves"][f"{preset}, 1 device"], rtol=1e-5, err_msg=preset)


def test_parameters_and_moments_are_divided(one_process):
    """As the compiler counts the step's arguments: a device holds its share of the state, and the step gives back its room."""
    (alone, *others), seen = one_process["memory"], set()
    assert alone["bytes"] == alone["whole_bytes"]
    for found in others:
        assert found["bytes"] == pytest.approx(found["whole_bytes"] / found["devices"], rel=0.1), found
        assert found["moment_bytes"] == pytest.approx(alone["moment_bytes"] / found["devices"], rel=0.1), found
        assert found["donated_bytes"] == pytest.approx(found["bytes"], rel=0.01), found
        seen.add((found["devices"], found["tensor"]))
    assert seen == {(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2)}


def test_muon_divides_its_moments_and_its_arithmetic(one_process):
    """A device holds its share of the moments, and orthogonalises its share of the layers without seeing the others, also
    where it has them all; there what was made of them is gathered, once."""
    alone, *others = one_process["memory with Muon"]
    assert alone["moment_bytes"] < one_process["memory"][0]["moment_bytes"]  # one moment a matrix instead of two
    for found in others:
        assert found["bytes"] == pytest.approx(found["whole_bytes"] / found["devices"], rel=0.1), found
        assert found["moment_bytes"] == pytest.approx(alone["moment_bytes"] / found["devices"], rel=0.1), found
    alone, *others = one_process["orthogonalising"]
    for devices, gathers, found in zip((2, 8, 8, 8), (0, 0, 1, 1), others, strict=True):
        assert found["flops"] == pytest.approx(alone["flops"] / devices, rel=0.1), found
        assert found["gathers"] == gathers, found
