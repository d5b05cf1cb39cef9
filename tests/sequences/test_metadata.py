import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mixlab.corpus import tokenizer as tokenizing
from mixlab.corpus.tokenizer import SPECIALS
from mixlab.corpus.writer import finalise, write_shard
from mixlab.errors import UserError
from mixlab.sequences.metadata import UNKNOWN, MetadataConfig, make_metadata, reduced, values_of

LETTERS = tokenizing.load("bytes")


def store_of(folder, urls, **columns):
    rows = [
        {"id": f"d{i}", "split": "validation" if i % 7 == 6 else "train", "bytes": 4, "url": url}
        | {name: values[i] for name, values in columns.items()}
        for i, url in enumerate(urls)
    ]
    tokens = LETTERS.encode_batch(["text"] * len(urls))
    shard = write_shard(folder, 0, tokens, rows, ["url", *columns], LETTERS.vocab_size)
    return finalise(folder, LETTERS, [shard], {})


def values(store, **settings):
    codes, names = values_of(store, MetadataConfig(**settings), store.documents("train"), "metadata")
    return [names[c - 1] if c else None for c in codes.tolist()]


@pytest.mark.parametrize(
    "url, domain, registered, suffix",
    [
        ("https://en.wikipedia.org/wiki/Bill_Gates", "en.wikipedia.org", "wikipedia.org", "org"),
        ("http://www.bbc.co.uk/news?id=1", "www.bbc.co.uk", "bbc.co.uk", "co.uk"),
        ("example.com", "example.com", "example.com", "com"),
        ("https://localhost:8080/x", "localhost:8080", "localhost", "localhost"),
        ("http://127.0.0.1/a", "127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("https://a.blogspot.com/b", "a.blogspot.com", "blogspot.com", "com"),
        ("", "", "", ""),
    ],
)
def test_urls_are_reduced_as_published(url, domain, registered, suffix):
    assert [reduced(url, how) for how in ("domain", "registered_domain", "suffix")] == [domain, registered, suffix]
    assert reduced(url, None) == url
    assert reduced("https://en.wikipedia.org/wiki/Bill_Gates", "url") == "en.wikipedia.org/wiki/Bill_Gates"


def test_the_template_is_the_published_one():
    text = MetadataConfig().text(reduced("https://en.wikipedia.org/wiki/Bill_Gates", "domain"))
    assert text == "URL: en.wikipedia.org\n\n" and len(text) == 23


def test_every_document_has_its_line_before_it(tmp_path):
    store = store_of(tmp_path, ["https://a.org/1", "https://b.org/2", "https://a.org/3", None, "", " "])
    metadata = make_metadata(store, MetadataConfig(), store.documents("train"), LETTERS, 0, "metadata")
    every = np.arange(6)
    assert metadata.codes.dtype == np.uint8 and metadata.codes.tolist() == [1, 2, 1, 0, 0, 0]
    assert metadata.lengths(every).tolist() == [12, 12, 12, 0, 0, 0]
    read = metadata.read(every, np.zeros(6, int), metadata.lengths(every))
    assert LETTERS.decode(read) == "URL: a.org\n\nURL: b.org\n\nURL: a.org\n\n"
    assert LETTERS.decode(metadata.read(np.array([1, 0]), np.array([5, 2]), np.array([5, 3]))) == "b.orgL: "


def test_a_document_without_a_value_follows_the_stated_rule(tmp_path):
    store = store_of(tmp_path, ["https://a.org/1", None, "", "  "])
    assert values(store) == ["a.org", None, None, None]
    assert values(store, missing="unknown") == ["a.org", UNKNOWN, UNKNOWN, UNKNOWN]
    with pytest.raises(UserError, match=r"3 of 4 documents have no value in url \(the first is 'd1'\)"):
        values(store, missing="error")


def test_rare_values_and_those_not_allowed_are_unknown(tmp_path):
    store = store_of(tmp_path / "store", ["http://a.org/1", "http://a.org/2", "http://b.org/", "http://c.org/"])
    assert values(store, min_documents=2) == ["a.org", "a.org", UNKNOWN, UNKNOWN]
    (tmp_path / "kept.json").write_text(json.dumps(["c.org"]))
    allowed = str(tmp_path / "kept.json")
    assert values(store, allowed=allowed) == [UNKNOWN, UNKNOWN, UNKNOWN, "c.org"]
    hashed = values(store, allowed=allowed, hashed=True)
    assert hashed[:3] == [UNKNOWN] * 3 and hashed[3] not in ("c.org", UNKNOWN)
    (tmp_path / "kept.json").write_text("{}")
    with pytest.raises(UserError, match="give a JSON file with a list"):
        values(store, allowed=allowed)


def test_several_columns_are_joined(tmp_path):
    urls = ["http://a.org/1", None, "http://a.org/2", None]
    store = store_of(tmp_path, urls, topic=["art/music", "art/music", "", None])
    settings = dict(columns=("url", "topic"), separator="; ")
    assert values(store, **settings) == ["a.org; art/music", "art/music", "a.org", None]


def test_numbers_are_written_as_text(tmp_path):
    store = store_of(tmp_path, ["x", "y"])
    assert values(store, columns=("bytes",), reduce=None) == ["4", "4"]


def test_a_column_that_is_not_there_is_told_with_the_nearest(tmp_path):
    store = store_of(tmp_path, ["http://a.org"])
    with pytest.raises(UserError, match="no metadata column 'ulr'; did you mean url"):
        values(store, columns=("ulr",))
    with pytest.raises(UserError, match="no document has a value in url"):
        values(store_of(tmp_path / "empty", [None, ""]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1), min_size=1, max_size=30))
