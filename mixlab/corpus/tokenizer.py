"""Text to token ids: raw bytes, a BPE trained on given texts, or any Hugging Face tokenizer.json.

Tokens are text only. BOS, EOS and PAD exist as ids that the sequence formats place; encoding never produces
them, not even from text that spells them out, so that no document can forge a document boundary.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mixlab.errors import UserError

BOS_NAMES = (
    "<|bos|>",
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "[BOS]",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",
)
EOS_NAMES = ("<|eos|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")
PAD_NAMES = ("<|pad|>", "<|padding|>", "<pad>", "[PAD]", "<｜▁pad▁｜>")
SPECIALS = (BOS_NAMES[0], EOS_NAMES[0], PAD_NAMES[0])  # of the tokenizers made here
MINIMUM_BPE_VOCABULARY = 256 + len(SPECIALS)

# Words, numbers in groups of up to three digits, punctuation, white space: the splitting of GPT-4 and OLMo 2.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Tokenizer:
    """Immutable and picklable. `vocab_size` is the highest id + 1; `bos_id`, `eos_id` and `pad_id` may be
    None; `definition` is the text of a Hugging Face tokenizer.json; `hash` identifies the definition and the
    three ids."""

    name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    definition: str = field(repr=False)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the definition and of the special ids."""
        ids = json.dumps([self.bos_id, self.eos_id, self.pad_id])
        return hashlib.sha256(f"{ids}\n{self.definition}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, int32 [tokens]."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [tokens]; several threads, unless TOKENIZERS_PARALLELISM=false."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(encoding.ids, np.int32) for encoding in encodings]
        return [self._split_specials(t) if self._is_special_V[r].any() else r for t, r in zip(texts, rows, strict=True)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens shown by name, bytes that are not UTF-8 shown as U+FFFD."""
        ids = [int(i) for i in ids]
        if not self._is_bytes:
            return self._model.decode(ids, skip_special_tokens=False)
        names = dict(zip((self.bos_id, self.eos_id, self.pad_id), SPECIALS, strict=True))
        return b"".join(names[i].encode() if i in names else bytes([i]) for i in ids).decode(errors="replace")

    def token(self, token_id: int) -> str | None:
        """How the vocabulary spells one token (a byte-level alphabet for BPE), None for an unused id."""
        return self._model.id_to_token(int(token_id))

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for, int32 [vocab_size]; 0 for specials and unused ids.

        Exact for byte-level BPE and for SentencePiece models with byte fallback, of the text after the
        tokenizer's own normalisation. UserError for other kinds (WordPiece), whose tokens do not determine
        the bytes."""
        kinds = set(_types(json.loads(self.definition)))
        if "ByteLevel" not in kinds and not kinds & {"Metaspace", "ByteFallback"}:
            raise UserError(
                f"tokenizer {self.name}: bytes per token are known for byte-level BPE and SentencePiece "
                f"models only (not {', '.join(sorted(kinds)) or 'words'}); take another tokenizer"
            )
        added = self._model.get_added_tokens_decoder()
        lengths_V = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._model.get_vocab(with_added_tokens=True).items():
            if self._is_special_V[token_id]:
                continue
            if token_id in added:
                lengths_V[token_id] = len(token.encode())
            elif "ByteLevel" in kinds:
                lengths_V[token_id] = len(token)  # every character of the byte-level alphabet is one byte
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths_V[token_id] = 1
            else:
                lengths_V[token_id] = len(token.replace("▁", " ").encode())
        return lengths_V

    def save(self, path: str | os.PathLike) -> None:
        """Writes the definition: a tokenizer.json that the Hugging Face libraries read as well."""
        Path(path).write_text(self.definition, encoding="utf-8")

    @cached_property
    def _is_bytes(self) -> bool:
        return self.definition == _bytes_definition()

    @cached_property
    def _model(self) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self.definition)
        model.no_padding()
        model.no_truncation()
        model.encode_special_tokens = True  # text that spells a special token is encoded as text
        return model

    @cached_property
    def _special_names(self) -> dict[int, str]:
        names = {i: token.content for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        own = (self.bos_id, self.eos_id, self.pad_id)
        return names | {i: self._model.id_to_token(i) for i in own if i is not None}

    @cached_property
    def _is_special_V(self) -> np.ndarray:
        is_special_V = np.zeros(self.vocab_size, bool)
        is_special_V[list(self._special_names)] = True
        return is_special_V

    def _split_specials(self, text: str) -> np.ndarray:
        """For models that hold a special token in their ordinary vocabulary as well (Unigram): its spelling
        is encoded in two parts."""
        parts = [text]
        for name in self._special_names.values():
            pieces = [part.split(name) for part in parts]
            parts = [
                (name[1:] if i else "") + piece + (name[:1] if i + 1 < len(split) else "")
                for split in pieces
                for i, piece in enumerate(split)
            ]
        encodings = self._model.encode_batch_fast([part for part in parts if part], add_special_tokens=False)
        ids = np.array([i for encoding in encodings for i in encoding.ids], np.int32)
        if self._is_special_V[ids].any():
            name = self._special_names[int(ids[self._is_special_V[ids]][0])]
            raise UserError(f"tokenizer {self.name}: text becomes the special token {name}; take another tokenizer")
        return ids

    def __getstate__(self) -> dict:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}


def load(
    spec: str | os.PathLike, *, bos: str | None = None, eos: str | None = None, pad: str | None = None
) -> Tokenizer:
    """The tokenizer named by `spec`: "bytes", or the path of a tokenizer.json.

    BOS, EOS and PAD are the tokens named here, or else those with a usual name; EOS must exist.
    UserError: no such file, not a tokenizer, no EOS, a named token not in the vocabulary."""
    if str(spec) == "bytes":
        return from_definition("bytes", _bytes_definition(), bos=bos, eos=eos, pad=pad)
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        definition = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer {spec}: cannot be read ({error}); give `bytes` or the path of a tokenizer.json file"
        ) from None
    name = path.parent.name if path.stem == "tokenizer" else path.stem
    return from_definition(name or "tokenizer", definition, bos=bos, eos=eos, pad=pad, source=str(spec))


