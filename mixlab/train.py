"""Trains the run that a configuration describes, or goes on with it.

python -m mixlab.train --config=configs/quickstart.py [--workdir=DIR] [--config.KEY=VALUE ...]

Several processes train one run together when srun, mpirun or a TPU pod has started them, or with --coordinator=HOST:PORT
--processes=N --process=I. The run's folder must be the same for all.

Exit codes (mixlab/errors.py has them all): 0 the run is complete; 2 something to put right, told in one message; 3 the loss
diverged and the configuration says stop; 75 asked to stop (SIGTERM or Ctrl-C) and saved; 76 another process, a bucket or a
device was lost, or a step hung. After 75 and 76 the same command goes on.
"""

import shlex
import sys
from pathlib import Path

from mixlab import errors
from mixlab.cli import Parser
from mixlab.parallel import distributed, host_memory, xla_flags


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="the run's folder; default runs/<name>")
    parser.add_argument(
        "--allow-change",
        default="",
        metavar="KEY[,KEY]",
        help="keys that differ on purpose from the run in the folder, for example stages.0.steps",
    )
    distributed.add_flags(parser)
    flags, config = parser.parse_config(arguments)
    xla_flags.set_flags()
    distributed.start(flags)
    from mixlab.data import open_data  # after the flags: a mistake there is told at once
    from mixlab.report.summary import summary
    from mixlab.training.disk import writing_run
    from mixlab.training.loop import train

    allowed = tuple(key for key in flags.allow_change.split(",") if key)
    workdir = flags.workdir or Path("runs") / config.name
    with distributed.leaving_together(workdir), distributed.quiet_unless_first(), writing_run(workdir):
        code = train(config, open_data(config), workdir, allowed)
        if code == 0:
            print(summary(workdir, shlex.join(a for a in arguments if a.startswith("--config"))))
    return code


if __name__ == "__main__":
    host_memory.keep_freed()
    sys.exit(errors.run(main))
