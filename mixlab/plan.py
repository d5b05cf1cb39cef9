"""The plan of a run: what will be read, before anything is trained."""

import itertools
import shutil

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.tree import Tree

from mixlab.config import Config
from mixlab.corpus.store import TokenStore
from mixlab.data import Data, Sizes
from mixlab.model.size import flops_per_token, parameter_count
from mixlab.schedule.buckets import tokens_without_repeats
from mixlab.schedule.curriculum import steps_without_repeats
from mixlab.schedule.fixed import FixedRows
from mixlab.schedule.source import SourceRows
from mixlab.schedule.stages import Stage
from mixlab.sequences.complete import CUT
from mixlab.sequences.documents import Documents
from mixlab.sequences.metadata import Metadata
from mixlab.sequences.statistics import average_context_length, average_sequence_length
from mixlab.stream import Stream
from mixlab.training.schedules import Stretch, rate_of
from mixlab.treatment import LARGE_SHARE


def make_plan(config: Config, data: Data) -> dict:
    """What plan.json holds: `outline`, and what only the text itself can tell: epochs, documents, dropped tokens, the
    stores' fingerprints."""
    plan = outline(config, data.stream.stages, data.stream)
    return plan | {
        "sources": {name: _read(store) for name, store in data.stores.items()},
        "evaluation_sets": {name: len(ids) for name, (_, ids) in data.held_out.items()},
        "tokenizer": {
            "name": data.tokenizer.name,
            "hash": data.tokenizer.hash,
            "vocab_size": data.tokenizer.vocab_size,
        },
        "stream": data.stream.fingerprint(),
        "experiments": _experiments(config, data),
        "conditioned_and_plain": _in_both(data.stream),
    }


def plan_of_sizes(config: Config, sizes: Sizes) -> dict:
    """The plan of a run whose text is not all at hand: `outline`, and how often each source is read. Sources that say
    "declared_tokens" instead of a fingerprint are those whose size is the configuration's word."""
    plan = outline(config, sizes.stages)
    for stage, planned in zip(sizes.stages, plan["stages"], strict=True):
        for name, source in planned["sources"].items():
            source["tokens_per_epoch"] = sizes.epoch_tokens(name, stage.format)
            source["epochs"] = source["tokens"] / source["tokens_per_epoch"]
    stores = {name: source.store for name, source in config.sources.items()}
    return plan | {
        "sources": {name: _read(store) for name, store in sizes.stores.items()}
        | {name: {"store": stores[name], "declared_tokens": tokens} for name, tokens in sizes.declared.items()}
    }


def _experiments(config: Config, data: Data) -> dict[str, dict]:
    """Of every configured experiment what it inserts before the run, or which steps it noises; of one that is not enabled that
    it is not. dynamic: what it inserts is decided during the run."""
    told = data.stream.insertions.summary() if data.stream.insertions is not None else {}
    found: dict[str, dict] = {}
    for name, (experiment, _) in data.experiments.items():
        found[name] = {"kind": experiment.kind, "enabled": name in config.enabled_experiments}
        if name in told and told[name]["insertions"]:
            found[name] |= told[name]
        if noised := [step for step, noise in sorted(data.stream.noises.items()) if noise.name == name]:
            found[name]["noised_steps"] = noised
        if hasattr(experiment, "decide"):
            found[name]["dynamic"] = True
    return found


def _in_both(stream: Stream) -> list[dict]:
    """For every pair of a stage with metadata and one without: how many documents each reads of, and how many both do.
    (A cooldown is meant to have none of the trunk's: Gao et al. 2025, section 2.)"""
    conditioned = [stage.format.metadata is not None for stage in stream.stages]
    if len(set(conditioned)) < 2:
        return []
    read = [stream.documents_read(number) for number in range(len(stream.stages))]
    return [
        {
            "stages": [stream.stages[i].name, stream.stages[j].name],
            "documents": [int(sum(mask.sum() for mask in read[n].values())) for n in (i, j)],
            "in_both": int(sum((read[i][store] & read[j][store]).sum() for store in read[i].keys() & read[j].keys())),
        }
        for i, j in itertools.combinations(range(len(read)), 2)
        if conditioned[i] != conditioned[j]
    ]