def from_definition(
    name: str,
    definition: str,
    *,
    bos: str | None = None,
    eos: str | None = None,
    pad: str | None = None,
    source: str | None = None,
) -> Tokenizer:
    """As `load`, from the text of a tokenizer.json."""
    source = source or name
    try:
        model = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"tokenizer {source}: not a tokenizer.json of the Hugging Face `tokenizers` library ({error})"
        ) from None
    vocabulary = model.get_vocab(with_added_tokens=True)

    def find(role: str, given: str | None, usual: tuple[str, ...]) -> int | None:
        if given is not None and given not in vocabulary:
            raise UserError(f"tokenizer {source}: {role}={given!r} is not in its vocabulary{_candidates(model)}")
        return next((vocabulary[n] for n in ((given,) if given else usual) if n in vocabulary), None)

    ids = find("bos", bos, BOS_NAMES), find("eos", eos, EOS_NAMES), find("pad", pad, PAD_NAMES)
    if ids[1] is None:
        raise UserError(
            f"tokenizer {source}: no end-of-document token found (looked for {' '.join(EOS_NAMES)}); "
            "give the one that is meant such a name in that file, or, where a corpus is prepared, name it with --eos=TOKEN"
            f"{_candidates(model)}"
        )
    return Tokenizer(name, max(vocabulary.values()) + 1, *ids, _mark_special(definition, set(ids) - {None}))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens (fewer when the texts are too few to merge that often).

    Deterministic: the same texts give the same definition, whatever their order or the number of threads.
    Ids 0, 1, 2 are BOS, EOS and PAD."""
    if vocab_size < MINIMUM_BPE_VOCABULARY:
        raise UserError(
            f"tokenizer bpe:{vocab_size}: a byte-level BPE needs at least {MINIMUM_BPE_VOCABULARY} tokens "
            f"(256 bytes and {len(SPECIALS)} special tokens)"
        )
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return from_definition(f"bpe:{vocab_size}", model.to_str())


def parse_bpe(spec: str) -> int | None:
    """The vocabulary size of "bpe:SIZE"; None when `spec` is not of that form; UserError when SIZE is no
    number."""
    if not spec.startswith("bpe:"):
        return None
    if not spec[4:].isdigit() or int(spec[4:]) < MINIMUM_BPE_VOCABULARY:
        raise UserError(f"tokenizer {spec}: write bpe:SIZE with SIZE at least {MINIMUM_BPE_VOCABULARY}, as in bpe:8192")
    return int(spec[4:])


def _bytes_definition() -> str:
    """Raw bytes as a tokenizer.json: token i < 256 is the byte i. Written by hand so that it never
    changes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    characters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}  # GPT-2's alphabet
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {characters[b]: b for b in range(256)} | {name: 256 + i for i, name in enumerate(SPECIALS)},
        "merges": [],
    }
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256 + i, "content": name, **flags} for i, name in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": bpe,
    }
    return json.dumps(definition, ensure_ascii=False)


def _mark_special(definition: str, ids: set[int]) -> str:
    """`definition` with the added tokens of these ids marked special, so that text never becomes one of
    them."""
    parsed = json.loads(definition)
    plain = [t for t in parsed.get("added_tokens") or () if t["id"] in ids and not t["special"]]
    if not plain:
        return definition
    for token in plain:
        token["special"] = True
    return json.dumps(parsed, ensure_ascii=False)


def _candidates(model: tokenizers.Tokenizer) -> str:
    names = [token.content for _, token in sorted(model.get_added_tokens_decoder().items())][:12]
    return f". Its added tokens: {' '.join(names)}" if names else ". It has no added tokens"


def _types(node: object) -> Iterable[str]:
    """The `type` of every pre-tokenizer and decoder of a parsed tokenizer.json."""
    if isinstance(node, dict) and "model" in node:
        yield from _types([node.get("pre_tokenizer"), node.get("decoder"), node.get("normalizer")])
        if node["model"].get("byte_fallback"):
            yield "ByteFallback"
    elif isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node["type"]
        yield from _types([value for key, value in node.items() if key != "type"])
    elif isinstance(node, list):
        for child in node:
            yield from _types(child)
