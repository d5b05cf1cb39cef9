"""A first run: a small Llama-style model on the text and code that this Python installation ships."""

from ml_collections import ConfigDict

from mixlab.model.presets import llama


def get_config(arg: str = "") -> ConfigDict:
    """Claim: in minutes on two CPU cores, a model of two million parameters learns far more of a text than counting its
    tokens and pairs of tokens does.

    Expected: about 1.95 bits per byte on held-out documents (mean of the domains), where the unigram model of the same
    tokens reaches 4.0 and the bigram model 2.6; the text, and so the digits after, differ between installations.
    Command: python -m mixlab.train --config=configs/quickstart.py
    Cost: about three and a half minutes on two CPU cores, of which half a minute builds the corpus, once; 1.5 GB of memory.

    arg: steps; 800 when left out.
    """
    length, rows, vocabulary = 256, 8, 1024
    return ConfigDict(
        dict(
            name="quickstart",
            tokenizer=f"bpe:{vocabulary}",
            sources={"text": {"store": "embedded"}},
            stages=[dict(name="main", steps=int(arg or 800), sequence_length=length, tokens_per_step=rows * length)],
            model=llama(
                layers=4,
                d_model=192,
                heads=6,
                ffn_width=512,
                vocab_size=vocabulary,
                context_length=length,
                tied_head=True,
            ),
            optimizer=dict(name="muon"),
            schedule=dict(kind="cosine", peak=7e-3, warmup_steps=30, final_fraction=0.02),
            checkpoint=dict(every_steps=200),
            evaluation=dict(every_steps=200, tokens_per_domain=16384),
        )
    )