def test_hashed_values_keep_documents_apart_exactly_as_the_values_do(tmp_path_factory, hosts):
    store = store_of(tmp_path_factory.mktemp("store"), [f"https://{host}/" for host in hosts])
    turned = store_of(tmp_path_factory.mktemp("store"), [f"https://{host}/" for host in reversed(hosts)])
    if not any(host.strip() for host in hosts):
        return  # no document has a value
    plain, hashed = values(store), values(store, hashed=True)
    pairs = {(a, b) for a, b in zip(plain, hashed, strict=True) if a is not None}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
    assert values(turned, hashed=True) == hashed[::-1]


def test_a_share_of_the_documents_has_metadata_whatever_their_order(tmp_path):
    count = 4000
    store = store_of(tmp_path / "a", [f"http://h{i % 50}.org/" for i in range(count)])
    made = make_metadata(store, MetadataConfig(share=0.9), store.documents("train"), LETTERS, 5, "m")
    conditioned = made.codes > 0
    assert abs(conditioned.mean() - 0.9) < 4 * np.sqrt(0.09 / count)
    other = make_metadata(store, MetadataConfig(share=0.9), store.documents("train"), LETTERS, 6, "m")
    assert (conditioned != (other.codes > 0)).any()
    fewer = make_metadata(store, MetadataConfig(share=0.5), store.documents("train"), LETTERS, 5, "m")
    assert not (fewer.codes[~conditioned]).any()
    assert made.fingerprint != other.fingerprint


def unigram(folder):
    """A SentencePiece-like model that holds special tokens in its ordinary vocabulary."""
    pieces = [*SPECIALS, "<unk>", "▁", *(chr(c) for c in range(33, 127)), "\n", "▁<|eos|>"]
    model = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=3))
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    (folder / "tokenizer.json").write_text(model.to_str())
    return tokenizing.load(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_text_of_a_special_token_in_a_url_never_becomes_one(tmp_path, kind):
    urls = [f"http://{name}.org{name}/x" for name in SPECIALS] + ["<s>", "<|endoftext|>"]
    store = store_of(tmp_path, urls)
    made = {
        "bytes": lambda: LETTERS,
        "bpe": lambda: tokenizing.train_bpe(urls * 5, 300),
        "unigram": lambda: unigram(tmp_path),
    }[kind]()
    metadata = make_metadata(store, MetadataConfig(reduce=None), store.documents("train"), made, 0, "m")
    assert len(metadata.tokens) > 30
    assert not {made.bos_id, made.eos_id, made.pad_id} & set(metadata.tokens.tolist())
    if kind != "unigram":
        whole = metadata.read(np.array([0]), np.array([0]), metadata.lengths(np.array([0])))
        assert made.decode(whole) == MetadataConfig().text(urls[0])
