"""Measures speed.

python tools/benchmark.py train        6 layers, width 384, vocabulary 8192, length 256, batch 8, float32, on one core, beside
                                       plain PyTorch; the same in bfloat16
python tools/benchmark.py data         from token store to batches; indices; a far step
python tools/benchmark.py attention    forward and backward, masked and not, beside the whole score matrix
python tools/benchmark.py loss         the fused loss beside one that holds all logits
python tools/benchmark.py buckets      a step of each length bucket against its share of the arithmetic
python tools/benchmark.py optimizers   a step with AdamW and with Muon
python tools/benchmark.py startup      imports; from the command to the first step with six buckets
python tools/benchmark.py accelerator  on a GPU or TPU, in about eight minutes: GPT-2 124M and 1.5B, long packed rows,
                                       attention, loss, buckets

--json prints one JSON object. --profile=DIR writes a trace of train steps there and prints what took longest. --keep adds the
figures to tools/speed/history.jsonl; figures of the same machine that are kept there stand beside the new ones.

CPU-seconds are quoted on CPU, where other programs disturb them little, wall seconds on accelerators; medians throughout.
The train step and its peer run in turn, each in a process of its own on one and the same core. PyTorch comes with the
`interop` extra; without it the step is measured alone.
"""

import argparse
import json
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from speed import clock, data, profile, startup, trains

from mixlab import errors
from mixlab.parallel import host_memory, xla_flags

HISTORY = Path(__file__).with_name("speed") / "history.jsonl"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    measures = {
        "train": lambda: trains.beside_peer(flags.rounds),
        "step": lambda: trains.step(flags.dtype, flags.profile),
        "data": lambda: data.reading(flags.tokens) | data.index(flags.documents),
        "attention": lambda: trains.attention(flags.dtype),
        "loss": lambda: trains.loss(flags.dtype),
        "buckets": lambda: trains.buckets(flags.dtype),
        "optimizers": lambda: trains.optimizers(flags.dtype),
        "startup": lambda: startup.imports() | startup.first_step(),
        "accelerator": lambda: trains.accelerator(flags.profile),
    }
    parser.add_argument("what", choices=list(measures), help="step: the train step alone, in this process")
    parser.add_argument("--rounds", type=int, default=3, help="how often step and peer run in turn")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="read by the data benchmark")
    parser.add_argument("--documents", type=int, default=10_000_000, help="in the index that the data benchmark builds")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the arithmetic")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="of train steps; for step and accelerator")
    parser.add_argument("--keep", action="store_true", help="add the figures to the history")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--without-flags", action="store_true", help="leave out mixlab's own compiler flags")
    flags = parser.parse_args(arguments)
    if not flags.without_flags:
        xla_flags.set_flags()
    result = {"machine": clock.machine()} | xla_flags.in_force() | measures[flags.what]()
    command = " ".join(["python tools/benchmark.py", *(a for a in arguments if a not in ("--keep", "--json"))])
    earlier = _earlier(result["machine"], command)
    if flags.json:
        print(json.dumps(result))
    else:
        _print(result, earlier)
    if flags.keep:
        with HISTORY.open("a") as file:
            file.write(json.dumps({"date": date.today().isoformat(), "command": command} | result) + "\n")
    if flags.profile:
        place = sys.stderr if flags.json else sys.stdout
        for name, seconds, calls in profile.longest(flags.profile):
            print(f"{seconds:10.4f} s {calls:6} x  {name}", file=place)
        gaps, whole = profile.idle(flags.profile)
        print(f"{gaps:10.4f} s of {whole:.4f} s idle between steps", file=place)


def _earlier(machine: str, command: str) -> dict:
    """What the same command found on this machine when its figures were last kept."""
    lines = HISTORY.read_text().splitlines() if HISTORY.is_file() else []
    kept = [entry for entry in map(json.loads, lines) if (entry["machine"], entry["command"]) == (machine, command)]
    return kept[-1] if kept else {}


def _print(result: dict, earlier: dict) -> None:
    width = max(len(key) for key in result)
    for key, value in result.items():
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        known = earlier.get(key)
        then = f"   {value / known:.2f} of {earlier['date']}" if isinstance(value, float) and known else ""
        print(f"{key:<{width}}  {text}{then}")


if __name__ == "__main__":
    host_memory.keep_freed()
    sys.exit(errors.run(main))
