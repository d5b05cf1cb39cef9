import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mixlab import errors, plan_devices
from mixlab.config import Config, TrainingConfig
from mixlab.errors import UserError
from mixlab.model.presets import llama, olmo2
from mixlab.model.size import flops_per_token, parameter_count
from mixlab.parallel.mesh import MeshConfig
from mixlab.plan_devices import GIB, KINDS, parse_devices, plan_on, state_bytes
from mixlab.schedule.stages import StageConfig, place_stages
from mixlab.training.metrics import PEAK_FLOPS
from mixlab.training.optimizer import OptimizerConfig
from tests.devices import simulated
from tests.stores import some_texts, write_config, write_store

ROOT = Path(__file__).resolve().parent.parent


def run_of(model, mesh=MeshConfig(), tokens_per_step=2**16, length=1024, **training):
    stage = StageConfig("main", steps=50, sequence_length=length, tokens_per_step=tokens_per_step)
    config = Config(model=model, mesh=mesh, stages=(stage,), training=TrainingConfig(**training))
    return config, place_stages(config.stages, lambda *_: 10**9, 0)


@pytest.mark.parametrize(
    ("text", "count", "memory", "peak"),
    [
        ("h100", 1, 80, 989e12),
        ("H100x64", 64, 80, 989e12),
        ("a100-40gbx8", 8, 40, 312e12),
        ("v5e-16", 16, 16, 197e12),
        ("v5p", 1, 95, 459e12),
        ("v5p-512", 256, 95, 459e12),  # counts cores
    ],
)
def test_devices(text, count, memory, peak):
    devices = parse_devices(text)
    assert (devices.count, devices.memory_bytes, devices.peak_flops) == (count, memory * GIB, peak)
    assert 0.5 * devices.memory_bytes < devices.usable_bytes < devices.memory_bytes


@pytest.mark.parametrize("text", ["h1000", "h100-8", "v5ex8", "v5p-3", "h100x0", "", "h100x"])
def test_devices_that_are_not_known(text):
    with pytest.raises(UserError, match=f"--devices={text}: "):
        parse_devices(text)


def test_every_kind_has_a_peak():
    assert {name for name, _, _ in KINDS.values()} <= {name for name, _ in PEAK_FLOPS}


