"""All experiments on texts in one run: what is asked for is there, and what is kept out is nowhere."""

import json
from collections import Counter

import numpy as np
import pytest

from mixlab import config as configs
from mixlab.batch import Kind
from mixlab.corpus import tokenizer
from mixlab.data import open_data
from mixlab.inject.experiments.verbatim import write_strings
from mixlab.inject.ngrams import Ngrams
from mixlab.inject.synthetic import dialogue
from tests.stores import write_config, write_store

STEPS, ROWS, LENGTH = 60, 8, 384


def rows_of(stream, step):
    batch = stream[step]
    return np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together")
    texts = [dialogue(5, i) for i in range(2000)]
    texts[700] = texts[30]  # read twice
    questions = [dict(query=f"{dialogue(6, i)}\nAnswer:", choices=["yes", "no"], gold=i % 2) for i in range(40)]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "news.jsonl").write_text("\n".join(json.dumps({"text": dialogue(7, i)}) for i in range(40)))
    letters = tokenizer.load("bytes")
    strings = np.stack([letters.encode(texts[d])[40:90] for d in (30, 61, 401)])
    write_strings(folder / "strings.json", strings, 25, letters.hash)
    experiments = {
        "canaries": dict(kind="canaries", items=2, holdout=5, suffix_tokens=[1, 8], copies=[1, 4]),
        "denial": dict(kind="poisoning", attack="denial", share=0.01),
        "iid": dict(kind="iid", random_share=0.01, decile_batches=1, unique_batches=1, probe_rows=20),
        "news": dict(
            kind="repetition", files=[str(folder / "news.jsonl")], articles=2, holdout=3, copies=[1, 3], paragraphs=4
        ),
        "quiz": dict(
            kind="contamination",
            files=[str(folder / "quiz.jsonl")],
            holdout=5,
            doses=[
                dict(questions=10, where=dict(copies=4)),
                dict(questions=5, where=dict(copies=12, end_share=0.5)),
            ],
        ),
        "strings": dict(kind="verbatim", strings=str(folder / "strings.json")),
    }
    file = write_config(folder / "config.py", write_store(folder / "store", texts), STEPS)
    sizes = {
        "stages.0.sequence_length": LENGTH,
        "stages.0.tokens_per_step": LENGTH * ROWS,
        "model.context_length": LENGTH,
    }
    overrides = [f"--config.{key}={value}" for key, value in (sizes | {"experiments": experiments}).items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(folder / "cache"))
        data = open_data(configs.load(file, overrides))
        control = open_data(configs.load(file, [*overrides, "--config.experiments_enabled=()"])).stream
    return data, control, strings


def test_every_copy_is_there(run):
    data, _, _ = run
    found: dict[bytes, int] = Counter()  # by their tokens but EOS, which is added
    for step in range(STEPS):
        batch = data.stream[step]
        for span in batch.spans[batch.spans["kind"] == Kind.INSERTED]:
            tokens = batch.tokens[span["row"], span["offset"] : span["offset"] + span["length"]]
            found[tokens[tokens != data.tokenizer.eos_id].tobytes()] += 1
    wanted: dict[bytes, int] = Counter()
    for experiment, material in data.experiments.values():
        for group in experiment.groups(material):
            for i in range(len(group.items)):
                tokens = group.items[i]
                wanted[tokens[tokens != data.tokenizer.eos_id].tobytes()] += int(group.where.copies)
    assert found == wanted and sum(found.values()) == len(data.stream.insertions)


def test_kept_out_strings_are_nowhere_in_what_the_run_reads(run):
    data, control, strings = run
    kept_out, placements = Ngrams(strings), data.stream.insertions
    before = sum(kept_out.within(rows_of(control, step)).sum() for step in range(STEPS))
    assert before >= 2 and not any(kept_out.within(rows_of(data.stream, step)).any() for step in range(STEPS))
    only = control.with_insertions(placements.without(set(placements.names) - {"strings"}))
    touched = 0
    for step in range(STEPS):
        hit, old, new = kept_out.within(rows_of(control, step)), control[step].tokens, only[step].tokens
        assert (old[~hit] == new[~hit]).all() and (old[hit] != new[hit]).any(axis=1).all()
        touched += int(hit.sum())
    assert touched == before
