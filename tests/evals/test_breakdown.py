import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab import errors, evaluate
from mixlab.corpus import tokenizer as tokenizers
from mixlab.evals.breakdown import breakdown
from mixlab.evals.held_out import make_set
from mixlab.evals.language_model import ratio, summarise

TOKENIZER = tokenizers.load("bytes")


def made_sets(memory_store, lengths, length, tokens):
    store = memory_store(lengths)
    store.flat %= 256
    halves = np.arange(len(lengths)) % 2
    sets = [
        make_set(n, store, np.flatnonzero(halves == i), TOKENIZER, False, length, tokens) for i, n in enumerate("ab")
    ]
    return store, [s for s in sets if s is not None]


def power_below(value):
    """The largest power of two that is not above `value`; 1 for 0."""
    return 2 ** (max(int(value), 1).bit_length() - 1)


def by_hand(sets, nll, store):
    """(kind, bin) -> document -> [nats, tokens], token after token."""
    found, at = {}, 0
    for s in sets:
        for row, column in zip(*np.nonzero(s.rows.loss_weights), strict=True):
            document = int(s.document_ids[s.documents[row, column]])
            whole = len(store.texts[document]) + 1  # with EOS
            bins = ("by_length", power_below(whole)), ("by_position", power_below(s.rows.positions[row, column]))
            for key in bins:
                sums = found.setdefault(key, {}).setdefault(document, np.zeros(2))
                sums += [nll[at + row, column], 1]
        at += len(s.rows.tokens)
    return found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 70), min_size=2, max_size=16), st.sampled_from([4, 16, 23]), st.integers(16, 300))
def test_every_scored_token_is_in_one_bin_of_each_kind(memory_store, lengths, length, tokens):
    store, sets = made_sets(memory_store, lengths, length, tokens)
    nll = np.random.default_rng(0).uniform(0, 5, (sum(len(s.rows.tokens) for s in sets), length)).astype(np.float32)
    metrics, expected = breakdown(sets, nll), by_hand(sets, nll, store)
    assert {tuple(key.split("/")[1:3]) for key in metrics} == {(kind, str(start)) for kind, start in expected}
    for (kind, start), sums in expected.items():
        nats, counts = np.array(list(sums.values())).T
        value, error = ratio(nats, counts)
        bin = f"eval/{kind}/{start}"
        assert metrics[f"{bin}/loss"] == pytest.approx(value)
        assert metrics[f"{bin}/loss_se"] == pytest.approx(error, abs=1e-9, nan_ok=True)
        assert (metrics[f"{bin}/tokens"], metrics[f"{bin}/documents"]) == (counts.sum(), len(sums))
        assert metrics[f"{bin}/bits_per_byte"] == pytest.approx(value / np.log(2))  # a token of these is a byte
    whole = summarise(sets, nll)
    for kind in ("by_length", "by_position"):
        bins = {key.rpartition("/")[0] for key in metrics if f"/{kind}/" in key}
        counts = [metrics[f"{name}/tokens"] for name in bins]
        assert sum(counts) == whole["eval/micro/tokens"]
        losses = [metrics[f"{name}/loss"] for name in bins]
        assert np.average(losses, weights=counts) == pytest.approx(whole["eval/micro/loss"])


def test_a_document_counts_by_all_its_tokens_where_only_its_beginning_is_read(memory_store):
    _, (s,) = made_sets(memory_store, [200, 1], 16, 64)
    metrics = breakdown([s], np.ones(s.rows.tokens.shape, np.float32))
    assert {key.split("/")[2] for key in metrics if "by_length" in key} == {"128"}
    assert metrics["eval/by_length/128/tokens"] == 16 and metrics["eval/by_length/128/documents"] == 1
    positions = {key.split("/")[2]: value for key, value in metrics.items() if "by_position" in key and "tokens" in key}
    assert positions == {"1": 2, "2": 2, "4": 4, "8": 8}  # 0 and 1, 2 and 3, 4 to 7, 8 to 15


def test_rows_of_held_out_text_are_as_long_as_the_config_says(trunk, monkeypatch, capsys):
    """By default as in the last stage (32); whichever it is, the same tokens are scored."""
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    arguments = [f"--workdir={trunk}", "--json", "--no-record", "--config.evaluation.breakdown=true"]
    found = []
    for more in ([], ["--config.evaluation.sequence_length=8"]):
        assert errors.run(evaluate.main, arguments + more) == 0
        found.append(json.loads(capsys.readouterr().out))
    longest = [max(int(k.split("/")[2]) for k in metrics if k.startswith("eval/by_position/")) for metrics in found]
    assert longest == [16, 4]
    assert found[0]["eval/micro/tokens"] == found[1]["eval/micro/tokens"]
    assert found[0]["eval/micro/loss"] != found[1]["eval/micro/loss"]
