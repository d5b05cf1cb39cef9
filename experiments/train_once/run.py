"""Many experiments in one run, from text to table: store, controls, treatments, dependence between them. Run again, it goes on.

python experiments/train_once/run.py --data=DIR [--workdir=runs/train_once]
python experiments/train_once/run.py --data=DIR --light
python experiments/train_once/run.py --embedded [--workdir=runs/train_once-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below, and benchmarks. --config.KEY=VALUE goes to every training. --light:
experiments on a fiftieth of the tokens, to see whether they disturb training; dependence is not tested.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import commands  # noqa: E402
from experiments.train_once import analyse  # noqa: E402
from experiments.train_once.config import TASKS  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.sweep import plan_runs, train_all  # noqa: E402

NAME = "train_once"
FILES = (
    "web_c4/*.jsonl.gz",
    "digitalgov/*.jsonl.gz",
    "wiki_passages/*.jsonl.gz",
    "stackexchange/*.jsonl.gz",
)


def main(arguments: list[str]) -> int:
    parser = commands.make_parser(NAME, __doc__)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument(
        "--dependence-steps", type=int, default=30, help="of each part of the dependence test; default 30"
    )
    parser.add_argument(
        "--light", action="store_true", help="on a fiftieth of the tokens; runs go to light/ within workdir"
    )
    parser.add_argument("--short", action="store_true", help="40 steps a run: everything is tried, nothing is learnt")
    flags, overrides = commands.parse(parser, NAME, arguments)
    workdir = flags.workdir
    words = [word for word in ("embedded", "light", "short") if getattr(flags, word)]
    spec = f"{HERE / 'config.py'}:{','.join(['{}', *words])}"
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    if flags.data is not None:
        os.environ["MIXLAB_TRAIN_ONCE_STORE"] = str((workdir / "store").resolve())
        os.environ["MIXLAB_TRAIN_ONCE_BENCHMARKS"] = str((flags.data / "benchmarks").resolve())
        os.environ["MIXLAB_TRAIN_ONCE_ARTICLES"] = str((flags.data / "wiki_passages").resolve() / "*.jsonl.gz")
        commands.check_files(flags.data, (*FILES, *(f"benchmarks/{task}.jsonl.gz" for task in TASKS)))
        commands.prepare([flags.data / pattern for pattern in FILES], workdir)
    if flags.light:
        workdir = workdir / "light"
        workdir.mkdir(exist_ok=True)

    for arm in ("control", "treatment"):
        runs = plan_runs([spec.format(arm)], [], seeds, overrides, workdir)
        if code := train_all(runs, flags.at_once, lambda line: print(line, flush=True)):
            return code
        if arm == "control":
            control = runs[0].folder
    if not flags.light:
        command = [
            "-m",
            "mixlab.dependence",
            f"--config={spec.format('control')}",
            "--config.experiments_enabled=None",
            f"--step={runs[0].config['stages'][0]['steps'] // 2}",
            f"--workdir={control}",
            f"--steps={flags.dependence_steps}",
            "--share=0.02",
            f"--output={workdir / 'dependence'}",
        ]
        commands.call("dependence", workdir, command)
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={commands.as_given(NAME, arguments)}"])


if __name__ == "__main__":
    sys.exit(errors.run(main))
