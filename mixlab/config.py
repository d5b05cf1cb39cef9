"""Configuration: a Python file's nested values, plus overrides from the command line -> frozen dataclasses.

A config file defines `get_config(arg="")` and returns an ml_collections ConfigDict (or nested dicts and the rooms' own
dataclasses) with what differs from the defaults below. `Config` is the schema: every key, type and default.
"""

import difflib
import importlib.util
import json
import re
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mixlab.errors import UserError
from mixlab.evals.tasks import TaskConfig, task_problems
from mixlab.inject.experiments import Experiment
from mixlab.model.config import ModelConfig, config_problems
from mixlab.parallel.mesh import MeshConfig
from mixlab.schedule.stages import StageConfig, rereading_problems
from mixlab.schema import build, override, plain
from mixlab.sequences.metadata import MetadataConfig
from mixlab.training import optimizer, schedules
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.schedules import ScheduleConfig, Stretch


@dataclass(frozen=True)
class SourceConfig:
    """Text to read.

    store: the folder of a token store, or "embedded" for the corpus made from this Python installation.
    where: only documents for which this holds: metadata column -> a value, a list of values, or {"min": …, "max": …}.
    part: (from, to) within 0 and 1: only this part of the training documents, told by a hash of their ids. Sources with
        parts that do not overlap have no document in common.
    declared_tokens: of one pass over it, what the format adds to documents included, for planning where the store is
        not at hand; not used once it is.
    """

    store: str = "embedded"
    where: dict[str, Any] = field(default_factory=dict)
    part: tuple[float, ...] = (0.0, 1.0)
    declared_tokens: int | None = None

    def problems(self, where: str) -> list[str]:
        found = []
        if self.declared_tokens is not None and self.declared_tokens < 1:
            found.append(f"{where}.declared_tokens = {self.declared_tokens}: must be at least 1")
        if len(self.part) != 2 or not 0 <= self.part[0] < self.part[1] <= 1:
            found.append(f"{where}.part = {self.part}: give two numbers from 0 to 1, the smaller first, as (0.0, 0.9)")
        return found


@dataclass(frozen=True)
class StartConfig:
    """Where a run begins; by default at step 0 with weights drawn from the seed.

    init_from: folder of a run or a soup; its weights, at step 0, with a fresh optimiser.
    branch_from: folder of a run; its weights, optimiser and step. The run reads its own stages from that step on.
    step: of which checkpoint; None: the newest that is sound.   reset_optimizer: branch with fresh moments.
    """

    init_from: str | None = None
    branch_from: str | None = None
    step: int | None = None
    reset_optimizer: bool = False

    def problems(self) -> list[str]:
        found = []
        if self.init_from is not None and self.branch_from is not None:
            found.append("start: init_from and branch_from are both given; a run begins in one way, set one to None")
        if self.init_from is None and self.branch_from is None and self.step is not None:
            found.append(f"start.step = {self.step}: of which run? Set start.branch_from or start.init_from too")
        if self.reset_optimizer and self.branch_from is None:
            found.append("start.reset_optimizer: belongs to start.branch_from; other runs begin with a fresh optimiser")
        return found


@dataclass(frozen=True)
class TrainingConfig:
    """The train step.

    accumulation_steps: parts that a batch is computed in, one after the other; the result is the same.
    z_loss: weight of (log Z)^2 a trained token.   loss_chunk_tokens: tokens whose logits a device holds at a time.
    on_non_finite: when loss or gradient is not finite, "skip" the update (counted in train/skipped), "stop" the run, or
        "roll_back": go back to the last checkpoint and come again without that batch; if that does not help, without any
        batch since that checkpoint.
    max_skipped_steps: in a row, after which "skip" stops too.
    spike_deviations: also roll back when the loss or the gradient's norm is more than so many standard deviations above the
        mean of the `spike_window_steps` before it (as OLMo-core counts spikes, with 6 and 128); None: never.
    max_roll_backs: of the whole run; the next one stops it.
    hang_seconds: a step that takes longer is taken for hung: the process dumps its stacks and ends, to be started again. Ten
        times as long for evaluation, probes and saving between two steps; 0: never.
    """

    accumulation_steps: int = 1
    z_loss: float = 0.0
    loss_chunk_tokens: int = 2048
    on_non_finite: Literal["skip", "stop", "roll_back"] = "skip"
    max_skipped_steps: int = 20
    spike_deviations: float | None = None
    spike_window_steps: int = 128
    max_roll_backs: int = 10
    hang_seconds: float = 1800.0


