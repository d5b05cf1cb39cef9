"""One model on the same tokens of one text, cut into rows in five ways; and on rows of a single length, or of concatenated text
in the lengths of the decomposed."""

import os

import numpy as np
from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import llama

CORPORA = {
    "text": dict(
        store=os.environ.get("MIXLAB_DECOMPOSITION_STORE", "runs/dataset_decomposition/store"),
        tokenizer=None,
        vocabulary=2048,
        steps=200,
        bucket_steps=80,
    ),
    "embedded": dict(store="embedded", tokenizer="bpe:1024", vocabulary=1024, steps=40, bucket_steps=40),
}
LENGTHS = (128, 256, 512, 1024, 2048)
TOKENS_PER_STEP = 4096
CYCLES = 8
DECOMPOSED = dict(kind="decompose", min_length=LENGTHS[0])
FORMATS = {
    "concat": dict(mask_documents=False, restart_positions=False, loss_across_documents=True),
    "concat_masked": dict(),
    "best_fit": dict(kind="best_fit"),
    "dd_uniform": DECOMPOSED,
    "dd_grow_p2": DECOMPOSED,
}
ARMS = tuple(FORMATS)
CONTROL = "concat_lengths"  # short rows and long ones, as dd_uniform, but with whatever documents they cut across
BUCKETS = tuple(f"bucket_{length}" for length in LENGTHS)


def curriculum(arm: str) -> dict | None:
    """Which rows the arm reads at which step; None where they all have one length."""
    if arm in BUCKETS:  # what is left of a document that is longer or shorter goes unread
        return dict(mixture="custom", shares=tuple(float(arm == name) for name in BUCKETS))
    if FORMATS[arm] is not DECOMPOSED:
        return None
    return dict(mixture="equal", cycles=CYCLES, odds=arm.removeprefix("dd_"))


def stages(arm: str, steps: int, seed: int) -> list[dict]:
    """One stage; of the control one for every step, lengths in the order of `seed`, in every cycle as many of each."""
    if arm == CONTROL:
        cycle = LENGTHS * (steps // CYCLES // len(LENGTHS))
        lengths = [n for at in range(CYCLES) for n in np.random.default_rng((seed, at)).permutation(cycle).tolist()]
        step = dict(steps=1, tokens_per_step=TOKENS_PER_STEP, format=FORMATS["concat"])
        return [dict(step, name=f"step-{at}", sequence_length=length) for at, length in enumerate(lengths)]
    return [
        dict(
            name="main",
            steps=steps,
            sequence_length=LENGTHS[-1],
            tokens_per_step=TOKENS_PER_STEP,
            format=FORMATS.get(arm, DECOMPOSED),
            curriculum=curriculum(arm),
        )
    ]


def get_config(arg: str = "dd_grow_p2") -> ConfigDict:
    """Claim (Pouransari et al. 2024, table 5): documents decomposed into rows of powers of two, short rows first in each of
    eight cycles, cost less time than rows of the longest length at equal tokens, and teach as much or more.

    Expected: experiments/dataset_decomposition/README.md.
    Command: python experiments/dataset_decomposition/run.py --data=DIR, or --embedded, trains all arms.
    Cost: about 55 minutes on a CPU core; 17 for the embedded corpus without single buckets.

    arg: words separated by commas: an arm (concat, concat_masked, best_fit, dd_uniform, dd_grow_p2; or concat_lengths:
        concat in the lengths of dd_uniform; or bucket_128 to bucket_2048: rows of that length alone, on fewer tokens);
        a seed (1); embedded for the corpus of this Python installation. "dd_uniform,2", "embedded,concat".
    """
    words = arg.split(",")
    corpus = "embedded" if "embedded" in words else "text"
    known = (*ARMS, CONTROL, *BUCKETS)
    arms = [word for word in words if word in known]
    seeds = [word for word in words if word.isdigit()]
    if len(arms) != 1 or len(seeds) > 1 or set(words) - {"embedded", *arms, *seeds}:
        raise UserError(f"{arg!r}: give one of {', '.join(known)}, with a seed or without, and embedded or not")
    arm, settings = arms[0], CORPORA[corpus]
    steps = settings["bucket_steps" if arm in BUCKETS else "steps"]
    seed = int(seeds[0]) if seeds else 1
    return ConfigDict(
        dict(
            name=f"decomposition-{arg.replace(',', '-')}",
            seed=seed,
            tokenizer=settings["tokenizer"],
            sources={"text": dict(store=settings["store"])},
            stages=stages(arm, steps, seed),
            model=llama(
                layers=3,
                d_model=128,
                heads=4,
                ffn_width=384,
                vocab_size=settings["vocabulary"],
                context_length=LENGTHS[-1],
                rope_base=100_000.0,  # as the paper's comparison
                tied_head=True,
            ),
            optimizer=dict(name="muon"),
            schedule=dict(kind="cosine", peak=7e-3, warmup_steps=20, final_fraction=0.02),
            checkpoint=dict(every_steps=1000, keep_last=1),
            evaluation=dict(
                every_steps=steps // 4,
                tokens_per_domain=24576,
                rows=4,
                sequence_length=LENGTHS[-1],
                breakdown=True,
                sample_tokens=0,
            ),
        )
    )
