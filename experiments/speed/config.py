"""One model on the same text with AdamW and with Muon, and with Muon in bfloat16."""

import os

from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import llama

CORPORA = {
    "text": dict(
        store=os.environ.get("MIXLAB_SPEED_STORE", "runs/speed/store"), tokenizer=None, vocabulary=2048, steps=200
    ),
    "embedded": dict(store="embedded", tokenizer="bpe:1024", vocabulary=1024, steps=50),
}
ARMS = {
    "adamw": dict(optimizer="adamw", compute_dtype="float32"),
    "muon": dict(optimizer="muon", compute_dtype="float32"),
    "muon_bf16": dict(optimizer="muon", compute_dtype="bfloat16"),
}
# Peak rates that run.py tries for each optimiser in short runs, and those that it trains with (README.md: why).
RATES = {"adamw": (1e-3, 2e-3, 4e-3, 8e-3, 16e-3), "muon": (4e-3, 8e-3, 16e-3)}
PEAKS = {"adamw": 3e-3, "muon": 16e-3}
SWEEP_SEED, SWEEP_FRACTION = 101, 0.375  # a seed that no arm has; so much of the steps
LENGTH, TOKENS_PER_STEP = 256, 4096
WARMUP_STEPS = 20
SCORES = 10  # held-out scores on the way


def get_config(arg: str = "muon") -> ConfigDict:
    """Claim (Jordan et al. 2024; Liu et al. 2025): Muon reaches AdamW's loss in about half to three quarters of the
    tokens, and its step costs little more, so that it is ahead at equal time as well. Arithmetic in bfloat16 with sums
    and weights in float32 gives the same curve as float32.

    Expected: experiments/speed/README.md.
    Command: python experiments/speed/run.py --data=DIR, or --embedded, tries the rates and trains all arms.
    Cost: about 25 minutes on a free CPU core; 6 for the embedded corpus with one seed.

    arg: words separated by commas: an arm (adamw, muon, muon_bf16), a seed (1), embedded for the corpus of this Python
        installation, steps=N. "muon_bf16,2", "embedded,adamw".
    """
    words = arg.split(",")
    corpus = CORPORA["embedded" if "embedded" in words else "text"]
    arms = [word for word in words if word in ARMS]
    seeds = [word for word in words if word.isdigit()]
    lengths = [word for word in words if word.startswith("steps=") and word[6:].isdigit()]
    if len(arms) != 1 or len(seeds) > 1 or len(lengths) > 1 or set(words) - {"embedded", *arms, *seeds, *lengths}:
        raise UserError(f"{arg!r}: give one of {', '.join(ARMS)}, with a seed or without, and embedded or not")
    arm = ARMS[arms[0]]
    steps = int(lengths[0][6:]) if lengths else corpus["steps"]
    return ConfigDict(
        dict(
            name=f"speed-{arg.replace(',', '-').replace('=', '')}",
            seed=int(seeds[0]) if seeds else 1,
            tokenizer=corpus["tokenizer"],
            sources={"text": dict(store=corpus["store"])},
            stages=[dict(name="main", steps=steps, sequence_length=LENGTH, tokens_per_step=TOKENS_PER_STEP)],
            model=llama(
                layers=4,
                d_model=128,
                heads=4,
                ffn_width=384,
                vocab_size=corpus["vocabulary"],
                context_length=LENGTH,
                tied_head=True,
                compute_dtype=arm["compute_dtype"],
            ),
            optimizer=dict(name=arm["optimizer"]),
            schedule=dict(
                kind="cosine",
                peak=PEAKS[arm["optimizer"]],
                warmup_steps=min(WARMUP_STEPS, steps // 3),
                final_fraction=0.1,
            ),
            checkpoint=dict(every_steps=1000, keep_last=1),
            evaluation=dict(every_steps=max(steps // SCORES, 1), tokens_per_domain=8192, sample_tokens=0),
        )
    )
