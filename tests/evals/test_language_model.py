import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.corpus import tokenizer as tokenizers
from mixlab.evals.baselines import baselines
from mixlab.evals.held_out import make_set
from mixlab.evals.language_model import ratio, summarise

TOKENIZER = tokenizers.load("bytes")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=20), st.integers(4, 24), st.integers(8, 400))
def test_every_token_but_a_documents_first_is_scored_once(memory_store, lengths, length, tokens):
    store = memory_store(lengths)
    for d, text in enumerate(store.texts):  # bytes that name their document and place, as far as 256 values go
        text[:] = (np.arange(len(text)) + 31 * d) % 256
    store.flat = np.concatenate(store.texts)
    s = make_set("x", store, np.arange(len(lengths)), TOKENIZER, False, length, tokens)
    if s is None:
        assert 1 in lengths  # only documents of one token were chosen
        return
    scored = s.rows.loss_weights > 0
    for i, document in enumerate(s.document_ids):
        text = store.texts[document]
        mine = scored & (s.documents == i)
        limit = max(length, tokens // 8)
        seen = s.rows.targets[mine]
        # A document over the limit ends there, with the token after it where the cut falls on a row's end.
        expected = len(text) - 1 if len(text) <= limit else len(seen)
        assert len(text) <= limit or expected in ((limit,) if limit % length == 0 else (limit - 1, limit))
        assert sorted(seen) == sorted(text[1 : expected + 1])  # pieces of one document may lie in any rows
        assert s.bytes[mine].sum() == len(seen)
    assert (s.rows.targets[scored] < 256).all() and (s.bytes[~scored] == 0).all()
    assert len(np.unique(s.document_ids)) == len(s.document_ids)


def test_the_choice_depends_on_the_name_alone(memory_store):
    store = memory_store([9] * 40)
    store.flat %= 256
    ids = np.arange(40)
    a, b = (make_set("x", store, ids, TOKENIZER, False, 16, 100) for _ in range(2))
    other = make_set("y", store, ids, TOKENIZER, False, 16, 100)
    assert np.array_equal(a.document_ids, b.document_ids) and not np.array_equal(a.document_ids, other.document_ids)
    assert 100 <= sum(len(store.texts[d]) + 1 for d in a.document_ids) < 120


def test_ratio_and_its_standard_error_agree_with_the_bootstrap():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 200, 400)
    sums = sizes * (3 + rng.normal(0, 0.5, 400))
    value, error = ratio(sums, sizes)
    draws = [rng.integers(0, 400, 400) for _ in range(4000)]
    bootstrap = np.std([sums[d].sum() / sizes[d].sum() for d in draws])
    assert value == pytest.approx(sums.sum() / sizes.sum()) and error == pytest.approx(bootstrap, rel=0.05)
    assert np.isnan(ratio(np.ones(1), np.ones(1))[1])


def test_averages(memory_store):
    store = memory_store([30, 30, 30, 30])
    store.flat %= 256
    small = make_set("small", store, np.array([0, 1]), TOKENIZER, False, 16, 1000)
    large = make_set("large", store, np.array([1, 2, 3]), TOKENIZER, False, 16, 1000)
    nll = np.concatenate([np.full(small.rows.tokens.shape, 1.0), np.full(large.rows.tokens.shape, 3.0)])
    metrics = summarise([small, large], nll)
    assert metrics["eval/small/loss"] == 1.0 and metrics["eval/large/loss"] == 3.0
    assert metrics["eval/macro/loss"] == 2.0 and metrics["eval/micro/loss"] == pytest.approx((2 * 1 + 3 * 3) / 5)
    assert metrics["eval/large/bits_per_byte"] == pytest.approx(3 / np.log(2))
    assert metrics["eval/large/tokens"] == 3 * 29 and metrics["eval/large/documents"] == 3


class CountedStore:
    def __init__(self, store, train):
        self.store, self.offsets, self.train = store, store.offsets, np.array(train)

    def documents(self, split):
        return self.train

    def read(self, *arguments):
        self.store.read(*arguments)


def test_baselines_are_probabilities_and_bigrams_know_what_follows(memory_store):
    store = memory_store([4000, 4000, 200])
    for text in store.texts:
        text[:] = np.resize([65, 66, 65, 67], len(text))  # after A comes B or C, after both comes A
    store.flat = np.concatenate(store.texts)
    s = make_set("x", store, np.array([2]), TOKENIZER, False, 32, 1000)
    found = baselines([CountedStore(store, [0, 1])], [s], TOKENIZER.vocab_size)
    assert set(found) == {"unigram", "bigram"} and set(found["bigram"]) == {"x", "macro", "micro"}
    assert found["unigram"]["x"] == pytest.approx(1.5, abs=0.2)  # 1/2 A, 1/4 B, 1/4 C, and a little for the unseen
    assert found["bigram"]["x"] == pytest.approx(0.5, abs=0.1)  # one bit at every second byte


def test_bigram_probabilities_sum_to_one(memory_store):
    """Scores every continuation of one context by asking for each in turn."""
    V = TOKENIZER.vocab_size
    rng = np.random.default_rng(0)
    store = memory_store([500])
    store.flat[:] = rng.choice([3, 5, 8], 500)
    counted = CountedStore(store, [0])
    for context in (3, 200):  # seen, and never seen
        total = 0.0
        probe = memory_store([2] * 256)
        for token, text in enumerate(probe.texts):
            text[:] = [context, token]
        probe.flat = np.concatenate(probe.texts)
        for token in range(256):
            s = make_set("x", probe, np.array([token]), TOKENIZER, False, 8, 8)
            total += 2 ** -baselines([counted], [s], V)["bigram"]["x"]
        assert total == pytest.approx(1.0, abs=0.02)  # the three special tokens hold the rest