def _read(store: TokenStore) -> dict:
    return {
        "store": str(store.path),
        "fingerprint": store.fingerprint,
        "documents": len(store),
        "tokens": store.n_tokens,
    }


def outline(config: Config, stages: tuple[Stage, ...], stream: Stream | None = None) -> dict:
    """Steps, tokens asked for and realised of every stage and source, learning rate at the joints, the model's size and
    its floating-point operations. Without a stream nothing is said about documents."""
    planned = []
    for number, (stage, (_, rule)) in enumerate(zip(stages, config.learning_rates, strict=True)):
        planned.append(
            {
                "name": stage.name,
                "first_step": stage.first_step,
                "last_step": stage.last_step,
                "steps": stage.steps,
                "sequence_length": stage.sequence_length,
                "rows_per_step": stage.rows_per_step,
                "tokens_per_step": stage.tokens_per_step,
                "tokens": stage.tokens,
                "sources": {name: _source(stage, name, number, stream) for name in sorted(stage.shares)},
                "learning_rate_first": rate_of(rule, stage.first_step),
                "learning_rate_highest": _highest_rate(rule, stage),
                "learning_rate_last": rate_of(rule, stage.last_step),
                "learning_rate_after": rate_of(rule, stage.last_step + 1),
            }
            | _buckets(stage, number, stream)
        )
    flops = sum(
        stage.batches(length) * stage.tokens_per_step * flops_per_token(config.model, length)
        for stage in stages
        for length in stage.mixtures
    )
    return {
        "name": config.name,
        "total_steps": config.total_steps,
        "total_tokens": sum(stage["tokens"] for stage in planned),
        "parameters": parameter_count(config.model),
        "flops": float(flops),
        "stages": planned,
    }


def _highest_rate(rule: Stretch, stage: Stage) -> float:
    """Of the stage's steps: a rate rises over the warm-up, and then goes one way."""
    warm = rule.first_step + rule.schedule.warmup_steps
    joints = (stage.first_step, min(max(warm, stage.first_step), stage.last_step), stage.last_step)
    return max(rate_of(rule, step) for step in joints)


def _source(stage: Stage, name: str, number: int, stream: Stream | None) -> dict:
    share, tokens = stage.shares[name], stage.tokens_of()[name]
    told: dict = {
        "weight": float(share.share),
        "requested_tokens": share.tokens,
        "tokens": tokens,
        "share": tokens / stage.tokens,
        "epochs": share.epochs,
        "limited": share.limited,
    }
    if stream is None:
        return told
    readings = [lane[name] for lane in stream.lanes[number].values()]
    told["first_row"] = sum(first for _, first in readings)
    source = readings[0].rows
    if source.documents.metadata is not None:
        told["metadata"] = _metadata(source.documents, source.documents.metadata)
    if not isinstance(source, FixedRows):
        return told | {
            "epochs": source.epochs_read(stage.rows_of()[name]),
            "first_epoch": source.start.epoch,
            "first_document": source.start.position,
            "documents_per_epoch": len(source.documents.ids),
            "tokens_per_epoch": source.epoch_tokens,
            "rows_per_epoch": source.rows_per_epoch,
            **_lost(source),
        }
    cut = source.cut
    dropped_by_reason = cut.dropped_tokens()
    truncated = dropped_by_reason.pop("truncated", 0)
    return told | {
        "epochs": tokens / sum(cut.tokens().values()),
        "first_epoch": 0,
        "first_document": 0,
        "documents_per_epoch": len(cut.documents.ids),
        "tokens_per_epoch": cut.epoch_tokens,
        "rows_per_epoch": sum(len(index) for index in cut.indices.values()),
        "dropped_tokens_per_epoch": sum(dropped_by_reason.values()),
        "dropped": dropped_by_reason,
        "padded_tokens_per_epoch": cut.padded_tokens(),
        "truncated_tokens_per_epoch": truncated,
    }


