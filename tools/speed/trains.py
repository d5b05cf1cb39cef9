"""What tools/benchmark.py measures of models: which settings, beside what."""

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax

from mixlab.errors import UserError
from mixlab.model.presets import gpt2, llama
from mixlab.model.size import flops_per_token
from speed import clock, kernels
from speed.steps import FORMULA, Setting, measure

TOOLS = Path(__file__).resolve().parents[1]
SMALL = gpt2(layers=6, d_model=384, heads=6, vocab_size=8192, ffn_width=1536, context_length=256)
ROWS, LENGTH = 8, 256
ACCELERATOR_SECONDS = 420  # after which no part of `accelerator` begins, so that all of it takes about eight minutes


def beside_peer(rounds: int) -> dict:
    """Tokens per CPU-second of the small train step in float32 and bfloat16, and of the peer, in turn on one core."""
    ours = [sys.executable, str(TOOLS / "benchmark.py"), "step", "--json"]
    commands = {"mixlab": ours, "mixlab bfloat16": [*ours, "--dtype=bfloat16"]}
    if importlib.util.find_spec("torch"):
        commands["pytorch"] = [sys.executable, str(TOOLS / "benchmark_torch_peer.py"), "--json"]
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # what is started below inherits it
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # also where there is an accelerator
    found: dict[str, list[float]] = {name: [] for name in commands}
    told: dict[str, dict] = {}
    for _ in range(rounds):
        for name, command in commands.items():
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            if run.returncode:
                raise UserError(f"{' '.join(command)} failed: {(run.stderr.strip().splitlines() or [''])[-1]}")
            told[name] = json.loads(run.stdout)
            found[name].append(
                told[name].get("seconds a step by cpu time") or told[name]["median_cpu_seconds_per_step"]
            )
    os.sched_setaffinity(0, allowed)
    result: dict = {
        "machine": told["mixlab"]["machine"],
        "setting": f"GPT-2, 6 layers, width 384, vocabulary 8192, {ROWS} rows of {LENGTH}, one core, {rounds} rounds",
    }
    for name, seconds in found.items():
        result[f"{name}: CPU-seconds a step, min..max"] = f"{min(seconds):.3f}..{max(seconds):.3f}"
        result[f"{name}: tokens per CPU-second"] = ROWS * LENGTH / statistics.median(seconds)
    for name in ("mixlab", "mixlab bfloat16"):
        if "pytorch" in found:
            ratio = statistics.median(found["pytorch"]) / statistics.median(found[name])
            result[f"{name} / pytorch float32, tokens per CPU-second"] = ratio
    return result


def step(dtype: str, profile: Path | None) -> dict:
    """The small train step in this process."""
    return {"formula": FORMULA} | measure(Setting(_in(SMALL, dtype), ROWS, LENGTH), 8, profile)


ON_CPU = [(8, 256, 6, 64, None), (4, 1024, 6, 64, 400), (1, 8192, 6, 64, 600)]
ON_ACCELERATOR = [(32, 1024, 12, 64, None), (32, 1024, 12, 64, 400), (4, 8192, 12, 64, None), (4, 8192, 12, 64, 600)]


def attention(dtype: str) -> dict:
    if jax.default_backend() == "cpu":
        return kernels.attention(ON_CPU, dtype, 5)
    return kernels.attention(ON_ACCELERATOR, dtype, 20)


def loss(dtype: str) -> dict:
    if jax.default_backend() == "cpu":
        return kernels.loss(2048, 384, 8192, dtype, 5)
    return kernels.loss(32768, 768, 50304, dtype, 20)


