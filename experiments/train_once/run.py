"""Many experiments in one run, from text to table: store, controls, treatments, dependence between them. Run again, it goes on.

python experiments/train_once/run.py --data=DIR [--workdir=runs/train_once]
python experiments/train_once/run.py --embedded [--workdir=runs/train_once-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below, and benchmarks. --config.KEY=VALUE goes to every training.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.train_once import analyse  # noqa: E402
from experiments.train_once.config import TASKS  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import UserError  # noqa: E402
from mixlab.sweep import plan_runs, train_all  # noqa: E402

FILES = (
    "web_c4/*.jsonl.gz",
    "digitalgov/*.jsonl.gz",
    "wiki_passages/*.jsonl.gz",
    "stackexchange/*.jsonl.gz",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the corpora and benchmarks")
    parser.add_argument("--embedded", action="store_true", help="the corpus of this Python installation")
    parser.add_argument("--workdir", type=Path, help="where runs go; default runs/train_once, runs/train_once-embedded")
    parser.add_argument("--seeds", default="1,2,3", help="default 1,2,3")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument(
        "--dependence-steps", type=int, default=30, help="of each part of the dependence test; default 30"
    )
    parser.add_argument("--short", action="store_true", help="40 steps a run: everything is tried, nothing is learnt")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the summary goes")
    flags, overrides = parser.parse_known_args(arguments)
    if (flags.data is None) == (not flags.embedded):
        raise UserError("give either --data=DIR or --embedded")
    if strangers := [o for o in overrides if not o.startswith("--config.")]:
        raise UserError(f"stray argument {strangers[0]!r}; --help lists the flags")
    workdir = flags.workdir or Path("runs/train_once-embedded" if flags.embedded else "runs/train_once")
    workdir.mkdir(parents=True, exist_ok=True)
    words = ",".join(word for word, on in (("embedded", flags.embedded), ("short", flags.short)) if on)
    spec = f"{HERE / 'config.py'}:{{}}{',' + words if words else ''}"
    seeds = [int(seed) for seed in flags.seeds.split(",")]
    if flags.data is not None:
        os.environ["MIXLAB_TRAIN_ONCE_STORE"] = str((workdir / "store").resolve())
        os.environ["MIXLAB_TRAIN_ONCE_BENCHMARKS"] = str((flags.data / "benchmarks").resolve())
        os.environ["MIXLAB_TRAIN_ONCE_ARTICLES"] = str((flags.data / "wiki_passages").resolve() / "*.jsonl.gz")
        _prepare(flags.data, workdir)

    for arm in ("control", "treatment"):
        runs = plan_runs([spec.format(arm)], [], seeds, overrides, workdir)
        if code := train_all(runs, flags.at_once, lambda line: print(line, flush=True)):
            return code
        if arm == "control":
            control = runs[0].folder
    dependence = workdir / "dependence"
    _call(
        "dependence",
        workdir,
        [
            "-m",
            "mixlab.dependence",
            f"--config={spec.format('control')}",
            "--config.experiments_enabled=None",
            f"--step={runs[0].config['stages'][0]['steps'] // 2}",
            f"--workdir={control}",
            f"--steps={flags.dependence_steps}",
            "--share=0.02",
            f"--output={dependence}",
        ],
    )
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={_command(arguments)}"])


def _prepare(data: Path, workdir: Path) -> None:
    """One store of all corpora: one tokenizer for all, a twentieth of the documents held out by a hash of their ids."""
    needed = (*FILES, *(f"benchmarks/{task}.jsonl.gz" for task in TASKS))
    if empty := [pattern for pattern in needed if not list(data.glob(pattern))]:
        raise UserError(f"--data={data}: holds no {empty[0]}; name the folder with {', '.join(needed)}")
    inputs = [f"--input={data / pattern}" for pattern in FILES]
    settings = ["--tokenizer=bpe:2048", "--metadata-fields=domain,url", "--validation-per-mille=50"]
    _call("store", workdir, ["tools/prepare_corpus.py", *inputs, *settings, f"--output={workdir / 'store'}"])


def _call(name: str, workdir: Path, command: list[str]) -> None:
    """Runs Python with `command`, its output in NAME.log."""
    began, log = time.monotonic(), workdir / f"{name}.log"
    print(f"{name}: started, see {log}", flush=True)
    program = [str(HERE.parents[1] / command[0])] if command[0].startswith("tools/") else command[:1]
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-W", "ignore", *program, *command[1:]], stdout=file, stderr=file)
    if done.returncode:
        raise UserError(f"{name}: exit code {done.returncode}:\n{log.read_text()[-2000:]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def _command(arguments: list[str]) -> str:
    """The command as a reader would give it: folders of this machine by what they hold."""
    kept = [a for a in arguments if not a.startswith(("--data", "--workdir", "--results"))]
    data = ["--data=DATA"] if "--embedded" not in arguments else []
    return " ".join(["python experiments/train_once/run.py", *data, *kept])


if __name__ == "__main__":
    sys.exit(errors.run(main))
