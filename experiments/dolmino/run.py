"""The microanneal experiment from text to table: store, trunk, anneals, soups, scores. Run again, it goes on.

python experiments/dolmino/run.py --data=DIR [--workdir=runs/dolmino]
python experiments/dolmino/run.py --embedded [--workdir=runs/dolmino-embedded]

DIR holds folders of *.jsonl.gz named as in CORPORA below. --config.KEY=VALUE goes to every training.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import commands  # noqa: E402
from experiments.dolmino import analyse  # noqa: E402
from experiments.dolmino.config import ARMS, CORPORA, STOPPED_AT  # noqa: E402
from mixlab import errors  # noqa: E402

NAME = "dolmino"
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
    parser = commands.make_parser(NAME, __doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--long", default="mix,math10", help="arms also annealed on as many tokens as a soup has")
    parser.add_argument("--trunk-steps", type=int, help="default: the configuration's")
    parser.add_argument("--anneal-steps", type=int, help="default: the configuration's")
    flags, overrides = commands.parse(parser, NAME, arguments)
    workdir = flags.workdir
    if flags.data is not None:
        os.environ["MIXLAB_DOLMINO_STORE"] = str((workdir / "store").resolve())
        commands.check_files(flags.data, FILES)
        commands.prepare([flags.data / pattern for pattern in FILES], workdir)
    words = "embedded," if flags.embedded else ""
    trunk_steps = []
    if flags.trunk_steps is not None:
        horizon = round(flags.trunk_steps / STOPPED_AT)
        trunk_steps = [f"--config.stages.0.steps={flags.trunk_steps}", f"--config.schedule.horizon_steps={horizon}"]
    steps = flags.anneal_steps or CORPORA["embedded" if flags.embedded else "text"]["anneal_steps"]
    branch = [*overrides, *trunk_steps, f"--config.start.branch_from={(workdir / 'trunk').resolve()}"]

    code = commands.train(NAME, workdir / "trunk", f"{words}trunk", [*overrides, *trunk_steps])
    arms, seeds = flags.arms.split(","), flags.seeds.split(",")
    for seed in seeds:  # a seed of every arm before the next: what is there when time is up compares
        for arm in arms:
            more = [*branch, f"--config.stages.1.steps={steps}"]
            code = code or commands.train(NAME, workdir / f"{arm}-{seed}", f"{words}{arm},{seed}", more)
    for arm in filter(None, flags.long.split(",")):
        more = [*branch, f"--config.stages.1.steps={steps * len(seeds)}"]
        code = code or commands.train(NAME, workdir / f"{arm}-long", f"{words}{arm},{seeds[0]}", more)
    if code:
        return code
    for arm in arms:
        _soup(workdir, arm, [workdir / f"{arm}-{seed}" for seed in seeds])
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={commands.as_given(NAME, arguments)}"])


def _soup(workdir: Path, arm: str, members: list[Path]) -> None:
    """The mean of an arm's anneals and its held-out scores, soup-ARM.json."""
    scores, folder = workdir / f"soup-{arm}.json", workdir / f"soup-{arm}"
    if scores.is_file():
        return
    if not folder.exists():
        commands.call(folder.name, workdir, ["-m", "mixlab.soup", *map(str, members), f"--output={folder}"])
    commands.call(f"soup-{arm}-scores", workdir, ["-m", "mixlab.evaluate", f"--workdir={folder}", "--json"])
    text = (workdir / f"soup-{arm}-scores.log").read_text()
    scores.write_text(text[text.index("{") :])


if __name__ == "__main__":
    sys.exit(errors.run(main))
