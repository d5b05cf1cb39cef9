"""Small token stores on disk, and configs that read them, for tests of whole commands."""

from pathlib import Path

import numpy as np

from mixlab.corpus import tokenizer
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.corpus.writer import finalise, write_shard

CONFIG = """
from mixlab.model.presets import llama

def get_config(arg=""):
    return dict(
        name="small",
        sources={{"text": {{"store": {store!r}}}}},
        model=llama(layers=2, d_model=32, heads=2, vocab_size=259, context_length=32),
        stages=[dict(name="main", steps={steps}, sequence_length=32, tokens_per_step=128)],
        schedule=dict(kind="cosine", peak=3e-3, warmup_steps=2),
        checkpoint=dict(every_steps=7, keep_last=2),
        evaluation=dict(every_steps=10, tokens_per_domain=600, rows=4, sample_tokens=4),
    )
"""


def write_store(
    folder: Path,
    texts: list[str],
    letters: Tokenizer | None = None,
    validation_every: int = 7,
    urls: list[str | None] | None = None,
) -> Path:
    """A store of `texts` in the domains a and b, with their URLs where there are some; every so-manieth document is held out."""
    letters = letters or tokenizer.load("bytes")
    rows = [
        {
            "id": f"doc-{i}",
            "split": "validation" if i % validation_every == 0 else "train",
            "bytes": len(text.encode()),
            "domain": "ab"[i % 2],
        }
        | ({} if urls is None else {"url": urls[i]})
        for i, text in enumerate(texts)
    ]
    columns = ["domain"] if urls is None else ["domain", "url"]
    shard = write_shard(folder, 0, letters.encode_batch(texts), rows, columns, letters.vocab_size)
    finalise(folder, letters, [shard], {})
    return folder


def some_texts(count: int = 30) -> list[str]:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 8))).decode() for _ in range(40)]
    return [" ".join(rng.choice(words, rng.integers(5, 20))) for _ in range(count)]


def write_config(path: Path, store: Path | str, steps: int = 10) -> str:
    path.write_text(CONFIG.format(store=str(store), steps=steps))
    return str(path)
