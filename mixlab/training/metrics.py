"""The record of a run: metrics.jsonl, one line a step, and the same numbers for TensorBoard and Weights &
Biases."""

import json
import logging
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mixlab.errors import UserError

log = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of one device, as vendors state it; the first name found in `device_kind` counts.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5p", 459e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def peak_flops(device: jax.Device) -> float | None:
    """Dense bfloat16 FLOP/s of the device; None where it is not known (a CPU, an unlisted model)."""
    kind = device.device_kind
    return next((peak for name, peak in PEAK_FLOPS if re.search(rf"\b{name}\b", kind, re.IGNORECASE)), None)


def mfu(flops_per_token: float, tokens_per_second: float, devices: list[jax.Device]) -> float | None:
    """Model FLOP/s utilisation, 0 to 1: the model's own arithmetic (recomputation not counted) over the
    devices' bfloat16 peak. `tokens_per_second` is the whole run's, over all `devices`; None if a peak is not
    known."""
    peaks = [peak_flops(device) for device in devices]
    return None if None in peaks else flops_per_token * tokens_per_second / sum(peaks)


class MetricsLog:
    """Writes metrics.jsonl (and tensorboard/, and Weights & Biases if asked) in a run's folder, from process
    0 only.

    A step's record is assembled by `add` calls and written as one line when a later step begins or `flush` is
    called; the line is on disk when that call returns. Call `flush` before a checkpoint is saved, so that a
    restored run lacks no record. NaN and infinities are written as null, since JSON has no word for them
    (TensorBoard gets them as they are).

    resume_step: the restored step: later records, which the run is about to write again, are cut off, and a
        last line torn by a crash is dropped. None for a new run: records of an earlier attempt are set aside
        as metrics.jsonl.previous.
    tensorboard, wandb: UserError naming the extra to install if the package is missing. WANDB_MODE=offline is
        respected. Weights & Biases cannot be cut back: after a resume it ignores steps it already has.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
        wandb: bool = False,
    ):
        self._workdir = Path(workdir)
        self._file = self._tensorboard = self._wandb = None
        self._begin(-1 if resume_step is None else resume_step)
        if jax.process_index() != 0:
            return
        self._workdir.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            self._tensorboard = _tensorboard_writer(self._workdir / "tensorboard", self._last + 1)
        if wandb:
            self._wandb = _wandb_run(self._workdir)
        path = self._workdir / "metrics.jsonl"
        if resume_step is not None:
            _truncate(path, resume_step)
        elif path.exists() and path.stat().st_size:
            os.replace(path, path.with_name("metrics.jsonl.previous"))
        self._file = path.open("a", encoding="utf-8")

    def _begin(self, last: int) -> None:
        self._last, self._step = last, None
        self._record: dict[str, Any] = {}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds values (numbers, or arrays of one number: reading those waits for the device) to the record of
        `step`. Steps come in order; a key comes once a step. ValueError otherwise: a record is written
        once."""
        if self._step is not None and step > self._step:
            self.flush()
        if step <= self._last or (self._step is not None and step < self._step):
            raise ValueError(f"metrics of step {step} come late: step {self._step or self._last} is being written")
        if twice := self._record.keys() & values.keys():
            raise ValueError(f"metrics of step {step}: {sorted(twice)} given twice")
        self._step = step
        if self._file is not None:
            self._record.update((key, _number(value)) for key, value in values.items())

    def flush(self) -> None:
        """Writes the record of the current step, if there is one; nothing more can be added to that step."""
        if self._step is None:
            return
        step, record = self._step, self._record
        self._step, self._record, self._last = None, {}, step
        if self._file is None or not record:
            return
        self._file.write(as_json_line({"step": step, **record}))
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in record.items():
                self._tensorboard.add_scalar(key, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def cut_back(self, step: int) -> None:
        """Records of later steps than `step` are taken back: the run has gone back there, and writes them again."""
        self._begin(step)
        if self._file is not None:
            self._file.close()
            _truncate(self._workdir / "metrics.jsonl", step)
            self._file = (self._workdir / "metrics.jsonl").open("a", encoding="utf-8")
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _tensorboard_writer(self._workdir / "tensorboard", step + 1)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


def as_json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; NaN and infinities become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _number(value) -> int | float | None:
    if value is None or isinstance(value, int | float):
        return value
    return value.item()


def _truncate(path: Path, last_step: int) -> None:
    """Keeps the records of steps up to `last_step`; replaces the file in one move."""
    if not path.exists():
        return
    kept, unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"] if line.endswith("\n") else None
        except (ValueError, KeyError, TypeError):
            step = None
        if step is None:
            unreadable += 1
        elif step <= last_step:
            kept.append(line)
    if unreadable:
        log.warning("%s: dropped %d torn line(s)", path, unreadable)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _tensorboard_writer(directory: Path, first_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "tensorboard: the package tensorboardX is not installed; pip install 'mixlab[tensorboard]', or turn it off"
        ) from error
    # purge_step: viewers drop what an earlier attempt wrote beyond it. The suffix keeps two attempts that
    # begin within one second from sharing a file.
    return SummaryWriter(str(directory), purge_step=first_step, filename_suffix=f".{first_step}")


def _wandb_run(workdir: Path):
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "wandb: the package wandb is not installed; pip install 'mixlab[wandb]', or turn it off"
        ) from error
    # One run a folder: a resumed run goes on under the same id.
    path = workdir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return wandb.init(project="mixlab", name=workdir.name, dir=str(workdir), id=path.read_text(), resume="allow")
