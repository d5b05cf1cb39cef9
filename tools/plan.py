"""Prints what a run would read and compute; trains nothing, and refuses what cannot be.

python tools/plan.py --config=FILE[:ARG] [--config.KEY=VALUE ...] [--verify] [--json]
"""

import json
import sys

from mixlab import errors
from mixlab.cli import Parser
from mixlab.data import open_data
from mixlab.plan import as_text, make_plan


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--verify", action="store_true", help="compare every store with its checksums, however large")
    flags, config = parser.parse_config(arguments)
    plan = make_plan(config, open_data(config, flags.verify))
    print(json.dumps(plan, indent=2) if flags.json else as_text(plan))


if __name__ == "__main__":
    sys.exit(errors.run(main))
