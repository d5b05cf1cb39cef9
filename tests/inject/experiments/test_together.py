"""All experiments on texts in one run: what is asked for is there, and what is kept out is nowhere."""

import json
from collections import Counter

import numpy as np
import pytest

from mixlab import config as configs
from mixlab.batch import Kind
from mixlab.data import open_data
from mixlab.inject.experiments.canaries import Canaries
from mixlab.inject.experiments.contamination import Contamination, Dose
from mixlab.inject.experiments.iid import Iid
from mixlab.inject.experiments.poisoning import Poisoning
from mixlab.inject.experiments.repetition import Repetition
from mixlab.inject.experiments.verbatim import Verbatim, write_strings
from mixlab.inject.items import Where
from mixlab.inject.ngrams import Ngrams
from mixlab.inject.placement import place
from mixlab.inject.synthetic import dialogue
from tests.inject.fakes import material
from tests.stores import write_config, write_store

STEPS, ROWS, LENGTH = 60, 8, 384


def rows_of(stream, step):
    batch = stream[step]
    return np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    texts = [dialogue(5, i) for i in range(1200)]
    texts[700] = texts[30]  # read twice
    questions = [dict(query=f"{dialogue(6, i)}\nAnswer:", choices=["yes", "no"], gold=i % 2) for i in range(40)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "news.jsonl").write_text("\n".join(json.dumps({"text": dialogue(7, i)}) for i in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
        file = write_config(folder / "config.py", write_store(folder / "store", texts), STEPS)
        sizes = {
            "stages.0.sequence_length": LENGTH,
            "stages.0.tokens_per_step": LENGTH * ROWS,
            "model.context_length": LENGTH,
        }
        data = open_data(configs.load(file, [f"--config.{key}={value}" for key, value in sizes.items()]))
    tokenizer, stream = data.tokenizer, data.stream
    strings = np.stack([tokenizer.encode(texts[d])[40:90] for d in (30, 61, 401)])
    write_strings(folder / "strings.json", strings, 25, tokenizer.hash)
    experiments = {
        "canaries": Canaries(items=2, holdout=5, suffix_tokens=(1, 8), copies=(1, 4)),
        "denial": Poisoning(attack="denial", share=0.01),
        "iid": Iid(random_share=0.01, decile_batches=1, unique_batches=1),
        "news": Repetition(files=(str(folder / "news.jsonl"),), articles=2, holdout=3, copies=(1, 3)),
        "quiz": Contamination(
            files=(str(folder / "quiz.jsonl"),),
            holdout=5,
            doses=(Dose(10, Where(copies=4)), Dose(5, Where(copies=12, end_share=0.5))),
        ),
        "strings": Verbatim(strings=str(folder / "strings.json")),
    }
    given = dict(steps=STEPS, rows_per_step=ROWS, row_length=LENGTH, vocab=tokenizer, read=lambda s: rows_of(stream, s))
    groups = {name: one.groups(material(name, **given)) for name, one in experiments.items()}
    others = {name: found for name, found in groups.items() if name != "strings"}
    assert experiments["strings"].objections(material("strings", **given), others) == []
    placements = place(groups, stream.grid, 0, tokenizer.eos_id, tokenizer.vocab_size)
    return stream, groups, placements, strings


def test_every_copy_is_there(run):
    stream, groups, placements, _ = run
    changed = stream.with_insertions(placements)
    found: dict[bytes, int] = Counter()
    for step in range(STEPS):
        batch = changed[step]
        for span in batch.spans[batch.spans["kind"] == Kind.INSERTED]:
            found[batch.tokens[span["row"], span["offset"] : span["offset"] + span["length"]].tobytes()] += 1
    wanted: dict[bytes, int] = Counter()
    for parts in groups.values():
        for group in parts:
            for i in range(len(group.items)):
                wanted[group.items[i].tobytes()] += int(group.where.copies)
    inner: dict[bytes, int] = Counter()
    for text, count in found.items():
        tokens = np.frombuffer(text, np.int32)
        inner[tokens[tokens != 257].tobytes()] += count  # without the EOS around it
    assert inner == wanted and sum(found.values()) == len(placements)


def test_kept_out_strings_are_nowhere_in_what_the_run_reads(run):
    stream, _, placements, strings = run
    kept_out, changed = Ngrams(strings), stream.with_insertions(placements)
    before = sum(kept_out.within(rows_of(stream, step)).sum() for step in range(STEPS))
    assert before >= 2 and not any(kept_out.within(rows_of(changed, step)).any() for step in range(STEPS))
    only = stream.with_insertions(placements.without(set(placements.names) - {"strings"}))
    touched = 0
    for step in range(STEPS):
        hit, old, new = kept_out.within(rows_of(stream, step)), stream[step].tokens, only[step].tokens
        assert (old[~hit] == new[~hit]).all() and (old[hit] != new[hit]).any(axis=1).all()
        touched += int(hit.sum())
    assert touched == before
