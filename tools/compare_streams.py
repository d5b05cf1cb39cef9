"""Proves that two runs read the same but for what their experiments insert: compares their batches at some steps.

python tools/compare_streams.py --config=FILE [--against=FILE] [--steps=N] [--json]

Without --against the run is compared with its own control, the same with experiments_enabled=(). Exit code 0 only if every
difference is an insertion's.
"""

import dataclasses
import json
import sys

import numpy as np

from mixlab import config as configs
from mixlab import errors
from mixlab.cli import Parser
from mixlab.comparison import Comparison, compare
from mixlab.data import open_data
from mixlab.errors import UserError
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

LISTED = 20  # lines of each list that are printed


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="FILE.py[:ARG]", help="the other run; its own control when left out")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="compared, drawn evenly; 100 when left out")
    parser.add_argument("--json", action="store_true", help="one JSON object, with every insertion, instead of text")
    flags, config = parser.parse_config(arguments)
    if flags.steps < 1:
        raise UserError(f"--steps={flags.steps}: must be at least 1")
    if flags.against is None:
        other = dataclasses.replace(config, experiments_enabled=())
    else:
        other = configs.load(flags.against, [])
    one, two = open_data(config).stream, open_data(other).stream
    count = min(flags.steps, len(one))
    steps = np.sort(permute(np.arange(count), len(one), seed_of("compare", count)))
    found = compare(one, two, steps)
    print(json.dumps(dataclasses.asdict(found), indent=2) if flags.json else _text(found))
    return 1 if found.unexplained else 0


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
    if not found.unexplained:
        return "\n".join([*lines, "every difference is an insertion's"])
    lines.append(f"{len(found.unexplained):,} differences that no insertion explains:")
    lines += [f"  step {s:>8}  row {r:>6}  offset {o:>6}  {what}" for s, r, o, what in found.unexplained[:LISTED]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
