"""A first run: a small Llama-style model on the text and code that this Python installation ships."""

from ml_collections import ConfigDict

from mixlab.model.presets import llama

VOCABULARY = 4096


def get_config(arg: str = "") -> ConfigDict:
    """Claim: on two CPU cores a model of 3 million parameters learns, in minutes, far more of a text than counting words and
    pairs of words does.

    Expected: validation bits per byte below the bigram baseline on every domain, and by a wide margin on average; the run
    prints both side by side.
    Command: python -m mixlab.train --config=configs/quickstart.py
    Cost: about three minutes on two CPU cores, one of them for building the corpus the first time; 1 GB of memory.

    arg: unused.
    """
    steps, length, rows = 400, 256, 16
    return ConfigDict(
        dict(
            name="quickstart",
            tokenizer=f"bpe:{VOCABULARY}",
            sources={"text": {"store": "embedded"}},
            stages=[
                dict(name="main", steps=steps, sequence_length=length, tokens_per_step=rows * length)
            ],
            model=llama(
                layers=4, d_model=192, heads=6, ffn_width=512, vocab_size=VOCABULARY, context_length=length, tied_head=True
            ),
            schedule=dict(kind="cosine", peak=3e-3, warmup_steps=30, final_fraction=0.05),
            checkpoint=dict(every_steps=100),
            evaluation=dict(every_steps=100, tokens_per_domain=16384),
        )
    )
