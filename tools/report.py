"""Writes the report of one run, or of several side by side, as a page that opens offline.

    python tools/report.py RUN_DIR [RUN_DIR ...] [--output=DIR]

The report of one run goes to RUN_DIR/report unless --output says otherwise; several runs need --output.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from mixlab import errors
from mixlab.report.page import write_report


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", type=Path)
    parser.add_argument("--output", metavar="DIR", type=Path, help="default, for one run: RUN_DIR/report")
    options = parser.parse_args(arguments)
    if options.output is None and len(options.run_dirs) > 1:
        raise errors.UserError("--output is missing: the report of several runs needs a folder of its own")
    print(write_report(options.run_dirs, options.output or options.run_dirs[0] / "report"))


if __name__ == "__main__":
    sys.exit(errors.run(main))
