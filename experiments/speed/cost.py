"""Seconds a step of every arm: a step of each in turn, so that whatever else the machine does slows all of them alike.

python experiments/speed/cost.py --output=cost.json [--embedded] [--rounds=40]
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.speed.config import ARMS, TOKENS_PER_STEP  # noqa: E402
from mixlab import errors  # noqa: E402

CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def measure(words: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """arm -> {"cpu", "wall": seconds of every step, its batch made and trained on}; all arms read the same batches, and
    each trains a model of its own."""
    import jax

    from mixlab import config as configs
    from mixlab.data import open_data
    from mixlab.parallel.mesh import global_batch, make_mesh
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.state import create_state, plan_state
    from mixlab.training.step import compile_train_step, make_train_step

    programs = {}
    for arm in ARMS:
        config = configs.load(f"{HERE / 'config.py'}:{words}{arm}", [])
        stream, mesh, optimizer = open_data(config).stream, make_mesh(config.mesh), make_optimizer(config.optimizer)
        layout = plan_state(config.model, optimizer, mesh)
        step = compile_train_step(make_train_step(config, optimizer, layout), layout, *stream.shape(0))
        programs[arm] = [stream, mesh, step, create_state(config.model, optimizer, layout, config.seed)]
    told: dict[str, dict[str, list[float]]] = {arm: {clock: [] for clock in CLOCKS} for arm in ARMS}
    for turn in range(-1, rounds):  # the first turn warms up
        for arm, program in programs.items():
            (stream, mesh, step, state), began = program, {name: now() for name, now in CLOCKS.items()}
            shape = stream.shape(max(turn, 0))
            program[3], metrics = step(state, global_batch(mesh, stream[max(turn, 0)].arrays(shape.masked), shape.rows))
            jax.block_until_ready((program[3], metrics))
            for name, now in CLOCKS.items():
                told[arm][name] += [now() - began[name]] * (turn >= 0)
    return told


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--embedded", action="store_true", help="the model for the embedded corpus")
    parser.add_argument("--rounds", type=int, default=40, help="steps of every arm; default 40")
    flags = parser.parse_args(arguments)
    seconds = measure("embedded," if flags.embedded else "", flags.rounds)
    flags.output.write_text(json.dumps({"tokens_per_step": TOKENS_PER_STEP, "seconds": seconds}) + "\n")
    for arm, told in seconds.items():
        print(f"{arm}: {', '.join(f'{statistics.median(times):.3f} s {clock}' for clock, times in told.items())}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
