"""Runs the probes of a run's experiments on its checkpoints, on their own.

python -m mixlab.probe --workdir=RUN_DIR [--steps=all|N,M,…] [--experiment=NAME] [--json] [--config.evaluation.KEY=VALUE ...]

All probes are run, due or not, of experiments that were enabled and of those that were not. The numbers go to standard output,
a line a checkpoint with --json; the run's folder is not touched.
"""

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("--steps", metavar="all|N,M", help="the checkpoints; the newest good one when left out")
    parser.add_argument("--experiment", metavar="NAME", help="this one's probes alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a checkpoint instead of tables")
    flags, overrides = parser.parse(arguments)
    strangers = [o for o in overrides if not o.startswith(("--config.evaluation.", "--config.mesh."))]
    if strangers:
        raise UserError(f"{strangers[0]}: only --config.evaluation.* and --config.mesh.* may differ from the run's")
    path = flags.workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={flags.workdir}: has no config.json; name the folder of a run")
    from mixlab import config as configs

    config = configs.load_json(path, overrides)
    if not config.experiments:
        raise UserError(
            f"--workdir={flags.workdir}: its configuration has no experiments, so there is nothing to probe"
        )
    if flags.experiment is not None and flags.experiment not in config.experiments:
        near = difflib.get_close_matches(flags.experiment, config.experiments, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(config.experiments)}"
        raise UserError(f"--experiment={flags.experiment}: is not among the run's experiments; {hint}")
    failed = False
    for step, metrics, failures in probe_checkpoints(config, flags.workdir, flags.steps, flags.experiment):
        if flags.json:
            print(json.dumps({"step": step} | metrics), flush=True)
        else:
            width = max(map(len, metrics), default=0)
            print("\n".join([f"step {step}", *(f"  {name:<{width}}  {metrics[name]:.6g}" for name in sorted(metrics))]))
        for failure in failures:
            print(
                "step {}: probe {probe} of experiment {experiment} failed: {error}".format(step, **failure),
                file=sys.stderr,
            )
        failed |= bool(failures)
    return int(failed)


def probe_checkpoints(
    config, workdir: Path, steps: str | None = None, experiment: str | None = None
) -> Iterator[tuple[int, dict[str, float], list[dict[str, str]]]]:
    """(step, probe/* metrics, failures) of checkpoints of the run in `workdir`: those of `steps` ("all" or "N,M"), or the
    newest that verifies."""
    import jax

    from mixlab.data import open_data, with_decisions
    from mixlab.evals.probes import open_probes
    from mixlab.inject.control_log import read_log
    from mixlab.parallel.mesh import make_mesh
    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.places import checkpoints_of
    from mixlab.training.state import plan_state

    data = open_data(config)
    mesh = make_mesh(config.mesh)
    layout = plan_state(config.model, make_optimizer(config.optimizer), mesh)
    runner = open_probes(config, data, layout, workdir)
    with jax.set_mesh(mesh), Checkpoints(checkpoints_of(workdir), read_only=True) as checkpoints:
        for chosen in chosen_steps(steps, checkpoints.steps(), workdir):
            params, meta = checkpoints.restore_params(layout.abstract["params"], chosen)
            log = read_log(workdir / "control.jsonl", meta["control_log"])
            stream = with_decisions(config, data, log).stream
            probed = runner.ask(params, meta["step"], stream, runner.of(experiment))
            yield meta["step"], probed.metrics, probed.failures


def chosen_steps(asked: str | None, there: list[int], workdir: Path) -> list[int] | list[None]:
    """The checkpoints that --steps asks for, of those that are there; None: the newest that verifies."""
    if not there:
        raise UserError(f"{workdir}: has no checkpoint yet; train first")
    if asked is None:
        return [None]
    if asked == "all":
        return there
    try:
        return [int(step) for step in asked.split(",")]
    except ValueError:
        raise UserError(f"--steps={asked}: write all, or numbers with commas: --steps={there[0]},{there[-1]}") from None


if __name__ == "__main__":
    sys.exit(errors.run(main))
