"""What a step has measured goes to the record and to the console, and a run that diverges is stopped."""

import time

import jax

from mixlab.config import Config
from mixlab.data import Data
from mixlab.model.size import flops_per_token
from mixlab.training.metrics import MetricsLog, mfu
from mixlab.training.progress import Progress


class Diverged(Exception):
    """Loss or gradient is not finite and the policy says stop."""


class Recorder:
    """Writes the metrics of a step when the next one has been dispatched, so that reading them holds nothing up."""

    def __init__(self, config: Config, data: Data, log: MetricsLog, progress: Progress, first: int):
        self._config, self._log, self._progress, self._first = config, log, progress, first
        self._stages = data.stream.stages
        self.tokens = sum(s.tokens_per_step * min(max(first - s.first_step, 0), s.steps) for s in self._stages)
        self._waiting: tuple | None = None
        self._skipped_in_a_row = 0
        self._last = time.perf_counter()
        self._ended: float | None = None  # when the waiting step did, if that is known

    def begin(self, scores: dict[str, float]) -> None:
        """The record of the step the run begins at (0, or a branch's): what is measured before any training."""
        self._log.add(self._first, {"tokens": self.tokens} | scores)
        self._log.flush()
        self._tell(self._first, scores)

    def add(self, step: int, stage, metrics) -> None:
        self.flush({})
        self.tokens += stage.tokens_per_step
        self._waiting = (step, stage, metrics)

    def flush(self, scores: dict[str, float]) -> None:
        """Writes the step that is waiting, together with what was measured after it, if anything."""
        if self._waiting is None:
            return
        step, stage, metrics = self._waiting
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter() if self._ended is None else self._ended
        self._waiting = self._ended = None
        seconds, self._last = now - self._last, now
        speed = stage.tokens_per_step / seconds
        length = stage.shape(step - 1)[1]
        utilisation = mfu(flops_per_token(self._config.model, length), speed, jax.devices())
        perf = {"perf/step_seconds": seconds, "perf/tokens_per_second": speed}
        perf |= {} if utilisation is None else {"perf/mfu": utilisation}
        buckets = {}
        if stage.curriculum is not None:  # the loss of short rows is higher, and their steps are quicker
            buckets = {
                "train/sequence_length": length,
                f"train/bucket_{length}/loss": values["train/loss"],
                f"perf/bucket_{length}/step_seconds": seconds,
            }
        self._log.add(step, {"tokens": self.tokens} | values | perf | buckets | scores)
        self._log.flush()
        self._progress.update(step, values["train/loss"], speed, utilisation)
        self._tell(step, scores)
        self._react(step, values)

    def stop_clock(self) -> None:
        """Before work between two steps that is not a step's own (evaluation, probes, saving): the waiting step ends here."""
        if self._waiting is not None:
            jax.block_until_ready(self._waiting[2])
            self._ended = time.perf_counter()

    def resume_clock(self) -> None:
        """After such work."""
        self._last = time.perf_counter()

    def _tell(self, step: int, scores: dict[str, float]) -> None:
        if "eval/macro/bits_per_byte" in scores:
            value, error = scores["eval/macro/bits_per_byte"], scores["eval/macro/bits_per_byte_se"]
            self._progress.note(
                f"step {step:,}  held-out bits per byte {value:.3f} ± {error:.3f} (mean of the domains)"
            )

    def _react(self, step: int, values: dict[str, float]) -> None:
        if not values["train/skipped"]:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        settings = self._config.training
        what = f"step {step:,}: the loss or its gradient is not finite"
        if settings.on_non_finite == "stop":
            raise Diverged(f"{what}; stopping, as training.on_non_finite says. The last checkpoint is from before it")
        self._progress.note(f"{what}; the update is skipped ({self._skipped_in_a_row} in a row)")
        if self._skipped_in_a_row >= settings.max_skipped_steps:
            raise Diverged(f"stopping after {self._skipped_in_a_row} skipped updates in a row")
