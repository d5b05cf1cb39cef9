"""The plan of a run: what will be read, before anything is trained."""

from mixlab.config import Config
from mixlab.data import Data
from mixlab.model.size import flops_per_token, parameter_count
from mixlab.training.schedules import learning_rate


def make_plan(config: Config, data: Data) -> dict:
    """What plan.json holds: steps, tokens, epochs and dropped tokens of every stage and source, learning rate at the joints,
    the model's size and its floating-point operations."""
    stages = []
    for stage in data.stream.stages:
        source = data.stream.sources[stage.source]
        rows = stage.steps * stage.rows_per_step
        dropped = source.epoch_tokens - source.rows_per_epoch * source.row_length
        stages.append(
            {
                "name": stage.name,
                "first_step": stage.first_step,
                "last_step": stage.last_step,
                "steps": stage.steps,
                "sequence_length": stage.sequence_length,
                "rows_per_step": stage.rows_per_step,
                "tokens_per_step": stage.tokens_per_step,
                "tokens": stage.steps * stage.tokens_per_step,
                "sources": {
                    stage.source: {
                        "weight": 1.0,
                        "tokens": rows * stage.sequence_length,
                        "epochs": rows / source.rows_per_epoch,
                        "documents_per_epoch": len(source.documents.ids),
                        "tokens_per_epoch": source.epoch_tokens,
                        "rows_per_epoch": source.rows_per_epoch,
                        "dropped_tokens_per_epoch": dropped,
                        "padded_tokens_per_epoch": 0,
                        "truncated_tokens_per_epoch": 0,
                    }
                },
                "learning_rate_first": learning_rate(config.schedule, stage.first_step, config.total_steps),
                "learning_rate_last": learning_rate(config.schedule, stage.last_step, config.total_steps),
            }
        )
    flops = sum(s["tokens"] * flops_per_token(config.model, s["sequence_length"]) for s in stages)
    return {
        "name": config.name,
        "total_steps": config.total_steps,
        "total_tokens": sum(stage["tokens"] for stage in stages),
        "parameters": parameter_count(config.model),
        "flops": float(flops),
        "stages": stages,
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


def as_text(plan: dict) -> str:
    """The plan for people: a tree of stages and sources."""
    lines = [
        f"{plan['name']}: {plan['parameters']:,} parameters, {plan['total_steps']:,} steps, "
        f"{plan['total_tokens']:,} tokens, {plan['flops']:.3g} floating-point operations"
    ]
    for stage in plan["stages"]:
        lines.append(
            f"└─ stage {stage['name']}: steps {stage['first_step']:,} to {stage['last_step']:,}, "
            f"{stage['rows_per_step']:,} rows of {stage['sequence_length']:,} a step, {stage['tokens']:,} tokens, "
            f"learning rate {stage['learning_rate_first']:.6g} to {stage['learning_rate_last']:.6g}"
        )
        for name, source in stage["sources"].items():
            lines.append(
                f"   └─ {name}: {source['weight']:.1%} of the tokens = {source['tokens']:,}; "
                f"{source['epochs']:.3f} epochs of {source['tokens_per_epoch']:,} tokens in "
                f"{source['documents_per_epoch']:,} documents; an epoch drops {source['dropped_tokens_per_epoch']:,}, "
                f"pads {source['padded_tokens_per_epoch']:,} and truncates {source['truncated_tokens_per_epoch']:,}"
            )
    sets = ", ".join(f"{name} ({count})" for name, count in plan["evaluation_sets"].items())
    lines.append(f"held-out documents: {sets or 'none'}")
    return "\n".join(lines)

