"""What the experiments' programs share: their flags, a store of the corpora, one command after the other, each with its log."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from experiments.results import is_complete
from mixlab.errors import EXIT_PREEMPTED, UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The flags of every experiment; `name` is that of its folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the corpora")
    parser.add_argument("--embedded", action="store_true", help="the corpus of this Python installation")
    parser.add_argument("--workdir", type=Path, help=f"where runs go; default runs/{name}, runs/{name}-embedded")
    parser.add_argument("--seeds", default="1,2,3", help="default 1,2,3")
    parser.add_argument("--results", type=Path, default=HERE / name / "results", help="where the summary goes")
    return parser


def parse(parser: argparse.ArgumentParser, name: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, the working folder made, and the overrides for every training. UserError for flags that cannot be."""
    flags, overrides = parser.parse_known_args(arguments)
    if (flags.data is None) == (not flags.embedded):
        raise UserError("give either --data=DIR or --embedded")
    if strangers := [o for o in overrides if not o.startswith("--config.")]:
        raise UserError(f"stray argument {strangers[0]!r}; --help lists the flags")
    flags.workdir = flags.workdir or Path(f"runs/{name}-embedded" if flags.embedded else f"runs/{name}")
    flags.workdir.mkdir(parents=True, exist_ok=True)
    return flags, overrides


def check_files(data: Path, patterns: tuple[str, ...]) -> None:
    """UserError unless `data` holds files of all these patterns."""
    if empty := [pattern for pattern in patterns if not list(data.glob(pattern))]:
        raise UserError(f"--data={data}: holds no {empty[0]}; name the folder with {', '.join(patterns)}")


def prepare(inputs: list[Path], workdir: Path) -> None:
    """One store of all corpora: one tokenizer for all, a twentieth of the documents held out by a hash of their ids."""
    settings = ["--tokenizer=bpe:2048", "--metadata-fields=domain,url", "--validation-per-mille=50"]
    program, files = str(ROOT / "tools/prepare_corpus.py"), [f"--input={path}" for path in inputs]
    call("store", workdir, [program, *files, *settings, f"--output={workdir / 'store'}"])


def train(experiment: str, folder: Path, argument: str, overrides: list[str]) -> int:
    """Trains experiments/EXPERIMENT/config.py:ARGUMENT in `folder`, unless it is complete; the exit code, 0 or 75 (stopped
    and saved)."""
    if is_complete(folder):
        return 0
    config = f"--config={HERE / experiment / 'config.py'}:{argument}"
    return call(folder.name, folder.parent, ["-m", "mixlab.train", config, f"--workdir={folder}", *overrides])


def call(name: str, workdir: Path, command: list[str]) -> int:
    """Runs Python with `command`, its output in NAME.log; the exit code, 0 or 75 (stopped and saved). UserError for others."""
    began, log = time.monotonic(), workdir / f"{name}.log"
    print(f"{name}: started, see {log}", flush=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-W", "ignore", *command], stdout=file, stderr=file)
    if done.returncode not in (0, EXIT_PREEMPTED):
        raise UserError(f"{name}: exit code {done.returncode}:\n{log.read_text()[-2000:]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode


def as_given(experiment: str, arguments: list[str]) -> str:
    """The command as a reader would give it: folders of this machine by what they hold."""
    kept = [a for a in arguments if not a.startswith(("--data", "--workdir", "--results"))]
    data = ["--data=DATA"] if "--embedded" not in arguments else []
    return " ".join([f"python experiments/{experiment}/run.py", *data, *kept])
