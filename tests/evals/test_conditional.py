import numpy as np
import pytest

from mixlab.config import MetadataEvaluationConfig
from mixlab.corpus import tokenizer
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError
from mixlab.evals.conditional import ConditionalSets, metrics_of
from mixlab.evals.held_out import make_set
from mixlab.evaluate import _print_variants
from mixlab.sequences.metadata import MetadataConfig
from tests.sequences.test_metadata import store_of

LETTERS: Tokenizer = tokenizer.load("bytes")
VARIANTS = ("none", "true", "wrong", "shuffled", "text")
LENGTH = 48


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    from mixlab.corpus.writer import finalise, write_shard

    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("store")
    texts = [rng.integers(97, 123, rng.integers(1, 150)).astype(np.uint8).tobytes().decode() for _ in range(80)]
    rows = [
        {
            "id": f"d{i}",
            "split": "validation" if i % 3 == 0 else "train",
            "bytes": len(text),
            "url": None if i % 15 == 0 else f"https://h{min(i % 10, 5)}.org/{i}",
        }
        for i, text in enumerate(texts)
    ]
    shard = write_shard(folder, 0, LETTERS.encode_batch(texts), rows, ["url"], LETTERS.vocab_size)
    return finalise(folder, LETTERS, [shard], {})


def conditional(store, bos, variants=VARIANTS, text="x.com", **template):
    held_out = {"all": (store, store.documents("validation"))}
    plain = [make_set("all", *held_out["all"], LETTERS, bos, LENGTH, 9000)]
    settings = MetadataEvaluationConfig(variants=variants, text=text)
    return ConditionalSets(settings, MetadataConfig(**template), plain, held_out, LETTERS, bos, LENGTH, 9000)


def scored(s):
    """(document, target) of every scored token, sorted; documents by their number in the store."""
    where = s.rows.loss_weights > 0
    return sorted(zip(s.document_ids[s.documents[where]].tolist(), s.rows.targets[where].tolist(), strict=True))


@pytest.mark.parametrize("bos", [False, True])
def test_all_variants_score_the_same_tokens_once(store, bos):
    found = conditional(store, bos)
    by_variant = {variant: scored(sets[0]) for variant, sets in found.sets.items()}
    assert all(tokens == by_variant["none"] for tokens in by_variant.values())
    urls = store.column("url").to_pylist()
    ids = found.sets["true"][0].document_ids
    assert len(ids) > 10 and all(urls[d] for d in ids)
    expected = sorted((d, t) for d in ids.tolist() for t in store[d][0 if bos else 1 :].tolist())
    assert by_variant["true"] == expected


def test_each_variant_writes_what_it_says(store):
    found = conditional(store, True)
    urls = store.column("url").to_pylist()
    lines = {}
    for variant, (s,) in found.sets.items():
        lines[variant] = {}
        for row in range(len(s.rows.tokens)):
            for segment in range(1, s.rows.segment_ids[row].max() + 1):
                here = s.rows.segment_ids[row] == segment
                document = int(s.document_ids[s.documents[row, here][0]])
                head, _, _ = LETTERS.decode(s.rows.tokens[row, here]).removeprefix("<|bos|>").rpartition("\n\n")
                lines[variant].setdefault(document, set()).add(head)
    true = {d: {f"URL: h{urls[d][9:].split('.')[0]}.org"} for d in lines["true"]}
    assert lines["true"] == true
    assert set(map(tuple, lines["none"].values())) == {("",)} and set(map(tuple, lines["text"].values())) == {
        ("URL: x.com",)
    }
    assert all(len(heads) == 1 and heads != true[d] and heads in true.values() for d, heads in lines["wrong"].items())
    assert sorted(map(tuple, lines["shuffled"].values())) == sorted(map(tuple, true.values()))
    assert lines["shuffled"] != true


def test_differences_are_paired_and_grouped_by_how_often_the_value_was_seen(store, capsys):
    found = conditional(store, True, ("none", "true"))
    rng = np.random.default_rng(1)
    none = rng.random(found.sets["none"][0].rows.tokens.shape).astype(np.float32)
    true = np.zeros(found.sets["true"][0].rows.tokens.shape, np.float32)
    own = [found.sets[v][0] for v in ("none", "true")]
    place = {}
    for row, column in np.argwhere(own[0].rows.loss_weights > 0):  # in both, a document's tokens come in one order
        place.setdefault(int(own[0].documents[row, column]), []).append(none[row, column])
    for row, column in np.argwhere(own[1].rows.loss_weights > 0):
        document = int(own[1].documents[row, column])
        true[row, column] = place[document].pop(0) - (0.5 if found.seen[0][document] >= 10 else 0.25)
    metrics = metrics_of(found, {"none": none, "true": true})
    counts = found.seen[0]
    assert (counts > 0).all() and (counts < 10).any() and (counts >= 10).any()
    for name, expected, here in (("seen_1", -0.25, counts < 10), ("seen_10", -0.5, counts >= 10)):
        assert metrics[f"eval_metadata/true_minus_none/{name}/loss"] == pytest.approx(expected, abs=1e-5)
        assert metrics[f"eval_metadata/true_minus_none/{name}/documents"] == here.sum()
    whole = metrics["eval_metadata/true/all/loss"] - metrics["eval_metadata/none/all/loss"]
    assert metrics["eval_metadata/true_minus_none/all/loss"] == pytest.approx(whole, abs=1e-5)
    assert not any(key.startswith("eval/") for key in metrics)
    _print_variants(metrics)
    out = capsys.readouterr().out
    assert f"seen 10 to 99 times{-0.5:>+15.4f}" in out and "nan" not in out


def test_what_cannot_be_compared_is_told(store, tmp_path):
    with pytest.raises(UserError, match=r"more than half of a row of 48; reduce them"):
        conditional(store, True, text="x" * 60)
    same = store_of(tmp_path, ["http://a.org"] * 20)
    with pytest.raises(UserError, match="'wrong' needs held-out documents of two values"):
        conditional(same, True)
    with pytest.raises(UserError, match="did you mean url"):
        conditional(store, True, columns=("urls",))
