"""Tests whether experiments that share a run depend on each other: continual pretraining dependence testing (Bordt and
Pawelczyk 2025, section 5).

python -m mixlab.dependence --workdir=RUN_DIR [--config=FILE.py] [--step=N] [--steps=100] [--share=0.01] --output=DIR

From a checkpoint of a run (its newest one without --step), training goes on for --steps steps without experiments, with each
alone and with all of them together, each on --share of the tokens; what each has done to the outcome of every other is
tested. The experiments are those of --config (the run's own configuration when left out), of experiments_enabled. The
learning rate is that of the configuration at those steps, which must go on that far. Finished parts are kept: run the same
command again to go on. DIR gets dependence.json, index.html, dependence.md and dependence.png.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlab import config as configs
from mixlab import errors
from mixlab.cli import Parser
from mixlab.config import FREE_KEYS, Config, StartConfig
from mixlab.data import Data, open_data
from mixlab.errors import UserError
from mixlab.inject.analysis.dependence import ALL, BASELINE, dependence
from mixlab.inject.concentrate import concentrated
from mixlab.schema import differences, plain
from mixlab.treatment import treat

BEFORE, LOSSES = "(before)", "(losses)"


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN_DIR", help="the run to go on from")
    parser.add_argument(
        "--config", metavar="FILE.py[:ARG]", help="with the experiments to test; default: the run's own"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of which checkpoint; the newest one when left out")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="to train each part; default 100")
    parser.add_argument("--share", type=float, default=0.01, help="of the tokens, for each experiment; default 0.01")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    flags, overrides = parser.parse(arguments)
    if flags.steps < 1 or not 0 < flags.share <= 1:
        raise UserError("--steps must be at least 1, and --share above 0 and at most 1")
    path = flags.workdir / "config.json"
    config = configs.load(flags.config, overrides) if flags.config else configs.load_json(path, overrides)
    result = run(config, flags.workdir, flags.step, flags.steps, flags.share, flags.output)
    print(result)


def run(config: Config, workdir: Path, step: int | None, steps: int, share: float, output: Path) -> str:
    """The whole test; returns the matrix as a Markdown table. UserError, before anything is trained, for whatever can be
    known by then."""
    from mixlab.report.dependence import as_markdown, write_dependence
    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.continuation import Continuation
    from mixlab.training.places import checkpoints_of

    everything, enabled = sorted(config.experiments), config.experiments_enabled
    tested = [name for name in everything if enabled is None or name in enabled]
    if not tested:
        raise UserError("experiments: there is none to test; add some, or enable them with experiments_enabled")
    with Checkpoints(checkpoints_of(workdir), read_only=True) as checkpoints:
        meta = checkpoints.meta(step)
    if meta is None:
        raise UserError(f"--workdir={workdir}: has no checkpoint yet; train it first")
    step = meta["step"]
    if step + steps > config.total_steps:
        raise UserError(
            f"--steps={steps}: the configuration ends at step {config.total_steps}, before step {step + steps}; name an "
            "earlier --step, or give the stages more steps (--config.stages.0.steps=…)"
        )
    experiments = concentrated({name: config.experiments[name] for name in tested}, step, step + steps, share)
    start = StartConfig(branch_from=str(workdir), step=step)
    config = replace(config, experiments=experiments, start=start)
    parts = {BEFORE: (), BASELINE: ()} | {name: (name,) for name in tested} | {ALL: tuple(tested)}
    plain_data = open_data(replace(config, experiments_enabled=()))
    data = {part: _treated(config, plain_data, names) for part, names in parts.items()}
    _check_same(output, {"config": plain(config), "steps": steps, "checkpoint": meta["sha256"]})
    continuation = Continuation(config)
    found: dict[str, dict[str, np.ndarray]] = {}
    for number, part in enumerate(parts, 1):
        file = output / "parts" / f"{part}.npz"
        if not file.exists():
            print(f"{number} of {len(parts)}: {part.strip('()')}", flush=True)
            model, losses = continuation.go_on(data[part], 0 if part == BEFORE else steps)
            probes = {
                name: experiment.probes(material) for name, (experiment, material) in data[part].experiments.items()
            }
            _save(file, continuation.outcomes(model, probes) | {LOSSES: np.array(losses)})
        with np.load(file) as arrays:
            found[part] = dict(arrays)
    included = [name for name in tested if name in found[BEFORE]]
    matrix = dependence({name: _outcome(found, name) if name in included else None for name in everything})
    facts = {
        "run": str(workdir),
        "step": step,
        "steps": steps,
        "share": share,
        "outcomes": {name: _facts(found, name) for name in included},
        "losses": {part: arrays[LOSSES].tolist() for part, arrays in found.items() if part != BEFORE},
    }
    write_dependence(matrix, facts, output)
    return as_markdown(matrix, facts)


def _treated(config: Config, data: Data, names: tuple[str, ...]) -> Data:
    """The data with the experiments `names` in them."""
    config = replace(config, experiments_enabled=names)
    return replace(data, stream=treat(config, data.stream, data.experiments, data.tokenizer))


def _outcome(found: dict[str, dict[str, np.ndarray]], name: str) -> dict[str, np.ndarray]:
    return {part: arrays[name] for part, arrays in found.items() if part != BEFORE}


def _facts(found: dict[str, dict[str, np.ndarray]], name: str) -> dict[str, Any]:
    """What the outcome is, and its mean at the checkpoint and after the steps without experiments."""
    before, baseline = found[BEFORE][name], found[BASELINE][name]
    return {
        "accuracy": before.dtype == bool,
        "items": len(before),
        "before": float(before.mean()),
        "baseline": float(baseline.mean()),
    }


def _check_same(output: Path, settings: dict[str, Any]) -> None:
    """UserError when the folder has parts of a test with other settings; else they are written down."""
    file, settings = output / "settings.json", json.loads(json.dumps(settings))
    try:
        if file.exists():
            changed = differences(json.loads(file.read_text()), settings)
            free = tuple(f"config.{key}" for key in FREE_KEYS)
            if changed := {key: pair for key, pair in changed.items() if not key.startswith(free)}:
                key, (there, here) = next(iter(changed.items()))
                raise UserError(
                    f"--output={output}: has parts of a test with {key} = {there!r}, here it is {here!r}; name another folder"
                )
        elif output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output={output}: holds something else already; name a new folder")
        else:
            (output / "parts").mkdir(parents=True)
            file.write_text(json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another folder") from None


def _save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    part = file.with_name(file.name + ".partial")
    with part.open("wb") as opened:
        np.savez_compressed(opened, **arrays)
    part.replace(file)


if __name__ == "__main__":
    sys.exit(errors.run(main))
