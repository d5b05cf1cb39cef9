"""Compiler flags that training sets for each backend, in one table: what each does, and what it was measured to gain.

Only what the documentation of JAX recommends for transformers (its "GPU performance tips" and "XLA compiler flags"). An unknown flag
ends the process when JAX starts: the tests try every one of XLA's on the installed jaxlib.
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """variable: of the environment, that the backend reads.   gain: as measured, by which command."""

    variable: str
    name: str
    value: str
    does: str
    gain: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


XLA, LIBTPU = "XLA_FLAGS", "LIBTPU_INIT_ARGS"
ALONE = "not measured: concerns several devices"

FLAGS: dict[str, tuple[Flag, ...]] = {
    # Nothing helps. CPU-seconds a step of `python tools/benchmark.py step` on an AMD EPYC core, with jax 0.10.2: 1.51 as it is,
    # 1.51 with xla_cpu_enable_fast_math, 1.51 with xla_cpu_prefer_vector_width=512, 1.51 with xla_cpu_opt_preset=FAST_RUNTIME.
    "cpu": (),
    # xla_gpu_triton_gemm_any is recommended by some and switched off by others: left as XLA has it.
    "gpu": (
        Flag(XLA, "xla_gpu_enable_latency_hiding_scheduler", "true", "collectives run beside arithmetic", ALONE),
        Flag(XLA, "xla_gpu_enable_pipelined_all_gather", "true", "a layer's weights come during the one before", ALONE),
        Flag(XLA, "xla_gpu_enable_pipelined_reduce_scatter", "true", "its gradient goes during the next", ALONE),
        Flag(XLA, "xla_gpu_enable_pipelined_all_reduce", "true", "the same, where weights are whole", ALONE),
    ),
    "tpu": (
        Flag(LIBTPU, "xla_tpu_enable_async_collective_fusion", "true", "collectives run within arithmetic", ALONE),
        Flag(LIBTPU, "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "so do all-gathers", ALONE),
        Flag(LIBTPU, "xla_tpu_overlap_compute_collective_tc", "true", "also on a single TensorCore", ALONE),
    ),
}
# Backend -> its names in JAX_PLATFORMS, and the packages of which one makes JAX look for its devices.
PLUGINS = {"gpu": (("cuda", "gpu"), ("jax_cuda12_plugin", "jax_cuda13_plugin")), "tpu": (("tpu",), ("libtpu",))}


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the flags of the backends that may be found here, but for those that the user has set himself. Call it before JAX
    starts a backend; afterwards it changes nothing."""
    for backend in accelerators(environment) or ("cpu",):
        add(FLAGS[backend], environment)


def accelerators(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The backends besides the CPU's that JAX will look for devices of."""
    asked_for = (environment.get("JAX_PLATFORMS") or "cuda,tpu").split(",")
    return tuple(
        backend
        for backend, (names, packages) in PLUGINS.items()
        if {*names} & {*asked_for} and any(map(importlib.util.find_spec, packages))
    )


def add(flags: tuple[Flag, ...], environment: MutableMapping[str, str]) -> None:
    """Adds these flags, but for those that are there with any value."""
    for flag in flags:
        given = environment.get(flag.variable, "").split()
        if not any(word.lstrip("-").split("=")[0] == flag.name for word in given):
            environment[flag.variable] = " ".join([*given, str(flag)])


def in_force() -> dict[str, str]:
    """The variables that hold flags, the user's and ours."""
    return {name: os.environ[name] for name in (XLA, LIBTPU) if os.environ.get(name)}
