"""What a finished run says at its end: held-out text beside counting, and what to do next."""

from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mixlab.report.runs import read_run


def summary(run_dir: Path, config_flags: str) -> str:
    """Bits per byte of every evaluation set beside the unigram and bigram baselines, scores of benchmarks, and commands to go on
    with.

    run_dir: of the run.   config_flags: its --config and --config.* flags, as the command had them."""
    run = read_run(run_dir)
    table = Table("held-out text", box=None, pad_edge=False)
    for column in ("bits per byte", "± se", "bigram", "unigram"):
        table.add_column(column, justify="right")
    for name in [*run.evaluation_sets(), "macro"]:
        value, error, _ = run.evaluated(name, "bits_per_byte")
        counted = [run.baseline(kind, name) for kind in ("bigram", "unigram")]
        table.add_row(name, *(f"{x:.3f}" if isfinite(x) else "" for x in (value, error, *counted)))
    tasks = Table("benchmark", box=None, pad_edge=False)
    for column in ("score", "± se", "bits per byte of the right answer"):
        tasks.add_column(column, justify="right")
    for name in run.tasks():
        numbers = (*run.evaluated(name, "score")[:2], run.evaluated(name, "bits_per_byte")[0])
        tasks.add_row(name, *(f"{x:.3f}" if isfinite(x) else "" for x in numbers))
    console = Console(width=100, highlight=False)
    with console.capture() as captured:
        console.print(table)
        if tasks.row_count:
            console.print(tasks)
    last, stage = run.stages[-1] if run.stages else {"steps": run.last_step}, f"stages.{max(len(run.stages) - 1, 0)}"
    longer, changed = f"--config.{stage}.steps={2 * last['steps']}", f"{stage}.steps"
    if "cycles" in last:  # as many times more of them as of steps: else the steps before would be other ones
        longer += f" --config.{stage}.curriculum.cycles={2 * last['cycles']}"
        changed += f",{stage}.curriculum"
    train = f"python -m mixlab.train {config_flags}"
    return captured.get() + "\n".join(
        [
            "bigram, unigram: what counting pairs of tokens, and single ones, of the training text reaches; macro: the mean",
            "What next?",
            f"  look      {run_dir / 'report' / 'index.html'}",
            f"  inspect   python tools/inspect_stream.py {config_flags} --step=0",
            f"  score     python -m mixlab.evaluate --workdir={run_dir}",
            f"  go on     {train} --workdir={run_dir} {longer} --allow-change={changed}",
            f"  vary      {train} --workdir={run_dir}-seed1 --config.seed=1",
            f"  compare   python tools/report.py {run_dir} {run_dir}-seed1 --output={run_dir}-compared",
        ]
    )
