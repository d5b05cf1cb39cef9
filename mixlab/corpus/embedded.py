"""The default corpus: what this Python installation ships, and synthetic mathematics. It needs no download.

Domains: stdlib_code, package_code, docstrings, reference, math. Real text, the same for the same
installation, good for trying things out and for mechanics, not for claims about natural language. `freeze`
writes it to a file that can be carried to another machine.
"""

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mixlab.corpus import tokenizer as tokenizers
from mixlab.corpus import writer
from mixlab.corpus.cache import cache_folder
from mixlab.corpus.scan import Document, Scope, hash_of, identity, scan
from mixlab.corpus.store import TokenStore
from mixlab.errors import UserError

VERSION = 2  # of the scan and its rules: a new one makes a new cached corpus
VALIDATION_PER_MILLE = 50
MINIMUM_VALIDATION_DOCUMENTS = 4
TRAINING_BYTES = 12_000_000  # text that a BPE is trained on
COLUMNS = ["url", "domain", "group"]
BATCH_DOCUMENTS = 256


def store(tokenizer: str, scope: Scope | None = None) -> TokenStore:
    """The default corpus, by tokenizer: "bytes", "bpe:SIZE" (trained on its training split) or a
    tokenizer.json.

    Built at the first call, then kept in the cache folder (see cache.py); several processes may call at once.
    UserError: the tokenizer cannot be loaded, the cache folder cannot be written."""
    scope = scope or Scope()
    recipe = _recipe(tokenizer, scope)
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder() / "corpus" / f"embedded-{key}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if path.exists():
                try:
                    return TokenStore.open(path)
                except UserError as error:
                    print(f"{error} (building it again)", file=sys.stderr)
                    shutil.rmtree(path)
            return _build(tokenizer, scope, recipe, path)
    except OSError as error:
        raise UserError(
            f"cache folder {cache_folder()}: cannot be used ({error.strerror or error}); "
            f"set MIXLAB_CACHE to a folder that can be written"
        ) from None


def write_store(
    tokenizer: str, output: str | os.PathLike, scope: Scope | None = None, **specials: str | None
) -> tuple[TokenStore, bool]:
    """The default corpus as a store in the folder `output`; returns (store, whether it was there already).

    UserError: `output` holds something else or cannot be written."""
    scope, output = scope or Scope(), Path(output)
    recipe = _recipe(tokenizer, scope, **specials)
    if output.is_dir() and (output / "store.json").exists():
        found = TokenStore.open(output)
        if found.manifest["preparation"].get("recipe") != recipe:
            raise UserError(f"--output={output}: holds another store; nothing was changed. Choose another --output")
        return found, True
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: exists and is not a token store; choose another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return _build(tokenizer, scope, recipe, output, **specials), False
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror or error})") from None


def freeze(path: str | os.PathLike, scope: Scope | None = None) -> int:
    """Writes the documents with their split to a .jsonl.gz; returns their number. Same corpus, same bytes.

    The file makes the same corpus anywhere: tools/prepare_corpus.py --input=FILE --split-field=split
    --metadata-fields=url,domain,group. UserError: not named .jsonl.gz, exists already, cannot be written."""
    path = Path(path)
    if not path.name.endswith(".jsonl.gz"):
        raise UserError(f"--freeze={path}: name the file .jsonl.gz")
    if path.exists():
        raise UserError(f"--freeze={path}: exists already; choose another name")
    documents = _scan(scope or Scope())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
            for document, split in zip(documents, splits(documents), strict=True):
                record = document._asdict() | {"split": split}
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--freeze={path}: cannot be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(documents)


def splits(documents: Sequence[Document]) -> list[str]:
    """train or validation, for each document, by the hash of its group; a domain with fewer than 4 validation
    documents also gives its groups of the lowest hashes, up to half of its documents."""
    order = {group: (hash_of(f"split-v1:{group}"), group) for group in {d.group for d in documents}}
    held_out = set()
    for domain in {d.domain for d in documents}:
        sizes = Counter(d.group for d in documents if d.domain == domain)
        wanted = min(MINIMUM_VALIDATION_DOCUMENTS, sum(sizes.values()) // 2)
        chosen = 0
        for group in sorted(sizes, key=order.__getitem__):
            if order[group][0] % 1000 < VALIDATION_PER_MILLE:
                held_out.add(group)
                chosen += sizes[group]
        for group in sorted(sizes.keys() - held_out, key=order.__getitem__):
            if chosen < wanted:
                held_out.add(group)
                chosen += sizes[group]
    return ["validation" if d.group in held_out else "train" for d in documents]


def fingerprint(documents: Sequence[Document]) -> str:
    """sha256 (hex) over id and sha256 of the text of every document, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode() + b"\0" + hashlib.sha256(document.text.encode()).digest())
    return digest.hexdigest()


def _recipe(tokenizer: str, scope: Scope, **specials: str | None) -> dict:
    """All that the store depends on, known without scanning."""
    loaded = None if tokenizers.parse_bpe(tokenizer) else tokenizers.load(tokenizer, **specials)
    recipe = {"version": VERSION, "tokenizer": loaded.hash if loaded else tokenizer, "scope": asdict(scope)}
    return json.loads(json.dumps(recipe | identity(scope)))


def _scan(scope: Scope) -> list[Document]:
    documents = scan(scope)
    if not any(d.domain.endswith("_code") for d in documents):
        domains = ", ".join(sorted({d.domain for d in documents}))
        print(
            f"note: this Python installation has no .py sources; the default corpus is {domains} only",
            file=sys.stderr,
        )
    return documents


def _build(tokenizer: str, scope: Scope, recipe: dict, path: Path, **specials: str | None) -> TokenStore:
    """Builds the store beside `path` and moves it there when it is complete."""
    print(
        f"building the default corpus from this Python installation (once for {tokenizer}; some 20 seconds)",
        file=sys.stderr,
    )
    documents = _scan(scope)
    document_splits = splits(documents)
    bpe_size = tokenizers.parse_bpe(tokenizer)
    if bpe_size:
        made = tokenizers.train_bpe(_training_texts(documents, document_splits), bpe_size)
    else:
        made = tokenizers.load(tokenizer, **specials)
    tokens = []
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        tokens += made.encode_batch([d.text for d in documents[start : start + BATCH_DOCUMENTS]])
    rows = [
        {"id": d.id, "split": split, "bytes": len(d.text.encode())} | {c: getattr(d, c) for c in COLUMNS}
        for d, split in zip(documents, document_splits, strict=True)
    ]
    preparation = {"corpus": "embedded", "fingerprint": fingerprint(documents), "recipe": recipe}
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        shard = writer.write_shard(temporary, 0, tokens, rows, COLUMNS, made.vocab_size)
        writer.finalise(temporary, made, [shard], preparation)
        temporary.chmod(0o755)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore.open(path)


def _training_texts(documents: Sequence[Document], document_splits: Sequence[str]) -> Iterator[str]:
    """Training documents in the order of their hash, up to 12 MB."""
    train = [d for d, split in zip(documents, document_splits, strict=True) if split == "train"]
    left = TRAINING_BYTES
    for document in sorted(train, key=lambda d: hash_of(f"bpe:{d.id}")):
        if left <= 0:
            break
        left -= len(document.text)
        yield document.text


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system frees it when a process ends in whatever way."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
