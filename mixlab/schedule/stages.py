"""A run is a list of stages; a stage says what is read, in rows of which length, for how many steps."""

from dataclasses import dataclass, field

from mixlab.sequences.format import FormatConfig


@dataclass(frozen=True)
class StageConfig:
    """A stage as the configuration states it.

    steps: its length.   sequence_length: tokens a row.   tokens_per_step: of the global batch; a multiple of
    sequence_length.   mixture: source -> share of the stage's tokens.   format: how documents become rows.
    """

    name: str = "main"
    steps: int = 1000
    sequence_length: int = 1024
    tokens_per_step: int = 32 * 1024
    mixture: dict[str, float] = field(default_factory=lambda: {"text": 1.0})
    format: FormatConfig = FormatConfig()

    def problems(self, where: str, sources: tuple[str, ...]) -> list[str]:
        found = [
            f"{where}.{key} = {getattr(self, key)}: must be at least 1"
            for key in ("steps", "sequence_length", "tokens_per_step")
            if getattr(self, key) < 1
        ]
        if not found and self.tokens_per_step % self.sequence_length:
            below = max(self.tokens_per_step // self.sequence_length, 1) * self.sequence_length
            found.append(
                f"{where}.tokens_per_step = {self.tokens_per_step} is not a multiple of sequence_length "
                f"{self.sequence_length}; use {below} or {below + self.sequence_length}"
            )
        for name in self.mixture:
            if name not in sources:
                found.append(f"{where}.mixture names {name!r}, which is not among the sources ({', '.join(sources)})")
        if len(self.mixture) != 1:
            found.append(f"{where}.mixture must name one source; it names {len(self.mixture)}")
        return found + self.format.problems(f"{where}.format")


@dataclass(frozen=True)
class Stage:
    """A stage with its place in the run; steps count from 0 over the whole run."""

    name: str
    first_step: int
    steps: int
    sequence_length: int
    rows_per_step: int
    source: str
    format: FormatConfig

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps - 1

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.sequence_length


def place_stages(configs: tuple[StageConfig, ...]) -> tuple[Stage, ...]:
    """The stages one after the other from step 0 on."""
    stages, first = [], 0
    for config in configs:
        stages.append(
            Stage(
                config.name,
                first,
                config.steps,
                config.sequence_length,
                config.tokens_per_step // config.sequence_length,
                next(iter(config.mixture)),
                config.format,
            )
        )
        first += config.steps
    return tuple(stages)
