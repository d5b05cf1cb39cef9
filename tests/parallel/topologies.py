"""Loss curves of small models on many meshes, and what the compiler says of their memory; run by test_topologies.py in
processes of its own.

    topologies.py                                  prints the largest differences, all presets on all meshes of eight devices
    topologies.py FILE                             writes a part of them to FILE
    topologies.py FILE PORT PROCESSES PROCESS [PRESET …]    the same of several processes with four devices together
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax

DEVICES = 8
SEVERAL = 4  # devices of all processes together
if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES if len(sys.argv) < 3 else SEVERAL // int(sys.argv[3]))
    if len(sys.argv) > 2:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        jax.distributed.initialize(f"localhost:{sys.argv[2]}", int(sys.argv[3]), int(sys.argv[4]))

import numpy as np  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

from mixlab.config import Config  # noqa: E402
from mixlab.model.presets import gpt2, llama, olmo2  # noqa: E402
from mixlab.parallel.mesh import MeshConfig, global_batch, host_rows, make_mesh  # noqa: E402
from mixlab.parallel.rules import spec  # noqa: E402
from mixlab.training.muon import orthogonalise  # noqa: E402
from mixlab.training.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from mixlab.training.schedules import ScheduleConfig  # noqa: E402
from mixlab.training.state import Layout, create_state, plan_state  # noqa: E402
from mixlab.training.step import compile_train_step, make_train_step  # noqa: E402

STEPS, ROWS, LENGTH, VOCABULARY = 20, 8, 32, 96
PRESETS = {"gpt2": gpt2, "llama": llama, "olmo2": olmo2}
MUON = "llama with Muon"  # instead of AdamW
# name: (mesh, how attention crosses devices)
ONE_PROCESS = {
    "1 device": (MeshConfig(), "gather"),
    "data 8": (MeshConfig(data=8), "gather"),
    "fsdp 8": (MeshConfig(data=1, fsdp=8), "gather"),
    "fsdp 4 x tensor 2": (MeshConfig(data=1, fsdp=4, tensor=2), "gather"),
    "fsdp 2 x sequence 4, gather": (MeshConfig(data=1, fsdp=2, sequence=4), "gather"),
    "data 2 x sequence 2 x tensor 2, ring": (MeshConfig(data=2, sequence=2, tensor=2), "ring"),
    "expert 2 x sequence 4, all to all": (MeshConfig(data=1, expert=2, sequence=4), "all_to_all"),
}
TESTED = {
    "gpt2": ("1 device", "data 8", "fsdp 8", "fsdp 4 x tensor 2", "fsdp 2 x sequence 4, gather"),
    "llama": ("1 device", "fsdp 8", "fsdp 4 x tensor 2", "data 2 x sequence 2 x tensor 2, ring"),
    "olmo2": ("1 device", "fsdp 8", "fsdp 4 x tensor 2", "expert 2 x sequence 4, all to all"),
    MUON: ("1 device", "data 8", "fsdp 8", "fsdp 4 x tensor 2"),
}
GROWING = [MeshConfig(1, 2), MeshConfig(1, 4), MeshConfig(1, 1, 2), MeshConfig(1, 2, 2)]
SEVERAL_PROCESSES = {
    "gpt2": (MeshConfig(data=1, fsdp=4), "gather"),
    "llama": (MeshConfig(data=1, fsdp=2, sequence=2), "ring"),
    "olmo2": (MeshConfig(data=2, tensor=2), "gather"),
}


def tiny(preset: str, **overrides) -> Config:
    values = dict(
        layers=2, d_model=64, heads=4, ffn_width=128, vocab_size=VOCABULARY, vocab_multiple=32, context_length=LENGTH,
        layer_loop="scan",
    )  # fmt: skip
    family = PRESETS[preset.removesuffix(" with Muon")]
    model = family(**(values | ({} if preset == "gpt2" else {"kv_heads": 2}) | overrides))
    optimizer = OptimizerConfig(name="muon" if preset == MUON else "adamw")
    return Config(model=model, optimizer=optimizer, schedule=ScheduleConfig(peak=1e-3, warmup_steps=2))


def arrays(step: int) -> dict[str, np.ndarray]:
    """A batch whose rows are of one to three documents and padding; the next token can be guessed from the one before."""
    rng = np.random.default_rng(step)
    tokens = np.empty((ROWS, LENGTH + 1), np.int32)
    tokens[:, 0] = rng.integers(VOCABULARY, size=ROWS)
    for at in range(LENGTH):
        tokens[:, at + 1] = (5 * tokens[:, at] + rng.integers(3, size=ROWS)) % VOCABULARY
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row in range(ROWS):
        ends = np.sort(rng.choice(np.arange(1, LENGTH + 1), rng.integers(1, 4), replace=False))
        for number, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), 1):
            segments[row, first:end], positions[row, first:end] = number, np.arange(end - first)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "positions": positions,
    }


@functools.cache
def prepare(preset: str, sizes: MeshConfig, how: str) -> tuple[Config, Layout, Callable]:
    """The config, where its state lies, and the compiled step."""
    config = tiny(preset, sequence_attention=how)
    optimizer = make_optimizer(config.optimizer)
    devices = jax.devices()[: math.prod(sizes.sizes)] if -1 not in sizes.sizes else jax.devices()[:1]
    layout = plan_state(config.model, optimizer, make_mesh(sizes, devices))
    return config, layout, compile_train_step(make_train_step(config, optimizer, layout), layout, ROWS, LENGTH)


@functools.cache
def fresh_state(preset: str) -> dict:
    """Of one device, in host memory: that weights are drawn alike on every mesh is tested elsewhere."""
    config = tiny(preset)
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, make_mesh(MeshConfig(), jax.local_devices()[:1]))
    return jax.tree.map(np.asarray, create_state(config.model, optimizer, layout, seed=0))


def curve(preset: str, sizes: MeshConfig, how: str) -> list[float]:
    """The loss of every step."""
    _, layout, step = prepare(preset, sizes, how)
    state, mine = place(fresh_state(preset), layout), host_rows(layout.mesh, ROWS)
    losses = []
    for number in range(STEPS):
        local = {name: array[mine] for name, array in arrays(number).items()}
        state, metrics = step(state, global_batch(layout.mesh, local, ROWS))
        losses.append(float(metrics["loss"]))
    return losses


def place(state: dict, layout: Layout) -> dict:
    def one(x, sharding):
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, state, layout.shardings)


def memory(preset: str, sizes: MeshConfig) -> dict[str, float]:
    """Bytes of the state on one device as the compiler counts them, and of the whole; of the moments, those on one device."""
    _, layout, step = prepare(preset, sizes, "gather")
    batch = sum(array.nbytes for array in arrays(0).values()) // (layout.mesh.size // layout.mesh.shape["tensor"])
    moments = [leaf for leaf in jax.tree.leaves(layout.abstract["opt_state"]) if leaf.ndim]
    return {
        "devices": layout.mesh.size,
        "tensor": layout.mesh.shape["tensor"],
        "bytes": step.memory_analysis().argument_size_in_bytes - batch,
        "whole_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layout.abstract)),
        "donated_bytes": step.memory_analysis().alias_size_in_bytes,
        "moment_bytes": sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in moments),
    }


def orthogonalising(sizes: MeshConfig) -> dict[str, float]:
    """Of a stack of matrices that lie as a layer's do: arithmetic of one device, and how often all see the whole."""
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.sizes)])
    place = NamedSharding(mesh, spec(("layers", "embed", "mlp")))
    stack = jax.ShapeDtypeStruct((8, 64, 128), np.float32, sharding=place)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: orthogonalise(x, 5), out_shardings=place).lower(stack).compile()
    return {"flops": compiled.cost_analysis()["flops"], "gathers": compiled.as_text().count(" all-gather(")}


