"""A run is a list of stages; a stage says what is read, in rows of which length, for how long."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from mixlab.errors import UserError
from mixlab.schedule.mixture import Mixture, mixing_block_steps
from mixlab.schedule.shares import SourceRequest, SourceShare, exact, token_shares
from mixlab.seeds import seed_of
from mixlab.sequences.format import FormatConfig
from mixlab.training.schedules import ScheduleConfig


@dataclass(frozen=True)
class StageConfig:
    """A stage as the configuration states it.

    steps, tokens, fraction: its length, exactly one of them; tokens and fraction (of the run's total_tokens) must come to
        whole steps.
    sequence_length: tokens a row.   tokens_per_step: of the global batch; a multiple of sequence_length.
    mixture: source -> what the stage asks of it; a bare number is a weight, a share of the tokens up to a common factor.
    format: how documents become rows.
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
        return found + self.format.problems(f"{where}.format")

    def _length_problems(self, where: str, total_tokens: int | None) -> list[str]:
        found = []
        if self.tokens_per_step % self.sequence_length:
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


@dataclass(frozen=True)
class Stage:
    """A stage with its place in the run; steps count from 0 over the whole run.

    shares: what each source gets.   mixture: which row is whose.   seed: of the stage's own order, or None."""

    name: str
    first_step: int
    steps: int
    sequence_length: int
    rows_per_step: int
    shares: dict[str, SourceShare]
    mixture: Mixture
    format: FormatConfig
    seed: int | None = None

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps - 1

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.sequence_length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def rows_of(self) -> dict[str, int]:
        """Rows that each source serves in the whole stage."""
        counts = self.mixture.counts(self.steps * self.rows_per_step)
        return dict(zip(self.mixture.names, counts.tolist(), strict=True))


def place_stages(
    configs: tuple[StageConfig, ...],
    epoch_tokens: Callable[[str, FormatConfig], int],
    seed: int,
    total_tokens: int | None = None,
) -> tuple[Stage, ...]:
    """The stages one after the other from step 0 on.

    epoch_tokens: (source, format) -> tokens of one pass over it.
    Raises UserError, all problems at once: shares that cannot be served, limits exceeded, a source too rare to be read."""
    stages, problems, first = [], [], 0
    for i, config in enumerate(configs):
        where = f"stages.{i}.mixture"
        steps, rows_per_step = config.length_steps(total_tokens), config.tokens_per_step // config.sequence_length
        available = {name: epoch_tokens(name, config.format) for name in config.mixture}
        shares, found = token_shares(
            config.requests(), steps * config.tokens_per_step, available, where, slack_tokens=config.tokens_per_step
        )
        problems += found
        if found:
            continue
        mixture = Mixture(
            {name: share.share for name, share in shares.items()},
            rows_per_step * mixing_block_steps(steps),
            steps * rows_per_step,
            seed_of(seed, "stage", config.name, *(() if config.seed is None else (config.seed,))),
        )
        problems += mixture.problems(where)
        length, format = config.sequence_length, config.format
        stages.append(Stage(config.name, first, steps, length, rows_per_step, shares, mixture, format, config.seed))
        first += steps
    if problems:
        raise UserError("the mixture cannot be served:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return tuple(stages)
