"""Metadata conditioning then cooldown at a small scale: one model and budget, arms that differ in what stands before documents."""

import os

from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import llama

# metadata: how a document's origin is written. trunk, cooldown: parts of the documents, by a hash of their ids; so every arm
# reads the same documents in its last tenth, and none of them before.
CORPORA = {
    "text": dict(
        store=os.environ.get("MIXLAB_MECO_STORE", "runs/meco/store"),
        tokenizer=None,
        vocabulary=2048,
        steps=640,
        metadata=dict(columns=("url",), reduce="domain"),
    ),
    "embedded": dict(
        store="embedded",
        tokenizer="bpe:1024",
        vocabulary=1024,
        steps=320,
        metadata=dict(columns=("group",), reduce=None, prefix="Group: "),
    ),
}
PARTS = {"trunk": (0.0, 0.88), "cooldown": (0.88, 1.0)}
COOLDOWN = 0.1  # of the steps
# arm -> what is changed of the metadata; None: there are none
ARMS = {
    "standard": None,
    "meco": {},
    "no_cooldown": {},
    "hashed": dict(hashed=True),
    "loss": dict(loss=True),
}
ROWS, LENGTH = 8, 256


def cooldown_steps(steps: int) -> int:
    return round(COOLDOWN * steps)


def get_config(arg: str = "meco") -> ConfigDict:
    """Claim (Gao et al. 2025): with its domain in front of every document for 90 % of training, and plain documents for the
    rest, a model does as well as one trained on a third more tokens; codes in place of domains do the same, metadata that bear
    loss a little worse, and without the cooldown it is much worse on plain documents. Held-out loss does not show the gain.

    Expected: experiments/meco/README.md.
    Command: python experiments/meco/run.py --data=DIR, or --embedded, trains all arms.
    Cost: about 45 minutes on one CPU core; 15 for the embedded corpus.

    arg: words separated by commas: an arm (standard, meco, no_cooldown, hashed, loss), a seed (1), embedded for the corpus of
        this Python installation, steps=N. "hashed,2", "embedded,meco".
    """
    words = arg.split(",")
    corpus = CORPORA["embedded" if "embedded" in words else "text"]
    arms = [word for word in words if word in ARMS]
    seeds = [word for word in words if word.isdigit()]
    lengths = [word for word in words if word.startswith("steps=") and word[6:].isdigit()]
    if len(arms) != 1 or len(seeds) > 1 or set(words) - {"embedded", *arms, *seeds, *lengths}:
        raise UserError(f"{arg!r}: give one of {', '.join(ARMS)}, with a seed or without, and embedded or not")
    arm, seed = arms[0], int(seeds[0]) if seeds else 1
    steps = int(lengths[0][6:]) if lengths else corpus["steps"]

    plain = dict(kind="complete", bos=True)
    metadata = None if ARMS[arm] is None else corpus["metadata"] | ARMS[arm]
    conditioned = dict(plain, metadata=metadata)

    def stage(name, steps, format):
        rows = dict(sequence_length=LENGTH, tokens_per_step=ROWS * LENGTH)
        return dict(name=name, steps=steps, mixture={name: 1.0}, format=format, **rows)

    last = cooldown_steps(steps)
    return ConfigDict(
        dict(
            name=f"meco-{arg.replace(',', '-').replace('=', '')}",
            seed=seed,
            tokenizer=corpus["tokenizer"],
            sources={name: dict(store=corpus["store"], part=part) for name, part in PARTS.items()},
            stages=[
                stage("trunk", steps - last, conditioned),
                stage("cooldown", last, conditioned if arm == "no_cooldown" else plain),
            ],
            model=llama(
                layers=4,
                d_model=128,
                heads=4,
                ffn_width=384,
                vocab_size=corpus["vocabulary"],
                context_length=LENGTH,
                tied_head=True,
            ),
            optimizer=dict(name="muon"),
            schedule=dict(kind="cosine", peak=7e-3, warmup_steps=steps // 20, final_fraction=0.1),
            checkpoint=dict(every_steps=steps - last, keep_last=2),
            evaluation=dict(
                every_steps=steps // 5,
                tokens_per_domain=8192,
                sample_tokens=0,
                metadata=dict(
                    variants=("none", "true", "wrong"),
                    template=corpus["metadata"] | (ARMS[arm] or {}),
                ),
            ),
        )
    )