def test_memory_of_a_gpu_that_jax_may_take(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert parse_devices("h100").usable_bytes == int(0.9 * 80 * GIB)


def test_state_of_a_model_too_large_for_this_machine():
    """32B parameters, nothing allocated: four bytes for each, and eight for its two moments."""
    model, optimizer = olmo2("32B"), OptimizerConfig()
    for mesh in MeshConfig(1, 1, 1), MeshConfig(2, 32, 4):
        found = state_bytes(model, optimizer, mesh)
        share = parameter_count(model) / (mesh.fsdp * mesh.tensor)
        assert found["parameters"] == pytest.approx(4 * share, rel=1e-3)  # norms are whole on some axes
        assert found["moments"] == pytest.approx(8 * share, rel=1e-3)


def test_time_and_operations():
    model = llama(layers=2, d_model=256, heads=4, vocab_size=512, context_length=1024)
    config, stages = run_of(model)
    told = plan_on(config, stages, parse_devices("h100x8"), 0.5)
    (stage,) = told["stages"]
    flops = 2**16 * flops_per_token(model, 1024)
    assert stage["flops_per_step"] == flops and stage["tokens_per_device_and_step"] == 2**13
    assert stage["step_seconds"] == pytest.approx(flops / (8 * 989e12 * 0.5))
    assert stage["seconds"] == pytest.approx(50 * stage["step_seconds"])
    by_remat = told["activation_bytes_by_remat"]
    assert told["needed_bytes"]["activations"] == by_remat["none"] > by_remat["dots"] > by_remat["full"] > 0


@pytest.mark.parametrize("devices", ["h100x8", "v5e-16", "h100"])
def test_what_cannot_fit_is_refused_with_what_can(devices):
    """What the message proposes is done, and then it fits."""
    model = olmo2("7B", context_length=1024, compute_dtype="bfloat16")
    config, stages = run_of(model, tokens_per_step=2**19)
    with pytest.raises(UserError, match=rf"--devices={devices}: the run needs .* nearest that fits: ") as refused:
        plan_on(config, stages, parse_devices(devices), 0.4)
    said = str(refused.value).partition("nearest that fits: ")[2]
    flags = dict(re.findall(r"--config\.([\w.]+)=(\w+)", said))
    more = re.match(r"([\d,]+) devices", said)
    where = f"h100x{more[1]}" if more else devices
    assert flags.keys() <= {"mesh.fsdp", "mesh.tensor", "training.accumulation_steps", "model.remat"}
    changed, stages = run_of(
        olmo2("7B", context_length=1024, compute_dtype="bfloat16", remat=flags.get("model.remat", "none")),
        MeshConfig(-1, int(flags.get("mesh.fsdp", 1)), int(flags.get("mesh.tensor", 1))),
        2**19,
        accumulation_steps=int(flags.get("training.accumulation_steps", 1)),
    )
    told = plan_on(changed, stages, parse_devices(where), 0.4)
    assert sum(told["needed_bytes"].values()) <= told["usable_bytes"]


def test_rows_and_meshes_that_cannot_be_split():
    model = llama(layers=2, d_model=256, heads=4, vocab_size=512, context_length=1024)
    with pytest.raises(UserError, match=r"64 rows of 1024 tokens .* 128 devices .* use tokens_per_step=131072"):
        plan_on(*run_of(model), parse_devices("h100x128"), 0.4)
    with pytest.raises(UserError, match="does not use 8 devices"):
        plan_on(*run_of(model, MeshConfig(-1, 3, 1)), parse_devices("h100x8"), 0.4)
    with pytest.raises(UserError, match=r"cannot be split evenly.*vocab"):
        odd = llama(layers=2, d_model=256, heads=4, vocab_size=511, vocab_multiple=1, context_length=1024)
        plan_on(*run_of(odd, MeshConfig(-1, 1, 2)), parse_devices("h100x8"), 0.4)


def test_rows_cut_along_their_length():
    model = llama(layers=2, d_model=256, heads=4, vocab_size=512, context_length=1024)
    few = {"tokens_per_step": 4 * 1024, "length": 1024}
    with pytest.raises(UserError, match=r"4 rows of 1024 tokens .* 8 devices .* mesh\.fsdp=4 with mesh\.sequence=2, "):
        plan_on(*run_of(model, MeshConfig(1, 8), **few), parse_devices("h100x8"), 0.4)
    told = plan_on(*run_of(model, MeshConfig(1, 8, by_length=True), **few), parse_devices("h100x8"), 0.4)
    assert "rows of 1,024 tokens: fsdp=4, sequence=2\n" in plan_devices.as_text(told)
    cut = plan_on(*run_of(model, MeshConfig(1, 4, sequence=2), **few), parse_devices("h100x8"), 0.4)
    assert cut["stages"] == told["stages"] and "fsdp=4, sequence=2\n" in plan_devices.as_text(cut)
    for kind in ("parameters", "moments"):
        assert cut["needed_bytes"][kind] == told["needed_bytes"][kind]  # either divides them by eight
    with pytest.raises(UserError, match=r"use a sequence_length of 1020 or 1040"):
        plan_on(*run_of(model, MeshConfig(1, sequence=10), **few), parse_devices("h100x10"), 0.4)


COMPILED = """
import json, sys
import jax
from mixlab.parallel.mesh import MeshConfig, make_mesh
from mixlab.plan_devices import memory
from mixlab.training.optimizer import make_optimizer
from mixlab.training.state import plan_state
from mixlab.training.step import compile_train_step, make_train_step
from tests.test_plan_devices import small

mesh = MeshConfig(*json.loads(sys.argv[2]))
config, stages = small(sys.argv[1], mesh)
devices = make_mesh(mesh)
assert devices.size == 8
optimizer = make_optimizer(config.optimizer)
layout = plan_state(config.model, optimizer, devices)
with jax.set_mesh(devices):
    compiled = compile_train_step(make_train_step(config, optimizer, layout), layout, 64, 256)
found = compiled.memory_analysis()
print(json.dumps([found.argument_size_in_bytes, found.temp_size_in_bytes, memory(config, mesh, stages)]))
"""


def small(remat, mesh):
    model = llama(layers=6, d_model=256, heads=8, vocab_size=4096, context_length=256, remat=remat, layer_loop="scan")
    return run_of(model, mesh, 64 * 256, 256)


@pytest.mark.parametrize(("remat", "mesh"), [("none", [1, 8, 1, 1]), ("dots", [1, 8, 1, 1]), ("full", [1, 2, 2, 2])])
def test_against_the_compiler(remat, mesh):
    """The compiler's own account of the train step, for eight simulated devices that never run it."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, remat, json.dumps(mesh)],
        env=simulated(8) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    arguments, temporary, estimated = json.loads(done.stdout.splitlines()[-1])
    batch = 5 * 4 * 64 * 256 / (mesh[0] * mesh[1] * mesh[3])
    state = estimated["parameters"] + estimated["moments"]
    assert arguments == pytest.approx(state + batch, rel=0.01)
    rest = sum(estimated.values()) - state
    assert 0.9 < rest / temporary < 1.3


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    config = write_config(tmp_path / "small.py", write_store(tmp_path / "store", some_texts()))
    main = runpy.run_path(str(ROOT / "tools" / "plan.py"))["main"]
    assert errors.run(main, [f"--config={config}", "--devices=v5e-4"]) == 0
    told = capsys.readouterr().out
    assert "on v5e-4: 4 devices of 16 GiB and 197 TFLOP/s" in told and "stage main: 32 tokens a device and step" in told
    assert errors.run(main, [f"--config={config}", "--devices=v5e-4", "--mfu=0.2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["devices"]["mfu"] == 0.2 and told["name"] == "small"
    assert plan_devices.as_text(told["devices"]).count("\n") >= 9
    assert errors.run(main, [f"--config={config}", "--devices=v5e-4", "--mfu=40"]) == errors.EXIT_USER_ERROR
    assert errors.run(main, [f"--config={config}", "--devices=v5e-256"]) == errors.EXIT_USER_ERROR
    assert "4 rows of 32 tokens a step cannot be split" in capsys.readouterr().err
