"""MeCo, metadata conditioning then cooldown, as published: models, rates, stages, and the paper's variants.

Numbers are from "Metadata Conditioning Accelerates Language Model Pre-training" (Gao et al., ICML 2025, arXiv 2501.01956),
tables 4 to 8 and 14, and from the released configurations of princeton-pli/MeCo. Comments mark what neither says.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from mixlab.errors import UserError
from mixlab.model.presets import llama

STORES = "stores"  # a folder with both token stores; elsewhere: --config.sources.dclm.store=DIR
LENGTH, ROWS = 8192, 512
COOLDOWN = 0.1


class Size(NamedTuple):
    """shape: layers, width, width of the feed-forward, heads, heads of keys and values.   steps: of ROWS x LENGTH tokens."""

    shape: tuple[int, int, int, int, int]
    peak: float
    weight_decay: float
    steps: int
    cooldown: float


SIZES = {
    "600M": Size((24, 1024, 4096, 16, 16), 3e-3, 0.033, 40_000, COOLDOWN),
    "1.6B": Size((24, 2048, 5504, 16, 8), 3e-3, 0.033, 40_000, COOLDOWN),
    "3B": Size((28, 3072, 8192, 24, 8), 3e-3, 0.033, 40_000, COOLDOWN),
    # Heads of keys and values as Llama 3's; its cooldown began at the nearest checkpoint.
    "8B": Size((32, 4096, 14336, 32, 8), 5e-4, 0.1, 20_000, 0.125),
}
# Tables 4, 5 and 14: word -> what stands before documents. The prefix of topics is not published.
METADATA = {
    "full_url": dict(reduce="url"),
    "suffix": dict(reduce="suffix"),
    "top_0.2%": dict(min_documents=1000),
    "top_2%": dict(min_documents=100),
    "hashed": dict(hashed=True),
    "topics": dict(columns=("topic",), reduce=None, prefix="Topic: "),
    "loss": dict(loss=True),  # section 2: slightly worse
}
STAGES = ("standard", "no_cooldown", "mixed", "cooldown_20%", "cooldown_30%")


def get_config(arg: str = "1.6B") -> ConfigDict:
    """Claim: with its domain in front of every document for 90 % of training, and plain documents for the rest, a model is as
    good as one trained on a third more tokens: at 1.6B the mean of ten tasks is 55.7 -> 56.7; held-out perplexity does not
    show it (13.2 -> 13.3).

    Expected: the paper's tables 1 and 17. Here only the plan is checked: parameters, tokens, stages and rates.
    Command: python tools/plan.py --config=configs/meco.py:1.6B
    Cost: the plan needs no text and takes seconds. Training took 1,536 hours of an H100 at 1.6B.

    arg: SIZE (600M, 1.6B, 3B, 8B), then words separated by commas. What is read: standard (never metadata), no_cooldown
        (always), mixed (for 90 % of the documents throughout), cooldown_20%, cooldown_30%. What stands before documents:
        full_url, suffix, top_0.2%, top_2%, hashed, topics, loss (metadata bear loss); its domain, when left out.

    The mean of the rows' means is the loss, as in the released code, whose parts of a batch are one row each; and where
    documents have no metadata, the end of one predicts the beginning of the next. Left open by paper and code: clipping (a
    norm of 1, their trainer's default), and whether "mixed" draws documents or rows (documents here).
    """
    name, *words = arg.split(",")
    kinds = [word for word in words if word in METADATA]
    stages = [word for word in words if word in STAGES]
    if name not in SIZES or len(kinds) > 1 or len(stages) > 1 or len(kinds) + len(stages) < len(words):
        raise UserError(
            f"configs/meco.py:{arg}: write a size of {', '.join(SIZES)}, then at most one of {', '.join(STAGES)} and one of "
            f"{', '.join(METADATA)}; for example 1.6B,hashed"
        )
    size = SIZES[name]
    layers, width, ffn_width, heads, kv_heads = size.shape
    how = stages[0] if stages else ""
    cooldown = {"": size.cooldown, "cooldown_20%": 0.2, "cooldown_30%": 0.3}.get(how, 0.0)
    metadata = METADATA[kinds[0]] if kinds else {}
    if how == "mixed":
        metadata = dict(metadata, share=1 - COOLDOWN)

    plain = dict(kind="complete", bos=True, eos=True, loss_across_documents=True, loss_normaliser="rows")
    conditioned = plain if how == "standard" else dict(plain, metadata=metadata)

    def stage(name, steps, source, format):
        rows = dict(sequence_length=LENGTH, tokens_per_step=ROWS * LENGTH)
        return dict(name=name, steps=steps, mixture={source: 1.0}, format=format, **rows)

    last = round(cooldown * size.steps)
    run = [stage("standard" if how == "standard" else "conditioned", size.steps - last, "dclm", conditioned)]
    if last:
        run.append(stage("cooldown", last, "dclm_cooldown", plain))
    pools = {"dclm": 270_000_000_000, "dclm_cooldown": 89_000_000_000}  # released apart: no document is in both
    used = {source for entry in run for source in entry["mixture"]}
    return ConfigDict(
        dict(
            name=f"meco-{arg.replace(',', '-').replace('%', '')}",
            sources={s: dict(store=f"{STORES}/{s}", declared_tokens=n) for s, n in pools.items() if s in used},
            stages=run,
            model=llama(
                layers=layers,
                d_model=width,
                ffn_width=ffn_width,
                heads=heads,
                kv_heads=kv_heads,
                vocab_size=128_256,
                context_length=LENGTH,
                rope_base=500_000.0,
                compute_dtype="bfloat16",
                remat="dots",
            ),
            optimizer=dict(
                name="adamw", b1=0.9, b2=0.95, weight_decay=size.weight_decay, decay_embeddings=True, clip_norm=1.0
            ),
            # One cosine over both stages: the cooldown begins at 12.4 % of the peak, with the optimiser's state.
            schedule=dict(kind="cosine", peak=size.peak, warmup_steps=size.steps // 20, final_fraction=0.1),
        )
    )
