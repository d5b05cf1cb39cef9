"""Microanneals: one trunk on web text, then short anneals from its checkpoint, each on another mixture."""

import os

from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import llama

# What a run reads: documents of one token store, a source a domain. web: the trunk's mixture. added: what a microanneal
# brings in, as shares of the added half. Domains with "math" in their name are the maths of the arm math10.
CORPORA = {
    "text": dict(
        store=os.environ.get("MIXLAB_DOLMINO_STORE", "runs/dolmino/store"),
        tokenizer=None,
        vocabulary=2048,
        trunk="runs/dolmino/trunk",
        trunk_steps=700,
        anneal_steps=150,
        web={"web": 0.6, "gov_web": 0.25, "docs": 0.15},
        added={"math": 0.4, "math_synthetic": 0.2, "wiki": 0.15, "qa": 0.15, "code": 0.1},
    ),
    "embedded": dict(
        store="embedded",
        tokenizer="bpe:1024",
        vocabulary=1024,
        trunk="runs/dolmino-embedded/trunk",
        trunk_steps=240,
        anneal_steps=48,
        web={"package_code": 0.7, "stdlib_code": 0.3},
        added={"math": 0.5, "docstrings": 0.3, "reference": 0.2},
    ),
}
ARMS = {"web": 0.0, "mix": 0.5, "math10": 0.1}  # share of the added sources in the anneal; math10: of maths alone
STOPPED_AT = 0.8  # of the trunk's cosine, as OLMo 2 7B: 3.9T of 5T tokens
ROWS, LENGTH = 8, 256


def mixture(corpus: str, arm: str) -> dict[str, float]:
    """Source -> share of the tokens of the anneal `arm`, or of the trunk."""
    web, added = CORPORA[corpus]["web"], CORPORA[corpus]["added"]
    if arm == "math10":
        added = {name: weight for name, weight in added.items() if "math" in name}
    share, total = ARMS.get(arm, 0.0), sum(added.values())
    shares = {name: (1 - share) * weight for name, weight in web.items()}
    shares |= {name: share * weight / total for name, weight in added.items()}
    return {name: round(weight, 6) for name, weight in shares.items() if weight}


def get_config(arg: str = "trunk") -> ConfigDict:
    """Claim (OLMo 2, section 4.4.2): half web and half of a better source, read once while the learning rate falls to
    zero, tells from one checkpoint what that source is worth; the mean of three such anneals is better than each.

    Expected: experiments/dolmino/README.md.
    Command: python experiments/dolmino/run.py --data=DIR, or --embedded, trains all arms.
    Cost: about 20 minutes on two CPU cores; 8 for the embedded corpus.

    arg: words separated by commas: trunk, web, mix or math10; for the last three the seed of the anneal's data order
        (1); embedded for the corpus of this Python installation. "mix,2", "embedded,trunk".
    """
    words = arg.split(",")
    corpus = "embedded" if "embedded" in words else "text"
    arms = [word for word in words if word in ("trunk", *ARMS)]
    seeds = [word for word in words if word.isdigit()]
    if len(arms) != 1 or len(seeds) > 1 or set(words) - {"embedded", *arms, *seeds}:
        raise UserError(f"{arg!r}: give one of trunk, {', '.join(ARMS)}, with a seed or without, and embedded or not")
    arm, seed = arms[0], int(seeds[0]) if seeds else 1
    settings = CORPORA[corpus]

    def stage(name, steps, arm, **more):
        return dict(
            name=name,
            steps=steps,
            sequence_length=LENGTH,
            tokens_per_step=ROWS * LENGTH,
            mixture=mixture(corpus, arm),
            **more,
        )

    stages = [stage("trunk", settings["trunk_steps"], "trunk")]
    if arm != "trunk":
        to_zero = dict(kind="linear", peak=None, final_fraction=0.0)  # from the rate that the trunk has come to
        stages.append(stage("anneal", settings["anneal_steps"], arm, schedule=to_zero, seed=seed))
    names = [*settings["web"], *settings["added"]]
    config = dict(
        name=f"dolmino-{arg.replace(',', '-')}",
        tokenizer=settings["tokenizer"],
        sources={name: dict(store=settings["store"], where=dict(domain=name)) for name in names},
        stages=stages,
        model=llama(
            layers=4,
            d_model=192,
            heads=6,
            ffn_width=512,
            vocab_size=settings["vocabulary"],
            context_length=LENGTH,
            tied_head=True,
        ),
        optimizer=dict(name="muon"),
        schedule=dict(
            kind="cosine", peak=7e-3, warmup_steps=30, horizon_steps=round(settings["trunk_steps"] / STOPPED_AT)
        ),
        checkpoint=dict(every_steps=200, keep_last=1),
        evaluation=dict(every_steps=0, tokens_per_domain=16384, sample_tokens=0),
    )
    if arm != "trunk":
        config["start"] = dict(branch_from=settings["trunk"])
    return ConfigDict(config)