def one_process(meshes: dict[str, tuple[str, ...]]) -> dict[str, list[float]]:
    return {f"{preset}, {name}": curve(preset, *ONE_PROCESS[name]) for preset in meshes for name in meshes[preset]}


def main(file: str = "", port: str = "", processes: str = "", process: str = "", *presets: str) -> None:
    if processes:
        found = {}
        for preset in presets or PRESETS:
            sizes, how = SEVERAL_PROCESSES[preset]
            found[preset] = curve(preset, dataclasses.replace(sizes, slices=int(processes)), how)
    elif file:
        sizes = [MeshConfig(), MeshConfig(1, 8), MeshConfig(1, 4, 2), *GROWING]
        found = {"curves": one_process(TESTED), "memory": [memory("llama", mesh) for mesh in sizes]}
        found["memory with Muon"] = [memory(MUON, mesh) for mesh in sizes[:3]]
        found["orthogonalising"] = [orthogonalising(MeshConfig(*s)) for s in ((1, 1), (1, 2), (1, 8), (8, 1), (2, 4))]
    else:
        for key, losses in (curves := one_process(dict.fromkeys((*PRESETS, MUON), tuple(ONE_PROCESS)))).items():
            reference = np.array(curves[f"{key.partition(',')[0]}, 1 device"])
            print(f"{key:<50}{losses[-1]:.6f}  {np.abs(np.array(losses) / reference - 1).max():.1e}")
    if file and jax.process_index() == 0:
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