@dataclass(frozen=True)
class CheckpointConfig:
    """every_steps: save at its multiples, and at the end.   keep_last: newest ones kept; keep_every_steps: multiples kept
    for good.
    directory: another disk, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; the checkpoints are in DIRECTORY/<name of the run's
        folder>. None: in the run's folder.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every_steps: int | None = None
    directory: str | None = None


@dataclass(frozen=True)
class MetadataEvaluationConfig:
    """Loss on held-out documents with metadata in front of them, in addition to the loss without.

    variants: "true", a document's own; "wrong", of another held-out document with another value; "shuffled", changed about
        at random within a set; "text", the same for all; "none", on the same tokens. Empty: nothing is scored.
    text: the value for all documents, such as "en.wikipedia.org"; written into the template like theirs.
    template: how metadata are made and written; None: as the first stage that has metadata does.
    """

    variants: tuple[Literal["none", "true", "wrong", "shuffled", "text"], ...] = ()
    text: str | None = None
    template: MetadataConfig | None = None


@dataclass(frozen=True)
class EvaluationConfig:
    """Loss and bits per byte on held-out documents, a set a domain.

    every_steps: at its multiples, before step 0 and at the end; 0 only at the end.   at_steps: after these steps too.
    tokens_per_domain: about how many tokens of each domain are read, whole documents in a fixed order.
    breakdown: also by length of the document and by position in the context.
    rows: of one evaluation batch, and as many more as the mesh needs to divide them.
    sequence_length: tokens of a row of held-out text; None: as in the last stage. Runs whose last stages differ in it are
        compared with one for all.   sample_prompts, sample_tokens, sample_temperature: texts continued at the end.
    metadata: the loss with metadata in front of documents.   sample_metadata: a value written in front of the texts that are
        continued, with the same template.
    tasks: name -> a benchmark, scored as well; at_steps are for them too.
    """

    every_steps: int = 250
    at_steps: tuple[int, ...] = ()
    tokens_per_domain: int = 65536
    breakdown: bool = False
    rows: int = 16
    sequence_length: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 128
    sample_temperature: float = 0.7
    sample_metadata: str | None = None
    metadata: MetadataEvaluationConfig = MetadataEvaluationConfig()
    tasks: dict[str, TaskConfig] = field(default_factory=dict)

    def due(self, step: int, steps: int, every_steps: int | None = None, starting: bool = False) -> bool:
        """Whether something is scored when `step` of `steps` updates are done.   every_steps: its own interval, if it has one.
        starting: a run begins here, at step 0 or as a branch."""
        every = self.every_steps if every_steps is None else every_steps
        return step == steps or step in self.at_steps or (every > 0 and (starting or step % every == 0))


@dataclass(frozen=True)
class LoggingConfig:
    """console_every_seconds: a progress line at most so often (a terminal has one that is redrawn).   tensorboard, wandb: write there too, besides metrics.jsonl."""

    console_every_seconds: float = 10.0
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class LoaderConfig:
    """threads: that read batches ahead.   prefetch_batches: at most so many.   workers: processes; 0 for none."""

    threads: int = 2
    prefetch_batches: int = 8
    workers: int = 0


@dataclass(frozen=True)
class Config:
    """A run, whole.

    name: of the run; its folder is runs/<name> unless the command says otherwise.
    seed: everything random derives from it.
    total_tokens: of the run, for stages whose length is a fraction of it.
    tokenizer: "bytes", "bpe:<size>" (trained on the embedded corpus), or a tokenizer.json; None: the stores' own.
    experiments: name -> an experiment inside the run, told apart by its `kind`; all are probed.
    experiments_enabled: those that insert something; None: all; (): none, the control run, which reads the same otherwise.
    """

    model: ModelConfig
    name: str = "run"
    seed: int = 0
    total_tokens: int | None = None
    tokenizer: str | None = None
    sources: dict[str, SourceConfig] = field(default_factory=lambda: {"text": SourceConfig()})
    stages: tuple[StageConfig, ...] = (StageConfig(steps=1000),)
    experiments: dict[str, Experiment] = field(default_factory=dict)
    experiments_enabled: tuple[str, ...] | None = None
    start: StartConfig = StartConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    loader: LoaderConfig = LoaderConfig()

    @property
    def total_steps(self) -> int:
        return sum(stage.length_steps(self.total_tokens) for stage in self.stages)

    @property
    def enabled_experiments(self) -> tuple[str, ...]:
        """Sorted: the order has no influence."""
        return tuple(sorted(self.experiments if self.experiments_enabled is None else self.experiments_enabled))

    @property
    def metadata_template(self) -> MetadataConfig | None:
        """How metadata are written at evaluation; None where neither it nor a stage says."""
        stages = (stage.format.metadata for stage in self.stages)
        return self.evaluation.metadata.template or next((found for found in stages if found), None)

    @property
    def learning_rates(self) -> tuple[tuple[int, Stretch], ...]:
        """First step of every stage, and the rule of its learning rate."""
        stages = [(stage.length_steps(self.total_tokens), stage.schedule) for stage in self.stages]
        return schedules.compose(self.schedule, stages)


# Keys that decide how a run is computed and watched, not what it computes: they may differ when a run is resumed.
FREE_KEYS = (
    "mesh.", "checkpoint.every_steps", "checkpoint.keep_", "evaluation.", "logging.", "loader.", "training.accumulation_steps", "training.loss_chunk_tokens",
    "training.on_non_finite", "training.max_skipped_steps", "training.spike_", "training.max_roll_backs",
    "training.hang_seconds", "model.remat", "model.layer_loop", "model.attention",
    "model.sequence_attention",
)  # fmt: skip


def load(spec: str, overrides: list[str]) -> Config:
    """The config of `file.py[:arg]` with overrides ["--config.a.b=value", …] applied, checked as a whole.

    Raises UserError naming every problem at once: unknown keys with the nearest one, wrong types, impossible values.
    """
    return _load(spec, plain(_call(spec)), overrides)


def load_json(path: Path, overrides: list[str]) -> Config:
    """As `load`, from a run's config.json."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name the folder of a run") from None
    return _load(str(path), values, overrides)


