"""The learning rate as a pure function of the step (OLMo 2 section 2 for the truncated cosine).

A schedule covers the steps [0, total_steps) of one stretch of training. `step` counts the updates made before
this one, so warm-up begins at 0 and reaches the peak at `warmup_steps`. A run of several stages is
made of such stretches, put together by `compose`.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

KINDS = ("cosine", "linear", "constant", "wsd")
DECAY_SHAPES = ("linear", "1-sqrt")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Which learning rate at which step.

    kind: "cosine" and "linear" fall from the peak, after warm-up, to `final_fraction * peak` at the horizon;
        "constant" stays at the peak; "wsd" (warm-up, stable, decay) stays at the peak and falls to
        `final_fraction * peak` over the last `decay_steps`, or the last `decay_fraction` of the steps.
    horizon_steps: where cosine and linear end; None is the length of the stretch. A horizon beyond the last
        step truncates the schedule and does not compress it, as in OLMo 2; after the horizon the rate stays
        at the floor.
    peak: the highest rate; None, in a stage's own rule: what the stage before had come to.
    decay_shape: "linear", or "1-sqrt" (1 - sqrt(progress)).
    """

    kind: str = "cosine"
    peak: float | None = 3e-4
    final_fraction: float = 0.1
    warmup_steps: int = 0
    horizon_steps: int | None = None
    decay_steps: int | None = None
    decay_fraction: float | None = None
    decay_shape: str = "linear"


def _decay_steps(config: ScheduleConfig, total_steps: int) -> int:
    if config.decay_steps is not None:
        return config.decay_steps
    return round((config.decay_fraction or 0.0) * total_steps)


def learning_rate(config: ScheduleConfig, step, total_steps: int):
    """The learning rate of update `step` (0 is the first), in a stretch of `total_steps`.

    `step` is a Python or numpy integer (or array): the answer is float64 and a Python float for a scalar; or
    a jax array or tracer: the answer is float32, good to six digits, also next to zero. `total_steps` is a
    Python integer.
    """
    on_device = not isinstance(step, int | np.integer | np.ndarray)
    xp = _jax_numpy() if on_device else np
    as_float = lambda x: xp.asarray(x, xp.float32 if on_device else xp.float64)  # noqa: E731
    warmup = config.warmup_steps
    start, end = warmup, total_steps if config.horizon_steps is None else config.horizon_steps
    if config.kind == "wsd":
        start, end = total_steps - _decay_steps(config, total_steps), total_steps
    # Differences are taken between integers: 1 - step / end would lose its digits near the end in float32.
    length = max(end - start, 1)
    left_steps = xp.clip(end - step, 0, length)
    left = as_float(left_steps) / length
    if config.kind == "cosine":
        shape = xp.sin(0.5 * math.pi * left) ** 2  # (1 + cos(pi * (1 - left))) / 2 without the cancellation
    elif config.kind == "wsd" and config.decay_shape == "1-sqrt":
        done = as_float(length - left_steps) / length
        shape = left / (1 + xp.sqrt(done))  # 1 - sqrt(done) without the cancellation
    else:
        shape = left
    floor = 1.0 if config.kind == "constant" else config.final_fraction
    decayed = floor + (1 - floor) * shape
    fraction = xp.where(as_float(step) < warmup, as_float(step) / max(warmup, 1), decayed)
    rate = config.peak * fraction
    return float(rate) if not on_device and np.ndim(rate) == 0 else rate


def _jax_numpy():
    import jax.numpy  # here, so that planning a run does not need jax

    return jax.numpy


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A schedule and the steps of the run that it covers, counted from the run's first."""

    first_step: int
    steps: int
    schedule: ScheduleConfig


