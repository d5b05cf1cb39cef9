"""The microanneal experiment from text to table: store, trunk, anneals, soups, scores. Run again, it goes on.

python experiments/dolmino/run.py --data=DIR [--workdir=runs/dolmino]
python experiments/dolmino/run.py --embedded [--workdir=runs/dolmino-embedded]

DIR holds folders of *.jsonl.gz named as in CORPORA below. --config.KEY=VALUE goes to every training.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.dolmino import analyse  # noqa: E402
from experiments.dolmino.config import ARMS, CORPORA, STOPPED_AT  # noqa: E402
from experiments.intervals import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import EXIT_PREEMPTED, UserError  # noqa: E402

FILES = (
    "web_c4/*.jsonl.gz",
    "digitalgov/*.jsonl.gz",
    "docs_urls/*.jsonl.gz",
    "math_gsm8k/gsm8k_train.jsonl.gz",
    "math_deepmind/dm_math_train.jsonl.gz",
    "wiki_passages/*.jsonl.gz",
    "stackexchange/*.jsonl.gz",
    "code_python/*.jsonl.gz",
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the corpora")
    parser.add_argument("--embedded", action="store_true", help="the corpus of this Python installation")
    parser.add_argument("--workdir", type=Path, help="where runs go; default runs/dolmino, runs/dolmino-embedded")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--seeds", default="1,2,3", help="of the anneals' data order; default 1,2,3")
    parser.add_argument("--long", default="mix,math10", help="arms also annealed on as many tokens as a soup has")
    parser.add_argument("--trunk-steps", type=int, help="default: the configuration's")
    parser.add_argument("--anneal-steps", type=int, help="default: the configuration's")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the summary goes")
    flags, overrides = parser.parse_known_args(arguments)
    if (flags.data is None) == (not flags.embedded):
        raise UserError("give either --data=DIR or --embedded")
    strangers = [o for o in overrides if not o.startswith("--config.")]
    if strangers:
        raise UserError(f"stray argument {strangers[0]!r}; --help lists the flags")
    workdir = flags.workdir or Path("runs/dolmino-embedded" if flags.embedded else "runs/dolmino")
    workdir.mkdir(parents=True, exist_ok=True)
    if flags.data is not None:
        os.environ["MIXLAB_DOLMINO_STORE"] = str((workdir / "store").resolve())
        _prepare(flags.data, workdir)
    words = "embedded," if flags.embedded else ""
    trunk_steps = []
    if flags.trunk_steps is not None:
        horizon = round(flags.trunk_steps / STOPPED_AT)
        trunk_steps = [f"--config.stages.0.steps={flags.trunk_steps}", f"--config.schedule.horizon_steps={horizon}"]
    steps = flags.anneal_steps or CORPORA["embedded" if flags.embedded else "text"]["anneal_steps"]
    branch = [*overrides, *trunk_steps, f"--config.start.branch_from={(workdir / 'trunk').resolve()}"]

    code = _train(workdir / "trunk", f"{words}trunk", [*overrides, *trunk_steps])
    arms, seeds = flags.arms.split(","), flags.seeds.split(",")
    for seed in seeds:  # a seed of every arm before the next: what is there when time is up compares
        for arm in arms:
            more = [*branch, f"--config.stages.1.steps={steps}"]
            code = code or _train(workdir / f"{arm}-{seed}", f"{words}{arm},{seed}", more)
    for arm in filter(None, flags.long.split(",")):
        more = [*branch, f"--config.stages.1.steps={steps * len(seeds)}"]
        code = code or _train(workdir / f"{arm}-long", f"{words}{arm},{seeds[0]}", more)
    if code:
        return code
    for arm in arms:
        _soup(workdir, arm, [workdir / f"{arm}-{seed}" for seed in seeds])
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={_command(arguments)}"])


def _prepare(data: Path, workdir: Path) -> None:
    """One store of all corpora: one tokenizer for all, a twentieth of the documents held out by a hash of their ids."""
    empty = [pattern for pattern in FILES if not list(data.glob(pattern))]
    if empty:
        raise UserError(f"--data={data}: holds no {empty[0]}; name the folder with {', '.join(FILES)}")
    inputs = [f"--input={data / pattern}" for pattern in FILES]
    settings = ["--tokenizer=bpe:2048", "--metadata-fields=domain,url", "--validation-per-mille=50"]
    _call("store", workdir, ["tools/prepare_corpus.py", *inputs, *settings, f"--output={workdir / 'store'}"])


def _train(folder: Path, arg: str, more: list[str]) -> int:
    if is_complete(folder):
        return 0
    command = ["-m", "mixlab.train", f"--config={HERE / 'config.py'}:{arg}", f"--workdir={folder}", *more]
    return _call(folder.name, folder.parent, command)


def _soup(workdir: Path, arm: str, members: list[Path]) -> None:
    """The mean of an arm's anneals and its held-out scores, soup-ARM.json."""
    scores, folder = workdir / f"soup-{arm}.json", workdir / f"soup-{arm}"
    if scores.is_file():
        return
    if not folder.exists():
        _call(folder.name, workdir, ["-m", "mixlab.soup", *map(str, members), f"--output={folder}"])
    _call(f"soup-{arm}-scores", workdir, ["-m", "mixlab.evaluate", f"--workdir={folder}", "--json"])
    text = (workdir / f"soup-{arm}-scores.log").read_text()
    scores.write_text(text[text.index("{") :])


def _call(name: str, workdir: Path, command: list[str]) -> int:
    """Runs Python with `command`, its output in NAME.log; the exit code, 0 or 75 (stopped and saved)."""
    began, log = time.monotonic(), workdir / f"{name}.log"
    print(f"{name}: started, see {log}", flush=True)
    with log.open("w") as file:
        root = HERE.parents[1]
        done = subprocess.run([sys.executable, "-W", "ignore", *_absolute(command, root)], stdout=file, stderr=file)
    if done.returncode not in (0, EXIT_PREEMPTED):
        raise UserError(f"{name}: exit code {done.returncode}:\n{log.read_text()[-2000:]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode


def _absolute(command: list[str], root: Path) -> list[str]:
    return [str(root / command[0]), *command[1:]] if command[0].startswith("tools/") else command


def _command(arguments: list[str]) -> str:
    """The command as a reader would give it: folders of this machine by what they hold."""
    kept = [a for a in arguments if not a.startswith(("--data", "--workdir", "--results"))]
    data = ["--data=DATA"] if "--embedded" not in arguments else []
    return " ".join(["python experiments/dolmino/run.py", *data, *kept])


if __name__ == "__main__":
    sys.exit(errors.run(main))
