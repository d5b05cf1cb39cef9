"""Measures speed: the train step beside a plain PyTorch one, and the data path.

python tools/benchmark.py train [--rounds=N] [--json]     6 layers, width 384, vocabulary 8192, length 256, batch 8, float32
python tools/benchmark.py data [--tokens=N] [--json]      document masks, positions, loss weights and provenance; with
                                                          and without metadata in front of documents

CPU-seconds are the figure to quote on a shared machine; wall seconds stand beside them. The train step and its peer run in
turn, each in a process of its own on one and the same core, and the ratio is that of the medians. PyTorch comes with the
`interop` extra; without it the step is measured alone.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mixlab import errors

PEER = Path(__file__).with_name("benchmark_torch_peer.py")
SHAPE = dict(layers=6, d_model=384, heads=6, vocab_size=8192)
ROWS, LENGTH = 8, 256


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=["train", "data", "train-once"])
    parser.add_argument("--rounds", type=int, default=3, help="how often step and peer run in turn")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="read by the data benchmark")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args(arguments)
    measure = {"train": lambda: train(flags.rounds), "data": lambda: data(flags.tokens), "train-once": train_once}
    result = {"machine": _machine()} | measure[flags.what]()
    if flags.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:<40} {value:,.4g}" if isinstance(value, float) else f"{key:<40} {value}")


def train(rounds: int) -> dict:
    """Tokens per CPU-second of the train step and of the peer, by alternating runs."""
    commands = {"mixlab": [sys.executable, __file__, "train-once", "--json"]}
    if importlib.util.find_spec("torch"):
        commands["pytorch"] = [sys.executable, str(PEER), "--json"]
    core = {min(os.sched_getaffinity(0))}
    found: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            run = subprocess.run(
                command, capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, core)
            )
            if run.returncode:
                raise errors.UserError(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1]}")
            found[name].append(json.loads(run.stdout))
    result: dict = {"setting": f"{SHAPE}, {ROWS} rows of {LENGTH}, float32, one core, {rounds} rounds"}
    for name, runs in found.items():
        seconds = [run["median_cpu_seconds_per_step"] for run in runs]
        result[f"{name}: CPU-seconds a step, min..max"] = f"{min(seconds):.3f}..{max(seconds):.3f}"
        result[f"{name}: tokens per CPU-second"] = ROWS * LENGTH / statistics.median(seconds)
    if "pytorch" in found:
        result["mixlab / pytorch"] = result["mixlab: tokens per CPU-second"] / result["pytorch: tokens per CPU-second"]
    return result


def train_once(steps: int = 8) -> dict:
    """Our train step in this process: GPT-2 style, AdamW, clipping; the same work as the peer's."""
    import jax

    from mixlab.config import Config
    from mixlab.model.presets import gpt2
    from mixlab.parallel.mesh import MeshConfig, global_batch, make_mesh
    from mixlab.schedule.stages import StageConfig
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.state import create_state, plan_state
    from mixlab.training.step import compile_train_step, make_train_step

    config = Config(
        model=gpt2(**SHAPE, ffn_width=4 * SHAPE["d_model"], context_length=LENGTH),
        stages=(StageConfig("main", 1000, sequence_length=LENGTH, tokens_per_step=ROWS * LENGTH),),
    )
    mesh = make_mesh(MeshConfig())
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, mesh)
    began = time.process_time()
    step = compile_train_step(make_train_step(config, optimizer, layout), layout, ROWS, LENGTH)
    compile_seconds = time.process_time() - began
    state = create_state(config.model, optimizer, layout, 0)
    grid = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (ROWS, LENGTH + 1)).astype(np.int32)
    local = {
        "tokens": grid[:, :-1],
        "targets": grid[:, 1:],
        "loss_weights": np.ones((ROWS, LENGTH), np.float32),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)),
    }
    cpu, wall = [], []
    for _ in range(steps + 2):
        began, began_wall = time.process_time(), time.perf_counter()
        state, metrics = step(state, global_batch(mesh, local, ROWS))
        jax.block_until_ready((state, metrics))
        cpu.append(time.process_time() - began)
        wall.append(time.perf_counter() - began_wall)
    cpu, wall = sorted(cpu[2:]), sorted(wall[2:])
    return {
        "compile_cpu_seconds": compile_seconds,
        "cpu_seconds_per_step": cpu[0],
        "median_cpu_seconds_per_step": cpu[len(cpu) // 2],
        "median_wall_seconds_per_step": wall[len(wall) // 2],
        "tokens_per_cpu_second": ROWS * LENGTH / cpu[len(cpu) // 2],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state["params"])),
    }


def data(tokens: int) -> dict:
    """The data path alone: from the token store on disk to the batches that are trained on, one thread."""
    from mixlab.corpus import tokenizer
    from mixlab.corpus.writer import finalise, write_shard
    from mixlab.schedule.stages import StageConfig, place_stages
    from mixlab.sequences.documents import Documents
    from mixlab.sequences.metadata import MetadataConfig, make_metadata
    from mixlab.stream import Stream

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, tokens // 500), 8, 100_000).astype(int)
    result: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = [rng.integers(0, 256, n).astype(np.int32) for n in lengths]
        hosts = rng.zipf(1.5, len(lengths)) % 5000
        rows = [
            {"id": str(i), "split": "train", "bytes": int(n), "url": f"https://www.host{host}.org/{i}"}
            for i, (n, host) in enumerate(zip(lengths, hosts, strict=True))
        ]
        letters = tokenizer.load("bytes")
        shard = write_shard(Path(folder), 0, texts, rows, ["url"], letters.vocab_size)
        store = finalise(Path(folder), letters, [shard], {})
        every = np.arange(len(store))
        result["documents"], result["mean_document_tokens"] = len(lengths), float(lengths.mean())
        began = time.process_time()
        metadata = make_metadata(store, MetadataConfig(), every, letters, 0, "url")
        result["metadata: read and tokenised, CPU-seconds"] = time.process_time() - began
        result["metadata: bytes a document"] = metadata.codes.itemsize
        result["metadata: bytes of all strings"] = metadata.tokens.nbytes + metadata.offsets.nbytes
        for length, rows, what in ((1024, 256, None), (1024, 256, metadata), (8192, 32, None), (8192, 32, metadata)):
            documents = Documents(store, every, (), (257,), what)
            named = f"length {length}" + (", metadata" if what else "")
            stage = StageConfig("main", 10**6, sequence_length=length, tokens_per_step=rows * length)
            began = time.process_time()
            stages = place_stages((stage,), lambda *_, d=documents: int(d.lengths.sum()), 0)
            stream = Stream(stages, lambda *_, d=documents: d)
            stream[0]
            result[f"{named}: index, CPU-seconds"] = time.process_time() - began
            steps = -(-tokens // (rows * length))
            cpu, wall = _reading(stream, steps)
            result[f"{named}: tokens per CPU-second"] = steps * rows * length / cpu
            result[f"{named}: tokens per second"] = steps * rows * length / wall
            for mean in (300, 711):  # 711 is the mean of Bordt and Pawelczyk (2025)
                treated = stream.with_insertions(_insertions(stream, steps, mean, letters.eos_id))
                result[f"{named}: more CPU time with items of {mean} tokens over 1.8 % of them"] = _more(
                    stream, treated, steps
                )
    return result


def _more(plain, treated, steps: int) -> float:
    """The share of CPU time that batches of one stream take more than those of another; of each the best of ten."""
    seconds = [[[_reading(s, 1, step)[0] for s in (plain, treated)] for _ in range(10)] for step in range(1, steps)]
    without, with_them = np.median(np.min(seconds, axis=1), axis=0)
    return float(with_them / without) - 1


def _reading(stream, steps: int, first: int = 1) -> tuple[float, float]:
    """Seconds of CPU and of wall time to read some steps."""
    began, began_wall = time.process_time(), time.perf_counter()
    for step in range(first, first + steps):
        stream[step]
    return time.process_time() - began, time.perf_counter() - began_wall


def _insertions(stream, steps: int, mean_tokens: int, eos_id: int):
    """Items of `mean_tokens`, a hundred more or fewer, over 1.8 % of the first steps."""
    from mixlab.inject.items import Group, Items, Where
    from mixlab.inject.placement import place

    count = int(0.018 * steps * stream.stages[0].tokens_per_step / (mean_tokens + 2))
    items = Items.of([np.full(mean_tokens - 100 + i % 201, 7) for i in range(count)])
    return place({"texts": [Group(items, Where(end_step=steps + 1))]}, stream.grid, 0, eos_id)


def _machine() -> str:
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    sys.exit(errors.run(main))