def compose(
    run: ScheduleConfig, stages: Sequence[tuple[int, ScheduleConfig | None]]
) -> tuple[tuple[int, Stretch], ...]:
    """The learning rate of a run of stages, given as (steps, own schedule or None): (first step of the stage, the stretch
    that rules it) for each.

    Stages without a rule of their own follow the run's, one stretch from the first step to the end of the last of them; a
    stage's own rule covers its own steps. A stage's peak of None is the rate that the stage before it had come to.
    """
    ends = list(itertools.accumulate(steps for steps, _ in stages))
    followers = [end for end, (_, own) in zip(ends, stages, strict=True) if own is None]
    whole = Stretch(0, followers[-1] if followers else 0, run)
    ruled: list[tuple[int, Stretch]] = []
    for (steps, own), end in zip(stages, ends, strict=True):
        first = end - steps
        stretch = whole
        if own is not None:
            if own.peak is None:
                own = dataclasses.replace(own, peak=rate_of(ruled[-1][1], first) if ruled else run.peak)
            stretch = Stretch(first, steps, own)
        ruled.append((first, stretch))
    return tuple(ruled)


def rate_of(stretch: Stretch, step):
    """The learning rate of a step of the run by one stretch's rule."""
    return learning_rate(stretch.schedule, step - stretch.first_step, stretch.steps)


def composed_rate(ruled: Sequence[tuple[int, Stretch]], step):
    """The learning rate of a step of the run; `step` as in `learning_rate`."""
    on_device = not isinstance(step, int | np.integer | np.ndarray)
    rate = rate_of(ruled[0][1], step)
    for first, stretch in ruled[1:]:
        if on_device:
            rate = _jax_numpy().where(step >= first, rate_of(stretch, step), rate)
        elif step >= first:
            rate = rate_of(stretch, step)
    return rate


def problems(config: ScheduleConfig, total_steps: int, key: str = "schedule") -> list[str]:
    """What is wrong with the schedule for a stretch of `total_steps`; one message each, naming
    `key.field`."""
    found = []

    def check(ok, field, message):
        if not ok:
            found.append(f"{key}.{field}: {message}")

    check(config.kind in KINDS, "kind", f"{config.kind!r} is unknown; use one of {', '.join(KINDS)}")
    check(
        config.peak is None or (math.isfinite(config.peak) and config.peak >= 0),
        "peak",
        f"{config.peak} is not a learning rate; use a number of at least 0",
    )
    check(
        0 <= config.final_fraction <= 1,
        "final_fraction",
        f"{config.final_fraction} is not a fraction of the peak; use 0 to 1",
    )
    check(
        0 <= config.warmup_steps <= total_steps,
        "warmup_steps",
        f"{config.warmup_steps} does not fit into the {total_steps} steps; use 0 to {total_steps}",
    )
    if config.horizon_steps is not None:
        decays = config.kind in ("cosine", "linear")
        check(decays, "horizon_steps", f"has no meaning for kind {config.kind!r}; leave it at None")
        check(
            not decays or config.horizon_steps > config.warmup_steps,
            "horizon_steps",
            f"{config.horizon_steps} is not after the warm-up of {config.warmup_steps} steps",
        )
    elif config.kind in ("cosine", "linear") and config.warmup_steps == total_steps:
        check(
            False,
            "warmup_steps",
            f"{config.warmup_steps} leaves no step for the decay; shorten it, or set horizon_steps",
        )
    check(
        config.decay_shape in DECAY_SHAPES,
        "decay_shape",
        f"{config.decay_shape!r} is unknown; use one of {', '.join(DECAY_SHAPES)}",
    )
    if config.kind != "wsd":
        for field in ("decay_steps", "decay_fraction"):
            check(
                getattr(config, field) is None,
                field,
                f"has no meaning for kind {config.kind!r}; leave it at None",
            )
        return found
    if (config.decay_steps is None) == (config.decay_fraction is None):
        check(False, "decay_steps", "kind 'wsd' needs decay_steps or decay_fraction, and not both")
        return found
    field = "decay_steps" if config.decay_fraction is None else "decay_fraction"
    decay, available = _decay_steps(config, total_steps), total_steps - config.warmup_steps
    check(
        1 <= decay <= available,
        field,
        f"gives a decay of {decay} steps; with {config.warmup_steps} of {total_steps} steps of warm-up, "
        f"use 1 to {available}",
    )
    return found
