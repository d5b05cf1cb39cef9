"""Scores a checkpoint of a run on its held-out documents, on its own.

python -m mixlab.evaluate --workdir=RUN_DIR [--step=N] [--config.evaluation.KEY=VALUE ...] [--json]

The run's own configuration is used. The numbers go to standard output; the run's folder is not touched.
"""

import json
import sys
from pathlib import Path

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint; the newest good one when left out")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    flags, overrides = parser.parse(arguments)
    strangers = [o for o in overrides if not o.startswith(("--config.evaluation.", "--config.mesh."))]
    if strangers:
        raise UserError(f"{strangers[0]}: only --config.evaluation.* and --config.mesh.* may differ from the run's")
    path = flags.workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={flags.workdir}: has no config.json; name the folder of a run")
    from mixlab import config as configs

    config = configs.load_json(path, overrides)
    step, metrics = evaluate_checkpoint(config, flags.workdir, flags.step)
    if flags.json:
        print(json.dumps({"step": step} | metrics, indent=2))
        return
    from mixlab.report.by_length import bin_label
    from mixlab.report.runs import BREAKDOWNS

    names = list(
        dict.fromkeys(key.removeprefix("eval/").rpartition("/")[0] for key in metrics if key.startswith("eval/"))
    )
    print(f"step {step}")
    _print_table("set", {name: name for name in names if name.partition("/")[0] not in BREAKDOWNS}, metrics)
    for kind, title in BREAKDOWNS.items():
        bins = {name: bin_label(kind, int(name.split("/")[1])) for name in names if name.startswith(f"{kind}/")}
        if bins:
            print()
            _print_table(title, bins, metrics)
    _print_variants(metrics)


def _print_variants(metrics: dict[str, float]) -> None:
    """Loss by set and by what stands before documents; and what their own metadata change."""
    losses = {
        tuple(k.split("/")[1:3]): v
        for k, v in metrics.items()
        if k.startswith("eval_metadata/") and k.endswith("/loss")
    }
    variants = list(dict.fromkeys(variant for variant, _ in losses if variant != "true_minus_none"))
    if variants:
        print(f"\n{'loss with metadata':<24}" + "".join(f"{variant:>10}" for variant in variants))
    for name in dict.fromkeys(name for variant, name in losses if variant in variants):
        print(f"{name:<24}" + "".join(f"{losses[variant, name]:>10.4f}" for variant in variants))
    changes = [name for variant, name in losses if variant == "true_minus_none"]
    if changes:
        print(f"\n{'true minus none':<24}{'loss':>10}{'± se':>9}{'tokens':>10}{'documents':>11}")
    for name in changes:
        loss, error, tokens, documents = (
            metrics[f"eval_metadata/true_minus_none/{name}/{key}"] for key in ("loss", "loss_se", "tokens", "documents")
        )
        print(f"{name:<24}{loss:>+10.4f}{error:>9.4f}{tokens:>10}{documents:>11}")


def _print_table(title: str, labels: dict[str, str], metrics: dict[str, float]) -> None:
    """labels: what stands between "eval/" and the metric -> how its row is called."""
    print(f"{title:<24}{'loss':>10}{'± se':>9}{'bits/byte':>12}{'± se':>9}{'tokens':>10}")
    for name, label in labels.items():
        row = [metrics.get(f"eval/{name}/{key}") for key in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se")]
        tokens = metrics.get(f"eval/{name}/tokens", "")
        print(f"{label:<24}{row[0]:>10.4f}{row[1]:>9.4f}{row[2]:>12.4f}{row[3]:>9.4f}{tokens:>10}")


def evaluate_checkpoint(config, workdir: Path, step: int | None = None) -> tuple[int, dict[str, float]]:
    """(step, eval/* metrics) of a checkpoint of the run in `workdir`: `step`, or the newest that verifies."""
    import jax

    from mixlab.data import open_data
    from mixlab.evals.evaluation import Evaluation
    from mixlab.evals.tasks import open_tasks
    from mixlab.parallel.mesh import make_mesh
    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.state import plan_state

    data = open_data(config)
    mesh = make_mesh(config.mesh)
    layout = plan_state(config.model, make_optimizer(config.optimizer), mesh)
    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore_params(layout.abstract["params"], step)
        if found is None:
            raise UserError(f"{workdir}: has no checkpoint yet; train first")
        params, meta = found
        return meta["step"], Evaluation(
            config, data, layout, open_tasks(config.evaluation.tasks, data.held_out)
        ).scores(params, meta["step"]).metrics


if __name__ == "__main__":
    sys.exit(errors.run(main))
