"""The experiment from text to table: store, trainings, scores. Run again, it goes on.

python experiments/meco/run.py --data=DIR [--workdir=runs/meco]
python experiments/meco/run.py --embedded [--workdir=runs/meco-embedded]

DIR holds folders of *.jsonl.gz named as in FILES below. --config.KEY=VALUE goes to every training.
"""

import gzip
import hashlib
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from experiments import commands  # noqa: E402
from experiments.meco import analyse  # noqa: E402
from experiments.meco.config import ARMS, CORPORA, cooldown_steps  # noqa: E402
from experiments.results import is_complete  # noqa: E402
from mixlab import errors  # noqa: E402
from mixlab.sequences.metadata import reduced  # noqa: E402

NAME = "meco"
FILES = tuple(
    f"{folder}/*.jsonl.gz"
    for folder in ("web_c4", "docs_urls", "digitalgov", "wiki_passages", "stackexchange", "learnxinyminutes")
)
DOCUMENTS_PER_HOST = 1200  # of a few hosts there are many more


def main(arguments: list[str]) -> int:
    parser = commands.make_parser(NAME, __doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help=f"default {','.join(ARMS)}")
    parser.add_argument("--steps", type=int, help="default: the configuration's")
    flags, overrides = commands.parse(parser, NAME, arguments)
    workdir = flags.workdir
    if flags.data is not None:
        os.environ["MIXLAB_MECO_STORE"] = str((workdir / "store").resolve())
        commands.prepare([sample_hosts(flags.data, workdir)], workdir)
    words = "embedded," if flags.embedded else ""
    steps = flags.steps or CORPORA["embedded" if flags.embedded else "text"]["steps"]
    for seed in flags.seeds.split(","):  # a seed of every arm before the next: what is there when time is up compares
        for arm in sorted(flags.arms.split(","), key=list(ARMS).index):
            more = list(overrides)
            trunk = (workdir / f"meco-{seed}").resolve()
            if arm == "no_cooldown" and is_complete(trunk):  # it is meco up to there, bit for bit
                step = steps - cooldown_steps(steps)
                more += [f"--config.start.branch_from={trunk}", f"--config.start.step={step}"]
            if code := commands.train(NAME, workdir / f"{arm}-{seed}", f"{words}{arm},{seed},steps={steps}", more):
                return code
    return analyse.main([str(workdir), f"--output={flags.results}", f"--command={commands.as_given(NAME, arguments)}"])


def sample_hosts(data: Path, workdir: Path) -> Path:
    """A file of all corpora, at most so many documents of a host, chosen by a hash of their ids."""
    sample = workdir / "documents.jsonl.gz"
    if not sample.is_file():
        commands.check_files(data, FILES)
        by_host = defaultdict(list)
        for file in (file for pattern in FILES for file in sorted(data.glob(pattern))):
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
    return sample


if __name__ == "__main__":
    sys.exit(errors.run(main))
