"""The length-bucket experiment from text to table: store, step times, every arm and seed, scores. Run again, it goes on.

python experiments/dataset_decomposition/run.py --data=DIR [--workdir=runs/dataset_decomposition]
python experiments/dataset_decomposition/run.py --embedded [--workdir=runs/dataset_decomposition-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below. --config.KEY=VALUE goes to every training.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.dataset_decomposition import analyse  # noqa: E402
from experiments.dataset_decomposition.config import ARMS, BUCKETS  # noqa: E402
from experiments.intervals import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import EXIT_PREEMPTED, UserError  # noqa: E402

FILES = ("docs_urls/*.jsonl.gz", "novels/*.jsonl.gz", "code_python/*.jsonl.gz", "speeches/*.jsonl.gz")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the corpora")
    parser.add_argument("--embedded", action="store_true", help="the corpus of this Python installation")
    parser.add_argument("--workdir", type=Path, help="where runs go; default runs/dataset_decomposition[-embedded]")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--seeds", default="1,2,3", help="default 1,2,3")
    parser.add_argument("--bucket-seeds", default="1", help="of the runs on one bucket; default 1; none if empty")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the summary goes")
    flags, overrides = parser.parse_known_args(arguments)
    if (flags.data is None) == (not flags.embedded):
        raise UserError("give either --data=DIR or --embedded")
    strangers = [o for o in overrides if not o.startswith("--config.")]
    if strangers:
        raise UserError(f"stray argument {strangers[0]!r}; --help lists the flags")
    workdir = flags.workdir or Path("runs/dataset_decomposition" + ("-embedded" if flags.embedded else ""))
    workdir.mkdir(parents=True, exist_ok=True)
    if flags.data is not None:
        os.environ["MIXLAB_DECOMPOSITION_STORE"] = str((workdir / "store").resolve())
        _prepare(flags.data, workdir)
    if not (workdir / "cost.json").is_file():
        words = ["--embedded", "--rounds=5", "--steps=25"] if flags.embedded else []
        _call("cost", workdir, [str(HERE / "cost.py"), f"--output={workdir / 'cost.json'}", *words])
    # A seed of every arm before the next: what is there when time is up compares.
    runs = [(arm, seed) for seed in flags.seeds.split(",") for arm in flags.arms.split(",")]
    runs += [(arm, seed) for seed in filter(None, flags.bucket_seeds.split(",")) for arm in BUCKETS]
    for arm, seed in runs:
        argument = f"{'embedded,' if flags.embedded else ''}{arm},{seed}"
        if code := _train(workdir / f"{arm}-{seed}", argument, overrides):
            return code
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={_command(arguments)}"])


def _prepare(data: Path, workdir: Path) -> None:
    """One store of all corpora: one tokenizer for all, a twentieth of the documents held out by a hash of their ids."""
    empty = [pattern for pattern in FILES if not list(data.glob(pattern))]
    if empty:
        raise UserError(f"--data={data}: holds no {empty[0]}; name the folder with {', '.join(FILES)}")
    inputs = [f"--input={data / pattern}" for pattern in FILES]
    settings = ["--tokenizer=bpe:2048", "--metadata-fields=domain,url", "--validation-per-mille=50"]
    program = str(HERE.parents[1] / "tools/prepare_corpus.py")
    _call("store", workdir, [program, *inputs, *settings, f"--output={workdir / 'store'}"])


def _train(folder: Path, argument: str, more: list[str]) -> int:
    if is_complete(folder):
        return 0
    command = ["-m", "mixlab.train", f"--config={HERE / 'config.py'}:{argument}", f"--workdir={folder}", *more]
    return _call(folder.name, folder.parent, command)


def _call(name: str, workdir: Path, command: list[str]) -> int:
    """Runs Python with `command`, its output in NAME.log; the exit code, 0 or 75 (stopped and saved)."""
    began, log = time.monotonic(), workdir / f"{name}.log"
    print(f"{name}: started, see {log}", flush=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-W", "ignore", *command], stdout=file, stderr=file)
    if done.returncode not in (0, EXIT_PREEMPTED):
        raise UserError(f"{name}: exit code {done.returncode}:\n{log.read_text()[-2000:]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode


def _command(arguments: list[str]) -> str:
    """The command as a reader would give it: folders of this machine by what they hold."""
    kept = [a for a in arguments if not a.startswith(("--data", "--workdir", "--results"))]
    data = ["--data=DATA"] if "--embedded" not in arguments else []
    return " ".join(["python experiments/dataset_decomposition/run.py", *data, *kept])


if __name__ == "__main__":
    sys.exit(errors.run(main))
