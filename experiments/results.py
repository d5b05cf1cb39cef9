"""What the experiments' analyses share: their flags, the facts of the runs that they read, and how results are kept."""

import argparse
import json
from pathlib import Path


def parse(description: str | None, results: Path, arguments: list[str]) -> argparse.Namespace:
    """The flags of an analysis: the folder of runs, where the summary goes, what made the runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="the folder of runs that run.py leaves")
    parser.add_argument("--output", type=Path, default=results, help="where the summary goes")
    parser.add_argument("--command", default="", help="what made the runs, for the record")
    return parser.parse_args(arguments)


def facts(folders: list[Path], plan: dict) -> dict:
    """When, on what and for how long these runs were trained, and on which corpus; the model's size from the plan of one."""
    runs = [json.loads((folder / "run.json").read_text()) for folder in folders]
    sources = json.loads((folders[0] / "config.json").read_text())["sources"].values()
    return {
        "corpus": "embedded" if all(source["store"] == "embedded" for source in sources) else "text",
        "finished": max(run["finished"] for run in runs)[:10],
        "machine": runs[0]["machine"],
        "devices": runs[0]["devices"],
        "versions": runs[0]["versions"],
        "training_seconds": round(sum(run["seconds"] for run in runs)),
        "parameters": plan["parameters"],
        "tokenizer": plan["tokenizer"],
    }


def write(record: dict, output: Path) -> Path:
    """Keeps the record, numbers to six figures, as CORPUS.json in `output`; the path less its ending, for a picture beside it."""
    output.mkdir(parents=True, exist_ok=True)
    stem = output / record["corpus"]
    stem.with_suffix(".json").write_text(json.dumps(rounded(record), indent=1) + "\n")
    return stem


def is_complete(folder: Path) -> bool:
    """Whether a run in this folder has come to its end."""
    path = folder / "run.json"
    return path.is_file() and json.loads(path.read_text())["exit"] == "complete"


def rounded(value):
    """The JSON value with every float to six figures."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