def _load(spec: str, values: dict, overrides: list[str]) -> Config:
    problems: list[str] = []
    config = build(Config, values, "", problems)
    if not problems and overrides:
        values = plain(config)  # with the defaults, so that an override finds every key
        for asked in overrides:
            override(values, asked, problems)
        config = build(Config, values, "", problems)
    if not problems:
        problems = check(config)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise UserError(f"{spec}: the configuration cannot be used:\n{listed}")
    return config


def check(config: Config) -> list[str]:
    """What is wrong with a config whose types are right: each room's own problems, and those between rooms."""
    found = config_problems(config.model) + optimizer.problems(config.optimizer) + config.start.problems()
    if not config.stages:
        found.append("stages: a run has at least one")
    names = [stage.name for stage in config.stages]
    found += [f"stages.{i}.name = {n!r}: an earlier stage has it" for i, n in enumerate(names) if n in names[:i]]
    found += _experiment_problems(config)
    found += _schedule_problems(config) + _metadata_problems(config) + rereading_problems(config.stages)
    found += task_problems(config.evaluation.tasks, config.model.context_length)
    for i, stage in enumerate(config.stages):
        where = f"stages.{i}"
        found += stage.problems(where, tuple(config.sources), config.total_tokens)
        if stage.sequence_length > config.model.context_length:
            found.append(
                f"{where}.sequence_length = {stage.sequence_length} is longer than model.context_length = "
                f"{config.model.context_length}; shorten the one or raise the other"
            )
        rows = stage.tokens_per_step // max(stage.sequence_length, 1)
        parts = config.training.accumulation_steps
        if parts >= 1 and rows % parts:
            fitting = max(d for d in range(1, parts + 1) if rows % d == 0)
            found.append(
                f"training.accumulation_steps = {parts} does not divide the {rows} rows of {where}; use {fitting}"
            )
    at_least = [
        (1, "training", ("accumulation_steps", "loss_chunk_tokens", "max_skipped_steps", "max_roll_backs")),
        (2, "training", ("spike_window_steps",)),
        (1, "checkpoint", ("every_steps", "keep_last", "keep_every_steps")),
        (1, "evaluation", ("tokens_per_domain", "rows")),
        (2, "evaluation", ("sequence_length",)),
        (0, "evaluation", ("every_steps", "sample_tokens", "sample_temperature")),
        (0, "logging", ("console_every_seconds",)),
        (1, "loader", ("prefetch_batches",)),
        (0, "loader", ("threads", "workers")),
        (0, "training", ("z_loss", "spike_deviations", "hang_seconds")),
    ]
    for least, group, keys in at_least:
        for key in keys:
            value = getattr(getattr(config, group), key)
            if value is not None and value < least:
                found.append(f"{group}.{key} = {value}: must be at least {least}")
    if (config.evaluation.sequence_length or 0) > config.model.context_length:
        found.append(
            f"evaluation.sequence_length = {config.evaluation.sequence_length} is longer than model.context_length = "
            f"{config.model.context_length}; shorten the one or raise the other"
        )
    if any(step < 0 for step in config.evaluation.at_steps):
        found.append(f"evaluation.at_steps = {config.evaluation.at_steps}: steps are counted from 0")
    if not re.fullmatch(r"[\w.-]+", config.name):
        found.append(f"name = {config.name!r}: letters, digits, '.', '_' and '-' only; it names the run's folder")
    for name, source in config.sources.items():
        found += source.problems(f"sources.{name}")
    if "embedded" in {source.store for source in config.sources.values()} and config.tokenizer is None:
        found.append("tokenizer = None: the embedded corpus needs one; use 'bytes', 'bpe:4096' or a tokenizer.json")
    return found