def buckets(dtype: str) -> dict:
    """Steps of as many tokens in rows of each length: time a step over that of the longest, beside the arithmetic's."""
    cpu = jax.default_backend() == "cpu"
    model = (
        llama(layers=4, d_model=192, heads=6, vocab_size=4096, context_length=2048)
        if cpu
        else _gpu(
            llama("7B", layers=8, d_model=1024, heads=16, kv_heads=16, head_dim=64, ffn_width=2816, context_length=8192)
        )
    )
    model, lengths = _in(model, dtype), (64, 256, 1024, 2048) if cpu else (256, 512, 1024, 2048, 4096, 8192)
    tokens = lengths[-1] * (2 if cpu else 8)
    which, found, costs = clock.clock(), {}, {}
    for length in lengths:
        costs[length] = measure(Setting(model, tokens // length, length), 5)[f"seconds a step by {which} time"]
    for length in lengths:
        ideal = flops_per_token(model, length) / flops_per_token(model, lengths[-1])
        found[f"rows of {length}: seconds a step by {which} time"] = costs[length]
        found[f"rows of {length}: time over arithmetic, 1 for rows of {lengths[-1]}"] = (
            costs[length] / costs[lengths[-1]] / ideal
        )
    return found


def optimizers(dtype: str) -> dict:
    """The small train step with each optimiser."""
    found, which = {}, clock.clock()
    for name in ("adamw", "muon"):
        told = measure(Setting(_in(SMALL, dtype), ROWS, LENGTH, optimizer=name), 8)
        found |= {f"{name}: {key}": told[key] for key in (f"seconds a step by {which} time", "memory: temporary, MiB")}
    return found


def accelerator(profile: Path | None) -> dict:
    """What a GPU or TPU is judged by, in bfloat16; the most important first. Told on the way, too, so that a run that is cut
    off is not lost; what does not begin within ACCELERATOR_SECONDS is left out."""
    if jax.default_backend() == "cpu":
        raise UserError("accelerator: this machine has none; `train` and the others measure what it has")
    long = dict(context_length=8192, vocab_size=32_000)
    settings = {
        "GPT-2 124M, 1024": Setting(_gpu(gpt2("124M")), 32, 1024),
        "GPT-2 1.5B, 2048": Setting(_gpu(gpt2("1558M", context_length=2048), "dots"), 4, 2048),
        "Llama 190M, 8192": Setting(_gpu(llama(layers=12, d_model=768, heads=12, **long)), 4, 8192),
        "Llama 190M, 8192, packed": Setting(_gpu(llama(layers=12, d_model=768, heads=12, **long)), 4, 8192, 600),
        "GPT-2 124M, 1024, layers scanned": Setting(_gpu(gpt2("124M", layer_loop="scan")), 32, 1024),
        "GPT-2 124M, 1024, packed": Setting(_gpu(gpt2("124M")), 32, 1024, 400),
        "GPT-2 1.5B, 2048, layers unrolled": Setting(
            _gpu(gpt2("1558M", context_length=2048, layer_loop="unroll"), "dots"), 4, 2048
        ),
    }
    last = "GPT-2 1.5B, 2048, layers unrolled"  # what takes longest to compile
    parts: dict[str, Callable[[], dict]] = {
        f"agreement, {name}": partial(kernels.agreement, name) for name in kernels.here()
    }
    for name, setting in settings.items():
        parts[name] = partial(measure, setting, 10, profile if name == "GPT-2 124M, 1024" else None)
    parts |= {f"attention, {shape}": partial(kernels.attention, [shape], "bfloat16", 20) for shape in ON_ACCELERATOR}
    parts |= {"buckets": partial(buckets, "bfloat16"), "loss": partial(loss, "bfloat16")}
    parts[last] = parts.pop(last)
    until = time.monotonic() + ACCELERATOR_SECONDS
    found: dict = {"formula": FORMULA}
    for name, part in parts.items():
        told = _told(name, part, until)
        found |= {f"{name}: {key}" if name in settings and key != name else key: told[key] for key in told}
    packed, single = (found.get(f"Llama 190M, 8192{kind}: wall seconds a step") for kind in (", packed", ""))
    if packed and single:
        found["Llama 190M, 8192: time of packed rows over that of single documents"] = packed / single
    return found


def _told(name: str, part: Callable[[], dict], until: float) -> dict:
    """What the part finds; or how it failed, so that a machine that is lent for minutes tells all the others."""
    if time.monotonic() > until:
        return {name: f"left out: {ACCELERATOR_SECONDS} seconds were over"}
    try:
        found = part()
    except Exception as error:
        found = {name: f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
    print(json.dumps({name: found}), file=sys.stderr, flush=True)
    return found


def _in(model, dtype: str):
    return dataclasses.replace(model, compute_dtype=dtype)


def _gpu(model, remat: str = "none"):
    return dataclasses.replace(model, compute_dtype="bfloat16", remat=remat)
