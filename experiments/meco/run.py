"""The experiment from text to table: store, trainings, scores. Run again, it goes on.

python experiments/meco/run.py --data=DIR [--workdir=runs/meco]
python experiments/meco/run.py --embedded [--workdir=runs/meco-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below. --config.KEY=VALUE goes to every training.
"""

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments.meco import analyse  # noqa: E402
from experiments.meco.config import ARMS, CORPORA, cooldown_steps  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.errors import EXIT_PREEMPTED, UserError  # noqa: E402
from mixlab.sequences.metadata import reduced  # noqa: E402

FOLDERS = ("web_c4", "docs_urls", "digitalgov", "wiki_passages", "stackexchange", "learnxinyminutes")
DOCUMENTS_PER_HOST = 1200  # of a few hosts there are many more


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the folder of the corpora")
    parser.add_argument("--embedded", action="store_true", help="the corpus of this Python installation")
    parser.add_argument("--workdir", type=Path, help="where runs go; default runs/meco, runs/meco-embedded")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--seeds", default="1,2,3", help="default 1,2,3")
    parser.add_argument("--steps", type=int, help="default: the configuration's")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the summary goes")
    flags, overrides = parser.parse_known_args(arguments)
    if (flags.data is None) == (not flags.embedded):
        raise UserError("give either --data=DIR or --embedded")
    strangers = [o for o in overrides if not o.startswith("--config.")]
    if strangers:
        raise UserError(f"stray argument {strangers[0]!r}; --help lists the flags")
    workdir = flags.workdir or Path("runs/meco-embedded" if flags.embedded else "runs/meco")
    workdir.mkdir(parents=True, exist_ok=True)
    if flags.data is not None:
        os.environ["MIXLAB_MECO_STORE"] = str((workdir / "store").resolve())
        _prepare(flags.data, workdir)
    words = "embedded," if flags.embedded else ""
    steps = flags.steps or CORPORA["embedded" if flags.embedded else "text"]["steps"]
    for seed in flags.seeds.split(","):  # a seed of every arm before the next: what is there when time is up compares
        for arm in sorted(flags.arms.split(","), key=list(ARMS).index):
            more = list(overrides)
            trunk = (workdir / f"meco-{seed}").resolve()
            if arm == "no_cooldown" and analyse.is_complete(trunk):  # it is meco up to there, bit for bit
                step = steps - cooldown_steps(steps)
                more += [f"--config.start.branch_from={trunk}", f"--config.start.step={step}"]
            code = _train(workdir / f"{arm}-{seed}", f"{words}{arm},{seed},steps={steps}", more)
            if code:
                return code
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={_command(arguments)}"])


def _prepare(data: Path, workdir: Path) -> None:
    """One store of all corpora, at most so many documents of a host, chosen by a hash of their ids; a twentieth held out."""
    sample = workdir / "documents.jsonl.gz"
    if not sample.is_file():
        by_host = defaultdict(list)
        for folder in FOLDERS:
            files = sorted((data / folder).glob("*.jsonl.gz"))
            if not files:
                raise UserError(
                    f"--data={data}: holds no {folder}/*.jsonl.gz; name the folder with {', '.join(FOLDERS)}"
                )
            for file in files:
                with gzip.open(file, "rt", encoding="utf-8") as lines:
                    for record in map(json.loads, lines):
                        by_host[reduced(record["url"], "domain")].append(record)
        partial = sample.with_suffix(".partial")
        with gzip.open(partial, "wt", encoding="utf-8") as file:
            for host in sorted(by_host):
                records = sorted(by_host[host], key=lambda r: hashlib.sha256(r["id"].encode()).digest())
                for record in records[:DOCUMENTS_PER_HOST]:
                    kept = {key: record[key] for key in ("id", "text", "url", "domain")}
                    file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        partial.rename(sample)
    settings = ["--tokenizer=bpe:2048", "--metadata-fields=domain,url", "--validation-per-mille=50"]
    prepare = str(HERE.parents[1] / "tools/prepare_corpus.py")
    _call("store", workdir, [prepare, f"--input={sample}", *settings, f"--output={workdir / 'store'}"])


def _train(folder: Path, arg: str, more: list[str]) -> int:
    if analyse.is_complete(folder):
        return 0
    command = ["-m", "mixlab.train", f"--config={HERE / 'config.py'}:{arg}", f"--workdir={folder}", *more]
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
    return " ".join(["python experiments/meco/run.py", *data, *kept])


if __name__ == "__main__":
    sys.exit(errors.run(main))
