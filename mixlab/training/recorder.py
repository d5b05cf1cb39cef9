"""What a step has measured goes to the record and to the console, and before the judge of the run's steps."""

import time

import jax

from mixlab.config import Config
from mixlab.data import Data
from mixlab.model.size import flops_per_token
from mixlab.training.guard import Guard
from mixlab.training.metrics import MetricsLog, mfu
from mixlab.training.progress import Progress


class Recorder:
    """Writes the metrics of a step when the next one has been dispatched, so that reading them holds nothing up."""

    def __init__(self, config: Config, data: Data, log: MetricsLog, progress: Progress, first: int, guard: Guard):
        self._config, self._log, self._progress, self._first, self._guard = config, log, progress, first, guard
        self._stages = data.stream.stages
        self.tokens = sum(s.tokens_per_step * min(max(first - s.first_step, 0), s.steps) for s in self._stages)
        self._waiting: tuple | None = None
        self._last = time.perf_counter()
        self._ended: float | None = None  # when the waiting step did, if that is known

    def begin(self, scores: dict[str, float]) -> None:
        """The record of the step the run begins at (0, or a branch's): what is measured before any training."""
        self._log.add(self._first, {"tokens": self.tokens} | scores)
        self._log.flush()
        self._tell(self._first, scores)

    def add(self, step: int, stage, metrics) -> None:
        """metrics: as the train step returned them; None for a batch that was gone past."""
        self.flush({})
        self.tokens += stage.tokens_per_step
        self._waiting = (step, stage, metrics)

    def flush(self, scores: dict[str, float]) -> None:
        """Writes the step that is waiting, together with what was measured after it, if anything. Diverged or RollBack, when
        that is what the run's judge makes of it."""
        if self._waiting is None:
            return
        step, stage, metrics = self._waiting
        if metrics is None:
            self._waiting = None
            self._log.add(step, {"tokens": self.tokens, "train/skipped": 1.0} | scores)
            self._log.flush()
            self._tell(step, scores)
            return
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
        if said := self._guard.judge(step - 1, values):
            self._progress.note(said)

    def stop_clock(self) -> None:
        """Before work between two steps that is not a step's own (evaluation, probes, saving): the waiting step ends here."""
        if self._waiting is not None and self._waiting[2] is not None:
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
