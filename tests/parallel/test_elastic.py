"""One run that goes on with other numbers of processes, devices and parts: it is fed the same global batches, row by row."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixlab import errors, train
from mixlab.errors import EXIT_PREEMPTED
from mixlab.parallel.mesh import host_rows
from mixlab.training.control import Control
from mixlab.training.signals import StopSignal
from tests.devices import free_port, simulated
from tests.stores import some_texts, write_store

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
# Rows of two lengths, and texts inserted in them.
CONFIG = """
from mixlab.model.presets import llama

def get_config(arg=""):
    return dict(
        name="elastic",
        sources=dict(text=dict(store={store!r})),
        model=llama(layers=1, d_model=16, heads=2, vocab_size=259, context_length=32),
        stages=[
            dict(
                name="main", steps={steps}, sequence_length=32, tokens_per_step=256,
                format=dict(kind="decompose", min_length=16), curriculum=dict(cycles=2, mixture="equal"),
            ),
        ],
        schedule=dict(kind="cosine", peak=3e-3, warmup_steps=2),
        checkpoint=dict(every_steps=3),
        evaluation=dict(every_steps=0, tokens_per_domain=300, rows=4, sample_tokens=0),
        experiments=dict(notes=dict(kind="texts", files=[{notes!r}], where=dict(copies=3))),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": f"note {i}!"}) + "\n" for i in range(4)))
    store = write_store(folder / "store", some_texts(120))
    (folder / "config.py").write_text(CONFIG.format(store=str(store), notes=str(folder / "notes.jsonl"), steps=STEPS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
        yield folder


def leg(patch: pytest.MonkeyPatch, record: Path, stop: int, arguments: list[str]) -> int:
    """Trains until `stop` steps are done. record: gets a line {"step", "rows": {global row: hash of all its arrays}} for every
    batch that this process feeds."""
    honest = Control.batches

    def batches(self, first, meshes):
        for step, local in honest(self, first, meshes):
            shape = self.stream.shape(step)
            rows = host_rows(meshes[shape], shape.rows).tolist()
            hashes = [
                hashlib.sha256(b"".join(local[name][i].tobytes() for name in sorted(local))).hexdigest()
                for i in range(len(rows))
            ]
            with record.open("a") as file:
                file.write(json.dumps({"step": step, "rows": dict(zip(rows, hashes, strict=True))}) + "\n")
            yield step, local

    patch.setattr(Control, "batches", batches)
    patch.setattr(StopSignal, "requested", lambda self, step: step == stop)
    return errors.run(train.main, arguments)


def main():
    """A leg in a process of its own: RECORD STOP ARGUMENTS."""
    with pytest.MonkeyPatch.context() as patch:
        sys.exit(leg(patch, Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))


def processes(place, record, stop, count, devices, *arguments):
    """A leg in `count` processes with so many devices each. Returns their exit codes."""
    port = free_port()
    body = "from tests.parallel.test_elastic import main; main()"
    command = [sys.executable, "-c", body]
    running = []
    for i in range(count):
        one = [str(place / f"{record}-{i}"), str(stop), *arguments]
        one += [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={i}"] if count > 1 else []
        environment = os.environ | simulated(devices) | {"PYTHONPATH": str(ROOT)}
        environment["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # compiles sooner, computes the same
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        running.append(subprocess.Popen([*command, *one], env=environment, cwd=ROOT, **streams))
    try:
        said = [process.communicate(timeout=900)[0] for process in running]
        assert {process.returncode for process in running} <= {0, EXIT_PREEMPTED}, said
        return [process.returncode for process in running]
    finally:
        for process in running:
            process.kill()


def fed(*records) -> dict[tuple[int, int], str]:
    """(step, global row) -> hash, of all processes that fed a leg; those that feed the same row feed the same."""
    rows: dict[tuple[int, int], str] = {}
    for record in records:
        for line in map(json.loads, record.read_text().splitlines()):
            for row, found in line["rows"].items():
                assert rows.setdefault((line["step"], int(row)), found) == found
    return rows


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([[line["step"], line["train/loss"], line["train/grad_norm"]] for line in lines if line["step"]])


def test_the_same_batches_and_losses_whatever_feeds_them(place):
    """1 process with 1 device; 2 with 1 each, in 2 parts; 1 with 4 devices on a mesh of 2 x 2, a worker reading."""
    flags = [f"--config={place / 'config.py'}"]
    with pytest.MonkeyPatch.context() as patch:
        assert leg(patch, place / "fed-whole", STEPS + 1, [*flags, f"--workdir={place / 'whole'}"]) == 0
    flags.append(f"--workdir={place / 'changed'}")
    with pytest.MonkeyPatch.context() as patch:
        alone = [*flags, "--config.loader.threads=0"]
        assert leg(patch, place / "fed-0-0", 4, alone) == EXIT_PREEMPTED
    parts = ("--config.mesh.fsdp=2", "--config.training.accumulation_steps=2", "--config.loader.threads=5")
    assert processes(place, "fed-1", 9, 2, 1, *flags, *parts) == [EXIT_PREEMPTED] * 2
    split = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.loader.workers=1")
    assert processes(place, "fed-2", STEPS + 1, 1, 4, *flags, *split) == [0]

    whole, legs = fed(place / "fed-whole"), [fed(*place.glob(f"fed-{number}-*")) for number in range(3)]
    shapes = [max(row for at, row in whole if at == step) + 1 for step in range(STEPS)]
    assert set(shapes) == {8, 16}  # rows of both lengths
    inserted = json.loads((place / "whole" / "plan.json").read_text())["experiments"]["notes"]
    assert inserted["insertions"] == 12
    assert [sorted({step for step, _ in found}) for found in legs] == [
        list(range(first, last)) for first, last in ((0, 4), (4, 9), (9, STEPS))
    ]
    assert {key: value for found in legs for key, value in found.items()} == whole
    assert all(len(fed(record)) < len(legs[1]) for record in place.glob("fed-1-*"))  # each fed its part
    np.testing.assert_allclose(losses(place / "changed"), losses(place / "whole"), rtol=1e-5)
