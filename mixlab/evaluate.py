"""Scores checkpoints of a run, or a soup, on held-out documents and on benchmarks.

python -m mixlab.evaluate --workdir=RUN_DIR [--steps=all|N,M,…] [--tasks=FILE.json] [--config.evaluation.KEY=VALUE ...] [--json]

The run's own configuration is used, with the benchmarks of a JSON file (name -> settings, as in evaluation.tasks) if one is
given. The numbers go to standard output and, under the names that training gives them, to evaluations.jsonl in the run's folder,
a line a checkpoint, where reports find them; results by item go to items/. Nothing else in the folder is touched.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError
from mixlab.parallel import host_memory, xla_flags
from mixlab.probe import chosen_steps


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN_DIR", help="the folder of a run or a soup")
    parser.add_argument(
        "--steps", "--step", metavar="all|N,M", help="the checkpoints; the newest good one when left out"
    )
    parser.add_argument("--tasks", type=Path, metavar="FILE.json", help="benchmarks: name -> settings")
    parser.add_argument("--no-record", action="store_true", help="print alone, and leave the folder as it is")
    parser.add_argument("--json", action="store_true", help="one JSON object a checkpoint instead of tables")
    flags, overrides = parser.parse(arguments)
    strangers = [o for o in overrides if not o.startswith(("--config.evaluation.", "--config.mesh."))]
    if strangers:
        raise UserError(f"{strangers[0]}: only --config.evaluation.* and --config.mesh.* may differ from the run's")
    path = flags.workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={flags.workdir}: has no config.json; name the folder of a run")
    from mixlab import config as configs

    xla_flags.set_flags()
    if flags.tasks is not None:
        overrides = [f"--config.evaluation.tasks={_tasks(flags.tasks)!r}", *overrides]
    config = configs.load_json(path, overrides)
    for step, metrics in evaluate_checkpoints(config, flags.workdir, flags.steps, record=not flags.no_record):
        if flags.json:
            print(json.dumps({"step": step} | metrics), flush=True)
        else:
            _print_tables(step, metrics)


def _tasks(path: Path) -> dict:
    try:
        tasks = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--tasks={path}: cannot be read as JSON ({error})") from None
    if not isinstance(tasks, dict) or not tasks:
        raise UserError(f'--tasks={path}: must be an object such as {{"arc": {{"files": ["arc.jsonl"]}}}}')
    return tasks


def _print_tables(step: int, metrics: dict[str, float]) -> None:
    from mixlab.report.by_length import bin_label
    from mixlab.report.runs import AVERAGES, BREAKDOWNS, TASK_AVERAGE

    losses = [key.removeprefix("eval/").removesuffix("/loss") for key in metrics if key.endswith("/loss")]
    names = [name for name in losses if not name.startswith("eval_metadata/")]
    print(f"step {step}")
    sets = [name for name in names if name.partition("/")[0] not in BREAKDOWNS]
    _print_table("set", {name: name for name in sorted(sets, key=AVERAGES.__contains__)}, metrics)
    for kind, title in BREAKDOWNS.items():
        bins = {name: bin_label(kind, int(name.split("/")[1])) for name in names if name.startswith(f"{kind}/")}
        if bins:
            print()
            _print_table(title, bins, metrics)
    tasks = [key.removeprefix("eval/").removesuffix("/score") for key in metrics if key.endswith("/score")]
    if tasks:
        print(f"\n{'benchmark':<24}{'score':>10}{'± se':>9}{'bits/byte':>12}{'± se':>9}{'items':>10}")
    for name in sorted(tasks, key=TASK_AVERAGE.__eq__):
        row = [metrics.get(f"eval/{name}/{key}") for key in ("score", "score_se", "bits_per_byte", "bits_per_byte_se")]
        cells = ("" if value is None else f"{value:.4f}" for value in row)
        print("{:<24}{:>10}{:>9}{:>12}{:>9}{:>10}".format(name, *cells, metrics.get(f"eval/{name}/items", "")))
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
        spread = f"{error:.4f}" if math.isfinite(error) else ""  # of one document alone there is none
        print(f"{_seen(name):<24}{loss:>+10.4f}{spread:>9}{tokens:>10}{documents:>11}")
    if any(name.startswith("seen_") for name in changes):
        print("seen: how many training documents have the same metadata")


def _seen(name: str) -> str:
    """seen_10 -> "seen 10 to 99 times"; another name as it is."""
    if not name.startswith("seen_"):
        return name
    first = int(name.removeprefix("seen_"))
    return f"seen {first:,} to {10 * first - 1:,} times" if first else "never seen"


def _print_table(title: str, labels: dict[str, str], metrics: dict[str, float]) -> None:
    """labels: what stands between "eval/" and the metric -> how its row is called."""
    print(f"{title:<24}{'loss':>10}{'± se':>9}{'bits/byte':>12}{'± se':>9}{'tokens':>10}")
    for name, label in labels.items():
        row = [metrics.get(f"eval/{name}/{key}") for key in ("loss", "loss_se", "bits_per_byte", "bits_per_byte_se")]
        tokens = metrics.get(f"eval/{name}/tokens", "")
        print(f"{label:<24}{row[0]:>10.4f}{row[1]:>9.4f}{row[2]:>12.4f}{row[3]:>9.4f}{tokens:>10}")


def evaluate_checkpoints(
    config, workdir: Path, steps: str | None = None, record: bool = False
) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, eval/* metrics) of checkpoints of the run in `workdir`: those of `steps` ("all" or "N,M"), or the newest that
    verifies.   record: also in evaluations.jsonl and items/."""
    import jax

    from mixlab.data import open_data
    from mixlab.evals.benchmarks import open_benchmarks
    from mixlab.evals.evaluation import Evaluation
    from mixlab.parallel.mesh import make_mesh
    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.places import checkpoints_of
    from mixlab.training.state import plan_state

    data = open_data(config)
    benchmarks = open_benchmarks(config, data)
    mesh = make_mesh(config.mesh)
    layout = plan_state(config.model, make_optimizer(config.optimizer), mesh)
    with jax.set_mesh(mesh), Checkpoints(checkpoints_of(workdir), read_only=True) as checkpoints:
        chosen = chosen_steps(steps, checkpoints.steps(), workdir)
        evaluation = Evaluation(config, data, layout, benchmarks)
        for asked in chosen:
            params, meta = checkpoints.restore_params(layout.abstract["params"], asked)
            scored = evaluation.scores(params, meta["step"])
            if record:
                _record(workdir, meta, scored)
            yield meta["step"], scored.metrics


def _record(workdir: Path, meta: dict, scored) -> None:
    from mixlab.evals.items import write_items
    from mixlab.training.metrics import as_json_line

    line = as_json_line({"step": meta["step"], "tokens": meta["tokens"]} | scored.metrics)
    try:
        with (workdir / "evaluations.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
        write_items(workdir, meta["step"], scored.items)
    except OSError as error:
        raise UserError(
            f"{workdir}: the results cannot be written there ({error.strerror}); --no-record prints them alone"
        ) from None


if __name__ == "__main__":
    host_memory.keep_freed()
    sys.exit(errors.run(main))
