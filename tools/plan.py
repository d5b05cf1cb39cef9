"""Prints what a run would read and compute; trains nothing, and refuses what cannot be.

python tools/plan.py --config=FILE[:ARG] [--config.KEY=VALUE ...] [--verify] [--json]

Sources whose store is not there are planned with their declared_tokens, and the plan says so.
"""

import json
import sys

from mixlab import errors
from mixlab.cli import Parser
from mixlab.data import declared_sizes, open_data, open_sizes
from mixlab.plan import as_text, make_plan, plan_of_sizes


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--verify", action="store_true", help="compare every store with its checksums, however large")
    flags, config = parser.parse_config(arguments)
    if declared_sizes(config):
        plan = plan_of_sizes(config, open_sizes(config, flags.verify))
    else:
        plan = make_plan(config, open_data(config, flags.verify))
    print(json.dumps(plan, indent=2) if flags.json else as_text(plan))


if __name__ == "__main__":
    sys.exit(errors.run(main))
