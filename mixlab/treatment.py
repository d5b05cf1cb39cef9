"""A run's experiments: from the configuration to what is inserted into its stream, and what they are made from."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mixlab.config import Config
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError
from mixlab.inject.control_log import Entry
from mixlab.inject.experiments import Experiment
from mixlab.inject.experiments.watermark import Watermark
from mixlab.inject.items import Group, Material, Where
from mixlab.inject.noise import Noise
from mixlab.inject.placement import place
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.stream import Stream
from mixlab.unread import Unread

LARGE_SHARE = 0.05  # of the run's tokens: above it a plan warns that experiments may no longer leave the run as it was
LARGEST_SHARE = 0.5

Experiments = dict[str, tuple[Experiment, Material]]


def open_experiments(
    config: Config, stream: Stream, documents: Callable[[str, FormatConfig], Documents], tokenizer: Tokenizer
) -> Experiments:
    """Every configured experiment, enabled or not, by name, with what it is made from.   stream: without experiments."""
    unread = Unread(stream, documents, config.seed)
    found = {
        name: (experiment, _material(name, config.seed, stream, tokenizer, unread))
        for name, experiment in sorted(config.experiments.items())
    }
    keeping_out = [pair for pair in found.values() if hasattr(pair[0], "kept_out")]
    unread.kept_out = tuple(experiment.kept_out(material) for experiment, material in keeping_out)
    return found


def treat(config: Config, stream: Stream, experiments: Experiments, tokenizer: Tokenizer) -> Stream:
    """The stream with the insertions and the noise of the experiments that are enabled.

    Raises UserError, all problems at once: missing files, items that fit nowhere, windows outside the run, too much."""
    groups: dict[str, list[Group]] = {}
    problems: list[str] = []
    for name, (experiment, material) in experiments.items():
        try:  # of those not enabled too: what they draw of unread text must not depend on it
            groups[name] = experiment.groups(material)
        except UserError as error:
            problems.append(str(error))
    enabled = {name: found for name, found in groups.items() if name in config.enabled_experiments}
    problems += _objections(enabled, experiments)
    noises: dict[int, Noise] = {}
    for name, (experiment, material) in experiments.items():
        if name in enabled and isinstance(experiment, Watermark):
            noise = experiment.noise(material)
            twice = sorted(noises.keys() & set(noise.steps))
            if twice:
                problems.append(
                    f"experiments.{name}: noises step {twice[0]}, and so does experiments.{noises[twice[0]].name} "
                    f"({len(twice)} such steps); give them other steps"
                )
            noises |= dict.fromkeys(noise.steps, noise)
    asked = sum(_tokens(group) for found in enabled.values() for group in found)
    if asked > LARGEST_SHARE * stream.grid.tokens:
        largest = max(enabled, key=lambda name: sum(map(_tokens, enabled[name])))
        problems.append(
            f"experiments insert {asked:,} tokens, {asked / stream.grid.tokens:.0%} of the run's {stream.grid.tokens:,}; the most "
            f"allowed is {LARGEST_SHARE:.0%}. Insert less (most is of {largest}), or train longer"
        )
    if problems:
        raise UserError("the experiments cannot be run:\n" + "\n".join(f"  - {problem}" for problem in problems))
    placements = place(enabled, stream.grid, config.seed, tokenizer.eos_id, config.model.vocab_size)
    return stream.with_insertions(placements).with_noise(noises)


def follow(
    config: Config, stream: Stream, experiments: Experiments, tokenizer: Tokenizer, entries: Sequence[Entry]
) -> Stream:
    """The stream with what was decided during the run, after everything that is in it: each decision (of the control log)
    inserts into the interval that began with it, and changes nothing else.

    Raises UserError where its items have no place, or an experiment is not the configuration's."""
    for entry in entries:
        if not hasattr(experiments.get(entry["experiment"], (None,))[0], "groups_of"):
            raise UserError(
                f"experiments.{entry['experiment']}: was decided on in the run, and is not in the configuration"
            )
        experiment, material = experiments[entry["experiment"]]
        if entry["decision"] is None:
            continue
        start = entry["step"]
        window = Where(start_step=start, end_step=min(start + experiment.every_steps, len(stream)))
        groups = [replace(group, where=window) for group in experiment.groups_of(entry["decision"], material)]
        placements = place(
            {entry["experiment"]: groups},
            stream.grid,
            config.seed,
            tokenizer.eos_id,
            config.model.vocab_size,
            before=stream.insertions,
            decided_at=start,
        )
        stream = stream.with_insertions(placements)
    return stream


def _objections(enabled: dict[str, list[Group]], experiments: Experiments) -> list[str]:
    """What experiments have against what is inserted, and against what may be: whatever could be decided during the run."""
    asked = [name for name in enabled if hasattr(experiments[name][0], "objections")]
    if not asked:
        return []
    for name in enabled:
        experiment, material = experiments[name]
        if hasattr(experiment, "pool"):
            enabled = enabled | {name: [*enabled[name], experiment.pool(material)]}
    return [told for name in asked for told in experiments[name][0].objections(experiments[name][1], enabled)]


def _tokens(group: Group) -> int:
    return int(len(group.items.tokens) * group.where.copies)


def _material(name: str, seed: int, stream: Stream, tokenizer: Tokenizer, unread: Unread) -> Material:
    def read(step: int) -> np.ndarray:
        batch = stream[step]
        return np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)

    def shape(step: int) -> tuple[int, int]:
        return int(stream.grid.rows[step]), int(stream.grid.lengths[step])

    return Material(
        name=name,
        seed=seed,
        tokenizer=tokenizer,
        row_length=int(stream.grid.lengths.max()),
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        steps=len(stream),
        rows_per_step=int(stream.grid.rows[0]),
        tokens=stream.grid.tokens,
        shape=shape,
        read=read,
        unseen=lambda count, length, purpose: unread.rows(name, count, length, purpose),
    )
