"""Trains a sweep of runs, several at a time, and prints a table of their metrics over the seeds.

python tools/sweep.py --config=FILE[:ARG] [--config=…] [--vary=KEY=VALUE,VALUE …] [--seeds=0,1,2] [--at-once=N] [--output=DIR]

Every combination of configurations, values and seeds is a run. The same command goes on after an interruption, and with
more values or seeds trains only those that are new. --slurm=FILE writes a job array instead of training here. Exit codes
are those of mixlab.train.
"""

import json
import sys
from pathlib import Path

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError
from mixlab.report.sweeps import as_text, sweep_table
from mixlab.sweep import plan_runs, slurm_script, train_all, train_one


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE.py[:ARG]", help="may be given repeatedly")
    add("--vary", action="append", default=[], metavar="KEY=VALUE,VALUE", help="may be given repeatedly")
    add("--seeds", default="0", metavar="N,N", help="0 when left out")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="the runs' folders; runs/sweep-<name of the first file> when left out",
    )
    add("--at-once", type=int, default=1, metavar="N", help="so many runs at a time, each on its share of the cores")
    add("--metrics", default="eval/macro/bits_per_byte", metavar="NAME,NAME", help="as in metrics.jsonl")
    add("--slurm", type=Path, metavar="FILE", help="write a script for sbatch; nothing is trained")
    add("--task", type=int, metavar="I", help="train the I-th run alone: what a job array does")
    add("--table", action="store_true", help="train nothing; the table of what is there")
    add("--json", action="store_true", help="print the table as JSON")
    flags, overrides = parser.parse(arguments)
    try:
        seeds = [int(seed) for seed in flags.seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds={flags.seeds}: give whole numbers, as in --seeds=0,1,2") from None
    if flags.at_once < 1:
        raise UserError(f"--at-once={flags.at_once}: give 1 or more")
    output = flags.output or Path("runs") / f"sweep-{Path(flags.config[0].partition(':')[0]).stem}"
    runs = plan_runs(flags.config, flags.vary, seeds, overrides, output)
    if flags.slurm:
        same = [f"--{name}={value}" for name in ("config", "vary") for value in getattr(flags, name)]
        same += [f"--{name}={value}" for name, value in (("seeds", flags.seeds), ("output", output))] + overrides
        output.mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of its logs
        flags.slurm.write_text(slurm_script([sys.executable, sys.argv[0], *same], runs, flags.at_once, output))
        print(f"{flags.slurm}: {len(runs)} tasks; start them with sbatch {flags.slurm}")
        return 0
    if flags.task is not None:
        if not 0 <= flags.task < len(runs):
            raise UserError(f"--task={flags.task}: the runs are 0 to {len(runs) - 1}")
        return train_one(runs[flags.task])
    code = 0 if flags.table else train_all(runs, flags.at_once, lambda line: print(line, file=sys.stderr, flush=True))
    table = sweep_table(runs, flags.metrics.split(","))
    if output.is_dir():
        (output / "table.json").write_text(json.dumps(table, indent=2) + "\n")
        (output / "table.txt").write_text(as_text(table) + "\n")
    print(json.dumps(table, indent=2) if flags.json else as_text(table))
    if sum(row["seeds"][str(seeds[0])] == "complete" for row in table) > 1:
        report = f"python tools/report.py {output}/*/seed-{seeds[0]}/ --output={output}/report"
        print(f"one seed of each beside the others: {report}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(errors.run(main))
