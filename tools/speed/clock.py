"""What is measured against: the machine's name, the highest rate that a large matrix product reaches, times of a call."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from mixlab.training.metrics import peak_flops


@dataclass(frozen=True)
class Times:
    """Seconds of repeated calls: CPU time of this process, which other programs disturb little, and wall time."""

    cpu: list[float]
    wall: list[float]

    def of(self, clock: str) -> float:
        """The median by "cpu" or "wall"."""
        return statistics.median(getattr(self, clock))

    def spread(self, clock: str) -> str:
        values = getattr(self, clock)
        return f"{min(values):.4g}..{max(values):.4g}"


def machine() -> str:
    """The processor or accelerators, cores, Python and jax, in words."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        what = f"{len(devices)} x {devices[0].device_kind}"
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
        what = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
    return f"{what}, Python {platform.python_version()}, jax {jax.__version__}"


def clock() -> str:
    """Which of the times to quote here: CPU-seconds where the work is done by this process, wall seconds on accelerators."""
    return "cpu" if jax.default_backend() == "cpu" else "wall"


def timed(call: Callable, repeats: int, warm_up: int = 2) -> Times:
    """Times `call`, whose result is waited for, after `warm_up` calls that do not count."""
    cpu, wall = [], []
    for turn in range(warm_up + repeats):
        began, began_wall = time.process_time(), time.perf_counter()
        jax.block_until_ready(call())
        if turn >= warm_up:
            cpu.append(time.process_time() - began)
            wall.append(time.perf_counter() - began_wall)
    return Times(cpu, wall)


def peak(dtype: str) -> tuple[float, str]:
    """(FLOP/s of this device, where the figure is from): by the device's name for bfloat16, otherwise the best of some large
    matrix products made just now, by the clock that is quoted."""
    named = peak_flops(jax.devices()[0])
    if named is not None and dtype == "bfloat16":
        return named, f"the data sheet of {jax.devices()[0].device_kind}"
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    times = getattr(timed(lambda: product(a), 8), clock())
    return 2 * size**3 / min(times), f"a product of {size} x {size} matrices in {dtype}, by {clock()} time"
