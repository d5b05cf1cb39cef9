"""Which devices a run fits on, and how long it takes there: memory by arithmetic, time from a stated utilisation.

Parameters and moments are exact: they are the shapes that training itself would make, split over a mesh of that many devices
that need not exist. Activations are estimates, made to agree with the XLA compiler's own account of the train step
(`compiled.memory_analysis()` on CPU, float32): between 0 and 25 % above it for every policy and mesh tried.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from mixlab.config import Config
from mixlab.errors import UserError
from mixlab.model.config import ModelConfig
from mixlab.model.size import flops_per_token, parameter_count
from mixlab.parallel import lengths
from mixlab.parallel.mesh import AXES, MeshConfig, named, row_shards
from mixlab.report.text import duration
from mixlab.schedule.stages import Stage
from mixlab.training.metrics import PEAK_FLOPS
from mixlab.training.optimizer import OptimizerConfig, make_optimizer
from mixlab.training.state import plan_state

GIB = 2**30
# Name -> (name in PEAK_FLOPS, bytes of memory, cores that the cloud's names of slices count for one device of JAX).
KINDS = {
    "a100": ("A100", 80 * GIB, 1),
    "a100-40gb": ("A100", 40 * GIB, 1),
    "b200": ("B200", 180 * GIB, 1),
    "gh200": ("GH200", 96 * GIB, 1),
    "h100": ("H100", 80 * GIB, 1),
    "h200": ("H200", 141 * GIB, 1),
    "l4": ("L4", 24 * GIB, 1),
    "l40s": ("L40S", 48 * GIB, 1),
    "v4": ("TPU v4", 32 * GIB, 2),
    "v5e": ("TPU v5e", 16 * GIB, 1),
    "v5p": ("TPU v5p", 95 * GIB, 2),
    "v6e": ("TPU v6e", 32 * GIB, 1),
}
REMAT = ("none", "dots", "full")
GPU_FRACTION = 0.75  # of a GPU's memory, JAX's default; XLA_PYTHON_CLIENT_MEM_FRACTION changes it
TPU_FRACTION = 0.95  # the rest is the runtime's and the compiled program's


@dataclass(frozen=True)
class Devices:
    """count: devices as JAX counts them.   memory_bytes, usable_bytes, peak_flops: of one."""

    name: str
    count: int
    memory_bytes: int
    usable_bytes: int
    peak_flops: float


def parse_devices(text: str) -> Devices:
    """ "h100", "h100x64", or a slice of TPUs by its name in the cloud: "v5e-16", "v5p-512" (256 chips: v4 and v5p count two
    cores a chip). UserError for anything else."""
    pattern = "|".join(sorted(map(re.escape, KINDS), key=len, reverse=True))
    found = re.fullmatch(rf"({pattern})(?:(x|-)(\d+))?", text.lower())
    kind, sign, number = found.groups() if found else ("", None, None)
    tpu = kind.startswith("v")
    if not found or (sign and sign != ("-" if tpu else "x")):
        raise UserError(
            f"--devices={text}: not known; write KINDxN for GPUs, as in h100x64, or a TPU slice's name, as in v5p-512; "
            f"the kinds are {', '.join(KINDS)}"
        )
    peak_name, memory, cores = KINDS[kind]
    count, rest = divmod(int(number) if number else cores, cores)
    if count < 1 or rest:
        raise UserError(f"--devices={text}: the number counts cores, {cores} a chip; give a multiple of {cores}")
    fraction = TPU_FRACTION if tpu else float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_FRACTION))
    return Devices(text, count, memory, int(memory * fraction), dict(PEAK_FLOPS)[peak_name])


@functools.cache
def state_bytes(model: ModelConfig, optimizer: OptimizerConfig, mesh: MeshConfig) -> dict[str, int]:
    """Bytes of one device for "parameters" and "moments" (with the optimiser's counters). UserError when the mesh does not
    fit the model."""
    sizes = AbstractMesh(mesh.sizes, AXES)
    abstract = plan_state(model, make_optimizer(optimizer), sizes).abstract

    def total(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return {"parameters": total(abstract["params"]), "moments": total(abstract["opt_state"])}


def activation_bytes(config: Config, mesh: MeshConfig, tokens: int, remat: str | None = None) -> int:
    """Bytes of one device for what the forward pass leaves to the backward pass of `tokens` of its own tokens at a time,
    and for the layer being differentiated."""
    c, split = config.model, mesh.tensor
    width = c.d_model
    heads, kv, mlp = c.heads * c.head_dim / split, c.kv_heads * c.head_dim / split, c.ffn_width / split
    projected = 2 if c.activation == "swiglu" else 1
    kept = {
        # What projections, norms and attention read and give: the inside of norms and activations is computed again.
        "none": 5 * width + 2 * heads + 2 * kv + (projected + 1) * mlp,
        # Its input; what attention gives; and what the projections give, but for the last, which is only added.
        "dots": 2 * width + 2 * heads + 2 * kv + projected * mlp,
        "full": width,
    }
    saved = c.layers * tokens * kept[remat or c.remat] * _compute_bytes(config)
    return int(saved + layer_bytes(config, mesh, tokens))


def layer_bytes(config: Config, mesh: MeshConfig, tokens: int) -> int:
    """Bytes of one device for everything a layer computes that its gradient needs: norms, rotated and plain queries and
    keys, the MLP's inside."""
    c, split = config.model, mesh.tensor
    heads, kv, mlp = c.heads * c.head_dim / split, c.kv_heads * c.head_dim / split, c.ffn_width / split
    values = 10 * c.d_model + 4 * heads + 2 * kv + (5 if c.activation == "swiglu" else 4) * mlp
    if mesh.sequence > 1 and c.sequence_attention == "gather":
        # Keys and values of whole rows, as they come and in pieces, and their float32 gradients.
        values += 2 * kv * mesh.sequence * (2 + 4 / _compute_bytes(config))
    return int(tokens * values * _compute_bytes(config))


def loss_bytes(config: Config, mesh: MeshConfig, tokens: int) -> int:
    """Bytes of one device for the gradient of the output matrix, and for a chunk's logits and their gradient, float32, as far
    as they do not fit where the layers' gradients will be made."""
    c = config.model
    vocabulary = c.padded_vocab_size / mesh.tensor
    logits = 8 * vocabulary * min(config.training.loss_chunk_tokens, tokens)
    return int(max(0, logits - layer_bytes(config, mesh, tokens)) + c.d_model * vocabulary * 4)


def gathered_bytes(config: Config, mesh: MeshConfig) -> int:
    """Bytes of one device for weights that fsdp and sequence bring together: two layers in the compute type, one layer's
    gradient, and the embedding."""
    if mesh.fsdp * mesh.sequence == 1:
        return 0
    c = config.model
    tables = c.padded_vocab_size * c.d_model * (1 if c.tied_head else 2)
    layer = (parameter_count(c) - tables) / c.layers
    return int((layer * (2 * _compute_bytes(config) + 4) + tables * _compute_bytes(config)) / mesh.tensor)


def _compute_bytes(config: Config) -> int:
    return {"bfloat16": 2, "float32": 4, "float64": 8}[config.model.compute_dtype]


def memory(config: Config, mesh: MeshConfig, stages: tuple[Stage, ...]) -> dict[str, int]:
    """Bytes of one device by what they are for, at their highest: in the stage with the most tokens a step."""
    parts = config.training.accumulation_steps
    tokens = max(stage.tokens_per_step for stage in stages) // (token_shards(mesh) * parts)
    state = state_bytes(dataclasses.replace(config.model, remat="none"), config.optimizer, mesh)
    return state | {
        "gradients": state["parameters"] * (1 if parts == 1 else 2),
        "activations": activation_bytes(config, mesh, tokens),
        "loss": loss_bytes(config, mesh, tokens),
        "gathered weights": gathered_bytes(config, mesh),
    }


def resolve(mesh: MeshConfig, devices: int) -> MeshConfig:
    """The mesh with its -1 replaced. UserError when the sizes do not use every device."""
    fixed = math.prod(size for size in mesh.sizes if size != -1)
    sizes = (devices // fixed if size == -1 else size for size in mesh.sizes)
    whole = dataclasses.replace(mesh, **dict(zip(AXES, sizes, strict=True)))
    if math.prod(whole.sizes) != devices:
        raise UserError(
            f"mesh: {named(mesh.sizes)} does not use {devices} devices; set the sizes so that their product is that number, "
            "or one of them to -1"
        )
    return whole


def token_shards(mesh: MeshConfig) -> int:
    """Into how many parts the tokens of a batch are divided."""
    return row_shards(vars(mesh)) * mesh.sequence


def fits(config: Config, mesh: MeshConfig, stages: tuple[Stage, ...], devices: Devices) -> bool:
    try:
        needed = sum(memory(config, mesh, stages).values())
    except UserError:  # the model cannot be split so
        return False
    return needed <= devices.usable_bytes and not _unsplit(config, mesh, stages)


def plan_on(config: Config, stages: tuple[Stage, ...], devices: Devices, utilisation: float) -> dict:
    """Memory, operations and expected time on these devices, as JSON holds them. UserError when it cannot run there, with the
    nearest settings that can."""
    mesh = resolve(config.mesh, devices.count)
    if wrong := _unsplit(config, mesh, stages):
        raise UserError("\n".join(f"--devices={devices.name}: {problem}" for problem in wrong))
    needed = memory(config, mesh, stages)
    if sum(needed.values()) > devices.usable_bytes:
        parts = ", ".join(f"{name} {count / GIB:,.1f}" for name, count in needed.items())
        raise UserError(
            f"--devices={devices.name}: the run needs {sum(needed.values()) / GIB:,.1f} GiB a device ({parts}), and "
            f"{devices.usable_bytes / GIB:,.1f} of {devices.memory_bytes / GIB:,.0f} GiB can be used; "
            f"{_remedy(config, mesh, stages, devices)}"
        )
    speed = devices.count * devices.peak_flops * utilisation
    told = []
    for stage in stages:
        per_step = {n: stage.tokens_per_step * flops_per_token(config.model, n) for n in stage.mixtures}
        flops = sum(stage.batches(length) * operations for length, operations in per_step.items())
        told.append(
            {
                "name": stage.name,
                "tokens_per_step": stage.tokens_per_step,
                "tokens_per_device_and_step": stage.tokens_per_step // devices.count,
                "flops_per_step": flops / stage.steps,
                "step_seconds": flops / stage.steps / speed,
                "seconds": flops / speed,
            }
        )
    tokens = max(s.tokens_per_step for s in stages) // (token_shards(mesh) * config.training.accumulation_steps)
    return {
        "name": devices.name,
        "devices": devices.count,
        "mesh": dict(zip(AXES, mesh.sizes, strict=True)),
        "meshes_by_length": _meshes_by_length(config, mesh, stages),
        "memory_bytes": devices.memory_bytes,
        "usable_bytes": devices.usable_bytes,
        "peak_flops": devices.peak_flops,
        "mfu": utilisation,
        "needed_bytes": needed,
        "activation_bytes_by_remat": {remat: activation_bytes(config, mesh, tokens, remat) for remat in REMAT},
        "stages": told,
    }


def as_text(plan: dict) -> str:
    """`plan_on` for people."""
    mesh = named(plan["mesh"].values())
    needed, stages = plan["needed_bytes"], plan["stages"]
    lines = [
        f"on {plan['name']}: {plan['devices']:,} devices of {plan['memory_bytes'] / GIB:,.0f} GiB and "
        f"{plan['peak_flops'] / 1e12:,.0f} TFLOP/s (bfloat16); {mesh}",
        f"  memory of a device: {sum(needed.values()) / GIB:,.2f} GiB of the {plan['usable_bytes'] / GIB:,.1f} usable",
        *(f"    {name:<18}{count / GIB:>9,.2f} GiB" for name, count in needed.items()),
        "    (activations by model.remat: "
        + ", ".join(f"{remat} {count / GIB:,.2f}" for remat, count in plan["activation_bytes_by_remat"].items())
        + " GiB)",
    ]
    for length, sizes in plan["meshes_by_length"].items():
        lines.append(f"  rows of {length} tokens: {named(sizes.values())}")
    for stage in stages:
        lines.append(
            f"  stage {stage['name']}: {stage['tokens_per_device_and_step']:,} tokens a device and step, "
            f"{stage['flops_per_step']:.3g} floating-point operations a step: {stage['step_seconds']:.3g} s a step at "
            f"{plan['mfu']:.0%} of the peak, {duration(stage['seconds'])} in all"
        )
    return "\n".join(lines)


def _unsplit(config: Config, mesh: MeshConfig, stages: tuple[Stage, ...]) -> list[str]:
    return lengths.problems(mesh, config.model, stages, config.training.accumulation_steps)


def _meshes_by_length(config: Config, mesh: MeshConfig, stages: tuple[Stage, ...]) -> dict[str, dict[str, int]]:
    """Length of rows -> the mesh that serves them, of lengths that another mesh serves than the run's."""
    found = {}
    for stage in stages:
        for rows, length in stage.shapes():
            sizes = lengths.sizes_for(mesh, rows, length, config.training.accumulation_steps)
            if sizes not in (None, mesh):
                found[f"{length:,}"] = dict(zip(AXES, sizes.sizes, strict=True))
    return found


def _remedy(config: Config, mesh: MeshConfig, stages: tuple[Stage, ...], devices: Devices) -> str:
    for count in (devices.count * factor for factor in (1, 2, 4, 8, 16, 32, 64)):
        for flags, changed, other in _changes(config, mesh, count, devices.usable_bytes):
            if fits(changed, other, stages, devices):
                what = " ".join(f"--config.{key}={value}" for key, value in flags.items())
                more = "" if count == devices.count else f"{count:,} devices"
                return f"nearest that fits: {' and '.join(filter(None, (more, what)))}"
    return "no more devices and no setting help; use fewer tokens a step or a smaller model"


def _changes(
    config: Config, mesh: MeshConfig, devices: int, usable_bytes: int
) -> Iterator[tuple[dict, Config, MeshConfig]]:
    """Settings that save memory, those that cost least first: splitting the parameters, then accumulation and
    recomputing, then splitting the layers."""
    model, training = config.model, config.training
    kept = mesh.sequence * mesh.expert
    options = []
    for t, f, remat, p in itertools.product(range(4), range(14), REMAT[REMAT.index(model.remat) :], range(7)):
        tensor, fsdp, parts = mesh.tensor * 2**t, mesh.fsdp * 2**f, training.accumulation_steps * 2**p
        least = 12 * parameter_count(model) / (tensor * fsdp * mesh.sequence)  # parameter, moment and gradient
        if devices % (tensor * fsdp * kept) == 0 and least < usable_bytes:
            cost = 0.1 * f + p + 1.5 * (REMAT.index(remat) - REMAT.index(model.remat)) + 4 * t
            options.append((cost, tensor, fsdp, remat, parts))
    for _, tensor, fsdp, remat, parts in sorted(options):
        other = dataclasses.replace(mesh, data=devices // (tensor * fsdp * kept), fsdp=fsdp, tensor=tensor)
        values = {
            "mesh.data": (config.mesh.data, other.data),
            "mesh.fsdp": (mesh.fsdp, fsdp),
            "mesh.tensor": (mesh.tensor, tensor),
            "training.accumulation_steps": (training.accumulation_steps, parts),
            "model.remat": (model.remat, remat),
        }
        if config.mesh.data == -1:
            del values["mesh.data"]
        changed = dataclasses.replace(
            config,
            model=dataclasses.replace(model, remat=remat),
            training=dataclasses.replace(training, accumulation_steps=parts),
        )
        yield {key: new for key, (old, new) in values.items() if new != old}, changed, other
