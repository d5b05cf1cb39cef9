"""A run is a list of stages; a stage says what is read, in rows of which length, for how long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from mixlab.errors import UserError
from mixlab.schedule.buckets import share_out
from mixlab.schedule.curriculum import Curriculum, CurriculumConfig
from mixlab.schedule.mixture import Mixture, mixing_block_steps
from mixlab.schedule.shares import SourceRequest, SourceShare, exact, token_shares
from mixlab.seeds import seed_of
from mixlab.sequences.decompose import bucket_lengths, length_problems
from mixlab.sequences.format import FormatConfig
from mixlab.training.schedules import ScheduleConfig


@dataclass(frozen=True)
class StageConfig:
    """A stage as the configuration states it.

    steps, tokens, fraction: its length, exactly one of them; tokens and fraction (of the run's total_tokens) must come to
        whole steps.
    sequence_length: tokens a row; of the longest rows, where documents are decomposed.
    tokens_per_step: of the global batch; a multiple of sequence_length.
    mixture: source -> what the stage asks of it; a bare number is a weight, a share of the tokens up to a common factor.
    format: how documents become rows.
    curriculum: which rows at which step, where documents are decomposed into rows of several lengths; None: all lengths
        as the sources hold them, in random order.
    schedule: the stage's own rule for the learning rate, over its own steps; None: the run's rule goes on.
    seed: reads in another order what the stages before have left of its sources, and all later epochs; None: the run's
        order goes on. Runs that differ in nothing else share all that comes before (members of a soup; OLMo 2, 5.3).
    """

    name: str = "main"
    steps: int | None = None
    tokens: int | None = None
    fraction: float | None = None
    sequence_length: int = 1024
    tokens_per_step: int = 32 * 1024
    mixture: dict[str, float | SourceRequest] = field(default_factory=lambda: {"text": 1.0})
    format: FormatConfig = FormatConfig()
    curriculum: CurriculumConfig | None = None
    schedule: ScheduleConfig | None = None
    seed: int | None = None

    def length_steps(self, total_tokens: int | None) -> int:
        """Steps of the stage; 0 where the length is not a number of whole steps (`problems` tells)."""
        exact_steps = self._exact_steps(total_tokens)
        return int(exact_steps) if exact_steps is not None and exact_steps.denominator == 1 else 0

    def _exact_steps(self, total_tokens: int | None) -> Fraction | None:
        if self.steps is not None:
            return Fraction(self.steps)
        if self.tokens is not None:
            return Fraction(self.tokens, max(self.tokens_per_step, 1))
        if self.fraction is not None and total_tokens is not None:
            return exact(self.fraction) * total_tokens / max(self.tokens_per_step, 1)
        return None

    def requests(self) -> dict[str, SourceRequest]:
        """The mixture with every entry spelled out."""
        return {
            name: entry if isinstance(entry, SourceRequest) else SourceRequest(weight=entry)
            for name, entry in self.mixture.items()
        }

    def problems(self, where: str, sources: tuple[str, ...], total_tokens: int | None) -> list[str]:
        found = [
            f"{where}.{key} = {getattr(self, key)}: must be at least 1"
            for key in ("steps", "tokens", "sequence_length", "tokens_per_step")
            if getattr(self, key) is not None and getattr(self, key) < 1
        ]
        if self.fraction is not None and not 0 < self.fraction <= 1:
            found.append(f"{where}.fraction = {self.fraction}: must be above 0 and at most 1")
        given = [key for key in ("steps", "tokens", "fraction") if getattr(self, key) is not None]
        if len(given) != 1:
            found.append(f"{where}: give its length as one of steps, tokens and fraction; given: {given or 'none'}")
        elif given == ["fraction"] and total_tokens is None:
            found.append(f"{where}.fraction: of what? Set total_tokens, or give steps or tokens")
        elif not found:
            found += self._length_problems(where, total_tokens)
        for name in self.mixture:
            if name not in sources:
                found.append(f"{where}.mixture names {name!r}, which is not among the sources ({', '.join(sources)})")
        if not self.mixture:
            found.append(f"{where}.mixture is empty; name a source")
        if self.curriculum is not None and self.format.kind != "decompose":
            found.append(
                f"{where}.curriculum: belongs to rows of several lengths, which format.kind = {self.format.kind!r} does "
                "not make; use 'decompose', or set curriculum=None"
            )
        return found + self.format.problems(f"{where}.format")

    def _length_problems(self, where: str, total_tokens: int | None) -> list[str]:
        found = []
        if self.format.kind == "decompose":
            found += self._bucket_problems(where, total_tokens)
        elif self.tokens_per_step % self.sequence_length:
            below = max(self.tokens_per_step // self.sequence_length, 1) * self.sequence_length
            found.append(
                f"{where}.tokens_per_step = {self.tokens_per_step} is not a multiple of sequence_length "
                f"{self.sequence_length}; use {below} or {below + self.sequence_length}"
            )
        steps = self._exact_steps(total_tokens)
        if steps is not None and steps.denominator != 1:
            below = int(steps) * self.tokens_per_step
            key, value = ("tokens", self.tokens) if self.tokens is not None else ("fraction", self.fraction)
            found.append(
                f"{where}.{key} = {value} is {float(steps):.4f} steps of {self.tokens_per_step} tokens, not whole ones; "
                f"use {f'tokens={below} or ' if below else ''}tokens={below + self.tokens_per_step}"
            )
        return found

    def _bucket_problems(self, where: str, total_tokens: int | None) -> list[str]:
        shortest, longest = self.format.min_length, self.sequence_length
        found = length_problems(where, shortest, longest, self.tokens_per_step, "format.min_length", "sequence_length")
        steps = self.length_steps(total_tokens)
        if found or not steps or self.curriculum is None:
            return found
        return self.curriculum.problems(f"{where}.curriculum", len(bucket_lengths(shortest, longest)), steps)


@dataclass(frozen=True)
class Stage:
    """A stage with its place in the run; steps count from 0 over the whole run.

    sequence_length: tokens of the longest rows.   tokens_per_step: the same at every step.
    shares: what each source gets.   mixtures: length of rows -> which row of that length is whose; most stages have one.
    seed: of the stage's own order, or None.   curriculum: which length at which step; None where there is but one."""

    name: str
    first_step: int
    steps: int
    sequence_length: int
    tokens_per_step: int
    shares: dict[str, SourceShare]
    mixtures: dict[int, Mixture]
    format: FormatConfig
    seed: int | None = None
    curriculum: Curriculum | None = None

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps - 1

    @property
    def rows_per_step(self) -> int:
        """Of the longest rows."""
        return self.tokens_per_step // self.sequence_length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def mixture(self) -> Mixture:
        """Of a stage whose rows have one length; ValueError for others."""
        (mixture,) = self.mixtures.values()
        return mixture

    def shape(self, step: int) -> tuple[int, int]:
        """(rows, length) of the global batch of a step."""
        length = self.batch_of(step)[0]
        return self.tokens_per_step // length, length

    def shapes(self) -> list[tuple[int, int]]:
        """Every (rows, length) that a step of the stage has, the shortest rows first."""
        return [(self.tokens_per_step // length, length) for length in sorted(self.mixtures)]

    def batch_of(self, step: int) -> tuple[int, int]:
        """The length of a step's rows, and the number of its batch among the stage's batches of that length."""
        number = step - self.first_step
        return (self.sequence_length, number) if self.curriculum is None else self.curriculum.bucket_of(number)

    def step_of(self, length: int, number: int) -> int:
        """The inverse of `batch_of`."""
        if self.curriculum is not None:
            number = int(self.curriculum.step_of(length, np.array(number)))
        return self.first_step + number

    def batches(self, length: int) -> int:
        """Steps of the stage that read rows of this length."""
        return self.steps if self.curriculum is None else self.curriculum.batches(length)

    def rows_of(self, length: int | None = None) -> dict[str, int]:
        """Rows of a length (None: of a stage's only one) that each source serves in the whole stage."""
        mixture = self.mixture if length is None else self.mixtures[length]
        served = dict(zip(mixture.names, mixture.counts(mixture.rows).tolist(), strict=True))
        return {name: served.get(name, 0) for name in sorted(self.shares)}

    def tokens_of(self) -> dict[str, int]:
        """Tokens that each source serves in the whole stage."""
        rows = {length: self.rows_of(length) for length in self.mixtures}
        return {name: sum(length * counts[name] for length, counts in rows.items()) for name in sorted(self.shares)}


BucketTokens = Callable[[str, FormatConfig, int], dict[int, int]]
Weights = Mapping[str, Fraction | float]


def place_stages(
    configs: tuple[StageConfig, ...],
    epoch_tokens: Callable[[str, FormatConfig], int],
    seed: int,
    total_tokens: int | None = None,
    bucket_tokens: BucketTokens | None = None,
) -> tuple[Stage, ...]:
    """The stages one after the other from step 0 on.

    epoch_tokens: (source, format) -> tokens of one pass over it.
    bucket_tokens: (source, format, longest row) -> length of rows -> tokens in such rows; of formats that decompose.
    Raises UserError, all problems at once: shares that cannot be served, limits exceeded, a source too rare to be read,
    buckets too small."""
    stages: list[Stage] = []
    problems: list[str] = []
    first = 0
    for i, config in enumerate(configs):
        where, steps = f"stages.{i}", config.length_steps(total_tokens)
        buckets = None
        if config.format.kind == "decompose":
            if bucket_tokens is None:
                raise ValueError("a stage that decomposes documents needs bucket_tokens")
            buckets = {n: bucket_tokens(n, config.format, config.sequence_length) for n in config.mixture}
            available = {name: sum(tokens.values()) for name, tokens in buckets.items()}
            asked = [name for name, request in config.requests().items() if request.asks]
            if empty := [name for name in asked if not available[name]]:
                problems.append(
                    f"{where}: no document of {' or '.join(empty)} gives a row of {config.format.min_length} tokens or more; "
                    "lower format.min_length, or read another source"
                )
                continue
        else:
            available = {name: epoch_tokens(name, config.format) for name in config.mixture}
        shares, found = token_shares(
            config.requests(),
            steps * config.tokens_per_step,
            available,
            f"{where}.mixture",
            slack_tokens=config.tokens_per_step,
        )
        problems += found
        if found:
            continue
        order = seed_of(seed, "stage", config.name, *(() if config.seed is None else (config.seed,)))
        weights = {name: share.share for name, share in shares.items()}
        curriculum = None
        if buckets is None:
            mixtures = {config.sequence_length: _mixture(config, config.sequence_length, steps, weights, order)}
        else:
            how = config.curriculum or CurriculumConfig()
            try:
                batches, by_bucket = share_out(how, weights, buckets, config.tokens_per_step, steps, where)
            except UserError as error:
                problems += str(error).splitlines()
                continue
            curriculum = Curriculum(how, batches, seed_of(order, "curriculum"))
            mixtures = {
                length: _mixture(config, length, curriculum.batches(length), w, seed_of(order, "bucket", length))
                for length, w in by_bucket.items()
            }
        stage = Stage(
            config.name,
            first,
            steps,
            config.sequence_length,
            config.tokens_per_step,
            shares,
            mixtures,
            config.format,
            config.seed,
            curriculum,
        )
        problems += _unserved(stage, f"{where}.mixture")
        stages.append(stage)
        first += steps
    if problems:
        raise UserError("the mixture cannot be served:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return tuple(stages)


def _mixture(config: StageConfig, length: int, batches: int, weights: Weights, seed: int) -> Mixture:
    rows = config.tokens_per_step // length
    return Mixture(dict(weights), rows * mixing_block_steps(batches), rows * batches, seed)


def _unserved(stage: Stage, where: str) -> list[str]:
    """A message for each source that is asked for so little that it gets no row."""
    if stage.curriculum is None:
        return stage.mixture.problems(where)
    return [
        f"{where}.{name} = {float(stage.shares[name].share):.3g} of the tokens: too little for a single row; raise it, "
        "lengthen the stage, or drop the source"
        for name, tokens in stage.tokens_of().items()
        if stage.shares[name].share and not tokens
    ]


def rereading_problems(configs: tuple[StageConfig, ...]) -> list[str]:
    """What is wrong with stages that go on reading a source which was, or now is, cut into rows once for all epochs: it
    cannot be said which of its documents are left, so only rows that are cut alike can be read on."""
    found: list[str] = []
    latest: dict[str, tuple[int, StageConfig]] = {}
    for i, config in enumerate(configs):
        where, told = f"stages.{i}", set()
        for name in config.mixture:
            before_i, before = latest.get(name, (i, config))
            latest[name] = (i, config)
            if before is config or not (before.format.cut_once or config.format.cut_once) or before_i in told:
                continue
            if before.format.cut(before.sequence_length) != config.format.cut(config.sequence_length):
                told.add(before_i)
                found.append(
                    f"{where}.format cuts {name} otherwise than stages.{before_i} did (kind {before.format.kind!r} then, "
                    f"{config.format.kind!r} now), and of rows cut once for all epochs it is not known which documents are "
                    f"left to read; give both stages one format and sequence_length, or each a source of its own: two parts "
                    f"of one store have no document in common (sources.{name}.part)"
                )
            elif config.seed is not None:
                told.add(before_i)
                found.append(
                    f"{where}.seed = {config.seed}: {name} goes on in rows that are cut once for all epochs, whose order "
                    "cannot change on the way; set seed=None, or read another source"
                )
    return found
