"""Tokenizers: round trips, special tokens that text cannot forge, determinism, exact byte lengths."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mixlab.corpus import tokenizer as T
from mixlab.errors import UserError

ROOT = str(Path(__file__).parents[2])
TEXTS = [f"The number {i} follows {i - 1}; été, 漢字 and\n\tcode_{i % 7} = {i}." for i in range(300)]
BPE = T.train_bpe(TEXTS, 400)
BYTES = T.load("bytes")
any_text = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["<|eos|>", "<|bos|>", "<|pad|>", "a", " ", "\n", "<|", "|>", "é", "12345"])
).map("".join)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES], ids=lambda t: t.name)
@given(text=any_text)
def test_text_survives_and_never_becomes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_bytes_are_the_bytes():
    assert BYTES.encode("hé").tolist() == [104, 195, 169]
    assert (BYTES.vocab_size, BYTES.bos_id, BYTES.eos_id, BYTES.pad_id) == (259, 256, 257, 258)
    assert BYTES.decode([256, 104, 257]) == "<|bos|>h<|eos|>"
    assert BYTES.decode([195]) == "\ufffd"
    assert BYTES.byte_lengths().tolist() == [1] * 256 + [0] * 3


def test_bytes_saved_as_tokenizer_json_reads_the_same_elsewhere(tmp_path):
    BYTES.save(tmp_path / "tokenizer.json")
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "".join(map(chr, range(1, 600)))
    assert model.encode(text).ids == BYTES.encode(text).tolist()


def test_encode_batch_is_encode():
    for tokenizer in (BPE, BYTES):
        for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_specials_are_shown_when_decoded():
    assert BPE.decode([BPE.bos_id, *BPE.encode("a b"), BPE.eos_id]) == "<|bos|>a b<|eos|>"


def test_training_is_deterministic_across_processes_and_orders():
    code = (
        "import hashlib; from mixlab.corpus.tokenizer import train_bpe;"
        f"print(hashlib.sha256(train_bpe({TEXTS[::-1]!r}, 400).definition.encode()).hexdigest())"
    )
    hashes = set()
    for threads in ("1", "3"):
        environment = {**os.environ, "PYTHONPATH": ROOT, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", code]
        hashes.add(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
    assert hashes == {hashlib.sha256(BPE.definition.encode()).hexdigest() + "\n"}


def test_training_uses_the_vocabulary_it_may():
    assert BPE.vocab_size == 400
    assert T.train_bpe(["a"], 400).vocab_size == T.MINIMUM_BPE_VOCABULARY
    assert len(BPE.encode(TEXTS[0])) < len(BYTES.encode(TEXTS[0])) / 2


def test_save_load_and_pickle_keep_everything(tmp_path):
    BPE.save(tmp_path / "mine.json")
    loaded = T.load(tmp_path / "mine.json")
    assert (loaded.name, loaded.hash) == ("mine", BPE.hash)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (0, 1, 2, 400)
    BPE.encode("warm the cached model")
    copy = pickle.loads(pickle.dumps(BPE))
    assert copy == BPE
    np.testing.assert_array_equal(copy.encode(TEXTS[3]), BPE.encode(TEXTS[3]))


def sentencepiece(kind="bpe"):
    """A small model of the Llama 2 kind: metaspace, byte fallback, <s> and </s> in the ordinary
    vocabulary."""
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, "▁", *"abcdehilmnorstuw</>", "▁a", "th", "▁th"]
    if kind == "bpe":
        model = models.BPE(
            {t: i for i, t in enumerate(tokens)},
            [("▁", "a"), ("t", "h"), ("▁", "th")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    else:
        model = models.Unigram([(t, 0.0 if t[0] == "<" else -1.0) for t in tokens], unk_id=0, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made.to_str()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["the storm", "a </s> b", "<s></s></s>", "é 漢 the"])
def test_byte_fallback_models(kind, text):
    tokenizer = T.from_definition("sp", sentencepiece(kind))
    ids = tokenizer.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert not set(ids.tolist()) & {0, 1, 2}
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_word_piece_has_no_byte_lengths():
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[EOS]": 1, "a": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="bytes per token"):
        T.from_definition("wp", made.to_str()).byte_lengths()


def renamed(path, **tokens):
    definition = BPE.definition
    for old, new in tokens.items():
        definition = definition.replace(f"<|{old}|>", new)
    path.write_text(definition)
    return path


def test_special_tokens_by_name_even_when_not_marked_special(tmp_path):
    parsed = json.loads(renamed(tmp_path / "t.json", bos="<start>", eos="<stop>", pad="<|endoftext|>").read_text())
    for token in parsed["added_tokens"]:
        token["special"] = False
    (tmp_path / "t.json").write_text(json.dumps(parsed))
    tokenizer = T.load(tmp_path / "t.json", bos="<start>", eos="<stop>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert not set(tokenizer.encode("a <stop> b<start>").tolist()) & {0, 1}
    assert T.load(tmp_path / "t.json").eos_id == 2  # <|endoftext|> is a usual name
    assert tokenizer.hash != T.load(tmp_path / "t.json").hash


def test_no_end_of_document_token_says_what_to_pass(tmp_path):
    path = renamed(tmp_path / "t.json", eos="<stop>")
    with pytest.raises(UserError, match=r"t\.json: no end-of-document token.*--eos=TOKEN.*<stop>"):
        T.load(path)
    with pytest.raises(UserError, match=r"eos='<halt>' is not in its vocabulary.*<stop>"):
        T.load(path, eos="<halt>")


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json"):
        T.load(tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        T.load(tmp_path)
    (tmp_path / "broken.json").write_text('{"model": 3')
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer\.json"):
        T.load(tmp_path / "broken.json")


def test_bpe_specs():
    assert T.parse_bpe("bpe:8192") == 8192
    assert T.parse_bpe("bytes") is None
    for wrong in ("bpe:", "bpe:x", "bpe:100", "bpe:-5"):
        with pytest.raises(UserError, match="bpe:8192"):
            T.parse_bpe(wrong)
    with pytest.raises(UserError, match="at least 259"):
        T.train_bpe(TEXTS, 258)
