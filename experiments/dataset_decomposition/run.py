"""The length-bucket experiment from text to table: store, step times, every arm and seed, scores. Run again, it goes on.

python experiments/dataset_decomposition/run.py --data=DIR [--workdir=runs/dataset_decomposition]
python experiments/dataset_decomposition/run.py --embedded [--workdir=runs/dataset_decomposition-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below. --config.KEY=VALUE goes to every training.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import commands  # noqa: E402
from experiments.dataset_decomposition import analyse  # noqa: E402
from experiments.dataset_decomposition.config import ARMS, BUCKETS, CONTROL  # noqa: E402
from mixlab import errors  # noqa: E402

NAME = "dataset_decomposition"
FILES = ("docs_urls/*.jsonl.gz", "novels/*.jsonl.gz", "code_python/*.jsonl.gz", "speeches/*.jsonl.gz")


def main(arguments: list[str]) -> int:
    parser = commands.make_parser(NAME, __doc__)
    parser.add_argument("--arms", default=",".join((*ARMS, CONTROL)), help="default: all of config.py")
    parser.add_argument(
        "--bucket-seeds", default="1,2,3", help="of the runs on one bucket; default 1,2,3; none if empty"
    )
    flags, overrides = commands.parse(parser, NAME, arguments)
    workdir = flags.workdir
    if flags.data is not None:
        os.environ["MIXLAB_DECOMPOSITION_STORE"] = str((workdir / "store").resolve())
        commands.check_files(flags.data, FILES)
        commands.prepare([flags.data / pattern for pattern in FILES], workdir)
    if not (workdir / "cost.json").is_file():
        words = ["--embedded", "--rounds=5", "--steps=25"] if flags.embedded else []
        commands.call("cost", workdir, [str(HERE / "cost.py"), f"--output={workdir / 'cost.json'}", *words])
    # A seed of every arm before the next: what is there when time is up compares.
    runs = [(arm, seed) for seed in flags.seeds.split(",") for arm in flags.arms.split(",")]
    runs += [(arm, seed) for seed in filter(None, flags.bucket_seeds.split(",")) for arm in BUCKETS]
    for arm, seed in runs:
        argument = f"{'embedded,' if flags.embedded else ''}{arm},{seed}"
        if code := commands.train(NAME, workdir / f"{arm}-{seed}", argument, overrides):
            return code
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={commands.as_given(NAME, arguments)}"])


if __name__ == "__main__":
    sys.exit(errors.run(main))
