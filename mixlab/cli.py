"""Command lines of the entry points: their own flags, and --config.KEY=VALUE overrides."""

import argparse
import difflib
from pathlib import Path
from typing import NoReturn

from mixlab import config
from mixlab.config import Config
from mixlab.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose complaints are UserErrors.

    with_run: --workdir=RUN_DIR may be given instead of --config, for the configuration of a run."""

    def __init__(self, description: str, with_config: bool = True, with_run: bool = False):
        super().__init__(description=description, allow_abbrev=False)
        self._with_run = with_run
        if with_run:
            help = "a run's folder instead of --config: with what was decided during the run"
            self.add_argument("--workdir", type=Path, metavar="RUN_DIR", help=help)
        if with_config:
            self.add_argument(
                "--config",
                required=not with_run,
                metavar="FILE.py[:ARG]",
                help="the configuration; any of its keys is set with --config.KEY=VALUE, for example "
                "--config.stages.0.steps=50",
            )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")

    def parse(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """(flags, overrides). UserError for anything that is neither, with the nearest flag."""
        flags, rest = self.parse_known_args(arguments)
        overrides = [entry for entry in rest if entry.startswith("--config.")]
        strays = [entry for entry in rest if not entry.startswith("--config.")]
        if strays:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(strays[0].split("=")[0], known, n=1)
            raise UserError(
                f"stray argument {' '.join(strays)!r}; "
                + (f"did you mean {near[0]}?" if near else f"the flags are {', '.join(known)}")
            )
        return flags, overrides

    def parse_config(self, arguments: list[str]) -> tuple[argparse.Namespace, Config]:
        flags, overrides = self.parse(arguments)
        if self._with_run:
            if (flags.config is None) == (flags.workdir is None):
                raise UserError("give either --config=FILE.py or --workdir=RUN_DIR")
            if flags.workdir is not None:
                return flags, config.load_json(flags.workdir / "config.json", overrides)
        return flags, config.load(flags.config, overrides)
