"""AdamW beside Muon, float32 beside bfloat16, from text to table: store, rates, step times, every arm and seed,
scores. Run again, it goes on.

python experiments/speed/run.py --data=DIR [--workdir=runs/speed]
python experiments/speed/run.py --embedded [--workdir=runs/speed-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below. --config.KEY=VALUE goes to every training. On a machine that
other work shares, keep it to a core of its own: taskset -c 1 python experiments/speed/run.py …
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import commands  # noqa: E402
from experiments.speed import analyse  # noqa: E402
from experiments.speed.config import ARMS, CORPORA, RATES, SWEEP_FRACTION, SWEEP_SEED  # noqa: E402
from mixlab import errors  # noqa: E402

NAME = "speed"
FILES = ("docs_urls/*.jsonl.gz", "novels/*.jsonl.gz", "code_python/*.jsonl.gz", "speeches/*.jsonl.gz")


def main(arguments: list[str]) -> int:
    parser = commands.make_parser(NAME, __doc__)
    parser.add_argument("--steps", type=int, help="of a training; default: the configuration's")
    flags, overrides = commands.parse(parser, NAME, arguments)
    workdir = flags.workdir
    if flags.data is not None:
        os.environ["MIXLAB_SPEED_STORE"] = str((workdir / "store").resolve())
        commands.check_files(flags.data, FILES)
        commands.prepare([flags.data / pattern for pattern in FILES], workdir)
    words = "embedded," if flags.embedded else ""
    steps = flags.steps or CORPORA["embedded" if flags.embedded else "text"]["steps"]

    def train(folder: Path, argument: str, *more: str) -> int:
        return commands.train(NAME, folder, f"{words}{argument}", [*more, *overrides])

    (workdir / "rates").mkdir(exist_ok=True)
    for optimizer, peaks in RATES.items():
        for peak in peaks:
            argument = f"{optimizer},{SWEEP_SEED},steps={round(SWEEP_FRACTION * steps)}"
            if code := train(workdir / f"rates/{optimizer}-{peak:g}", argument, f"--config.schedule.peak={peak}"):
                return code
    if not (workdir / "cost.json").is_file():
        fewer = ["--embedded", "--rounds=20"] if flags.embedded else []
        commands.call("cost", workdir, [str(HERE / "cost.py"), f"--output={workdir / 'cost.json'}", *fewer])
    for seed in flags.seeds.split(","):  # a seed of every arm before the next: what is there when time is up compares
        for arm in ARMS:
            if code := train(workdir / f"{arm}-{seed}", f"{arm},{seed},steps={steps}"):
                return code
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={commands.as_given(NAME, arguments)}"])


if __name__ == "__main__":
    sys.exit(errors.run(main))
