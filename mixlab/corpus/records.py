"""Raw records to documents: which field is text, id, split, metadata; and which records cannot be used."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mixlab.corpus import readers
from mixlab.corpus.readers import Block
from mixlab.errors import UserError

FIRST_SHARD_BYTES = 4_000_000
SHARDS_PER_SIZE = 16
SPLIT_NAMES = {"train": "train"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


@dataclass(frozen=True)
class Settings:
    """How records become documents. Fields are dotted paths; `metadata_fields` are pairs (column, path).

    A document without an id gets FILE:LINE. Without `split_field` the split is a rule on the sha256 of the
    id: validation for `validation_per_mille` of 1000.

    drop_repetitions leaves out documents in which 1 to 13 tokens come 32 times or more in a row (OLMo 2, section 3.1);
    a BPE made of the same input is trained before anything is left out."""

    text_field: str = "text"
    id_field: str = "id"
    metadata_fields: tuple[tuple[str, str], ...] = ()
    split_field: str | None = None
    validation_per_mille: int = 20
    shard_megabytes: float = 64
    drop_repetitions: bool = False

    @property
    def columns(self) -> list[str]:
        return [column for column, _ in self.metadata_fields]

    @property
    def paths(self) -> list[str]:
        paths = [self.text_field, self.id_field, *(path for _, path in self.metadata_fields)]
        return paths + ([self.split_field] if self.split_field else [])

    def shard_bytes(self, index: int) -> int:
        """Raw bytes of a shard: small at first, so that a small corpus too keeps many workers busy."""
        growing = FIRST_SHARD_BYTES << min(index // SHARDS_PER_SIZE, 40)
        return max(1, min(int(self.shard_megabytes * 1e6), growing))


def metadata_fields(text: str) -> tuple[tuple[str, str], ...]:
    """ "url,meta.source,host=meta.host" as pairs (column, path); unnamed, a column is its path's last part.

    UserError: an empty entry, a column twice, or one that every store has (id, split, bytes)."""
    pairs = []
    for entry in text.split(",") if text else []:
        column, equals, path = entry.strip().rpartition("=")
        column = column if equals else path.rpartition(".")[2]
        if not column or not path:
            raise UserError(f"--metadata-fields: {entry!r} is not FIELD or COLUMN=FIELD, as in url,source=meta.source")
        taken = ("id", "split", "bytes", *(c for c, _ in pairs))
        if column in taken:
            free = path.replace(".", "_")
            other = f"{free}={path}" if free not in taken else f"{free}_2={path}"
            raise UserError(f"--metadata-fields: column {column!r} exists already; name another, as in {other}")
        pairs.append((column, path))
    return tuple(pairs)


def parse(
    blocks: Sequence[Block], settings: Settings, skipped: dict[str, dict], counts: Counter
) -> Iterator[tuple[str, dict]]:
    """(text, metadata row) of each usable record; `skipped` counts the others, reason -> {count, first}."""
    for block in blocks:
        for number, raw in enumerate(block.records, block.first):
            if block.kind == "json" and not raw.strip():
                continue
            where = block.name if block.kind == "text" else f"{block.name}:{number}"
            try:
                record = raw.decode("utf-8-sig")
                record = json.loads(record) if block.kind == "json" else {settings.text_field: record}
            except UnicodeDecodeError:
                note_skip(skipped, "not UTF-8", where)
                continue
            except (ValueError, RecursionError):
                note_skip(skipped, "not JSON", where)
                continue
            text = readers.lookup(record, settings.text_field)
            if text is None:
                fields = f" (fields: {', '.join(record)})" if isinstance(record, dict) else ""
                note_skip(skipped, f"without field {settings.text_field!r}", where + fields)
                continue
            if not isinstance(text, str):
                note_skip(skipped, f"whose {settings.text_field!r} is no string", where)
                continue
            if not text.strip():
                note_skip(skipped, "empty", where)
                continue
            try:
                size = len(text.encode())
            except UnicodeEncodeError:  # half of a surrogate pair
                note_skip(skipped, "not Unicode", where)
                continue
            document = _string(readers.lookup(record, settings.id_field))
            if not document:
                document = where
                counts["ids made"] += block.kind == "json"
            if settings.split_field is None:
                split = hash_split(document, settings.validation_per_mille)
            else:
                value = _string(readers.lookup(record, settings.split_field))
                split = SPLIT_NAMES.get(value)
                if split is None:
                    note_skip(skipped, f"split {value!r} is neither train nor validation", where)
                    continue
            row = {"id": document, "split": split, "bytes": size}
            row |= {column: _string(readers.lookup(record, path)) for column, path in settings.metadata_fields}
            yield text, row


def hash_split(document: str, validation_per_mille: int) -> str:
    """The split of a document by its id alone, so that it never moves."""
    bucket = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) % 1000
    return "validation" if bucket < validation_per_mille else "train"


def _string(value: object) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def note_skip(skipped: dict[str, dict], reason: str, where: str, count: int = 1) -> None:
    skipped.setdefault(reason, {"count": 0, "first": where})["count"] += count
