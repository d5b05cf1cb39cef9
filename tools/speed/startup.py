"""How long a run takes to begin: imports, and from the command to the first step with six length buckets."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mixlab.errors import UserError

CONFIG = """
from mixlab.model.presets import llama

def get_config(arg=""):
    return dict(
        name="startup",
        tokenizer="bytes",
        model=llama(layers=12, d_model=256, heads=4, vocab_size=259, context_length=2048),
        stages=[dict(name="main", steps=400, sequence_length=2048, tokens_per_step=8192, format=dict(kind="decompose",
            variant="exact", min_length=64))],
        schedule=dict(kind="constant", peak=1e-3, warmup_steps=0),
        evaluation=dict(every_steps=0, tokens_per_domain=256, rows=4, sample_tokens=1),
    )
"""


def imports() -> dict:
    """Wall seconds to import what the command imports, in a fresh process; the quicker of two."""
    code = "import time; t = time.perf_counter(); import mixlab.train; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    return {"imports, wall seconds": min(float(run.stdout) for run in runs)}


def first_step() -> dict:
    """Wall seconds from the command to the record of the first step, with an empty and with a warm cache of compiled
    programs; the corpus is there in both."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "config.py").write_text(CONFIG)
        _begin(place, "corpus", place / "compiled-for-the-corpus")
        cold = _begin(place, "cold", None)
        warm = _begin(place, "warm", None)
    return {"first step, empty cache, wall seconds": cold, "first step, warm cache, wall seconds": warm}


def _begin(place: Path, name: str, compiled: Path | None) -> float:
    """Runs the config in a folder of its own until its first step is on record; the seconds that took."""
    environment = os.environ | {"MIXLAB_CACHE": str(place / "cache")}
    command = [sys.executable, "-m", "mixlab.train", f"--config={place / 'config.py'}", f"--workdir={place / name}"]
    record, told, began = place / name / "metrics.jsonl", place / f"{name}.log", time.perf_counter()
    with told.open("w") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as run:
        while run.poll() is None and not (record.is_file() and '"train/loss"' in record.read_text()):
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if run.poll() is not None:
            raise UserError(f"{' '.join(command)} ended with {run.returncode}:\n{told.read_text()[-2000:]}")
        run.kill()
    if compiled:  # what the corpus took to build is kept, what was compiled is not
        (place / "cache" / "compiled").rename(compiled)
    return seconds
