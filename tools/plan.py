"""Prints what a run would read and compute; trains nothing, and refuses what cannot be.

python tools/plan.py --config=FILE[:ARG] [--config.KEY=VALUE ...] [--devices=h100x64] [--mfu=0.4] [--verify] [--json]

Sources whose store is not there are planned with their declared_tokens, and the plan says so.
"""

import json
import sys

from mixlab import errors, plan_devices
from mixlab.cli import Parser
from mixlab.data import declared_sizes, open_data, open_sizes
from mixlab.errors import UserError
from mixlab.plan import as_text, make_plan, plan_of_sizes
from mixlab.plan_devices import parse_devices


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--verify", action="store_true", help="compare every store with its checksums, however large")
    parser.add_argument(
        "--devices", type=parse_devices, metavar="NAME", help="memory and time there: h100, h100x64, v5e-16, v5p-512 …"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, metavar="SHARE", help="of the devices' peak that training reaches (0.4)"
    )
    flags, config = parser.parse_config(arguments)
    if not 0 < flags.mfu <= 1:
        raise UserError(f"--mfu={flags.mfu}: give a share of the peak, more than 0 and at most 1")
    if declared_sizes(config):
        sizes = open_sizes(config, flags.verify)
        plan, stages = plan_of_sizes(config, sizes), sizes.stages
    else:
        data = open_data(config, flags.verify)
        plan, stages = make_plan(config, data), data.stream.stages
    if flags.devices:
        plan["devices"] = plan_devices.plan_on(config, stages, flags.devices, flags.mfu)
    print(json.dumps(plan, indent=2) if flags.json else as_text(plan))
    if flags.devices and not flags.json:
        print(plan_devices.as_text(plan["devices"]))


if __name__ == "__main__":
    sys.exit(errors.run(main))
