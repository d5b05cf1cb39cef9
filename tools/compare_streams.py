"""Proves that two runs read the same but for what their experiments insert: compares their batches at some steps.

python tools/compare_streams.py --config=FILE|--workdir=RUN_DIR [--against=FILE|RUN_DIR] [--steps=N] [--json]

Of a run's folder, what was decided while it was trained is compared too. Without --against the run is compared with its own
control, the same with experiments_enabled=(). Exit code 0 only if every difference is an insertion's, or an experiment's noise.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from mixlab import config as configs
from mixlab import errors
from mixlab.cli import Parser
from mixlab.comparison import Comparison, compare
from mixlab.config import Config
from mixlab.data import open_data, with_decisions
from mixlab.errors import UserError
from mixlab.inject.control_log import whole_log
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of
from mixlab.stream import Stream

LISTED = 20  # lines of each list that are printed


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__.splitlines()[0], with_run=True)
    parser.add_argument(
        "--against", metavar="FILE.py[:ARG]|RUN_DIR", help="the other run; its own control when left out"
    )
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="compared, drawn evenly; 100 when left out")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every insertion, instead of text")
    flags, config = parser.parse_config(arguments)
    if flags.steps < 1:
        raise UserError(f"--steps={flags.steps}: must be at least 1")
    one = _stream(config, flags.workdir)
    if flags.against is None:
        two = _stream(dataclasses.replace(config, experiments_enabled=()), None)
    elif Path(flags.against).is_dir():
        two = _stream(configs.load_json(Path(flags.against) / "config.json", []), Path(flags.against))
    else:
        two = _stream(configs.load(flags.against, []), None)
    count = min(flags.steps, len(one))
    steps = np.sort(permute(np.arange(count), len(one), seed_of("compare", count)))
    found = compare(one, two, steps)
    print(json.dumps(dataclasses.asdict(found), indent=2) if flags.json else _text(found))
    return 1 if found.unexplained else 0


def _stream(config: Config, folder: Path | None) -> Stream:
    """What a run of this configuration reads, with what was decided in its folder."""
    data = open_data(config)
    return data.stream if folder is None else with_decisions(config, data, whole_log(folder)).stream


def _text(found: Comparison) -> str:
    lines = [
        f"{found.steps:,} steps, {found.positions:,} tokens compared: {found.differing:,} differ, "
        f"under {len(found.insertions):,} insertions"
    ]
    for i in found.insertions[:LISTED]:
        lines.append(
            f"  step {i['step']:>8}  row {i['row']:>6}  offset {i['offset']:>6} +{i['length']:<6} {i['differing']:>6} differ  "
            f"{i['experiment']}: item {i['item']}, copy {i['copy']}" + (" (in the other run)" if i["in"] else "")
        )
    if len(found.insertions) > LISTED:
        lines.append(f"  … and {len(found.insertions) - LISTED:,} more; --json lists all")
    for n in found.noised[:LISTED]:
        where = " (in the other run)" if n["in"] else ""
        lines.append(
            f"  step {n['step']:>8}  noise on all {n['rows']} rows, sigma {n['sigma']:g}  {n['experiment']}{where}"
        )
    if len(found.noised) > LISTED:
        lines.append(f"  … and {len(found.noised) - LISTED:,} more noised steps; --json lists all")
    if not found.unexplained:
        return "\n".join([*lines, "every difference is an insertion's" + (" or noise" if found.noised else "")])
    lines.append(f"{len(found.unexplained):,} differences that no insertion explains:")
    lines += [f"  step {s:>8}  row {r:>6}  offset {o:>6}  {what}" for s, r, o, what in found.unexplained[:LISTED]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