def _metadata(documents: Documents, metadata: Metadata) -> dict:
    """How many of the documents have metadata, how many different ones, and their tokens on average."""
    codes, lengths = metadata.codes[documents.ids], metadata.lengths(documents.ids)
    count = int(np.count_nonzero(codes))
    values = int(np.count_nonzero(np.bincount(codes)[1:]))
    return {"documents": count, "values": values, "mean_tokens": float(lengths.sum() / max(count, 1))}


def _lost(source: SourceRows) -> dict:
    """Tokens, and where documents are cut short or left out also documents, that an epoch has no row for."""
    if source.format.kind != "complete":
        dropped = source.epoch_tokens - source.rows_per_epoch * source.row_length
        return {"dropped_tokens_per_epoch": dropped, "padded_tokens_per_epoch": 0, "truncated_tokens_per_epoch": 0}
    index = source.index(source.start.epoch + (source.start.position > 0))
    by_reason = dict(index.dropped_tokens)
    truncated = by_reason.pop(CUT, 0)
    kept = np.asarray(index.documents, np.int64)
    return {
        "dropped_tokens_per_epoch": sum(by_reason.values()),
        "dropped": by_reason,
        "padded_tokens_per_epoch": len(index) * source.row_length - int(index.lengths.sum(dtype=np.int64)),
        "truncated_tokens_per_epoch": truncated,
        "truncated_documents_per_epoch": int((index.lengths < source.documents.virtual_lengths(kept)).sum()),
        "dropped_documents_per_epoch": len(source.documents.ids) - len(kept),
    }


def _buckets(stage: Stage, number: int, stream: Stream | None) -> dict:
    """Of a stage whose rows have several lengths: what is read of each, and what that means for the model (Pouransari et
    al. 2024, appendix F)."""
    if stage.curriculum is None:
        return {}
    tokens = {length: stage.batches(length) * stage.tokens_per_step for length in sorted(stage.mixtures)}
    buckets: dict[str, dict] = {
        str(length): {
            "rows_per_step": stage.tokens_per_step // length,
            "steps": stage.batches(length),
            "rows": count // length,
            "tokens": count,
            "share": count / stage.tokens,
            "sources": {name: rows * length for name, rows in stage.rows_of(length).items()},
        }
        for length, count in tokens.items()
    }
    told = {
        "buckets": buckets,
        "cycles": stage.curriculum.config.cycles,
        "average_sequence_length": average_sequence_length(tokens),
        "average_context_length": average_context_length(tokens),
    }
    if stream is None:
        return told
    lanes = stream.lanes[number]
    for length, bucket in zip(tokens, buckets.values(), strict=True):
        held = sum(len(rows.index) for name, (rows, _) in lanes[length].items() if isinstance(rows, FixedRows))
        bucket |= {"rows_per_epoch": held, "epochs": bucket["rows"] / held}
    if any(first for lane in lanes.values() for _, first in lane.values()):
        return told  # a stage before has read some
    cuts = {name: rows.cut.tokens() for name, (rows, _) in lanes[min(lanes)].items() if isinstance(rows, FixedRows)}
    config, shares = stage.curriculum.config, {name: s.share for name, s in stage.shares.items() if s.share}
    pool = tokens_without_repeats(config, shares, cuts)
    return told | {"steps_without_repeats": steps_without_repeats(config, pool, stage.tokens_per_step)}