def _experiment_problems(config: Config) -> list[str]:
    found = []
    for name, experiment in config.experiments.items():
        if not re.fullmatch(r"[\w.-]+", name):
            found.append(f"experiments.{name}: a name has letters, digits, '.', '_' and '-' only; rename it")
        if alike := [other for other in config.experiments if other.lower() == name.lower() and other < name]:
            found.append(f"experiments.{name}: differs from {alike[0]} by case alone; rename one of them")
        found += experiment.problems(f"experiments.{name}")
    for name in config.experiments_enabled or ():
        if name not in config.experiments:
            near = difflib.get_close_matches(name, config.experiments, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(config.experiments) or 'none'}"
            found.append(f"experiments_enabled names {name!r}, which is not among the experiments; {hint}")
    return found


def _metadata_problems(config: Config) -> list[str]:
    settings, key = config.evaluation.metadata, "evaluation.metadata"
    found = [] if settings.template is None else settings.template.problems(f"{key}.template")
    asked = [f"evaluation.tasks.{name}.metadata" for name, task in config.evaluation.tasks.items() if task.metadata]
    asked += ["evaluation.sample_metadata"] if config.evaluation.sample_metadata is not None else []
    asked += [f"{key}.variants"] if settings.variants else []
    if asked and config.metadata_template is None:
        found.append(
            f"{asked[-1]}: no stage has metadata to go by; set {key}.template, for example to {{'columns': ['url']}}"
        )
    if "text" in settings.variants and not settings.text:
        found.append(f"{key}.text = {settings.text!r}: the variant 'text' needs one, for example 'en.wikipedia.org'")
    return found


def _schedule_problems(config: Config) -> list[str]:
    lengths = [stage.length_steps(config.total_tokens) for stage in config.stages]
    followed = sum(lengths[: max((i + 1 for i, s in enumerate(config.stages) if s.schedule is None), default=0)])
    found = schedules.problems(config.schedule, followed) if followed else []
    if config.schedule.peak is None:
        found.append(
            "schedule.peak = None: only a stage's own schedule can take over the rate before it; give a number"
        )
    for i, (stage, steps) in enumerate(zip(config.stages, lengths, strict=True)):
        if stage.schedule is not None and steps:
            found += schedules.problems(stage.schedule, steps, f"stages.{i}.schedule")
    return found


def with_defaults(values: dict) -> dict:
    """The values of an earlier config.json with the defaults of keys that were added since; as they are where they no longer
    make a config."""
    problems: list[str] = []
    config = build(Config, values, "", problems)
    return values if problems else plain(config)


def to_json(config: Config) -> str:
    return json.dumps(plain(config), indent=2) + "\n"


def _call(spec: str) -> Any:
    """What get_config of `file.py[:arg]` returns."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        there = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(name, there, n=1)
        raise UserError(f"--config={spec}: there is no file {name}" + (f"; did you mean {near[0]}?" if near else ""))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={spec}: {name} is not a Python file; name one that defines get_config()")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={spec}: {name} does not define get_config(); add it")
        return module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = f" (line {frames[-1].lineno})" if frames else ""
        raise UserError(f"--config={spec}: {name}{line} failed with {type(error).__name__}: {error}") from error
