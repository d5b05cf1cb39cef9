"""Seconds a step at equal tokens: by length of rows, with document masking and without; and of the steps of every arm.

python experiments/dataset_decomposition/cost.py --output=cost.json [--embedded] [--rounds=9] [--steps=50]

Lengths take turns, and so do arms, so that whatever else the machine does slows all of them alike.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.dataset_decomposition.config import ARMS, LENGTHS, TOKENS_PER_STEP  # noqa: E402
from mixlab import errors  # noqa: E402


def measure(argument: str, tokens_per_step: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """{"plain": {length: seconds of every round}, "masked": the same}: of the train step of the configuration, each
    executable called once before the first round."""
    import jax
    import numpy as np

    from mixlab import config as configs
    from mixlab.parallel.mesh import global_batch, make_mesh
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.state import create_state, plan_state
    from mixlab.training.step import compile_train_step, make_train_step

    config = configs.load(f"{HERE / 'config.py'}:{argument}", [])
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, mesh)
    seconds: dict[str, dict[str, list[float]]] = {"plain": {}, "masked": {}}
    with jax.set_mesh(mesh):
        state = create_state(config.model, optimizer, layout, 0)
        step = make_train_step(config, optimizer, layout)
        programs = []
        for masked in (False, True):
            for length in LENGTHS:
                rows = tokens_per_step // length
                tokens = np.random.default_rng(0).integers(config.model.vocab_size, size=(rows, length), dtype=np.int32)
                batch = {
                    "tokens": tokens,
                    "targets": tokens,
                    "loss_weights": np.ones(tokens.shape, np.float32),
                    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
                }
                batch |= {"segment_ids": np.ones_like(tokens)} if masked else {}
                executable = compile_train_step(step, layout, rows, length, masked)
                times = seconds["masked" if masked else "plain"].setdefault(str(length), [])
                programs.append((executable, global_batch(mesh, batch, rows), times))
        for turn in range(rounds + 1):
            for executable, batch, times in programs:
                began = time.perf_counter()
                state, metrics = executable(state, batch)
                jax.block_until_ready((state, metrics))
                times += [time.perf_counter() - began] * (turn > 0)
    return seconds


def measure_arms(words: str, steps: int) -> dict[str, dict[str, list]]:
    """arm -> {"lengths": of the rows of its first steps, "seconds": of each, its batch made and trained on}. One step of
    every arm, then the next; the arms train one model, of which only the time matters."""
    import jax

    from mixlab import config as configs
    from mixlab.data import open_data
    from mixlab.parallel.mesh import global_batch, make_mesh
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.state import create_state, plan_state
    from mixlab.training.step import compile_train_step, make_train_step

    loaded = {arm: configs.load(f"{HERE / 'config.py'}:{words}{arm}", []) for arm in ARMS}
    streams = {arm: open_data(config).stream for arm, config in loaded.items()}
    config = loaded[ARMS[0]]
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, mesh)
    told: dict[str, dict[str, list]] = {arm: {"lengths": [], "seconds": []} for arm in ARMS}
    with jax.set_mesh(mesh):
        state = create_state(config.model, optimizer, layout, 0)
        train_step = make_train_step(config, optimizer, layout)
        shapes = {shape for stream in streams.values() for shape in stream.shapes()}
        executables = {shape: compile_train_step(train_step, layout, *shape) for shape in sorted(shapes)}
        for step in range(-1, steps):  # the first turn warms up
            for arm, stream in streams.items():
                shape, began = stream.shape(max(step, 0)), time.perf_counter()
                batch = global_batch(mesh, stream[max(step, 0)].arrays(shape.masked), shape.rows)
                state, metrics = executables[shape](state, batch)
                jax.block_until_ready((state, metrics))
                if step >= 0:
                    told[arm]["lengths"].append(shape.length)
                    told[arm]["seconds"].append(time.perf_counter() - began)
    return told


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--embedded", action="store_true", help="the model for the embedded corpus")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=50, help="of every arm; default 50, two of its eight cycles")
    flags = parser.parse_args(arguments)
    words = "embedded," if flags.embedded else ""
    seconds = measure(f"{words}concat", TOKENS_PER_STEP, flags.rounds)
    record = {"tokens_per_step": TOKENS_PER_STEP, "rounds": flags.rounds, "seconds": seconds}
    record["arms"] = measure_arms(words, flags.steps)
    flags.output.write_text(json.dumps(record) + "\n")
    for kind, by_length in seconds.items():
        medians = ", ".join(f"{length}: {statistics.median(times):.3f} s" for length, times in by_length.items())
        print(f"{kind}: {medians}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