def as_text(plan: dict, width: int | None = None) -> str:
    """The plan for people: a tree of stages, each with a table of its sources. width: columns; None: the terminal's."""
    tree = Tree(
        f"{plan['name']}: {plan['parameters']:,} parameters, {plan['total_steps']:,} steps, "
        f"{plan['total_tokens']:,} tokens, {plan['flops']:.3g} floating-point operations"
    )
    declared = {name for name, source in plan.get("sources", {}).items() if "declared_tokens" in source}
    if declared:
        tree.add(
            f"SIZES DECLARED, NOT READ, of the sources marked * ({len(declared)} of {len(plan['sources'])}): they have "
            "no store. This can be planned, not trained."
        )
    for stage in plan["stages"]:
        shape = f"{stage['rows_per_step']:,} rows of {stage['sequence_length']:,} tokens"
        if "buckets" in stage:
            shape = f"{stage['tokens_per_step']:,} tokens, in rows of the lengths below"
        first, highest, last = (stage[f"learning_rate_{which}"] for which in ("first", "highest", "last"))
        over = f" over {highest:.6g}" if highest > max(first, last) else ""
        branch = tree.add(
            f"stage {stage['name']}: steps {stage['first_step']:,} to {stage['last_step']:,}, "
            f"{stage['tokens']:,} tokens\n"
            f"{stage['steps']:,} steps of {shape}\n"
            f"learning rate {first:.6g}{over} to {last:.6g}; its rule goes on to {stage['learning_rate_after']:.6g}"
        )
        if "buckets" in stage:
            branch.add(_lengths(stage))
        branch.add(_amounts(stage["sources"], declared))
        for name, source in stage["sources"].items():
            if "metadata" in source:
                told = source["metadata"]
                branch.add(
                    f"metadata before {told['documents']:,} of {source['documents_per_epoch']:,} documents of {name}: "
                    f"{told['values']:,} different, {told['mean_tokens']:.1f} tokens on average"
                )
        if all("first_row" in source for source in stage["sources"].values()):
            branch.add(_reading(stage["sources"]))
    if again := _epochs_in_all(plan["stages"]):
        tree.add(
            "read in several stages: " + ", ".join(f"{name} {epochs:.4f} epochs" for name, epochs in again.items())
        )
    if plan.get("experiments"):
        tree.add(_inserted(plan["experiments"]))
    for pair in plan.get("conditioned_and_plain", ()):
        (one, other), (ones, others) = pair["stages"], pair["documents"]
        tree.add(
            f"documents read in {one}: {ones:,}; in {other}: {others:,}; in both: {pair['in_both']:,}"
            + (" (no document is read with and without metadata)" if not pair["in_both"] else "")
        )
    if "evaluation_sets" in plan:
        sets = ", ".join(f"{name} ({count})" for name, count in plan["evaluation_sets"].items())
        tree.add(f"held-out documents: {sets or 'none'}")
    width = width or max(shutil.get_terminal_size((120, 24)).columns, 100)
    console = Console(width=width, highlight=False, markup=False, color_system=None)
    with console.capture() as captured:
        console.print(tree)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _lengths(stage: dict) -> Group:
    """What is read of each bucket, and how much each has."""
    told = (
        f"{stage['cycles']:,} cycles; a sequence has {stage['average_sequence_length']:,.1f} tokens on average, a "
        f"prediction {stage['average_context_length']:,.1f} tokens of context"
    )
    if "steps_without_repeats" in stage:
        about = "about " if len(stage["sources"]) > 1 else ""  # what each gives to a bucket comes to whole rows
        told += f"\nup to {about}{stage['steps_without_repeats']:,} steps read no row twice"
    table = _table("length", "rows a step", "steps", "tokens", "share", "epochs", "rows an epoch")
    for length, bucket in stage["buckets"].items():
        table.add_row(
            f"{int(length):,}",
            f"{bucket['rows_per_step']:,}",
            f"{bucket['steps']:,}",
            f"{bucket['tokens']:,}",
            f"{bucket['share']:.3%}",
            *((f"{bucket['epochs']:.4f}", f"{bucket['rows_per_epoch']:,}") if "epochs" in bucket else ()),
        )
    return Group(told, table)


