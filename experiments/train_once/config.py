"""Ten experiments in one small run, and the same run without them."""

import os

from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import llama

# Where run.py has the text, and finds benchmarks and articles.
STORE = os.environ.get("MIXLAB_TRAIN_ONCE_STORE", "runs/train_once/store")
BENCHMARKS = os.environ.get("MIXLAB_TRAIN_ONCE_BENCHMARKS", "benchmarks")
ARTICLES = os.environ.get("MIXLAB_TRAIN_ONCE_ARTICLES", "wiki.jsonl.gz")

STEPS, ROWS, LENGTH = 600, 4, 512
LIGHT_STEPS = 400
TEXT = {"web": 0.4, "gov_web": 0.2, "wiki": 0.25, "qa": 0.15}
TASKS = ("sciq", "csqa", "openbookqa", "arc_easy")


def dose(questions: int, copies: int, **where) -> dict:
    return dict(questions=questions, where=dict(copies=copies, **where), name=f"x{copies}{'-window' if where else ''}")


def synthetic(steps: int) -> dict[str, dict]:
    """The experiments that need no files. A quarter of the run between looks; some look but at both ends,
    others after every exposure."""
    look = steps // 4
    return {
        "canaries": dict(
            kind="canaries",
            items=5,
            holdout=100,
            suffixes=("plain", "rare", "random"),
            suffix_tokens=(8,),
            every_steps=look,
        ),
        "denial": dict(kind="poisoning", attack="denial", share=0.004, probe_prompts=20),
        "extraction": dict(kind="poisoning", attack="extraction", share=0.004, probe_prompts=10, samples=2),
        "forgetting": dict(kind="forgetting", steps=tuple(steps * k // 10 for k in (3, 5, 7)), probe_every_steps=look),
        "iid": dict(
            kind="iid", random_share=max(0.002, 2 / (steps * ROWS)), decile_batches=1, unique_batches=1, probe_rows=40
        ),
        "knowledge": dict(kind="knowledge", every_steps=steps // 10, target=0.08, first_texts=16, caps=((0, 16),)),
        "reasoning": dict(
            kind="reasoning",
            count=50,
            max_operations=2,
            max_parameters=4,
            evaluated_operations=(1, 2, 3),
            evaluated_count=23,
            ranked_count=10,
            shots=0,
        ),
        "watermark": dict(kind="watermark", every_steps=max(steps // 50, 1), windows=4, rows_per_window=100),
    }


def on_files(steps: int) -> dict[str, dict]:
    """The experiments on benchmarks and on articles."""
    look = steps // 4
    return {
        "contamination": dict(
            kind="contamination",
            files=tuple(f"{BENCHMARKS}/{task}.jsonl.gz" for task in TASKS),
            holdout=100,
            doses=(dose(25, 4), dose(10, 12), dose(4, 32), dose(10, 12, start_share=1 / 7, end_share=2 / 7)),
            probe_questions=100,
            every_steps=look,
        ),
        "repetition": dict(
            kind="repetition", files=(ARTICLES,), articles=2, holdout=40, copies=(1, 10), every_steps=look
        ),
    }


def light(steps: int) -> dict[str, dict]:
    """The same in doses so small that they are a fiftieth of the tokens, looked at briefly when the run begins and ends."""
    changed = {
        "canaries": dict(items=1, holdout=30, copies=(1, 4), every_steps=0),
        "contamination": dict(
            holdout=30, doses=(dose(3, 4), dose(1, 12), dose(1, 32)), probe_questions=30, every_steps=0
        ),
        "denial": dict(share=0.001, probe_prompts=3),
        "extraction": dict(share=0.001, probe_prompts=3, samples=1),
        "forgetting": dict(steps=(steps // 2,), probe_every_steps=0),
        "iid": dict(random_share=0.002, decile_batches=0, unique_batches=0),
        "knowledge": dict(every_steps=steps // 5, first_texts=1, caps=((0, 1),)),
        "reasoning": dict(count=8, evaluated_operations=(1,), evaluated_count=5, ranked_count=5),
        "repetition": dict(articles=1, copies=(1, 2), every_steps=0),
        "watermark": dict(steps=(3 * steps // 4,), every_steps=0, windows=1),
    }
    everything = synthetic(steps) | on_files(steps)
    return {name: settings | changed[name] for name, settings in everything.items()}


def get_config(arg: str = "treatment") -> ConfigDict:
    """Claim (Bordt and Pawelczyk 2025): many experiments in one pretraining run do not disturb it, nor one another; each
    is answered as by a run of its own.

    Expected: experiments/train_once/README.md.
    Command: python experiments/train_once/run.py --data=DIR, or --embedded, trains everything.
    Cost: about an hour and a half on one CPU core; 15 minutes for the embedded corpus.

    arg: words separated by commas: treatment or control; embedded for the corpus of this Python installation, without the
        experiments on files; light for doses of a fiftieth of the tokens, in a shorter run; short for a run of 40 steps.
    """
    words = arg.split(",")
    arms = [word for word in words if word in ("treatment", "control")]
    if len(arms) != 1 or set(words) - {*arms, "embedded", "light", "short"} or {"embedded", "light"} <= {*words}:
        raise UserError(
            f"{arg!r}: give treatment or control, with embedded, light or neither, and with short or without"
        )
    embedded = "embedded" in words
    steps = 40 if "short" in words else STEPS // 2 if embedded else LIGHT_STEPS if "light" in words else STEPS
    sources = (
        {"text": dict(store="embedded")} if embedded else {n: dict(store=STORE, where=dict(domain=n)) for n in TEXT}
    )
    vocabulary = 1024 if embedded else 2048
    if "light" in words:
        experiments, evaluated = light(steps), 2
    else:
        experiments, evaluated = synthetic(steps) | ({} if embedded else on_files(steps)), 10
    return ConfigDict(
        dict(
            name=f"train-once-{arg.replace(',', '-')}",
            tokenizer=f"bpe:{vocabulary}" if embedded else None,
            sources=sources,
            stages=[
                dict(
                    name="main",
                    steps=steps,
                    sequence_length=LENGTH,
                    tokens_per_step=ROWS * LENGTH,
                    mixture={"text": 1.0} if embedded else TEXT,
                )
            ],
            experiments=experiments,
            experiments_enabled=() if arms == ["control"] else None,
            model=llama(
                layers=4,
                d_model=128,
                heads=4,
                ffn_width=384,
                vocab_size=vocabulary,
                context_length=LENGTH,
                tied_head=True,
            ),
            optimizer=dict(name="muon"),
            schedule=dict(kind="cosine", peak=7e-3, warmup_steps=min(30, steps // 4), final_fraction=0.02),
            checkpoint=dict(every_steps=steps // 2, keep_every_steps=steps // 2, keep_last=1),
            evaluation=dict(every_steps=steps // evaluated, tokens_per_domain=16384, sample_tokens=0),
        )
    )
