"""OLMo 2 and its anneals on Dolmino Mix 1124, as published: models, rates, mixtures and lengths.

Numbers are from "2 OLMo 2 Furious" (arXiv 2501.00656), tables 1, 3, 4, 5 and 13. Comments mark those that another
source contradicts or the paper leaves open: the released configurations and file lists of allenai/OLMo, and the code of
allenai/OLMo-core.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import olmo2

STORES = (
    "stores"  # a folder with a token store for each source; one that lies elsewhere: --config.sources.NAME.store=DIR
)
LENGTH = 4096


class Size(NamedTuple):
    """rows: of LENGTH tokens, a step.   horizon_tokens: of the cosine, which stage 1 ends before, but for 13B.
    steps, seed: of stage 1.   anneal_peak: where anneals begin; None: at what the rate has come to."""

    rows: int
    peak: float
    warmup_steps: int
    horizon_tokens: float
    steps: int
    seed: int
    anneal_peak: float | None


# Warm-up: 2,000 steps for everyone in the paper; 8,388,608,000 tokens in the released configurations, which are 4,000,
# 2,000 and 1,000 steps for 1B, 7B and 13B. Only with 4,000 does 1B come to the rate that its anneal begins at.
SIZES = {
    "1B": Size(512, 4e-4, 4000, 5e12, 1_907_359, 6198, 7.4487e-5),
    "7B": Size(
        1024, 3e-4, 2000, 5e12, 928_646, 6198, 6.1499e-5
    ),  # the rate of step 928,000, 0.24 % above the last one's
    "13B": Size(
        2048, 9e-4, 2000, 5e12, 596_057, 6198, 9e-5
    ),  # released with a peak of 3e-4, which the anneal does not fit
    "32B": Size(2048, 6e-4, 2000, 6.5e12, 721_901, 34521, None),  # the released code takes it from the checkpoint
}

# OLMo 2 Mix 1124 (table 4): source -> tokens, read in natural proportion; 1B, 13B and 32B go on into a second pass.
# Here and below peS2o, Wikipedia and FLAN have the sizes that the released lists note; the tables round them to 58.6B,
# 3.7B and 17.0B. Table 13's shares come out to a tenth of a per cent with the former.
PRETRAINING = {
    "dclm": 3_710_000_000_000,
    "starcoder": 83_000_000_000,
    "pes2o": 58_550_000_000,
    "arxiv": 20_800_000_000,
    "open_web_math": 12_200_000_000,
    "algebraic_stack": 11_800_000_000,
    "wiki": 3_660_000_000,
}

# Dolmino Mix 1124 (tables 5 and 13): source -> tokens, and how much of it the mixes of 50B, 100B and 300B tokens list,
# in per cent; 400 is four copies. From tulu_math on it is what table 13 sums up as "Dolmino math", 10.7B tokens.
MIXES = {"50B": 50_000_000_000, "100B": 100_000_000_000, "300B": 300_000_000_000}
DOLMINO = {
    "dclm_filtered": (752_000_000_000, 3.23, 6.85, 20.78),  # fastText's best with a FineWeb-Edu score from 2 on
    "flan": (17_080_000_000, 50, 100, 200),
    "stackexchange": (1_260_000_000, 100, 200, 400),
    "pes2o": (58_550_000_000, 5.15, 16.7, 100),
    "wiki": (3_660_000_000, 100, 100, 400),
    "tulu_math": (230_000_000, 100, 200, 400),
    "dolmino_synth_math": (28_700_000, 100, 200, 400),
    "mathcoder_books": (3_870_000_000, 100, 200, 400),
    "metamath": (84_200_000, 100, 200, 400),
    "codesearchnet": (1_780_000, 100, 200, 400),
    "gsm8k": (2_740_000, 100, 200, 400),
    # TinyGSM-MIND, 6.48B tokens, in two: table 13's shares come out when "two students" is there once in every mix.
    "tinygsm_problem_solving": (3_070_000_000, 100, 200, 400),
    "tinygsm_two_students": (3_410_000_000, 100, 100, 100),
}
# Where the released lists of files hold other numbers of copies than table 13. The runs stop before such a list ends.
LISTED = {"50B": {}, "100B": {"wiki": 200, "tinygsm_two_students": 300}, "300B": {"tinygsm_two_students": 400}}

# The anneals whose mean was released: three on 50B (7B; 1B is the first alone), three on 100B and one on 300B (13B).
# For 32B the paper says the same four, OLMo-core lists three: 1110 and 2662 on 100B, 2662 on 300B.
ANNEAL_SEEDS = {"50B": (42, 42069, 666), "100B": (1110, 2662, 6209), "300B": (2662,)}


def get_config(arg: str = "7B-50B") -> ConfigDict:
    """Claim: after trillions of tokens, mostly of the web, an anneal on 1 to 6 % as much selected text, a tenth to a
    fifth of it mathematics, lifts a model at everything and at mathematics most: at 7B MMLU 59.8 -> 63.7, GSM8K
    24.1 -> 67.5.

    Expected: the paper's table 9. Here only the plan is checked: tokens, shares, repeats, steps and rates.
    Command: python tools/plan.py --config=configs/olmo2.py:7B-50B
    Cost: the plan needs no text and takes seconds. Training takes 1.8e23 floating-point operations at 7B.

    arg: SIZE (1B, 7B, 13B, 32B) for stage 1 alone; SIZE-MIX (50B, 100B, 300B) with the anneal; SIZE-MIX-lists in the
        proportions of the released file lists instead of table 13's. Published are 1B-50B, 7B-50B, and 13B and 32B with
        100B and 300B. Other members of a soup: --config.stages.1.seed=42069.

    Differences from the released runs. Documents come in another order: the generator is another, a source is read to
    its end before it is read again (they shuffled the copies together), and the anneal goes on in peS2o and Wikipedia
    where stage 1 left off. Nothing is lost at the ends of files. Rows with repeated n-grams bear no loss there either,
    but OLMo divides a batch's loss by all of its tokens, so that such a row shrinks the gradient; here it is divided by
    the tokens trained on. 32B left out updates whose loss or gradient norm stood out by six standard deviations; here
    only those that are not finite are. The rate is that of the updates already made: the anneal's first has the full
    rate.
    """
    name, mix, variant = (*arg.split("-", 2), "", "")[:3]
    if name not in SIZES or mix not in ("", *MIXES) or variant not in ("", "lists") or arg.endswith("-"):
        raise UserError(
            f"configs/olmo2.py:{arg}: write SIZE, SIZE-MIX or SIZE-MIX-lists, with a size of {', '.join(SIZES)} "
            f"and a mix of {', '.join(MIXES)}; for example 7B-50B"
        )
    size = SIZES[name]
    tokens_per_step = size.rows * LENGTH
    stage = dict(
        sequence_length=LENGTH,
        tokens_per_step=tokens_per_step,
        # Attention, positions and loss go on over the ends of documents.
        format=dict(mask_documents=False, restart_positions=False, loss_across_documents=True, mask_repetitions=True),
    )
    sources = dict(PRETRAINING)
    stages = [dict(stage, name="pretraining", steps=size.steps, mixture=PRETRAINING)]
    if mix:
        sources |= {source: tokens for source, (tokens, *_) in DOLMINO.items()}
        anneal = dict(
            name="anneal",
            steps=-(-MIXES[mix] // tokens_per_step),
            mixture=dolmino(mix, lists=bool(variant)),
            schedule=dict(kind="linear", peak=size.anneal_peak, final_fraction=0.0),
            seed=ANNEAL_SEEDS[mix][0],
        )
        stages.append(stage | anneal)
    return ConfigDict(
        dict(
            name=f"olmo2-{arg}",
            seed=size.seed,
            sources={s: dict(store=f"{STORES}/{s}", declared_tokens=tokens) for s, tokens in sources.items()},
            stages=stages,
            model=olmo2(name, context_length=LENGTH, compute_dtype="bfloat16", remat="dots"),
            # AdamW with 0.9, 0.95 and 1e-8, decay of 0.1 on all but embeddings, clipping at a norm of 1.
            optimizer=dict(
                name="adamw", b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, decay_norms_and_biases=True, clip_norm=1.0
            ),
            schedule=dict(
                kind="cosine",
                peak=size.peak,
                final_fraction=0.1,
                warmup_steps=size.warmup_steps,
                horizon_steps=round(size.horizon_tokens / tokens_per_step),
            ),
            training=dict(z_loss=1e-5),  # table 1 and all released configurations; the prose of section 3.3.3 says 1e-4
        )
    )


def dolmino(mix: str, lists: bool = False) -> dict[str, int]:
    """Source -> tokens that a mix lists, as weights: a list is shuffled as a whole and holds more than the run reads of
    it (51.5B tokens for the mix of 50B; 113B by the released lists for that of 100B)."""
    column = 1 + list(MIXES).index(mix)
    other = LISTED[mix] if lists else {}
    return {source: round(row[0] * other.get(source, row[column]) / 100) for source, row in DOLMINO.items()}