def _amounts(sources: dict[str, dict], declared: set[str]) -> Table:
    """What each source gives to a stage: the largest first."""
    table = _table("source", "tokens", "off by", "share", "epochs", "tokens an epoch")
    for name, source in sorted(sources.items(), key=lambda item: -item[1]["tokens"]):
        epoch = f"{source['tokens_per_epoch']:,}" if "tokens_per_epoch" in source else ""
        table.add_row(
            name,
            f"{source['tokens']:,}",
            f"{source['tokens'] - source['requested_tokens']:+,}",
            f"{source['share']:.3%}",
            f"{source['epochs']:.4f}",
            epoch + (" *" if name in declared else "  " if declared else ""),
            "limited to its max_epochs" if source["limited"] else "",
        )
    return table


def _reading(sources: dict[str, dict]) -> Table:
    """Where a stage begins to read each source, and what an epoch of it loses to the format."""
    table = _table("from", "epoch", "document", "row", "documents an epoch", "dropped", "padded", "truncated")
    for name, source in sources.items():
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in source.get("dropped", {}).items())
        if "truncated_documents_per_epoch" in source:
            cut, out = source["truncated_documents_per_epoch"], source["dropped_documents_per_epoch"]
            reasons = "; ".join(filter(None, [reasons, f"{cut:,} documents cut short, {out:,} in no row"]))
        numbers = ("first_epoch", "first_document", "first_row", "documents_per_epoch")
        lost = ("dropped", "padded", "truncated")
        keys = (*numbers, *(f"{what}_tokens_per_epoch" for what in lost))
        table.add_row(name, *(f"{source[key]:,}" for key in keys), reasons)
    return table


def _inserted(experiments: dict[str, dict]) -> Group:
    """What each experiment puts into the run, and a warning where it is much."""
    told = "experiments; what they insert replaces text, EOS around it included"
    share = sum(experiment.get("share", 0) for experiment in experiments.values())
    if share > LARGE_SHARE:
        told += f"\nWARNING: they replace {share:.1%} of the tokens; above {LARGE_SHARE:.0%} the run itself may change"
    table = _table("experiment", "kind", "items", "insertions", "tokens", "share", "redraws", "expected", "steps")
    for name, experiment in experiments.items():
        if "insertions" not in experiment:
            noised = experiment.get("noised_steps")
            steps = f"{noised[0]:,} to {noised[-1]:,}" if noised else ""
            what = f"noise on {len(noised):,} batches" if noised else "inserts nothing"
            what = "decided on the way" if experiment.get("dynamic") else what
            what = what if experiment["enabled"] else "not enabled"
            table.add_row(name, experiment["kind"], what, *[""] * 5, steps)
            continue
        table.add_row(
            name,
            experiment["kind"],
            *(f"{experiment[key]:,}" for key in ("items", "insertions", "tokens")),
            f"{experiment['share']:.3%}",
            f"{experiment['redraws']:,}",
            f"{experiment['expected_redraws']:,.1f}",
            f"{experiment['first_step']:,} to {experiment['last_step']:,}",
            f"{experiment['fallbacks']:,} where space was left" if experiment["fallbacks"] else "",
        )
    return Group(told, table)


def _epochs_in_all(stages: list[dict]) -> dict[str, float]:
    """Source -> passes over it in the whole run, of those that several stages read."""
    epochs: dict[str, list[float]] = {}
    for stage in stages:
        for name, source in stage["sources"].items():
            epochs.setdefault(name, []).append(source["epochs"])
    return {name: sum(parts) for name, parts in sorted(epochs.items()) if len(parts) > 1}


def _table(first: str, *columns: str) -> Table:
    """A table of one column of names, and of numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table
