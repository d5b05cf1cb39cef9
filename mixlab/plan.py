"""The plan of a run: what will be read, before anything is trained."""

from rich.console import Console
from rich.tree import Tree

from mixlab.config import Config
from mixlab.data import Data
from mixlab.model.size import flops_per_token, parameter_count
from mixlab.schedule.stages import Stage
from mixlab.stream import Stream
from mixlab.training.schedules import rate_of


def make_plan(config: Config, data: Data) -> dict:
    """What plan.json holds: `outline`, and what only the text itself can tell: epochs, documents, dropped tokens, the
    stores' fingerprints."""
    plan = outline(config, data.stream.stages, data.stream)
    return plan | {
        "sources": {
            name: {
                "store": str(store.path),
                "fingerprint": store.fingerprint,
                "documents": len(store),
                "tokens": store.n_tokens,
            }
            for name, store in data.stores.items()
        },
        "evaluation_sets": {name: len(ids) for name, (_, ids) in data.held_out.items()},
        "tokenizer": {"name": data.tokenizer.name, "hash": data.tokenizer.hash, "vocab_size": data.tokenizer.vocab_size},
        "stream": data.stream.fingerprint(),
    }


def outline(config: Config, stages: tuple[Stage, ...], stream: Stream | None = None) -> dict:
    """Steps, tokens asked for and realised of every stage and source, learning rate at the joints, the model's size and its
    floating-point operations. Without a stream nothing is said about documents."""
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
                "sources": {name: _source(stage, name, number, stream) for name in stage.mixture.names},
                "learning_rate_first": rate_of(rule, stage.first_step),
                "learning_rate_last": rate_of(rule, stage.last_step),
                "learning_rate_after": rate_of(rule, stage.last_step + 1),
            }
        )
    flops = sum(s["tokens"] * flops_per_token(config.model, s["sequence_length"]) for s in planned)
    return {
        "name": config.name,
        "total_steps": config.total_steps,
        "total_tokens": sum(stage["tokens"] for stage in planned),
        "parameters": parameter_count(config.model),
        "flops": float(flops),
        "stages": planned,
    }


def _source(stage: Stage, name: str, number: int, stream: Stream | None) -> dict:
    share, rows = stage.shares[name], stage.rows_of()[name]
    told = {
        "weight": float(share.share),
        "requested_tokens": share.tokens,
        "tokens": rows * stage.sequence_length,
        "epochs": share.epochs,
        "limited": share.limited,
    }
    if stream is None:
        return told
    source, first = stream.readings[number][name]
    return told | {
        "epochs": source.epochs_read(rows),
        "first_row": first,
        "first_epoch": source.start.epoch,
        "first_document": source.start.position,
        "documents_per_epoch": len(source.documents.ids),
        "tokens_per_epoch": source.epoch_tokens,
        "rows_per_epoch": source.rows_per_epoch,
        "dropped_tokens_per_epoch": source.epoch_tokens - source.rows_per_epoch * source.row_length,
        "padded_tokens_per_epoch": 0,
        "truncated_tokens_per_epoch": 0,
    }


def as_text(plan: dict) -> str:
    """The plan for people: a tree of stages and sources."""
    tree = Tree(
        f"{plan['name']}: {plan['parameters']:,} parameters, {plan['total_steps']:,} steps, "
        f"{plan['total_tokens']:,} tokens, {plan['flops']:.3g} floating-point operations"
    )
    for stage in plan["stages"]:
        branch = tree.add(
            f"stage {stage['name']}: steps {stage['first_step']:,} to {stage['last_step']:,}, "
            f"{stage['rows_per_step']:,} rows of {stage['sequence_length']:,} a step, {stage['tokens']:,} tokens; "
            f"learning rate {stage['learning_rate_first']:.5e} to {stage['learning_rate_last']:.5e}"
        )
        for name, source in stage["sources"].items():
            branch.add(_source_line(name, source, stage["tokens"]))
    if "evaluation_sets" in plan:
        sets = ", ".join(f"{name} ({count})" for name, count in plan["evaluation_sets"].items())
        tree.add(f"held-out documents: {sets or 'none'}")
    console = Console(width=200, highlight=False)
    with console.capture() as captured:
        console.print(tree, markup=False)
    return captured.get().rstrip()


def _source_line(name: str, source: dict, stage_tokens: int) -> str:
    line = (
        f"{name}: {source['tokens']:,} tokens, {source['tokens'] / stage_tokens:.2%} (asked for {source['weight']:.2%}), "
        f"{source['epochs']:.4g} epochs"
    )
    if source["limited"]:
        line += ", limited to its max_epochs"
    if "tokens_per_epoch" in source:
        line += (
            f" of {source['tokens_per_epoch']:,} tokens in {source['documents_per_epoch']:,} documents, from epoch "
            f"{source['first_epoch']}, document {source['first_document']:,}, row {source['first_row']:,}; an epoch drops "
            f"{source['dropped_tokens_per_epoch']:,}, pads {source['padded_tokens_per_epoch']:,} and truncates "
            f"{source['truncated_tokens_per_epoch']:,}"
        )
    return line
